"""The layout: a room imports only from rooms above it, and no room has a cycle inside."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pnmf_pyro

PACKAGE = Path(pnmf_pyro.__file__).parent
ROOMS = (
    *("data", "gp", "custom_modules", "initialization", "priors", "models", "training"),
    *("transforms", "estimator", "analysis", "plotting", "command_line", "__main__", "__init__"),
)
FILES = {p.relative_to(PACKAGE).with_suffix("").as_posix(): p for p in PACKAGE.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """Files of the package that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    names = {f.removeprefix("pnmf_pyro.").replace(".", "/") for f in found if "pnmf_pyro" in f}
    return {name for n in names for name in (n, f"{n}/__init__") if name in FILES}


def test_rooms_import_from_rooms_above_them_only():
    for name, path in FILES.items():
        room = ROOMS.index(name.split("/")[0])
        assert all(ROOMS.index(other.split("/")[0]) <= room for other in imports(path)), name


def test_no_room_has_a_cycle():
    assert len(list(TopologicalSorter({n: imports(p) for n, p in FILES.items()}).static_order()))
