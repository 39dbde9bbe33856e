"""Pages of text, tables and pictures, as HTML and as lines for a terminal."""

from functools import partial
from html.parser import HTMLParser

import matplotlib.pyplot as plt
import numpy as np
import pytest

from pnmf_pyro import fit
from pnmf_pyro.command_line.pages import Page, Picture, Table, Text
from pnmf_pyro.command_line.report import fit_report


def draw(*values):
    ax = plt.subplots(figsize=(3, 2))[1]
    ax.plot(values)
    return ax


@pytest.fixture
def page():
    return Page(
        "A <page>",
        [
            Text("Words", "One & two.\n- " + "three " * 40),
            Table("Numbers", {"name": ["a<b", "long name"], "x": [1.23456, -0.0], "in": [True, 0]}),
            Picture("Line & axes", partial(draw, 1, 2)),
        ],
    )


class Cells(HTMLParser):
    """Collects what tables hold."""

    def __init__(self):
        super().__init__()
        self.rows, self.inside, self.images = [], False, 0

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        self.inside = tag in ("td", "th")
        if self.inside:
            self.rows[-1].append("")
        self.images += tag == "img" and dict(attrs)["src"].startswith("data:image/png;base64,")

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


def test_html(page, tmp_path):
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    cells = Cells()
    cells.feed(text)
    assert cells.rows == [["name", "x", "in"], ["a<b", "1.235", "yes"], ["long name", "0", "0"]]
    assert cells.images == 1
    assert "<h1>A &lt;page&gt;</h1>" in text
    assert "One &amp; two." in text
    assert 'alt="Line &amp; axes"' in text
    assert not plt.get_fignums()


def test_lines(page):
    words, table, _ = page.blocks
    assert str(table).splitlines() == [
        "name           x   in",
        "a<b        1.235  yes",
        "long name      0    0",
    ]
    lines = str(words).splitlines()
    assert lines[0] == "One & two."
    assert len(lines) == 4
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.png", r"path must end in .html.* got a.png. pnmf_pyro.plotting draws single plots"),
        ("no/a.html", "there is"),
    ],
)
def test_paths(name, message, page, tmp_path):
    with pytest.raises(ValueError, match=message):
        page.write(tmp_path / name)


def test_a_report_says_what_it_shows_and_where_the_fit_comes_from():
    X = np.random.default_rng(0).poisson(5, size=(40, 12))
    model = fit(X, np.random.default_rng(1).uniform(size=(40, 2)), n_components=2)
    text = fit_report(model, source="factors.h5ad", y_down=False).html()
    for name in ("factors.h5ad", "Written 20", "fitted by pnmf_pyro", "seed", "lengthscales"):
        assert name in text
    assert text.count("<p>") == 6  # a caption for each picture
