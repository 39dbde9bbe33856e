"""Fits that are stopped and go on, and whether they find the same bits."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.estimator.checkpoints import Checkpoint

random = np.random.default_rng(0)
N, D, L = 70, 12, 2
PLACES = random.uniform(size=(N, 2)) * 10
X = random.poisson(np.exp(np.sin(PLACES)) @ random.gamma(0.7, size=(2, D)) * 2)
LABELS = np.arange(N) % 3

GRADIENTS = {"training_mode": "standard", "loadings_mode": "softplus", "mode": "expanded", "E": 3}
LOCAL = {"coords": PLACES, "local": True, "K": 8}
FEW = {"coords": PLACES, "num_inducing": 30, "stages": None}
BATCHES = {"batch_size": 35, "E": 3}

# What is fitted, by name: kinds of priors, steps, schedules and likelihoods.
FITS = {
    "non-spatial": {},
    "float64 and hidden entries": {"mask": random.uniform(size=X.shape) < 0.9},
    "gradients": GRADIENTS,
    "plateau": {**GRADIENTS, "scheduler": "plateau", "scheduler_patience": 2, "optimizer": "NAdam"},
    "minibatches": BATCHES,
    "minibatches of features": {**BATCHES, "y_batch_size": 5},
    "negative binomial": {"likelihood": "negative-binomial", "max_iter": 90},
    "minibatches of a negative binomial": {**BATCHES, "likelihood": "negative-binomial"},
    "chosen likelihood": {"likelihood": "auto"},
    "effects": {"batches": LABELS, "size_factors": "total"},
    "minibatches with effects": {**BATCHES, "batches": LABELS},
    "SVGP": {"coords": PLACES},
    "SVGP with few inducing points": FEW,
    "minibatches of an SVGP": {**FEW, **BATCHES},
    "LCGP": LOCAL,
    "LCGP by gradients": {**LOCAL, **GRADIENTS},
    "LCGP beside others": {**LOCAL, "non_spatial_components": 1, "neighbors": "probabilistic"},
    "groups": {**LOCAL, "groups": LABELS},
}


class Stop(Exception):
    """A fit is stopped."""


def fit(name: str, **more: object) -> PNMF:
    """Fit one of :data:`FITS`."""
    counts = X.astype("f8" if name.startswith("float64") else "f4")
    given = {"n_components": L, "max_iter": 50, **FITS[name], **more}
    return pnmf_pyro.fit(counts, **given)


def writes(call: Callable[[], object], monkeypatch, stop_at: int | None = None) -> int:
    """Say how often a call writes a checkpoint; or write one of them alone, and stop there."""
    keep, done = Checkpoint.keep, []

    def counted(self, state) -> None:
        done.append(1)
        if stop_at is None or len(done) == stop_at:
            keep(self, state)
        if len(done) == stop_at:
            raise Stop

    with monkeypatch.context() as patch, suppress(Stop):
        patch.setattr(Checkpoint, "keep", counted)
        call()
    return len(done)


def differing(one: PNMF, other: PNMF) -> list[str]:
    """Names of what two fits do not have in the same bits."""
    a, b = one.model_.state_dict(), other.model_.state_dict()
    found = [name for name in a.keys() | b.keys() if name not in a or name not in b]
    found += [k for k in a.keys() & b.keys() if not torch.equal(a[k], b[k])]
    for name in ("history_", "elbo_", "elbo_se_", "likelihood_", "likelihood_densities_"):
        if getattr(one, name) != getattr(other, name):
            found.append(name)
    return found + ["stages"] * (one.history_.stages != other.history_.stages)


def stopped(path: Path, name: str, at: int, monkeypatch) -> None:
    """Stop a fit right after the checkpoint of that number, which is the one that is written."""
    path.unlink(missing_ok=True)
    assert writes(lambda: fit(name, checkpoint=path, every=0), monkeypatch, at) == at
