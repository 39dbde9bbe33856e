"""Checkpoints: a file from which a fit goes on to the bits of one that was never stopped."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pnmf_pyro import __version__
from pnmf_pyro.data.atomic import check_replaceable
from pnmf_pyro.data.checks import check_number, noting, warn
from pnmf_pyro.data.interrupts import Interrupts
from pnmf_pyro.data.parallel import ALONE, Ranks
from pnmf_pyro.data.resumable import State
from pnmf_pyro.data.stored import StoredCounts
from pnmf_pyro.data.tables import hash_of, hash_of_table
from pnmf_pyro.estimator.archive import Arrays, read_archive, write_archive
from pnmf_pyro.estimator.inputs import Data
from pnmf_pyro.estimator.plain import HasParameters, plain_label, plain_parameters

# Packages that compute: another version may round in another way.
PACKAGES = ("torch", "pyro-ppl", "numpy", "scipy", "scikit-learn")

# Parameters that change nothing of what is found.
ASIDE = ("verbose", "device")

# Seconds from one checkpoint to the next, unless given.
EVERY = 60.0


class Unkept:
    """A fit without a checkpoint.

    Attributes
    ----------
    found : dict or None
        State of a fit that was stopped.
    path : Path or None
        File in which the fit is kept.
    """

    found: State | None = None
    path: Path | None = None

    def open(self, settings: HasParameters, data: Data, ranks: Ranks = ALONE) -> None:
        """Read what there is of a fit with these parameters and data, by these ranks."""

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a plain value that is made once, however often the fit is stopped."""
        return make()

    def under_way(self) -> AbstractContextManager[object]:
        """Return the block in which a fit may be stopped."""
        return nullcontext()

    def whole(self) -> AbstractContextManager[object]:
        """Return a block that no signal interrupts."""
        return nullcontext()

    def keep(self, state: Callable[[], State | None]) -> None:
        """Write a state."""

    def passed(self, state: Callable[[], State | None]) -> None:
        """Write a state if it is time to, or a signal waits, which is then handed on."""


class Checkpoint(Unkept):
    """The file of a fit that may be stopped at any moment.

    Of several ranks all hand their states to the first, which writes them as one file: so they go
    on from the same step, whichever of them was stopped, and when.

    Parameters
    ----------
    path : str or os.PathLike
        File to go on from, if it is there, and to write to.
    every : float
        Seconds from one writing to the next, in the long stages of a fit.
    """

    def __init__(self, path: str | os.PathLike, every: float):
        if not isinstance(path, str | os.PathLike) or "\0" in os.fsdecode(path):
            raise ValueError(
                f"checkpoint must be the name of a file, such as 'run.ckpt'; got {path!r}."
            )
        self.path: Path = Path(os.fsdecode(path))
        self.every = float(every)
        if not self.path.parent.is_dir():
            raise ValueError(
                f"checkpoint must be in an existing folder; there is no {self.path.parent}."
            )
        check_replaceable(self.path)
        self.identity: State = {}
        self.made: State = {}
        self.ranks = ALONE
        self.interrupts = Interrupts()
        self.written: float | None = None

    def open(self, settings: HasParameters, data: Data, ranks: Ranks = ALONE) -> None:
        """Read the file, if it is there; one of another fit is a ValueError."""
        self.ranks, self.identity = ranks, identity_of(settings, data, ranks)
        remedy = "Remove it to begin anew, or name another file as checkpoint."
        header: State = {}
        if there := self.path.exists():
            header, arrays = read_archive(
                self.path,
                lambda name: name.startswith(f"{ranks.rank}."),
                "a checkpoint of pnmf_pyro",
                remedy,
            )
        held = hash_of(header) if there else "not there"
        ranks.agree(**self.identity["data"], checkpoint=held)
        if not there:
            return
        if "checkpoint" not in header:
            raise ValueError(f"checkpoint: {self.path} holds a model, and no checkpoint. {remedy}")
        other = differences(header["checkpoint"], self.identity)
        if other:
            raise ValueError(
                f"checkpoint: {self.path} is of another fit: {'; '.join(other)}. Go on with what "
                f"it was written for. {remedy}"
            )
        try:
            state = rebuilt(header["states"][ranks.rank], arrays)
        except Exception as error:  # a part is missing, or on a device that is not here
            raise ValueError(f"checkpoint: {self.path} is damaged ({error!r}). {remedy}") from error
        self.made, self.found = state["made"], state["fit"]

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return a plain value that is made once, however often the fit is stopped."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    def under_way(self) -> AbstractContextManager[object]:
        """Let signals wait for whole steps."""
        return self.interrupts

    def whole(self) -> AbstractContextManager[object]:
        """Return a block that no signal interrupts."""
        return self.interrupts.waiting()

    def keep(self, state: Callable[[], State | None]) -> None:
        """Write a state, and hand on a signal that waits.

        Where the first cannot be written that is an OSError; later the old one stays, with a
        warning, and the fit goes on.
        """
        with self.interrupts.waiting():
            own = flattened({"made": self.made, "fit": state()}, f"{self.ranks.rank}.")
            states = self.ranks.at_first(own)
            header = {"checkpoint": self.identity, "states": [plain for plain, _ in states]}
            arrays = {name: one for _, of_rank in states for name, one in of_rank.items()}
            try:
                self.ranks.by_first(
                    lambda: write_archive(self.path, header, arrays, compressed=False)
                )
            except ConnectionError:
                raise
            except OSError as error:
                if self.written is None:
                    raise
                with noting([]):  # a fit that goes on from the one before need not say so
                    warn(f"The checkpoint is not written: {error}. The one before it stays.")
        self.written = time.monotonic()
        self.interrupts.hand_on()

    def passed(self, state: Callable[[], State | None]) -> None:
        """Write a state if it is time to, or a signal waits, which is then handed on."""
        last = -np.inf if self.written is None else self.written
        due = self.ranks.leads and time.monotonic() - last >= self.every
        if self.ranks.any(due or self.interrupts.came):
            self.keep(state)


def checkpoint_of(path: str | os.PathLike | None, every: float) -> Unkept:
    """Return the checkpoint that a fit is given, or none; a ValueError for what cannot be one."""
    check_number("every", every, 0.0, np.inf)
    return Unkept() if path is None else Checkpoint(path, every)


def identity_of(settings: HasParameters, data: Data, ranks: Ranks) -> State:
    """Return what must be the same for a fit to go on: versions, parameters, and data as hashes.

    The data are those of all ranks, of which each has its own rows of a store.

    What a file cannot name, and a fit without a seed, are a ValueError.
    """
    seed = settings.get_params(deep=False)["random_state"]
    if not isinstance(seed, int | np.integer):
        raise ValueError(
            "checkpoint needs a seed, since a fit goes on to the bits that it would have had: set "
            f"random_state to a whole number. It is {seed!r}."
        )
    try:
        parameters = parameters_of(settings)
    except ValueError as error:
        raise ValueError(f"checkpoint cannot keep this fit: {error}") from error
    counts, places, s = data.counts, data.places, data.size_factors
    known_by = counts.digest if isinstance(counts, StoredCounts) else hash_of_table(counts.numpy())
    hidden = () if data.hidden is None else (data.hidden.row_starts, data.hidden.columns_of)
    labels = [] if data.groups is None else [plain_label(one) for one in data.groups.names]
    design = None if data.design is None else data.design.plain(plain_label)
    return {
        "versions": versions(),
        "parameters": parameters | {"device": str(counts.device), "processes": ranks.size},
        "data": {
            "X": known_by,
            "size_factors": hash_of(None if s is None else counts.ranks.stacked(s, 0)),
            "mask": hash_of(*hidden),
            "coordinates": hash_of(None if places is None else places.coordinates),
            "groups": hash_of(labels, None if places is None else places.groups),
            "batches or covariates": hash_of(design, data.rows),
        },
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return {"pnmf_pyro": __version__, **{name: version(name) for name in PACKAGES}}


def parameters_of(settings: HasParameters) -> State:
    """Return the parameters that say what is found, loadings to start from as hashes."""
    parameters = plain_parameters(settings)
    init = settings.get_params(deep=False)["init"]
    starts = init if isinstance(init, list | tuple) else [init]
    parameters["init"] = [hash_of(s) if isinstance(s, np.ndarray) else s for s in starts]
    return {name: value for name, value in parameters.items() if name not in ASIDE}


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say in what the identities of two fits differ."""
    told = []
    for kind in ("versions", "parameters"):
        one, other = there[kind], here[kind]
        for name in sorted(one.keys() | other.keys()):
            before, now = (str(values.get(name))[:60] for values in (one, other))
            if one.get(name) != other.get(name):
                told.append(f"{name} was {before}, and is {now}")
    names = [name for name, hashed in here["data"].items() if there["data"].get(name) != hashed]
    return [*told, *(f"{name} has changed" for name in names)]


def flattened(state: object, prefix: str = "") -> tuple[Any, Arrays]:
    """Return a state as what JSON can hold, and its tensors as arrays, with names that begin so."""
    arrays: Arrays = {}

    def plain(one: Any) -> Any:
        if isinstance(one, Tensor):
            name = f"{prefix}{len(arrays)}"
            arrays[name] = one.detach().cpu().numpy()
            return {"tensor": [name, str(one.device)]}
        if isinstance(one, Mapping):
            return {"dict": [[key, plain(value)] for key, value in one.items()]}
        if isinstance(one, tuple):
            return {"tuple": [plain(value) for value in one]}
        if isinstance(one, list):
            return [plain(value) for value in one]
        if one is None or isinstance(one, bool | int | float | str):
            return one
        raise TypeError(f"a checkpoint cannot hold {one!r}")

    return plain(state), arrays


def rebuilt(plain: Any, arrays: Arrays) -> Any:
    """Return the state of which :func:`flattened` made what JSON holds, and arrays."""
    if isinstance(plain, list):
        return [rebuilt(one, arrays) for one in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == "dict":
        return {key: rebuilt(one, arrays) for key, one in value}
    if kind == "tuple":
        return tuple(rebuilt(one, arrays) for one in value)
    name, device = value
    return torch.from_numpy(arrays[name]).clone().to(device)  # in memory of torch's own
