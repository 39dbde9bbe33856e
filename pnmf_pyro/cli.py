"""The command line: pnmf-pyro fit, plot and demo."""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import NMF
from sklearn.metrics import mean_poisson_deviance

from pnmf_pyro import plotting
from pnmf_pyro.anndata_bridge import AnnDataKeys
from pnmf_pyro.counts import as_counts
from pnmf_pyro.data import check_counts, library_size_factors, thin_counts
from pnmf_pyro.distributions import mean_deviance
from pnmf_pyro.estimator import PNMF
from pnmf_pyro.files import (
    CountTable,
    check_results_path,
    read_counts,
    read_fit,
    write_results,
)
from pnmf_pyro.recipe import fit
from pnmf_pyro.report import check_report_path, write_report
from pnmf_pyro.results import SPATIAL_KEY
from pnmf_pyro.transforms import get_factors, get_loadings

TRAIN_FRACTION = 0.5
# Lowest expected test count that a prediction may claim; factorisations can predict exact zeros.
LOWEST_PREDICTION = 1e-3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Those of the process unless given.

    Returns
    -------
    int
        0 if all went well, 2 if the input or the options cannot be used.
    """
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            options.run(options)
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.stderr.write(f"pnmf-pyro: {error}\n")
        return 2
    return 0


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    sys.stderr.write(f"pnmf-pyro: warning: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pnmf-pyro", description="Probabilistic non-negative matrix factorisation of counts."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (_fit_command(commands), _demo_command(commands)):
        command.add_argument("--components", type=int, default=10, help="default: 10")
        command.add_argument("--seed", type=int, default=0, help="default: 0")
        command.add_argument("--quiet", action="store_true", help="no progress bar, no report")
    _plot_command(commands)
    return parser


def _fit_command(commands: Any) -> argparse.ArgumentParser:
    fitting = commands.add_parser(
        "fit",
        help="factorise a table of counts",
        description="Factorise a table of counts, samples by features, and write the factors, "
        "their uncertainty, the loadings, the settings and the ELBO history.",
    )
    fitting.add_argument(
        "counts", metavar="COUNTS", help=".h5ad, .npz (scipy sparse), .mtx, .csv, .tsv"
    )
    fitting.add_argument("--out", required=True, help="where to write results: .h5ad or .npz")
    fitting.add_argument("--layer", help="layer of an .h5ad file to take in place of X")
    fitting.add_argument("--transpose", action="store_true", help="COUNTS is features by samples")
    fitting.add_argument(
        "--size-factors",
        choices=("none", "total"),
        default="none",
        help="scale the rates of each sample by its total count (default: none)",
    )
    fitting.add_argument(
        "--spatial-key",
        default=SPATIAL_KEY,
        help="coordinates in obsm of an .h5ad file: the factors are then smooth in space "
        "(default: %(default)s, where it is there)",
    )
    fitting.add_argument("--no-space", action="store_true", help="leave coordinates alone")
    fitting.add_argument("--batch-key", help="column of obs of an .h5ad file with sections")
    fitting.add_argument(
        "--set",
        action="append",
        default=[],
        type=_assignment,
        metavar="NAME=VALUE",
        help="set any parameter of pnmf_pyro.PNMF, such as --set mode=expanded; may be repeated",
    )
    fitting.set_defaults(run=_fit)
    return fitting


def _plot_command(commands: Any) -> None:
    plot = commands.add_parser(
        "plot",
        help="draw a report on a fit",
        description="Draw maps, top features, loadings and the course of a fit that is in an .h5ad "
        "file, as fit writes it, or in a model saved by PNMF.save.",
    )
    plot.add_argument("fit", metavar="FIT", help=".h5ad with results, or .npz by PNMF.save")
    plot.add_argument("--out", "-o", required=True, help="where to write it: .png or .html")
    plot.add_argument("--key", default="pnmf", help="key_added of the fit (default: pnmf)")
    plot.add_argument("--unit", default="", help="unit of the coordinates, for scale bars")
    plot.set_defaults(run=_plot)


def _demo_command(commands: Any) -> argparse.ArgumentParser:
    demo = commands.add_parser(
        "demo",
        help="fit scikit-learn's digits and compare with other models",
        description="Fit the 1,797 x 64 pixel counts of scikit-learn's digits, print the ELBO and "
        "the deviance of held-out counts beside that of other models, and draw the components.",
    )
    demo.add_argument("--out", default=".", help="folder for the picture (default: here)")
    demo.set_defaults(run=_demo)
    return demo


def _assignment(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE, where VALUE is JSON or else a word."""
    name, equals, value = text.partition("=")
    if not equals or name not in PNMF().get_params():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE with a parameter of PNMF")
    if value == "None":
        return name, None
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _fit(options: argparse.Namespace) -> None:
    check_results_path(options.out)
    table = read_counts(options.counts, options.layer, options.transpose)
    s = None
    if options.size_factors == "total":
        s = library_size_factors(check_counts(table.X))
    coords, groups = _places(options, table)
    started = time.perf_counter()
    model = _model(
        options, table.X, coords=coords, groups=groups, size_factors=s, **dict(options.set)
    )
    seconds = time.perf_counter() - started
    write_results(options.out, model, table)
    _say(options)(
        f"{model.model_.N} samples x {model.model_.D} features, {model.n_components_} components\n"
        f"ELBO {model.elbo_:.6g} nats after {model.n_iter_} iterations, {seconds:.1f} s\n"
        f"deviance explained {_deviance_explained(model, table.X, s):.1%} "
        "(1 - deviance / deviance of a model with feature means only)\n"
        f"wrote {options.out}\n"
    )


def _places(options: argparse.Namespace, table: CountTable) -> tuple[Any, Any]:
    """Coordinates and groups of an .h5ad file, where there are any."""
    spatial_key = None if options.no_space else options.spatial_key
    keys = AnnDataKeys(None, spatial_key, options.batch_key)
    if table.annotation is not None:
        return keys.places(table.annotation)
    if keys != AnnDataKeys(None, spatial_key and SPATIAL_KEY):
        raise ValueError("--spatial-key and --batch-key are for .h5ad files; leave them out.")
    return None, None


def _plot(options: argparse.Namespace) -> None:
    check_report_path(options.out)
    write_report(read_fit(options.fit), options.out, key=options.key, unit=options.unit)
    sys.stdout.write(f"wrote {options.out}\n")


def _model(options: argparse.Namespace, X: Any, **parameters: Any) -> PNMF:
    chosen = {
        "n_components": options.components,
        "random_state": options.seed,
        "verbose": not options.quiet,
        **parameters,
    }
    return fit(X, **chosen)


def _say(options: argparse.Namespace) -> Callable[[str], object]:
    return (lambda text: None) if options.quiet else sys.stdout.write


def _deviance_explained(model: PNMF, X: Any, size_factors: np.ndarray | None) -> float:
    counts = as_counts(X)
    s = counts.values.new_ones(counts.shape[0], 1)
    if size_factors is not None:
        s *= torch.from_numpy(size_factors)[:, None]
    feature_means = counts.transposed_matmul(counts.values, torch.ones_like(s)) / s.sum()
    factors = torch.as_tensor(get_factors(model)).to(s) * s
    loadings = torch.as_tensor(get_loadings(model)).to(s)
    return 1 - mean_deviance(counts, factors, loadings) / mean_deviance(counts, s, feature_means)


def _demo(options: argparse.Namespace) -> None:
    folder = Path(options.out)
    say = _say(options)
    train, test = thin_counts(
        load_digits().data, TRAIN_FRACTION, np.random.RandomState(options.seed)
    )
    kept = train.sum(0) > 0
    train, test = train[:, kept], test[:, kept]
    model = _model(options, train)
    nmf = NMF(
        options.components, beta_loss="kullback-leibler", solver="mu", init="nndsvda", max_iter=1000
    )
    predictions = {
        "pnmf_pyro": model.inverse_transform(get_factors(model)),
        "scikit-learn NMF (Kullback-Leibler)": nmf.fit_transform(train) @ nmf.components_,
        "feature means only": np.broadcast_to(train.mean(0), train.shape),
    }
    say(
        f"digits: {train.shape[0]} samples x {train.shape[1]} features with counts, "
        f"{options.components} components\n"
        f"ELBO {model.elbo_:.6g} nats after {model.n_iter_} iterations\n"
        f"mean Poisson deviance of held-out counts ({1 - TRAIN_FRACTION:.0%}, by thinning):\n"
    )
    for name, mean in predictions.items():
        say(f"  {_held_out_deviance(test, mean):.4f}  {name}\n")
    components = np.zeros((options.components, len(kept)))
    components[:, kept] = model.components_
    try:
        path = _draw_digits(components, model.history_, folder)
        say(f"wrote {path}\n")
    except ImportError as error:
        say(f"no picture: {error}\n")


def _held_out_deviance(test: np.ndarray, mean: np.ndarray) -> float:
    expected = np.maximum(mean * (1 - TRAIN_FRACTION) / TRAIN_FRACTION, LOWEST_PREDICTION)
    return mean_poisson_deviance(test.ravel(), expected.ravel())


def _draw_digits(components: np.ndarray, history: Sequence[float], folder: Path) -> Path:
    figure = plotting.new_figure((9, 3.6))
    images, trace = figure.subfigures(1, 2, width_ratios=(1.6, 1))
    rows = -(-len(components) // 5)
    plotting.plot_component_images(components, (8, 8), images.subplots(rows, 5, squeeze=False))
    plotting.plot_elbo(history, trace.subplots())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "digits.png"
    figure.savefig(path, dpi=150)
    return path
