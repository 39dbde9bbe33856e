"""Sphinx configuration: python -m sphinx -W --keep-going -b html docs docs/_build."""

import base64
import configparser
import io
import json
import re
import shutil
from pathlib import Path

from PIL import Image

import pnmf_pyro

_setup = configparser.ConfigParser()
_setup.read(Path(__file__).parent.parent / "setup.cfg")

# The notebooks with their outputs are pages too; Sphinx reads only what is in its own folder.
_tutorials = Path(__file__).parent / "tutorials"
_tutorials.mkdir(exist_ok=True)
_gallery = []
for _notebook in sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb")):
    shutil.copy(_notebook, _tutorials)
    _cells = json.loads(_notebook.read_text(encoding="utf-8"))["cells"]
    _title, _lead = "".join(_cells[0]["source"]).split("\n\n")[:2]
    _data = [output.get("data", {}) for cell in _cells for output in cell.get("outputs", ())]
    _pictures = [base64.b64decode(one["image/png"]) for one in _data if "image/png" in one]
    _name = f"tutorials/{_notebook.stem}"
    if _pictures:  # the richest of them stands for the notebook
        _picture = Image.open(io.BytesIO(max(_pictures, key=len)))
        _picture.thumbnail((480, 480))
        _picture.quantize(method=Image.Quantize.FASTOCTREE).save(
            _tutorials / f"{_notebook.stem}.png", optimize=True
        )
    _image = f"![]({_name}.png)" * bool(_pictures)
    _said = " ".join(re.split(r"(?<=\.)\s+", " ".join(_lead.split()))[:2])
    _gallery.append(f"- {_image}\n\n  **[{_title.lstrip('# ')}]({_name})**\n\n  {_said}\n")
_gallery = ["```{container} gallery", *_gallery, "```"]
(_tutorials / "gallery.txt").write_text("\n".join(_gallery), encoding="utf-8")

project = "pnmf_pyro"
author = _setup["metadata"]["author"]
copyright = f"2026, {author}"
release = version = pnmf_pyro.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_nb",
]
exclude_patterns = ["_build", "jupyter_execute"]
templates_path = ["_templates"]

autosummary_generate = True
# A class is on the page of its room and on that of its module: both are it.
suppress_warnings = ["ref.python"]
autosummary_ignore_module_all = False  # __all__ says what is public
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # only what this package wrote
numpydoc_show_class_members = False  # the module pages list the members
numpydoc_xref_param_type = False

# Continuous integration executes the notebooks on its own. Pages that say so run at each build.
nb_execution_mode = "off"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_theme = "pydata_sphinx_theme"
html_title = f"pnmf_pyro {release}"
html_theme_options = {"show_prev_next": True, "navigation_with_keys": False}
_WITH_SECTION_NAVIGATION = {"api"}
html_sidebars: dict[str, list[str]] = {
    page.stem: []
    for page in Path(__file__).parent.glob("*.*")
    if page.suffix in (".md", ".rst") and page.stem not in _WITH_SECTION_NAVIGATION
} | {"tutorials/*": []}


def _skip(app, what, name, obj, skip, options):
    """Leave out the setters that scikit-learn generates for metadata routing."""
    if name.startswith("set_") and name.endswith("_request"):
        return True
    return None


def _contents(index):
    """Return the tables of contents of index.md in the form of llms.txt, for programs that read."""
    title, rest = index.split("\n\n", 1)
    summary = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", rest.split("\n\n", 1)[0])
    lines = [title, "", "> " + " ".join(summary.split()), ""]
    for row in re.findall(r"^\| *(.+?) *\| *(.*?) *\|$", index, re.M):
        links = re.findall(r"\[([^]]+)\]\(([^)]+?)(?:\.md)?\)", row[0])
        for name, page in links:
            heading = page in ("tutorials", "how_to", "explanation")
            line = f"## {name}" if heading else f"- [{name}]({page}.html): {row[1]}"
            lines += ["", line, ""] if heading else [line]
    return "\n".join(lines) + "\n"


def _write_contents(app, error):
    """Write llms.txt beside the pages."""
    if error is None:
        index = (Path(__file__).parent / "index.md").read_text()
        (Path(app.outdir) / "llms.txt").write_text(_contents(index))


def setup(app):
    """Register the filter of members, and what is written beside the pages."""
    app.connect("autodoc-skip-member", _skip)
    app.connect("build-finished", _write_contents)
