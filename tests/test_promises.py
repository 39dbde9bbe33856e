"""Each promise of docs/promises.md names tests that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/promises.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/\S+?)`", PAGE)))


@pytest.mark.parametrize("test", NAMED)
def test_the_test_of_a_promise_exists(test):
    path, _, name = test.partition("::")
    source = (ROOT / path).read_text()
    assert "def test_" in source
    assert not name or f"def {name}(" in source


def test_every_promise_names_a_test():
    promises = re.split(r"\n- ", PAGE)[1:]
    assert len(promises) > 20
    assert all("`tests/" in promise for promise in promises)
