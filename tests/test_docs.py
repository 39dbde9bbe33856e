"""The code of README.md and of the pages in docs/ runs, each page from top to bottom.

The blocks of a page share one namespace and one temporary folder with small data; warnings are
errors. Blocks of `bash` are calls of the command line, blocks of `sh` scripts around them.
Docstrings are run as doctests and the notebooks on their own, both by .ci/run.
"""

import os
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pyro
import pytest
import torch

from pnmf_pyro.command_line.cli import main
from pnmf_pyro.command_line.exits import Exit

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

FENCE = re.compile(
    r"^(?:<!-- ci: (?P<mark>\S+) -->\n)?```(?P<language>\S*)[^\n]*\n(?P<code>.*?)^```$", re.M | re.S
)
PYTHON = {"python", "{code-cell}"}
NOT_CODE = {"text", "{toctree}", "{include}"}

# Pages that are not run here, and why. Nor are blocks marked <!-- ci: NAME -->, which .ci/run runs
# as a user would type them.
EXEMPT = {
    "reference_examples.md": "sessions with their results, run by test_reference_examples.py",
    "performance.md": "benchmarks, minutes to hours each",
}

# Pages about real data, which are skipped where these are absent.
ECOLOGY = "ecology.md"

# Pages that take more than three seconds.
LONG = {
    "batches.md",
    "calibration.md",
    "checks.md",
    "choosing_k.md",
    "checkpoints.md",
    "command_line.md",
    "ecology.md",
    "gpu.md",
    "interpretation.md",
    "large_tables.md",
    "model.md",
    "plots.md",
    "pyro.md",
}

# Packages that one page shows beside ours; .ci/run has them in its last stage. Their own warnings
# are not ours to mend.
OTHERS = {"scanpy", "spatialdata", "squidpy"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its mark, its language, its code and the line where the code begins."""

    mark: str | None
    language: str
    code: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            found["mark"],
            found["language"],
            found["code"],
            text.count("\n", 0, found.start("code")) + 1,
        )
        for found in FENCE.finditer(text)
    ]


def exempt(page: Path, block: Block) -> bool:
    return bool(block.mark) or page.name in EXEMPT or block.language in NOT_CODE


def source_of(block: Block) -> str:
    """The code without the options of a notebook's cell."""
    return re.sub(r"^:.*$", "", block.code, flags=re.M) if block.language[0] == "{" else block.code


def run_python(page: Path, block: Block, namespace: dict) -> None:
    # Empty lines before it, so that an error names the line of the page.
    code = compile("\n" * (block.line - 1) + source_of(block), str(page), "exec")
    with warnings.catch_warnings():
        others = set(re.findall(r"^import (\w+)", block.code, re.M)) & OTHERS
        if others:
            warnings.simplefilter("ignore")
        for name in others:
            pytest.importorskip(name, reason=f"{page.name}, line {block.line} needs {name}")
        exec(code, namespace)
    plt.close("all")


def run_shell(block: Block) -> None:
    for line in block.code.replace("\\\n", " ").splitlines():
        command, *arguments = shlex.split(line, comments=True) or ["#"]
        if command != "#":
            assert command == "pnmf-pyro", f"line {block.line}: {line} is neither run nor exempt"
            assert main(arguments) in (Exit.FINE, Exit.LOOK), line


def run_script(block: Block) -> None:
    """Run the block by a shell that finds the commands of this environment."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run(["sh", "-e", "-c", block.code], check=True, env={**os.environ, "PATH": path})


@pytest.fixture
def small_data(tmp_path, monkeypatch):
    """A folder with the files that pages read, and the module that pages of docs/ import."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    tissue = pytest.importorskip("tissue")
    section = tissue.simulated_section(12)
    for name in ("section.h5ad", "counts.h5ad"):
        section.write_h5ad(name)
    yield
    sys.modules.pop("tissue")


def write_mites(file: Path) -> None:
    """Write the files that R would: counts, environment and places of the mites."""
    anndata = pytest.importorskip("anndata")
    mites = anndata.read_h5ad(file)
    mites.to_df().astype(int).to_csv("mites.csv")
    mites.obs.to_csv("environment.csv")
    places = mites.obsm["spatial"]
    text = [f"{name},{x},{y}" for name, (x, y) in zip(mites.obs_names, places, strict=True)]
    Path("places.csv").write_text("\n".join(["site,x,y", *text]))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.name, marks=[pytest.mark.slow] * (page.name in LONG))
        for page in PAGES
    ],
)
def test_the_page_runs(page, small_data, data_file):
    matplotlib.use("Agg")
    if page.name == ECOLOGY:
        write_mites(data_file("eco_mite"))
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        run_page(page)


def run_page(page: Path) -> None:
    namespace: dict = {"__name__": page.stem}
    for block in blocks_of(page):
        if exempt(page, block):
            continue
        if block.language in PYTHON:
            run_python(page, block, namespace)
        elif block.language == "sh":
            run_script(block)
        else:
            assert block.language == "bash", f"{page.name}, line {block.line}: unknown language"
            run_shell(block)


def test_marked_blocks_are_run_by_continuous_integration():
    script = (ROOT / ".ci" / "run").read_text()
    marks = {block.mark for page in PAGES for block in blocks_of(page) if block.mark}
    stages = re.findall(r"readme_command (\S+)|readme_block (\w+)\)", script)
    assert marks == {name for pair in stages for name in pair if name}


def test_exempt_pages_hold_nothing_else():
    """What is left out of the pages that are exempt is what the reason says."""
    for block in blocks_of(ROOT / "docs" / "reference_examples.md"):
        assert block.code.startswith(">>> ")
    for block in blocks_of(ROOT / "docs" / "performance.md"):
        assert all(line.startswith("python -m benchmarks ") for line in block.code.splitlines())


def test_every_fence_is_found():
    """A block that the pattern misses would be skipped in silence."""
    for page in PAGES:
        fences = sum(line.lstrip().startswith("```") for line in page.read_text().splitlines())
        assert fences == 2 * len(blocks_of(page)), page.name
