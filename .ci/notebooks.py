"""Execute every notebook of a folder from top to bottom; each has a time limit of its own."""

import argparse
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient


def execute(path: Path, minutes: float) -> nbformat.NotebookNode:
    """Run all cells of one notebook in its own folder; each cell may take what time is left."""
    deadline = time.monotonic() + 60 * minutes
    client = NotebookClient(
        jupytext.read(path),
        kernel_name="python3",
        timeout_func=lambda cell: max(1, int(deadline - time.monotonic())),
        resources={"metadata": {"path": str(path.parent)}},
    )
    return client.execute()


def main() -> None:
    """Find the notebooks (a text file beside its .ipynb counts once) and execute them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0, help="limit for one notebook")
    parser.add_argument("--write", action="store_true", help="write NAME.ipynb from NAME.py")
    options = parser.parse_args()
    notebooks: dict[str, Path] = {}
    for suffix in (".ipynb", ".md", ".py"):  # the last one wins: the text is what is edited
        notebooks |= {path.stem: path for path in options.folder.glob(f"*{suffix}")}
    if not notebooks:
        sys.exit(f"no notebooks in {options.folder}")
    for path in sorted(notebooks.values()):
        start = time.monotonic()
        executed = execute(path, options.minutes)
        if options.write:
            jupytext.write(executed, path.with_suffix(".ipynb"))
        print(f"{path}: {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
