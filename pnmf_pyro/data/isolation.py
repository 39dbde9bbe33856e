"""Isolation: a computation neither feels nor moves the state that torch and Pyro share.

Both keep state for the whole process: whether gradients are taken, the default type and device,
generators, a stack of effect handlers, a store of parameters. A function that is `isolated` finds
them as in a fresh process, whatever surrounds the call, and puts them back however it ends. Since
they are shared, isolated functions of several threads run one after another.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from contextlib import ExitStack
from copy import copy
from functools import cache, wraps
from threading import RLock
from typing import Any, ParamSpec, TypeVar

import pyro
import pyro.distributions
import pyro.infer
import torch
from pyro.poutine import runtime
from pyro.poutine import util as poutine_util
from threadpoolctl import ThreadpoolController

from pnmf_pyro.data.blocks import smaller_by
from pnmf_pyro.data.checks import warn
from pnmf_pyro.data.parallel import alone

Given = ParamSpec("Given")
Answer = TypeVar("Answer")

_lock = RLock()
_under_way = False

# By what blocks become smaller, one after the other, where the memory of a card ends.
DIVISORS = (1, 8, 64)
NEED_LESS = (
    "Fewer neighbours (K=16), fewer inducing points (num_inducing) and batch_size need less of it; "
    "device='cpu' needs none."
)

# Pyro's flags for checks of models and values.
_VALIDATIONS = (pyro.infer, pyro.distributions, poutine_util)


def isolated(function: Callable[Given, Answer]) -> Callable[Given, Answer]:
    """Let a function run as in a fresh process, and leave the process as it was.

    Where a card has no memory left, it runs again in smaller blocks. An interrupt (Ctrl-C) may come
    at any moment, also while the state is put back; then that is done again before the interrupt is
    passed on.
    """

    @wraps(function)
    def run(*args: Given.args, **kwargs: Given.kwargs) -> Answer:
        with _lock:
            found = _Found()
            try:
                with _fresh():
                    return _by_blocks(lambda: function(*args, **kwargs))
            finally:
                late: KeyboardInterrupt | None = None
                while True:
                    try:
                        found.put_back()
                        break
                    except KeyboardInterrupt as error:
                        late = error
                if late is not None:
                    raise late

    return run


def _by_blocks(call: Callable[[], Answer]) -> Answer:
    """Return what a call returns; where the memory of a card ends, call again in smaller blocks.

    What trains a model in place goes on from where that stands. A call within such a call is left
    to the outer one. Ranks do not call again, since all of them have to do the same.
    """
    global _under_way
    if _under_way:
        return call()
    full, _under_way = "", True
    try:
        for divisor in DIVISORS if alone() else DIVISORS[:1]:
            try:
                with smaller_by(divisor):
                    answer = call()
            except torch.cuda.OutOfMemoryError as error:
                full = f"The card has too little memory ({str(error).split('. ')[0]})"
            else:
                if full:
                    warn(f"{full}. All was done again in blocks 1/{divisor} as large. {NEED_LESS}")
                return answer
            gc.collect()
            torch.cuda.empty_cache()
    finally:
        _under_way = False
    raise MemoryError(f"{full}. {NEED_LESS}")


class _Found:
    """The shared state as it was found."""

    def __init__(self) -> None:
        self.gradients = torch.is_grad_enabled()
        self.dtype = torch.get_default_dtype()
        self.generator = torch.random.get_rng_state()
        started = torch.cuda.is_initialized()
        self.cuda_generators = torch.cuda.get_rng_state_all() if started else []
        self.threads = torch.get_num_threads()
        self.handlers = list(runtime._PYRO_STACK)
        self.tables = [(one, _copied(one)) for one in _tables()]
        self.validations = [one.is_validation_enabled() for one in _VALIDATIONS]

    def put_back(self) -> None:
        """Put it back; doing so once more does no harm."""
        runtime._PYRO_STACK[:] = self.handlers
        for one, held in self.tables:
            vars(one).update({name: copy(table) for name, table in held.items()})
        torch.set_grad_enabled(self.gradients)
        torch.set_default_dtype(self.dtype)
        torch.random.set_rng_state(self.generator)
        if self.cuda_generators:
            torch.cuda.set_rng_state_all(self.cuda_generators)
        for module, enabled in zip(_VALIDATIONS, self.validations, strict=True):
            module.enable_validation(enabled)
        if torch.get_num_threads() != self.threads:
            for library in openmp().lib_controllers:
                library.set_num_threads(self.threads)


def _tables() -> tuple[object, object]:
    """Pyro's parameters, and the dimensions that plates have taken."""
    return pyro.get_param_store(), runtime._DIM_ALLOCATOR


def _copied(owner: object) -> dict[str, Any]:
    return {name: copy(table) for name, table in vars(owner).items()}


def _fresh() -> ExitStack:
    """Set the shared state as in a fresh process, but for parameters, which have their names."""
    unusual = ExitStack()
    if torch.is_inference_mode_enabled():
        unusual.enter_context(torch.inference_mode(False))
    if torch.get_default_device().type != "cpu":
        unusual.enter_context(torch.device("cpu"))
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            unusual.enter_context(torch.autocast(kind, enabled=False))
    runtime._PYRO_STACK.clear()
    runtime._DIM_ALLOCATOR._stack = []
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    return unusual


@cache
def openmp() -> ThreadpoolController:
    """The threads of torch. After `torch.set_num_threads` batched inverses of torch 2.13 fail."""
    return ThreadpoolController().select(user_api="openmp")


def _unlocked() -> None:
    global _lock
    _lock = RLock()


if hasattr(os, "register_at_fork"):  # where a child process would wait for a thread it lacks
    os.register_at_fork(after_in_child=_unlocked)
