"""pnmf-pyro check: compare the data with tables that the fitted model makes."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np

from pnmf_pyro.analysis.predictive_checks import (
    FLAGGED,
    PredictiveCheck,
    posterior_predictive_check,
)
from pnmf_pyro.command_line import options as shared
from pnmf_pyro.command_line.count_table import CountTable
from pnmf_pyro.command_line.exits import Exit
from pnmf_pyro.command_line.files import read_model
from pnmf_pyro.command_line.pages import check_report_path
from pnmf_pyro.command_line.report import check_report, check_words
from pnmf_pyro.estimator.pnmf import PNMF


def run(options: argparse.Namespace) -> Exit:
    """Check, say what was found, and write it."""
    fewest = round(1 / FLAGGED)
    if options.draws < fewest:
        raise ValueError(
            f"--draws must be at least {fewest}, since the smallest p-value of n tables is "
            f"1 / (n + 1) and p < {FLAGGED} is flagged; got {options.draws}."
        )
    if options.out:
        check_report_path("--out", options.out)
    model, table = read_model(options.model), shared.read_table(options)
    _check_features(model, table)
    _check_mask(model, table)
    coords, groups = (None, None) if model.spatial else shared.places(options, table)
    check = posterior_predictive_check(
        model,
        table.X,
        coords,
        groups,
        n_draws=options.draws,
        random_state=options.seed,
        verbose=not options.quiet,
    )
    check = _with_sample_names(check, table)
    shared.say(options, "\n\n".join(map(str, check_words(check))))
    if options.out:
        shared.write_page(options, check_report(check), options.out)
    return Exit.LOOK if check.flagged else Exit.FINE


def _with_sample_names(check: PredictiveCheck, table: CountTable) -> PredictiveCheck:
    """Call samples what the file calls them, which the counts alone do not know."""
    if not table.sample_names:
        return check
    named = [
        replace(one, labels=table.sample_names) if one.statistic.of == "sample" else one
        for one in check.results
    ]
    return replace(check, results=named)


def _check_mask(model: PNMF, table: CountTable) -> None:
    """Raise a ValueError where a mask hides what the fit observed."""
    if table.mask is None:
        return  # what the fit did not observe, the model knows
    if (hidden := model.model_.exposure.hidden) is None:
        more = np.size(table.mask) - np.count_nonzero(table.mask)
    else:
        more = int((~table.mask & (hidden.numpy().toarray() == 0)).sum())
    if more:
        raise ValueError(
            f"--mask must be that of the fit; it hides {more} entries that the fit observed."
        )


def _check_features(model: PNMF, table: CountTable) -> None:
    """Raise a ValueError if model and counts name their features differently."""
    known = getattr(model, "feature_names_in_", None)
    if known is None or table.feature_names is None or len(known) != len(table.feature_names):
        return  # other shapes are refused with the counts
    other = np.flatnonzero(np.asarray(table.feature_names, dtype=object) != known)
    if len(other):
        first = other[0]
        raise ValueError(
            f"COUNTS must have the features of the fit in their order; {len(other)} of "
            f"{len(known)} differ, the first is {table.feature_names[first]!r} where the fit has "
            f"{known[first]!r}. Give the file that was fitted."
        )
