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


# The one large table of the page, by the number of its features: as printed where there is time.
SIZES = [pytest.param("20", id="small"), pytest.param("500", id="printed", marks=pytest.mark.slow)]


@pytest.mark.parametrize("features", SIZES)
def test_the_page_runs(features, tmp_path):
    page = tmp_path / PAGE.name
    assert PAGE.read_text().count("500)") == 2  # of the table and of its loadings
    page.write_text(PAGE.read_text().replace("500)", f"{features})"))
    before = np.random.get_state()  # noqa: NPY002 - the examples draw from it, as printed
    np.random.seed(0)  # noqa: NPY002
    try:
        with warnings.catch_warnings():
            result = doctest.testfile(str(page), module_relative=False)
    finally:
        np.random.set_state(before)  # noqa: NPY002
    assert result.failed == 0
    assert result.attempted >= sum(len(sources(row["value"])) for row in EXAMPLES)
