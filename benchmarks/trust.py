"""What a session can do to a fit: odd calls, damaged files, interrupts, two threads at once."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.transforms import factor_samples, get_factors
from tests.support import damaged_models, damaged_tables
from tests.support.fuzz import cases, verdict
from tests.support.interrupts import interrupted, same_attributes, shared_state

Work = Callable[[], np.ndarray]


def fuzz(options: argparse.Namespace) -> None:
    """Make every odd call `repeats` times, each with random numbers of its own."""
    every = cases()
    for seed in range(options.repeats):
        began, bad = time.perf_counter(), {}
        for number, case in enumerate(every):
            if wrong := verdict(case, seed * len(every) + number):
                bad[case.name] = wrong
        seconds = round(time.perf_counter() - began)
        _say(seed=seed, cases=len(every), seconds=seconds, bad=bad)


def damage(options: argparse.Namespace) -> None:
    """Change files of models and of counts at random, each kind `repeats` times."""
    warnings.simplefilter("ignore")
    found: dict[str, int] = {"refused": 0, "usable": 0}
    bad: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        models, *data = damaged_models.saved_models(folder)
        tables = damaged_tables.whole_files(folder)
        kinds = [
            *((name, models[name], damaged_models.CHANGES, "model.npz") for name in models),
            *((name, tables[name], damaged_tables.CHANGES, name) for name in damaged_tables.NAMES),
        ]
        for seed in range(options.repeats):
            for number, (name, whole, changes, file) in enumerate(kinds):
                for change in changes:
                    random = np.random.default_rng([seed, number, changes.index(change)])
                    (folder / file).write_bytes(change(whole, random))
                    try:
                        if name in models:
                            refused = damaged_models.use(folder / file, *data) is None
                        else:
                            refused = damaged_tables.refused_or_usable(folder / file)
                        found["refused" if refused else "usable"] += 1
                    except Exception as error:  # whatever a file leads to that it should not
                        bad[f"{name}, {change.__name__}, seed {seed}"] = repr(error)[:200]
    _say(**found, bad=bad)


def interrupts(options: argparse.Namespace) -> None:
    """Interrupt fits and refits `repeats` times; count those that left damage."""
    warnings.simplefilter("ignore")
    random = np.random.default_rng(0)
    X, places = random.poisson(3.0, (60, 12)), random.uniform(size=(60, 2))
    model = PNMF(3, max_iter=20, random_state=0).fit(X)
    expected = model.components_.copy()
    held, before = vars(model.set_params(max_iter=10**6, tol=0)).copy(), shared_state()
    calls = {
        "refit": lambda: model.fit(X[:40]),
        "fit": lambda: pnmf_pyro.fit(X, n_components=3, tol=0, max_iter=10**6),
        "in space": lambda: pnmf_pyro.fit(X, places, n_components=3, tol=0, max_iter=10**6),
        "check": lambda: pnmf_pyro.posterior_predictive_check(model, X, n_draws=10**5),
    }
    counts = {"interrupted": 0, "damaged": 0}
    for number in range(options.repeats):
        call = list(calls.values())[number % len(calls)]
        counts["interrupted"] += interrupted(call, random.uniform(0, 0.5))
        again = PNMF(3, max_iter=20, random_state=0).fit(X).components_
        whole = shared_state() == before and same_attributes(model, held)
        counts["damaged"] += not (whole and np.array_equal(again, expected))
    _say(calls=options.repeats, **counts)


def threads(options: argparse.Namespace) -> None:
    """Run `repeats` pairs of fits in two threads; count those that are the bits of one alone."""
    warnings.simplefilter("ignore")
    random = np.random.default_rng(0)
    X, places = random.poisson(3.0, (60, 12)), random.uniform(size=(60, 2))
    model = PNMF(3, max_iter=50, random_state=0).fit(X)
    kinds: list[Work] = [
        lambda: PNMF(3, max_iter=50, random_state=0).fit(X).components_,
        lambda: get_factors(pnmf_pyro.fit(X, n_components=3, max_iter=30)),
        lambda: get_factors(pnmf_pyro.fit(X, places, n_components=3, max_iter=12)),
        lambda: np.asarray(factor_samples(model, 20, random_state=0)),
    ]
    alone, before = [work() for work in kinds], shared_state()
    same = 0
    for number in range(options.repeats):
        pair = [number % len(kinds), (number // len(kinds)) % len(kinds)]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda kind: kinds[kind](), pair))
        same += all(np.array_equal(one, alone[k]) for one, k in zip(found, pair, strict=True))
    _say(pairs=options.repeats, same_bits=same, state_moved=shared_state() != before)


def _say(**found: object) -> None:
    print(json.dumps(found), flush=True)
