"""Seeded odd calls of the public functions, and the verdict on each.

A case is an odd thing (a table, places, groups, size factors, or a parameter) given to a random
function that takes such a thing. Every thing says what is right: that it is `taken`, with the
result of the same numbers as a plain array; that it is `refused`, by a ValueError or TypeError
that names the argument; or `either`. Beside that no result is wrong in shape, sign or finiteness
without a warning, nothing that is given is changed, and no global state moves.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.initialization import initialize_factors
from pnmf_pyro.transforms import factor_uncertainty, get_factors, transform_F, transform_W
from tests.support.interrupts import shared_state

STEPS = 8
N, D = 12, 6
QUICK = {"training_mode": "natural", "loadings_mode": "multiplicative", "mode": "lower-bound"}

Random = np.random.Generator
Thing = Callable[[np.ndarray, Random], Any]


@dataclass(frozen=True)
class Case:
    """One odd call: `run` makes it, and returns arrays and, where it can be told, what is right."""

    name: str
    right: str
    names: str
    run: Callable[[Random], tuple[list[np.ndarray], list[np.ndarray] | None]]


def table(random: Random) -> np.ndarray:
    """Counts without an empty row or column."""
    return random.poisson(np.exp(random.normal(size=(N, 2))) @ random.gamma(1, 2, (2, D))) + 1


def of(model: PNMF) -> list[np.ndarray]:
    """What a fit found."""
    return [model.components_, get_factors(model), factor_uncertainty(model)]


def masked(values: np.ndarray, random: Random) -> np.ma.MaskedArray:
    return np.ma.masked_array(values, np.arange(values.size).reshape(values.shape) == 3)


def with_entry(value: object) -> Thing:
    def change(values: np.ndarray, random: Random) -> np.ndarray:
        kind = object if isinstance(value, str) or value is None else float
        changed = values.astype(kind)
        changed[(1,) * values.ndim] = value
        return changed

    return change


# What a table, and a list of numbers for each sample, may be, and may not.
NUMBERS: dict[str, dict[str, Thing]] = {
    "taken": {
        **{kind: lambda a, r, k=kind: a.astype(k) for kind in ("f8", "f4", ">f8")},
        "list": lambda a, r: a.tolist(),
        "tuple": lambda a, r: tuple(a.tolist()),
        "fortran": lambda a, r: np.asfortranarray(a),
        "strides": lambda a, r: np.repeat(a, 2, 0)[::2],
        "read-only": lambda a, r: np.broadcast_to(a, a.shape),
        "tensor": lambda a, r: torch.from_numpy(a.copy()),
        "tensor with gradient": lambda a, r: torch.from_numpy(a.astype(float)).requires_grad_(),
        "masked, nothing masked": lambda a, r: np.ma.masked_array(a),
        "pandas": lambda a, r: pd.DataFrame(a) if a.ndim == 2 else pd.Series(a),
        "pandas nullable": lambda a, r: (pd.DataFrame(a) if a.ndim == 2 else pd.Series(a)).astype(
            "Float64"
        ),
    },
    "refused": {
        "complex": lambda a, r: a + 1j,
        "complex tensor": lambda a, r: torch.from_numpy(a + 1j),
        "dates": lambda a, r: (1e6 * a).astype("M8[s]"),
        "periods": lambda a, r: a.astype("m8[s]"),
        "words": lambda a, r: np.full(a.shape, "gene"),
        "a word": lambda a, r: "words",
        "a path": lambda a, r: __import__("pathlib").Path("counts.csv"),
        "NaN": with_entry(np.nan),
        "infinity": with_entry(np.inf),
        "None inside": with_entry(None),
        "a word inside": with_entry("gene"),
        "masked": masked,
        "dict": lambda a, r: {"a": [1]},
        "set": lambda a, r: {1, 2},
        "generator": lambda a, r: (row for row in a),
        "number": lambda a, r: 3.0,
        "function": lambda a, r: len,
        "three dimensions": lambda a, r: np.stack([a] * 2)[..., None],
        "empty": lambda a, r: a[:0],
        "ragged": lambda a, r: [[1.0], [1.0, 2.0]],
        "pandas with NA": lambda a, r: (
            pd.DataFrame(a.reshape(len(a), -1))
            .astype("Float64")
            .mask(pd.DataFrame(np.arange(a.size).reshape(len(a), -1) == 2))
        ),
    },
}
TABLES: dict[str, dict[str, Thing]] = {
    "taken": {
        **NUMBERS["taken"],
        **{kind: lambda a, r, k=kind: a.astype(k) for kind in ("i8", "u1", "f2", "bool", "O")},
        **{
            f"{form} {api}": lambda a, r, k=f"{form}_{api}": getattr(sp, k)(a.astype("f4"))
            for form in ("csr", "csc", "coo", "lil", "dia")
            for api in ("matrix", "array")
        },
        "sparse, twice": lambda a, r: _twice(a),
        "sparse tensor": lambda a, r: torch.from_numpy(a.astype("f4")).to_sparse(),
        "hybrid tensor": lambda a, r: torch.from_numpy(a.astype("f4")).to_sparse(1),
        "csr tensor": lambda a, r: torch.from_numpy(a.astype("f4")).to_sparse_csr(),
        "sparse frame": lambda a, r: pd.DataFrame(a.astype(float)).astype(pd.SparseDtype(float, 0)),
        "matrix": lambda a, r: np.matrix(a),
    },
    "refused": {
        **{kind: make for kind, make in NUMBERS["refused"].items() if kind != "masked"},
        "negative": with_entry(-1.0),
        "nothing": lambda a, r: None,
        "one sample": lambda a, r: a[0],
        "meta tensor": lambda a, r: torch.from_numpy(a).to("meta"),
        "column of words": lambda a, r: pd.DataFrame(a).assign(cell="a"),
    },
    "either": {
        "masked": masked,  # taken as hidden where there is a mask=
        **{f"all {x:g}": lambda a, r, x=x: a * x for x in (0.0, 1e-310, 1e-20, 1e9, 1e30, 1e300)},
        "one huge": with_entry(1e12),
        "one entry": lambda a, r: a[:1, :1],
        "one count": lambda a, r: np.eye(*a.shape) * (np.arange(len(a)) == 0)[:, None],
        "rows over orders": lambda a, r: a * 10.0 ** np.linspace(0, 8, len(a))[:, None].round(),
        "names twice": lambda a, r: pd.DataFrame(a, columns=["g"] * a.shape[1]),
    },
}
PLACES: dict[str, dict[str, Thing]] = {
    "taken": {**NUMBERS["taken"], "sparse": lambda a, r: sp.csr_matrix(a)},
    "refused": {**NUMBERS["refused"], "no columns": lambda a, r: a[:, :0]},
    "either": {f"scale {x:g}": lambda a, r, x=x: a * x for x in (1e-300, 1e-12, 1e6, 1e12, 1e200)},
}
FACTORS: dict[str, dict[str, Thing]] = {
    "taken": NUMBERS["taken"],
    "refused": {
        **NUMBERS["refused"],
        "zeros": lambda a, r: a * 0,
        "negative": with_entry(-1.0),
        "column": lambda a, r: a[:, None],
    },
    "either": {f"all {x:g}": lambda a, r, x=x: np.full(len(a), x) for x in (1e-60, 1e-30, 1e30)},
}
LETTERS = np.array(["a", "b", "c"])
GROUPS: dict[str, dict[str, Thing]] = {
    "taken": {
        "words": lambda g, r: LETTERS[g],
        "list": lambda g, r: LETTERS[g].tolist(),
        "bytes": lambda g, r: LETTERS[g].astype("S"),
        "dates": lambda g, r: g.astype("M8[D]"),
        "category": lambda g, r: pd.Categorical(LETTERS[g], categories=list("abcd")),
        "tensor": lambda g, r: torch.from_numpy(g),
        "flags": lambda g, r: g > 0,
    },
    "refused": {
        "NaN in a list": lambda g, r: [np.nan if x == 1 else LETTERS[x] for x in g],
        "None in a list": lambda g, r: [None if x == 1 else LETTERS[x] for x in g],
        "NA": lambda g, r: pd.Series(LETTERS[g], dtype="string").mask(pd.Series(g) == 1),
        "NaN": lambda g, r: np.where(g == 1, np.nan, g),
        "NaT": lambda g, r: np.where(g == 1, np.datetime64("NaT"), g.astype("M8[D]")),
        "complex": lambda g, r: g + 1j,
        "masked": masked,
        "one too few": lambda g, r: g[:-1],
        "columns": lambda g, r: np.c_[g, g, g],
        "a word": lambda g, r: "batch",
    },
}
WRONG_PARAMETERS: dict[str, tuple] = {
    **dict.fromkeys(
        ("n_components", "E", "max_iter", "K", "num_inducing"), (0, -1, 1.5, "3", None, True)
    ),
    **dict.fromkeys(("batch_size", "y_batch_size"), (0, 2.5, True, "all", np.inf)),
    **dict.fromkeys(("learning_rate", "lengthscale", "sigma"), (0, -1, np.nan, np.inf, 1j, "a")),
    **dict.fromkeys(("spatial", "local", "multigroup", "shuffle"), ("yes", None, 2)),
    **dict.fromkeys(("mode", "training_mode", "kernel", "init", "optimizer"), ("x", 3, b"x", [])),
    "tol": (-1, np.nan, "a"),
    "scheduler_patience": (-1, 0.5),
    "random_state": (-1, 2**40, 1.0, "a"),
    "scale_pf": (0, -1, "x", np.nan),
}


def _twice(a: np.ndarray) -> sp.coo_matrix:
    """Counts of which each is stored as two entries."""
    S = sp.coo_matrix(a.astype(float))
    half = np.r_[S.data - 1, np.ones(S.nnz)]
    return sp.coo_matrix((half, (np.r_[S.row, S.row], np.r_[S.col, S.col])), a.shape)


def uses(random: Random) -> dict[str, Callable[..., list[np.ndarray]]]:
    """Functions of a table, places, groups and size factors."""
    A = table(random)
    flat = PNMF(2, max_iter=STEPS, random_state=0, **QUICK).fit(A)
    where = random.uniform(size=(N, 2))
    fast = {"n_components": 2, "max_iter": STEPS, "init": "random"}
    return {
        "PNMF": lambda X, s=None: of(
            PNMF(2, max_iter=STEPS, random_state=0, **QUICK).fit(X, size_factors=s)
        ),
        "fit": lambda X, s=None: of(pnmf_pyro.fit(X, size_factors=s, mode="lower-bound", **fast)),
        "space": lambda X, c=where, g=None: of(pnmf_pyro.fit(X, c, g, **fast)),
        "local": lambda X, c=where, g=None: of(pnmf_pyro.fit(X, c, g, local=True, K=4, **fast)),
        "transform": lambda X, s=None: [flat.transform(X, size_factors=s)],
        "score": lambda X, s=None: [np.array(flat.score(X, size_factors=s))],
        "transform_F": lambda X, s=None: [
            transform_F(X, flat.components_.T, mode="lower-bound", max_iter=STEPS, size_factors=s)
        ],
        "transform_W": lambda X, s=None: [transform_W(X, get_factors(flat), size_factors=s)],
        "initialize_factors": lambda X: list(initialize_factors(X, 2, "nndsvda", random_state=0)),
        "check": lambda X, c=None, g=None: [
            np.concatenate([one.observed for one in _check(flat, X, c, g).results])
        ],
        "select": lambda X, c=None, g=None: [
            pnmf_pyro.select_n_components(
                X, [1], coordinates=c, groups=g, n_seeds=2, random_state=0, max_iter=4
            ).deviance
        ],
    }


def _check(model: PNMF, X: object, c: object, g: object) -> Any:
    return pnmf_pyro.posterior_predictive_check(model, X, c, g, n_draws=3, random_state=0)


def cases() -> list[Case]:
    """All cases, of which a run takes some by its seed."""
    found = []

    def add(argument: str, kinds: dict[str, dict[str, Thing]], names: str, plain: Any) -> None:
        takers = {"X": None, "c": ("space", "local", "check"), "g": ("space", "local"), "s": None}

        def run(random: Random, make: Thing, right: str) -> Any:
            A, given = table(random), plain(random)
            functions = uses(random)
            wanted = takers[argument] or [
                name
                for name, function in functions.items()
                if argument in function.__code__.co_varnames[: function.__code__.co_argcount]
            ]
            function = functions[wanted[int(random.integers(len(wanted)))]]
            given = A if argument == "X" else given
            thing = make(given, random)
            others = () if argument == "X" else (A,)
            extra = {"c": random.uniform(size=(N, 2))} if argument == "g" else {}
            before = _frozen(thing)
            result = function(*others, **{**extra, argument: thing})
            assert _frozen(thing) == before, "what was given has changed"
            sparse_draws = "select" in function.__code__.co_names or right != "taken"
            number = given > 0 if str(getattr(thing, "dtype", "")) == "bool" else given
            same = None if sparse_draws or argument == "g" else number
            return result, same if same is None else function(*others, **{argument: same * 1.0})

        for right, things in kinds.items():
            for name, make in things.items():
                call = lambda random, make=make, right=right: run(random, make, right)  # noqa: E731
                found.append(Case(f"{argument}: {name}", right, names, call))

    add("X", TABLES, r"\bX\b|sample\(s\)|feature\(s\)|Negative values|omplex data", lambda r: None)
    add("c", PLACES, "coordinates|places", lambda r: r.uniform(1, 2, size=(N, 2)))
    add("s", FACTORS, "size_factors|first step", lambda r: r.uniform(0.5, 2, size=N))
    add("g", GROUPS, "groups", lambda r: np.arange(N) % 3)
    for name, values in WRONG_PARAMETERS.items():
        for value in values:

            def wrong(random: Random, name: str = name, value: object = value) -> Any:
                fit = PNMF if random.integers(2) else pnmf_pyro.fit
                given = {"n_components": 2, "max_iter": 4, name: value}
                return of(
                    PNMF(**given).fit(table(random))
                    if fit is PNMF
                    else pnmf_pyro.fit(table(random), **given)
                ), None

            found.append(Case(f"{name}={value!r}", "refused", rf"\b{name}\b", wrong))
    return found


def _frozen(thing: object) -> object:
    """What can be compared to tell that a thing has not changed."""
    if isinstance(thing, np.ndarray) and thing.dtype != object:
        return thing.tobytes()
    return copy.deepcopy(thing) if isinstance(thing, list | tuple | str) else None


def verdict(case: Case, seed: int) -> str:
    """Say what is wrong with a case; nothing where all is as it should be."""
    before = shared_state()
    heard: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            found, plain = case.run(np.random.default_rng(seed))
    except (ValueError, TypeError, FloatingPointError) as error:
        if case.right == "taken":
            return f"refused: {type(error).__name__}: {error}"
        if not re.search(case.names, str(error)):
            return f"unhelpful: {type(error).__name__}: {error}"
        found, plain = [], None
    else:
        if case.right == "refused":
            return "accepted"
    if (after := shared_state()) != before:
        return f"global state moved: {[name for name in after if after[name] != before[name]]}"
    said = [w for w in heard if "did not converge" not in str(w.message)]
    if not said and not all(np.isfinite(values).all() for values in found):
        return "not finite, without a warning"
    for values, expected in zip(found, plain or [], strict=False):
        size = np.abs(expected).max(initial=1e-30)
        if not np.allclose(values, expected, rtol=0.02, atol=0.01 * size):
            return "differs from what the same numbers give as a plain array"
    return ""
