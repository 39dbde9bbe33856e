"""The table of the reference's names, and the page that shows it.

`docs/api_parity.json` holds one row for each name of the reference: classes, functions, parameters
with their defaults, attributes, modes and examples. After a change of it write the page anew:

    python -m tests.support.parity
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[2] / "docs"
TABLE, PAGE = DOCS / "api_parity.json", DOCS / "api_parity.md"
COLUMNS = ("reference", "kind", "value", "ours", "tests", "status", "why")

HEAD = """\
# Parity with the API of PNMF

Every name of the `PNMF` reference: where it lives here, which test holds it, and where we differ.
Value is the signature, the default, the type or, for an example, its first line. *Same* means that
it takes and gives what the reference says. *Extended* means that and more. *Different* means
something else, with the reason. [Differences from PNMF](differences.md) says more.

Written from `docs/api_parity.json` by `python -m tests.support.parity`. Tests compare both with the
package.
"""


def load() -> list[dict[str, Any]]:
    """Rows of the table, in the order of the reference."""
    return json.loads(TABLE.read_text())


def parameters(signature: str) -> dict[str, str]:
    """Names and defaults in a printed signature such as "(X, y=None, **kwargs)"."""
    arguments = ast.parse(f"def f{signature}: pass").body[0].args  # type: ignore[attr-defined]
    names = [argument.arg for argument in arguments.args]
    required = ["required"] * (len(names) - len(arguments.defaults))
    found = dict(zip(names, required + [ast.unparse(d) for d in arguments.defaults], strict=True))
    for stars, argument in (("*", arguments.vararg), ("**", arguments.kwarg)):
        if argument is not None:
            found[stars + argument.arg] = "any"
    return found


def render(rows: list[dict[str, Any]]) -> str:
    """The page: a table for each class or function."""
    lines = [HEAD]
    for row in rows:
        if row["kind"] in ("class", "function"):
            lines += ["", f"## {row['reference'].removeprefix('PNMF.')}", ""]
            lines += ["| reference | kind | value | here | tests | status | why |"]
            lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
        lines.append("| " + " | ".join(_cell(row, column) for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if column == "tests":
        return "<br>".join(f"`{test.removeprefix('tests/')}`" for test in value)
    if column == "value" and row["kind"] == "example":
        value = value.splitlines()[0]
    text = value.replace("|", "\\|")
    return f"`{text}`" if column in ("reference", "value", "ours") else text


if __name__ == "__main__":
    PAGE.write_text(render(load()))
