"""pnmf-pyro demo: scikit-learn's digits, beside simpler models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.decomposition import NMF

from pnmf_pyro import plotting
from pnmf_pyro.analysis.hold_out import thin_counts
from pnmf_pyro.command_line.exits import Exit
from pnmf_pyro.command_line.options import say
from pnmf_pyro.data.atomic import replacing
from pnmf_pyro.estimator.fit import fit
from pnmf_pyro.models.deviance import deviance
from pnmf_pyro.transforms import get_factors

TRAIN_FRACTION = 0.5
# Lowest expected test count that a prediction may claim; factorisations can predict exact zeros.
LOWEST_PREDICTION = 1e-3


def run(options: argparse.Namespace) -> Exit:
    """Fit, compare and draw."""
    random = np.random.RandomState(options.seed)
    train, test = thin_counts(load_digits().data, TRAIN_FRACTION, random)
    kept = train.sum(0) > 0
    train, test = train[:, kept], test[:, kept]
    L, seed, shown = options.components, options.seed, not options.quiet
    model = fit(train, n_components=L, random_state=seed, verbose=shown)
    nmf = NMF(L, beta_loss="kullback-leibler", solver="mu", init="nndsvda", max_iter=1000)
    predictions = {
        "pnmf_pyro": model.inverse_transform(get_factors(model)),
        "scikit-learn NMF (Kullback-Leibler)": nmf.fit_transform(train) @ nmf.components_,
        "feature means only": np.broadcast_to(train.mean(0), train.shape),
    }
    say(
        options,
        f"digits: {train.shape[0]} samples x {train.shape[1]} features with counts, "
        f"{L} components\n"
        f"ELBO {model.elbo_:.6g} ± {model.elbo_se_:.2g} nats after {model.n_iter_} iterations\n"
        f"mean Poisson deviance of held-out counts ({1 - TRAIN_FRACTION:.0%}, by thinning):",
    )
    for name, mean in predictions.items():
        expected = np.maximum(mean * (1 - TRAIN_FRACTION) / TRAIN_FRACTION, LOWEST_PREDICTION)
        say(options, f"  {deviance(test, expected):.4f}  {name}")
    components = np.zeros((L, len(kept)))
    components[:, kept] = model.components_
    try:
        say(options, f"wrote {_draw_digits(components, model.history_, Path(options.out))}")
    except ImportError as error:
        say(options, f"no picture: {error}")
    return Exit.FINE


def _draw_digits(components: np.ndarray, history: Sequence[float], folder: Path) -> Path:
    figure = plotting.new_figure((9, 3.6))
    images, trace = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.6, 1))[0]
    rows = -(-len(components) // 5)
    plotting.plot_component_images(components, (8, 8), images.subplots(rows, 5, squeeze=False))
    plotting.plot_elbo(history, trace.subplots())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "digits.png"
    with replacing(path) as part:
        figure.savefig(part, format="png", dpi=150)
    return path
