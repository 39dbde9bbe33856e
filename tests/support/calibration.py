"""How often intervals of q(F) hold the F that made the counts.

`python -m tests.support.calibration` prints the tables.
"""

from __future__ import annotations

import numpy as np
import torch

import pnmf_pyro
from pnmf_pyro.data.places import Places
from pnmf_pyro.estimator.recipe import CLOSER
from pnmf_pyro.estimator.stages import LearnHyperparameters
from pnmf_pyro.priors.joint import posterior_of
from pnmf_pyro.training.hyperparameters import CRITERIA
from pnmf_pyro.transforms import transform_F
from tests.support import dense_fields

MODES = ("expanded", "simple", "lower-bound")


def separated_loadings(
    D: int, L: int, overlap: float, mean: float, rng: np.random.Generator
) -> np.ndarray:
    """Each feature belongs to one component, but for a share `overlap` spread over all."""
    W = (1 - overlap) * np.eye(L)[np.arange(D) % L] + overlap * rng.dirichlet(np.ones(L), D)
    W *= rng.gamma(5, 1 / 5, (D, 1))
    return W * mean / (W.sum(1).mean() * np.exp(0.5))


def coverage(
    mode: str, overlap: float, mean: float, seed: int = 7, N: int = 1000, joint: bool = True
) -> float:
    """Share of F in the central 90% intervals that `transform_F` gives, W being known.

    N samples of 60 features and three components; `mean` is that of the counts.
    """
    rng = np.random.default_rng(seed)
    W = separated_loadings(60, 3, overlap, mean, rng)
    F = rng.normal(size=(N, 3))
    prior = transform_F(rng.poisson(np.exp(F) @ W.T), W, mode=mode, return_prior=True)
    q = (posterior_of(prior) if joint else prior).marginal()
    z = (F.T - q.loc.detach().numpy()) / q.scale.detach().numpy()
    return float((np.abs(z) < 1.6449).mean())


def coverage_at_new_places(seed: int, criterion: str, N: int = 300, held_out: int = 100) -> float:
    """Share of F in the central 90% intervals at places that the fit has not seen.

    Fields of three components with loadings of their own; loadings, level and hyperparameters are
    learned. The levels of a component and of its loadings trade off, so they are matched first.
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(size=(N + held_out, 2))
    K = dense_fields.covariance("Matern32", x, x, 0.3, 1.0)
    tril = np.linalg.cholesky(K + 1e-9 * np.eye(len(x)))
    F = tril @ rng.normal(size=(len(x), 3))
    W = separated_loadings(60, 3, 0.0, 2.0, rng)
    X = rng.poisson(np.exp(F) @ W.T)
    stages = [
        LearnHyperparameters(criterion) if isinstance(stage, LearnHyperparameters) else stage
        for stage in CLOSER
    ]
    fit = pnmf_pyro.fit(X[:N], x[:N], n_components=3, stages=stages, tol=1e-5, max_iter=3000)
    owner = np.abs(np.corrcoef(fit.components_, W.T)[:3, 3:]).argmax(1)
    truth = F[:, owner].T
    level = np.log(fit.components_.sum(1) / W.sum(0)[owner])
    q = fit.model_.prior.at(Places(torch.from_numpy(x[N:]))).marginal()
    z = (truth[:, N:] - level[:, None] - q.loc.numpy()) / q.scale.numpy()
    return float((np.abs(z) < 1.6449).mean())


def main() -> None:
    print("| mean count | overlap | " + " | ".join(f"`{mode}`" for mode in MODES) + " |")
    print("| --- | --- |" + " --- |" * len(MODES))
    for mean in (0.2, 1.0, 5.0):
        for overlap in (0.0, 0.05, 0.2, 0.5, 0.8):
            found = [f"{coverage(mode, overlap, mean):.3f}" for mode in MODES]
            print(f"| {mean:g} | {overlap:g} | " + " | ".join(found) + " |", flush=True)
    print("\n| criterion | at places not seen, five seeds |\n| --- | --- |")
    for criterion in CRITERIA:
        found = [f"{coverage_at_new_places(seed, criterion):.3f}" for seed in range(5)]
        print(f"| `{criterion}` | {', '.join(found)} |", flush=True)


if __name__ == "__main__":
    main()
