"""The door of the package: what importing it costs, and which names it has."""

import subprocess
import sys
from pathlib import Path

import pytest

import pnmf_pyro

CHECKOUT = Path(pnmf_pyro.__file__).parents[1]
HEAVY = ("torch", "pyro", "scipy", "sklearn", "matplotlib", "pandas", "anndata", "joblib")


def python(code: str, *options: str) -> str:
    """What a fresh process prints that finds the package in this folder alone."""
    path = f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); {code}"
    done = subprocess.run(
        [sys.executable, *options, "-c", path], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    found = f"import pnmf_pyro; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    assert python(found) == ""


def test_what_is_seldom_used_is_not_imported_with_the_estimator():
    code = "from pnmf_pyro import PNMF, fit; print(*sys.modules)"
    found = python(code).split()
    assert "pnmf_pyro.estimator.pnmf" in found
    assert "sklearn.cluster" not in found
    assert not [name for name in found if name.startswith("pnmf_pyro.analysis")]


def test_the_version_needs_no_installation():
    """-S leaves out the folder of installed packages, and with it all metadata."""
    assert python("import pnmf_pyro; print(pnmf_pyro.__version__)", "-S") == pnmf_pyro.__version__


@pytest.mark.parametrize("name", pnmf_pyro.__all__)
def test_every_name_is_there(name):
    assert name in dir(pnmf_pyro)
    assert getattr(pnmf_pyro, name) is not None


def test_rooms_are_attributes():
    for room in ("models", "priors", "initialization", "custom_modules", "estimator", "training"):
        assert getattr(pnmf_pyro, room).__name__ == f"pnmf_pyro.{room}"
    assert pnmf_pyro.interpretation.__name__ == "pnmf_pyro.analysis.interpretation"
    with pytest.raises(AttributeError, match="no attribute 'colour'"):
        _ = pnmf_pyro.colour
