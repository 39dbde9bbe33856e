"""Every example that the reference prints runs with the import renamed."""

import doctest
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.support.parity import load

PAGE = Path(__file__).parents[1] / "docs" / "reference_examples.md"
EXAMPLES = [row for row in load() if row["kind"] == "example"]


def sources(text: str) -> list[str]:
    """The statements of examples, without the comments and the results between them."""
    return [example.source for example in doctest.DocTestParser().get_examples(text)]


@pytest.mark.parametrize("row", EXAMPLES, ids=lambda row: row["reference"])
def test_every_printed_example_is_on_the_page(row):
    printed = sources(row["value"].replace("from PNMF", "from pnmf_pyro"))
    page = sources(PAGE.read_text())
    starts = range(len(page) - len(printed) + 1)
    assert printed
    assert any(page[start : start + len(printed)] == printed for start in starts)


@pytest.mark.slow
def test_the_page_runs():
    before = np.random.get_state()  # noqa: NPY002 - the examples draw from it, as printed
    np.random.seed(0)  # noqa: NPY002
    try:
        with warnings.catch_warnings():
            result = doctest.testfile(str(PAGE), module_relative=False)
    finally:
        np.random.set_state(before)  # noqa: NPY002
    assert result.failed == 0
    assert result.attempted >= sum(len(sources(row["value"])) for row in EXAMPLES)
