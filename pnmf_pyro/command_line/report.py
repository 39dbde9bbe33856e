"""Reports on one page: a fit, a check, a calibration, a choice of the number of components."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import numpy as np

from pnmf_pyro import plotting
from pnmf_pyro.analysis.calibration import LEVELS, Calibration
from pnmf_pyro.analysis.differential import differential_features
from pnmf_pyro.analysis.interpretation import contributions
from pnmf_pyro.analysis.predictive_checks import PredictiveCheck
from pnmf_pyro.analysis.selection import ComponentSelection
from pnmf_pyro.command_line.pages import Block, Page, Picture, Table, Text
from pnmf_pyro.estimator.anndata_bridge import settings
from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.estimator.results import Fit, Results, results_of
from pnmf_pyro.training.fitted import Fitted

# Columns of a table of marking features, and what they are called in a report.
MARKER_COLUMNS = {
    "component": "component",
    "feature": "feature",
    "against": "closest other",
    "mean": "log2 ratio",
    "sd": "sd",
    "lfsr": "lfsr",
}

# What the pictures of a fit show.
CAPTIONS = {
    "Factors": "How active a component is at each place. Twice the factor means twice the counts "
    "from the component. Each component has a scale of its own.",
    "Samples": "Which share of a sample's counts comes from each component. Columns sum to 1. "
    "Samples with the same strongest component stand together.",
    "Uncertainty of log-factors": "The standard deviation of the logarithm of a factor: 0.1 is "
    "about ten per cent of the factor.",
    "Features by specificity": "The features that tell a component from the others. Specificity is "
    "p log(p / q): p is the share of the component's counts that the feature has, q that of all "
    "components together.",
    "Loadings": "Which share of a feature's counts comes from each component. Rows sum to 1.",
    "Correlation of factors": "Components that are active in the same samples are red.",
    "ELBO": "It should be flat at the end. A line stands where a stage of the fit begins. Values "
    "of different stages are not to be compared.",
}

# What those of a check, a calibration, a choice and a comparison of features show.
CHECKED = (
    "Each point is a feature, a sample or a pair. On the line the model reproduces the data. Red "
    "points are beyond 95% of the tables of the model. A statistic of the whole table is a line, "
    "over bars that the tables of the model make."
)
CALIBRATED = (
    "Where the truth lay among draws of its posterior; bars at both ends mean too narrow "
    "intervals. The same for each quantity, minus what is right: in the grey band it is by chance. "
    "The share of the truth in intervals of each level, minus the level, with two standard errors."
)
CHOSEN = (
    "Lower is better at the left, higher at the right, where the band reaches from the worst to "
    "the best pair of fits. The dashed line is the number that the rule chooses."
)
MARKED = (
    "Each point is a feature. To the right it is more frequent than in the component that comes "
    "closest, by powers of two. Higher up that is surer; the dotted line is the rate asked for."
)

# Features, samples or pairs that are named for each statistic that a model misses.
NAMED = 8


def fit_report(
    fit: Fit, *, key: str = "pnmf", unit: str = "", source: str = "", y_down: bool = True
) -> Page:
    """Return a page on a fit: top features, loadings, maps and ELBO where it has them.

    Parameters
    ----------
    fit : PNMF, AnnData, ModelFit or PoissonFactorization
        Fit to describe, see :func:`~pnmf_pyro.estimator.results.results_of`.
    key : str
        `key_added` of the fit, for AnnData.
    unit : str
        Unit of the coordinates, for scale bars.
    source : str
        Name of the file that holds the fit.
    y_down : bool
        Whether the second coordinate points down, as in images; north is up if not.

    Examples
    --------
    >>> import numpy as np
    >>> import pnmf_pyro
    >>> from pnmf_pyro.command_line.report import fit_report
    >>> X = np.random.default_rng(0).poisson(5, size=(60, 20))
    >>> page = fit_report(pnmf_pyro.fit(X, n_components=2))
    >>> [block.heading for block in page.blocks]
    ['The fit', 'Samples', 'Features by specificity', 'Loadings', 'Correlation of factors', 'ELBO']
    >>> page.write("fit.html")  # doctest: +SKIP
    """
    found = results_of(fit, key)
    known = getattr(found, "settings", None)  # of a fit in an AnnData object
    if known is None and not isinstance(fit, Results):
        known = settings(cast(Fitted, fit))
    summary = _numbers(found, known or {}) | _origin(known or {}, source)
    drawn: dict[str, Callable] = {
        "Features by specificity": partial(plotting.plot_top_features, found, by="specificity"),
        "Loadings": partial(plotting.plot_loadings, found),
        "Correlation of factors": partial(plotting.plot_factor_correlation, found),
    }
    if found.coordinates is not None and found.coordinates.shape[1] == 2:
        maps = {
            "Factors": partial(plotting.plot_factors, found, unit=unit, y_down=y_down),
            "Uncertainty of log-factors": partial(
                plotting.plot_uncertainty, found, unit=unit, y_down=y_down
            ),
        }
        drawn = maps | drawn
    else:
        drawn = {"Samples": partial(plotting.plot_samples, found)} | drawn
    if found.elbo_history is not None:
        drawn["ELBO"] = partial(plotting.plot_elbo, found)
    table = Table("The fit", {"quantity": list(summary), "value": list(summary.values())})
    pictures = [Picture(name, draw, CAPTIONS[name]) for name, draw in drawn.items()]
    return Page("Poisson factorisation", [table, *pictures])


def _numbers(found: Results, known: Mapping[str, Any]) -> dict[str, str]:
    """What there is to say of a fit in numbers, by name."""
    summary = {name: str(value) for name, value in found.summary().items()}
    if "elbo" in known:  # that of the whole fit, as the command fit says it
        summary.pop("ELBO at the last step (nats)", None)
        summary["ELBO (nats)"] = f"{known['elbo']:.6g} ± {known['elbo_se']:.2g}"
    shares = contributions(found).sum(0)
    summary["share of counts, by component"] = ", ".join(f"{s:.0%}" for s in shares / shares.sum())
    return summary | {"size factors": "yes" if np.ptp(found.size_factors) else "none"}


def _origin(known: Mapping[str, Any], source: str) -> dict[str, str]:
    """Where a fit comes from and how it was made, by name."""
    parameters = known.get("parameters", {})
    learned = known.get("hyperparameters", {})
    found = {
        "file": source,
        "fitted by pnmf_pyro": known.get("version", ""),
        "seed": known.get("seed", parameters.get("random_state", "")),
        "likelihood": parameters.get("likelihood", ""),
        "column of sections": known.get("batch_key", ""),
        "kernel": known.get("kernel", ""),
    }
    if "lengthscale" in learned:
        lengths = np.atleast_1d(np.asarray(learned["lengthscale"], dtype=float))
        found["lengthscales"] = ", ".join(f"{one:.4g}" for one in lengths)
    return {name: str(value) for name, value in found.items() if str(value)}


def check_report(check: PredictiveCheck) -> Page:
    """Return a page on a predictive check: verdict, statistics, and what is farthest off."""
    return Page(
        f"{check.kind.capitalize()} predictive check",
        [
            *check_words(check),
            Picture("Data and model", partial(plotting.plot_predictive_check, check), CHECKED),
            *_farthest_off(check),
        ],
    )


def check_words(check: PredictiveCheck) -> list[Text | Table]:
    """Return the verdict of a predictive check and the table of its statistics."""
    rows = [one.row for one in check.results]
    columns = {
        "statistic": [row["statistic"].replace("_", " ") for row in rows],
        "of each": [row["of"] for row in rows],
        "data": [row["observed"] for row in rows],
        "model": [row["replicated"] for row in rows],
        "5%": [row["replicated_5%"] for row in rows],
        "95%": [row["replicated_95%"] for row in rows],
        "mean z": [round(row["mean_z"], 2) for row in rows],
        "p": [round(row["p_value"], 4) for row in rows],
    }
    return [Text("Verdict", check.verdict()), Table("Statistics", columns)]


def _farthest_off(check: PredictiveCheck) -> list[Block]:
    """What is farthest from the model, for each flagged statistic that has several numbers."""
    explained = (
        "Numbers that are farthest from those of the model's tables; z is the distance from their "
        "mean in standard deviations."
    )
    blocks: list[Block] = [Text("Farthest off", explained)]
    for one in check.flagged:
        if len(one.observed) == 1:
            continue
        chosen = np.argsort(-np.abs(one.z), kind="stable")[:NAMED]
        name, of = one.statistic.name.replace("_", " "), one.statistic.of
        columns = {
            of: [_name(one.labels[i]) for i in chosen],
            "data": one.observed[chosen],
            "model": one.replicated[:, chosen].mean(0, dtype=np.float64),
            "z": one.z[chosen].round(1),
        }
        blocks.append(Table(f"{name} of each {of}", columns))
    return blocks if len(blocks) > 1 else []


def _name(label: object) -> str:
    """A label, or those of a pair."""
    return " – ".join(map(str, label)) if isinstance(label, tuple) else str(label)


def calibration_report(found: Calibration) -> Page:
    """Return a page on a calibration: verdict, coverage, and where the truth lay."""
    picture = Picture("Ranks and coverage", partial(plotting.plot_calibration, found), CALIBRATED)
    return Page("Calibration", [*calibration_words(found), picture])


def calibration_words(found: Calibration) -> list[Text | Table]:
    """Return the verdict of a calibration and the table of coverage."""
    table = found.table()
    columns: dict[str, list] = {"component": list(np.asarray(table["component"]))}
    for level in (f"{level:.0%}" for level in LEVELS):
        shares = zip(np.asarray(table[level]), np.asarray(table[f"se_{level}"]), strict=True)
        columns[level] = [f"{share:.3f} ({error:.3f})" for share, error in shares]
    columns["mean z"] = [round(float(z), 2) for z in np.asarray(table["mean_z"])]
    columns["sd z"] = [round(float(z), 2) for z in np.asarray(table["sd_z"])]
    columns["p of ranks"] = [round(float(p), 4) for p in np.asarray(table["p_value"])]
    return [Text("Verdict", found.verdict()), Table("Share that intervals hold (s.e.)", columns)]


def selection_report(selection: ComponentSelection) -> Page:
    """Return a page on a choice of the number of components: curves, table and what they tell."""
    table, summary = selection_words(selection)
    curves = Picture("Curves", partial(plotting.plot_selection, selection), CHOSEN)
    return Page("Number of components", [summary, curves, table])


def selection_words(selection: ComponentSelection) -> tuple[Table, Text]:
    """Return the table of a choice and what it tells in words."""
    columns = {name.replace("_", " "): list(values) for name, values in selection.columns.items()}
    return Table("Numbers tried", columns), Text("What the curves tell", selection.summary())


def markers_report(model: PNMF, lfsr: float, n: int) -> Page:
    """Return a page on the features that mark each component: volcano plots and their table."""
    plots = Picture("Log-ratios", partial(plotting.plot_volcano, model, lfsr=lfsr), MARKED)
    return Page("Features of components", [plots, markers_table(model, lfsr, n)])


def markers_table(model: PNMF, lfsr: float, n: int) -> Table:
    """Return the first n features that are surely more frequent in a component than elsewhere."""
    table = differential_features(model)
    columns = {name: np.asarray(table[name]) for name in MARKER_COLUMNS}
    sure = np.flatnonzero((columns["lfsr"] < lfsr) & (columns["mean"] > 0))
    sure = sure[np.lexsort((-columns["mean"][sure], columns["component"][sure]))]
    starts = np.searchsorted(columns["component"][sure], columns["component"][sure])
    sure = sure[np.arange(len(sure)) - starts < n]
    heading = f"More frequent than in any other component, lfsr < {lfsr:g}"
    return Table(heading, {MARKER_COLUMNS[k]: v[sure] for k, v in columns.items()})
