"""The layout: a file imports only from files above its own in this list."""

import ast
from pathlib import Path

import pytest

import pnmf_pyro

PACKAGE = Path(pnmf_pyro.__file__).parent
ORDER = (
    "validation",
    "random_state",
    "counts",
    "data",
    "places",
    "kernels",
    "cholesky",
    "ordering",
    "neighbors",
    "vecchia_factor",
    "vecchia_posterior",
    "remembered",
    "distributions.log_rate",
    "distributions.poisson_factors",
    "distributions.vecchia",
    "distributions.fields",
    "distributions.sites",
    "neighborhoods",
    "distributions.local_fields",
    "distributions",
    "custom_modules",
    "optimizers",
    "persistence",
    "initialization",
    "inducing",
    "space",
    "priors.base",
    "priors.gaussian",
    "priors.families",
    "priors.svgp",
    "priors.lcgp",
    "priors",
    "elbo",
    "models",
    "hyperparameters",
    "training",
    "conditional",
    "streaming",
    "transforms",
    "parameters",
    "parts",
    "estimator",
    "results",
    "anndata_bridge",
    "recipe",
    "own_models",
    "frames",
    "statistics",
    "replicates",
    "posterior_checks",
    "matching",
    "selection",
    "interpretation",
    "plotting.figures",
    "plotting.tissue",
    "plotting.maps",
    "plotting.features",
    "plotting.diagnostics",
    "plotting.checks",
    "plotting",
    "arviz_bridge",
    "files",
    "pages",
    "report",
    "commands.options",
    "commands.fit",
    "commands.check",
    "commands.select",
    "commands.plot",
    "commands.demo",
    "commands",
    "cli",
    "",
)
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported_modules(path: Path) -> set[str]:
    """Modules of the package that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            known = [name for name in inside if name.removeprefix("pnmf_pyro.") in ORDER]
            found |= set(known) or {node.module}
    prefix = "pnmf_pyro"
    ours = {name for name in found if name == prefix or name.startswith(prefix + ".")}
    return {name.removeprefix(prefix).removeprefix(".") for name in ours}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_upwards(path):
    name = module_name(path)
    assert name in ORDER, f"{name} has no place in the layout yet"
    below = {other for other in imported_modules(path) if ORDER.index(other) >= ORDER.index(name)}
    assert not below, f"{name} imports from below: {below}"


def test_the_check_sees_imports():
    assert {"training", "models", "parts"} <= imported_modules(PACKAGE / "estimator.py")


def test_versions_agree():
    setup = (PACKAGE.parent / "setup.cfg").read_text()
    assert f"version = {pnmf_pyro.__version__}" in setup
