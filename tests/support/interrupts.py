"""Interrupts at chosen times, and what they may not leave behind."""

import signal
from collections.abc import Callable

from pyro.poutine import runtime

from tests.support.state import global_state


def interrupted(call: Callable[[], object], seconds: float) -> bool:
    """Interrupt a call after some seconds; say whether it was still at work.

    An interrupt inside a function of NumPy may come out of it as an error of another kind.
    """
    came = []

    def stop(*_: object) -> None:
        came.append(True)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
        call()
    except BaseException:
        if not came:
            raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return bool(came)


def shared_state() -> dict:
    """The global state, and Pyro's stack of handlers and dimensions of plates."""
    plates = runtime._DIM_ALLOCATOR._stack
    return {**global_state(), "handlers": len(runtime._PYRO_STACK), "plates": list(plates)}


def same_attributes(model: object, before: dict[str, object]) -> bool:
    """Say whether an estimator has the very objects that it had."""
    now = vars(model)
    return now.keys() == before.keys() and all(now[name] is before[name] for name in now)
