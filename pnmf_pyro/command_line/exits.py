"""Exit codes of the commands."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """What the exit code of a command says."""

    FINE = 0
    LOOK = 1
    UNUSABLE = 2
    FAULT = 3
    INTERRUPTED = 130
    TERMINATED = 143


COMMON_CODES = {
    Exit.UNUSABLE: "the input, the options or the place of the output cannot be used; one line on "
    "standard error says why",
    Exit.FAULT: "a fault of the program, with a traceback",
    Exit.INTERRUPTED: "stopped by Ctrl-C (SIGINT)",
    Exit.TERMINATED: "stopped by SIGTERM",
}
