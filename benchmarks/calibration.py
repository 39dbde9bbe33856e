"""The report on calibration: python -m benchmarks.calibration [--simulations 500] [--out docs].

Tables are made by models of known loadings, for each prior, mode and overlap of loadings, and
log-factors inferred from them. The page says which inputs it was made from: a hash of the settings,
the loadings and the places, and one of the package.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import torch

import pnmf_pyro
from benchmarks.coverage import loadings
from pnmf_pyro import plotting
from pnmf_pyro.analysis.calibration import LEVELS, Calibration, calibrate
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors import LCGP, SVGP, GaussianPrior, Prior

PRIORS = ("independent", "SVGP", "LCGP")
MODES = ("expanded", "simple", "lower-bound")
OVERLAPS = (0.0, 0.2, 0.5)

# The overlap of which ranks are tested by many tables, and drawn.
TESTED = 0.2


@dataclass(frozen=True)
class Sizes:
    """Sizes of the simulated tables, and how the fields are."""

    samples: int = 20
    features: int = 20
    components: int = 2
    mean_count: float = 1.0
    kernel: str = "Matern32"
    lengthscale: float = 0.3
    neighbours: int = 10
    seed: int = 0


def inputs(sizes: Sizes, overlap: float) -> tuple[np.ndarray, np.ndarray]:
    """Loadings (D, L), and places (N, 2) in the unit square."""
    rng = np.random.default_rng(sizes.seed)
    W = loadings(sizes.features, sizes.components, overlap, sizes.mean_count, rng)
    return W.astype(np.float32), rng.uniform(size=(sizes.samples, 2))


def prior_of(name: str, sizes: Sizes, coordinates: np.ndarray) -> Prior:
    """A prior of known hyperparameters, with an inducing point at each place, or neighbours."""
    L = sizes.components
    if name == "independent":
        y = torch.empty(sizes.features, sizes.samples, device="meta")
        return GaussianPrior(y, L, 1.0, use_natural_gradients=True)
    places = Places(torch.from_numpy(coordinates))
    kernel = SpatialKernel(sizes.kernel, sizes.lengthscale, 1.0)
    if name == "SVGP":
        return SVGP(kernel, places, places, L, use_natural_gradients=True)
    prior = LCGP(kernel, places, L, K=sizes.neighbours, use_natural_gradients=True)
    prior.correlate()
    return prior


def cell(name: str, mode: str, overlap: float, sizes: Sizes, n_simulations: int) -> Calibration:
    """Calibrate one model."""
    W, coordinates = inputs(sizes, overlap)
    y = torch.empty(sizes.features, sizes.samples, device="meta")
    prior = prior_of(name, sizes, coordinates)
    model = PoissonFactorization(prior, y, sizes.components, "multiplicative", mode)
    model.W.assign(torch.from_numpy(W))
    return calibrate(model, n_simulations, random_state=sizes.seed + 1)


def hash_of_inputs(settings: dict) -> str:
    """Hash of the settings, and of the loadings and places that they make."""
    found = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for overlap in settings["overlaps"]:
        for array in inputs(Sizes(**settings["sizes"]), overlap):
            found.update(array.tobytes())
    return found.hexdigest()


def hash_of_package() -> str:
    """Hash of the sources of the package."""
    root, found = Path(pnmf_pyro.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()


Key = tuple[str, str, float]


def page(found: dict[Key, Calibration], settings: dict) -> str:
    """Return the report in Markdown."""
    sizes = Sizes(**settings["sizes"])
    head = ["prior", "mode", "overlap", "tables", *(f"{level:.0%}" for level in LEVELS), "p"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for (name, mode, overlap), one in found.items():
        shares = [one.coverage(level) for level in LEVELS]
        cells = [name, f"`{mode}`", f"{overlap:g}", str(one.n_simulations)]
        cells += [f"{share:.3f} ({error:.3f})" for share, error in shares]
        lines.append(f"| {' | '.join(cells)} | {one.p_value:.2g} |")
    return "\n".join(
        [
            "# Calibration over priors, modes and overlap",
            "",
            f"Tables of {sizes.samples} samples, {sizes.features} features and "
            f"{sizes.components} components, mean count {sizes.mean_count:g}, are drawn from "
            "models of known loadings and hyperparameters. Each mode infers their log-factors. "
            f"Fields have a {sizes.kernel} kernel of lengthscale {sizes.lengthscale:g} in the unit "
            "square. SVGP has an inducing point at each place, LCGP "
            f"{sizes.neighbours} neighbours.",
            "",
            "Columns of levels have the share of log-factors in central intervals, with its "
            "standard error over tables. p is the probability of ranks as far from uniform. It is "
            "over all components and the log-likelihood of a sample (see "
            "{mod}`pnmf_pyro.analysis.calibration`).",
            "",
            *lines,
            "",
            f"Ranks and coverage at an overlap of {TESTED:g}:",
            "",
            *(
                f"![{name}, {mode}](figures/{picture(name, mode)})"
                for name, mode, overlap in found
                if overlap == TESTED
            ),
            "",
            f"Made by `python -m benchmarks.calibration --simulations {settings['simulations']} "
            f"--others {settings['others']}`. Inputs have the SHA-256 "
            f"`{hash_of_inputs(settings)}`, the package `{hash_of_package()}`.",
            "",
        ]
    )


def picture(name: str, mode: str) -> str:
    """Name of the file with the picture of a prior and mode."""
    return f"calibration_{name.lower()}_{mode}.png"


def draw(one: Calibration, title: str, path: Path) -> None:
    """Write the picture of a calibration."""
    axes = plotting.plot_calibration(one)
    figure = axes[0].figure
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write calibration_report.md and its pictures, after each cell, so that a part is useful."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--simulations", type=int, default=500)
    parser.add_argument("--others", type=int, default=40, help="tables at other overlaps")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--samples", type=int, default=Sizes.samples)
    options = parser.parse_args(arguments)
    sizes = Sizes(samples=options.samples)
    settings = {
        "sizes": asdict(sizes),
        "overlaps": OVERLAPS,
        "simulations": options.simulations,
        "others": options.others,
    }
    (options.out / "figures").mkdir(parents=True, exist_ok=True)
    found: dict[Key, Calibration] = {}
    overlaps = sorted(OVERLAPS, key=lambda overlap: overlap != TESTED)
    for overlap, name, mode in product(overlaps, PRIORS, MODES):
        n = options.simulations if overlap == TESTED else options.others
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = found[name, mode, overlap] = cell(name, mode, overlap, sizes, n)
        if overlap == TESTED:
            title = f"{name}, {mode}, overlap {overlap:g}, {n} tables"
            draw(one, title, options.out / "figures" / picture(name, mode))
        in_order = dict(sorted(found.items(), key=lambda kv: (PRIORS.index(kv[0][0]), kv[0][1:])))
        (options.out / "calibration_report.md").write_text(page(in_order, settings))


if __name__ == "__main__":
    main()
