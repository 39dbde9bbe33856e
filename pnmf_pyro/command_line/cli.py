"""The command line as a process: its signals, its streams, and the code with which it ends."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from types import FrameType
from typing import Any, TextIO

from pnmf_pyro.command_line.exits import Exit

# Signals that ask a process to end, what Python does by itself, and the code to end with.
SIGNALS = {
    signal.SIGINT: (signal.default_int_handler, Exit.INTERRUPTED),
    signal.SIGTERM: (signal.SIG_DFL, Exit.TERMINATED),
}

# Seconds after which a signal comes again that came while a module was imported.
LATER = 0.05


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments`, those of the process if None; return the exit code.

    It is 0 if all went well, 1 if the result needs a look, 2 if the input or the options cannot be
    used, 3 for a fault of the program, 130 or 143 if SIGINT or SIGTERM stopped it. What 1 means for
    each command is in its --help.
    """
    out, err = _Patient(sys.stdout), _Patient(sys.stderr)
    with redirect_stdout(out), redirect_stderr(err), _stopping() as stopped:
        try:
            from pnmf_pyro.command_line.commands import run  # takes seconds, and can be stopped

            return run(arguments)
        except BaseException as error:
            if not stopped and not isinstance(error, KeyboardInterrupt):
                raise
            number = stopped[0] if stopped else signal.SIGINT
            said = "files that were not finished are as they were before"
            sys.stderr.write(f"pnmf-pyro: stopped by {number.name}; {said}.\n")
            return SIGNALS[number][1]


@contextmanager
def _stopping() -> Iterator[list[signal.Signals]]:
    """Let signals raise KeyboardInterrupt where the process has no handlers; list those that came.

    What is being written is then put away, as after any other error.
    """
    came: list[signal.Signals] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if _is_importing(frame):  # libraries in C++ abort where their imports raise
            threading.Timer(LATER, os.kill, (os.getpid(), number)).start()
            return
        came.append(signal.Signals(number))
        raise KeyboardInterrupt

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number, (usual, _) in SIGNALS.items():
            if signal.getsignal(number) == usual:
                before[number] = signal.signal(number, stop)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_importing(frame: FrameType | None) -> bool:
    """Say whether a module is being imported in a frame, or in one that called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class _Patient:
    """A stream to which can be written also when its reader has gone, as `head` does."""

    def __init__(self, stream: TextIO | None):
        self._stream: TextIO = io.StringIO() if stream is None else stream

    def write(self, text: str) -> int:
        """Write at once; a reader that has gone misses it."""
        try:
            self._stream.write(text)
            self._stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
