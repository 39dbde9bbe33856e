"""The package has every name of the reference, as the table says, and the table is complete."""

import ast
import importlib
import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from pnmf_pyro import PNMF
from pnmf_pyro.estimator.parameters import check_parameters
from pnmf_pyro.initialization import initialize_factors
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors import GaussianPrior
from tests.support import parity

ROOT = Path(__file__).parents[1]
ROWS = parity.load()
CALLABLE = ("class", "constructor", "method", "function")
CALLS = [row for row in ROWS if row["kind"] in CALLABLE and row["value"] != "(undefined)"]
MODES = [row for row in ROWS if row["kind"] == "mode"]
MEMBERS = [row for row in ROWS if row["kind"] in ("attribute", "property")]


def name_of(row) -> str:
    return row["reference"]


def resolve(path: str):
    """The object at a dotted path."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return found
    raise AssertionError(path)


def children(row) -> list:
    """Rows of the parameters of a callable."""
    prefix = row["reference"] + "("
    return [r for r in ROWS if r["kind"] == "parameter" and r["reference"].startswith(prefix)]


# --- the table


def test_no_cell_is_empty():
    for row in ROWS:
        for column in parity.COLUMNS:
            assert row[column], f"{row['reference']}: {column}"
        assert row["status"] in ("same", "extended", "different")
        assert row["status"] == "same" or len(row["why"]) > 3, f"{row['reference']}: why?"
    names = [row["reference"] for row in ROWS]
    assert len(names) == len(set(names))


def test_tests_that_are_named_exist():
    functions: dict[str, set[str]] = {}
    for file in (ROOT / "tests").rglob("test_*.py"):
        body = ast.parse(file.read_text()).body
        found = {node.name for node in body if isinstance(node, ast.FunctionDef)}
        functions[file.relative_to(ROOT).as_posix()] = found
    for row in ROWS:
        for test in row["tests"]:
            file, _, function = test.partition("::")
            assert function in functions.get(file, ()), f"{row['reference']}: no {test}"


def test_the_page_shows_the_table():
    message = "docs/api_parity.md is not what the table says; run python -m tests.support.parity"
    assert parity.PAGE.read_text() == parity.render(ROWS), message


@pytest.mark.parametrize("row", CALLS, ids=name_of)
def test_every_parameter_has_its_row(row):
    if row["kind"] == "constructor":  # the class has them
        row = next(r for r in ROWS if r["reference"] == row["reference"].removesuffix(".__init__"))
    listed = {r["reference"].split("(")[1][:-1]: r["value"] for r in children(row)}
    expected = parity.parameters(row["value"])
    assert list(listed.items()) == list(expected.items())


# --- the package


@pytest.mark.parametrize("row", CALLS, ids=name_of)
def test_signatures_are_those_of_the_reference(row):
    """Names, order and defaults; what we add stands in the table and is optional."""
    found = {}
    for parameter in inspect.signature(resolve(row["ours"])).parameters.values():
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        default = "required" if parameter.default is parameter.empty else repr(parameter.default)
        found[stars + parameter.name] = ("any" if stars else default, parameter.kind)
    if row["kind"] in ("method", "constructor"):
        del found["self"]
    added = {name: found.pop(name) for name in row.get("added", ())}
    same = {name: default for name, (default, _) in found.items()}
    expected = parity.parameters(row["value"])
    assert {n: _number(d) for n, d in same.items()} == {n: _number(d) for n, d in expected.items()}
    assert list(same) == list(expected)
    for name, (default, kind) in added.items():
        assert default != "required", name
        if name not in ("y", "recurse"):  # scikit-learn's and torch's own
            assert kind == inspect.Parameter.KEYWORD_ONLY, name


def _number(default: str):
    """A default as a value where it is one, so that 1e-4 is 0.0001."""
    try:
        return ast.literal_eval(default)
    except ValueError:
        return default


def test_the_comparison_sees_a_difference():
    printed = "(X, y=None, E=3, **kwargs)"
    expected = {"X": "required", "y": "None", "E": "3", "**kwargs": "any"}
    assert parity.parameters(printed) == expected
    row = next(r for r in CALLS if r["reference"] == "PNMF.PNMF.inverse_transform")
    with pytest.raises(AssertionError):
        test_signatures_are_those_of_the_reference({**row, "value": "(transformed, scale=1)"})
    with pytest.raises(AssertionError):
        test_signatures_are_those_of_the_reference({**row, "value": "(factors)"})


@pytest.mark.parametrize("row", MODES, ids=name_of)
def test_modes_are_accepted(row):
    call, _, rest = row["reference"].partition("(")
    parameter = rest.partition("=")[0]
    given = {parameter: ast.literal_eval(row["value"])}
    y = torch.ones(6, 8)
    if call == "PNMF.PNMF":
        check_parameters(PNMF(**given))
    elif call == "PNMF.initialization.initialize_factors":
        initialize_factors(np.ones((6, 5)) + np.eye(6, 5), 2, random_state=0, **given)
    elif call == "PNMF.models.PoissonFactorization":
        PoissonFactorization(GaussianPrior(y, 2), y, 2, **given)
    elif call == "PNMF.transforms.transform_F":
        factors = resolve(row["ours"])(np.eye(6) + 1, np.ones((6, 2)), tol=1.0, **given)
        assert np.isfinite(factors).all()
    else:
        assert getattr(resolve(row["ours"])((2, 3), **given), parameter) == given[parameter]


@pytest.mark.parametrize("row", MEMBERS, ids=name_of)
def test_attributes_are_there(row, fitted):
    owner, _, name = row["reference"].rpartition(".")
    if row["kind"] == "property":
        assert isinstance(inspect.getattr_static(resolve(row["ours"]), name), property)
        return
    y = torch.ones(6, 8)
    prior = GaussianPrior(y, 2)
    made = {
        "PNMF.PNMF": lambda: fitted,
        "PNMF.models.PoissonFactorization": lambda: PoissonFactorization(prior, y, 2),
        "PNMF.priors.GaussianPrior": lambda: prior,
    }[owner]()
    assert isinstance(made, resolve(row["ours"]))
    assert hasattr(made, name)
