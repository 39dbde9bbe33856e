"""pnmf-pyro fit: factorise a table of counts."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time

import numpy as np
import torch

from pnmf_pyro.command_line import options as shared
from pnmf_pyro.command_line.count_table import CountTable
from pnmf_pyro.command_line.effects import effects
from pnmf_pyro.command_line.exits import Exit
from pnmf_pyro.command_line.outputs import check_results_path, write_results
from pnmf_pyro.command_line.pages import check_report_path
from pnmf_pyro.command_line.processes import joined
from pnmf_pyro.command_line.report import fit_report
from pnmf_pyro.command_line.stored import fit_in_store, stays_in_store
from pnmf_pyro.data.checks import check_output_path
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.parallel import Ranks
from pnmf_pyro.estimator.checkpoints import checkpoint_of
from pnmf_pyro.estimator.fit import fit, plan
from pnmf_pyro.estimator.pnmf import PNMF
from pnmf_pyro.models.deviance import deviance
from pnmf_pyro.transforms import get_factors, get_loadings


def run(options: argparse.Namespace) -> Exit:
    """Fit, write and say how it went; of the processes of torchrun the first writes and speaks."""
    with joined() as ranks:
        options.quiet = options.quiet or not ranks.leads
        return _run(options, ranks)


def _run(options: argparse.Namespace, ranks: Ranks) -> Exit:
    if options.plan:
        return _plan(options)
    _check_checkpoint(options)
    if stays_in_store(options):
        return fit_in_store(options, ranks)
    if options.out is None:
        raise ValueError("--out must name where to write results; or give --plan, to fit nothing.")
    check_results_path(options)  # before the fit takes its time
    if options.save_model:
        check_output_path("--save-model", options.save_model, (".npz",))
    if options.report:
        check_report_path("--report", options.report)
    table = shared.read_table(options)
    coords, groups = shared.places(options, table)
    chosen = {"n_components": options.components, **shared.settings(options, table)}
    chosen |= effects(options, table)
    chosen |= {"checkpoint": options.checkpoint, "every": options.every}
    started = time.perf_counter()
    model, settled = shared.heard(lambda: fit(table.X, coords, groups, **chosen))
    seconds = time.perf_counter() - started
    if not ranks.leads:
        return Exit.FINE
    if table.feature_names:
        model.feature_names_in_ = np.asarray(table.feature_names, dtype=object)
    written, complete = _keep(options, model, table)
    explained = _deviance_explained(model, table)
    learned = [name for name in ("batches", "covariates") if getattr(options, name) is not None]
    beside = f"\neffects of {' and '.join(learned)} on each feature" * bool(learned)
    shared.say(
        options,
        f"{model.model_.N} samples x {model.model_.D} features, {model.n_components_} components, "
        f"{'in' if model.spatial else 'without'} space\n"
        f"ELBO {model.elbo_:.6g} ± {model.elbo_se_:.2g} nats after {model.n_iter_} iterations, "
        f"{seconds:.1f} s\n"
        f"deviance explained {explained:.1%} "
        f"(1 - deviance / deviance of a model with feature means only){beside}\n"
        f"wrote {', '.join(written)}",
    )
    return Exit.FINE if settled and complete else Exit.LOOK


def _check_checkpoint(options: argparse.Namespace) -> None:
    """Refuse what cannot be a checkpoint, and say so where there is one."""
    checkpoint_of(options.checkpoint, options.every)
    if options.checkpoint and os.path.exists(options.checkpoint) and not options.quiet:
        sys.stderr.write(f"pnmf-pyro: {options.checkpoint} is there: the fit goes on from it\n")


def _plan(options: argparse.Namespace) -> Exit:
    """Say what the fit would do."""
    table = shared.read_table(options)
    coords, groups = shared.places(options, table)
    chosen = {"n_components": options.components, **shared.settings(options, table)}
    chosen |= effects(options, table)
    shared.say(options, str(plan(table.X, coords, groups, **chosen)))
    return Exit.FINE


def _keep(options: argparse.Namespace, model: PNMF, table: CountTable) -> tuple[list[str], bool]:
    """Write the model, the results, the report; return what is written, and if nothing is left out.

    What is left out is warned of. Without results the model is kept all the same.
    """
    written: list[str] = []
    left_out: list[str] = []
    if options.save_model:
        try:
            model.save(options.save_model)
            written.append(options.save_model)
        except (OSError, ValueError) as error:
            left_out.append(f"the model is not saved: {error}")
    try:
        files, odd = write_results(options, model, table)
        written = [*map(str, files), *written]
        if odd:
            left_out.append(f"{options.out} is without {', '.join(odd)}, which cannot be written")
    except Exception:
        kept = written[0] if written else _rescue(model)
        shared.show_warning(f"no results, but the fitted model is in {kept}; PNMF.load reads it")
        raise
    if options.report:
        try:
            page = fit_report(model, source=str(options.out or ""), **shared.map_style(options))
            page.write(options.report, options.command)
            written.append(options.report)
        except Exception as error:  # a plot must not cost the results
            left_out.append(f"the report is not written: {error}; results are in {options.out}")
    for one in left_out:
        shared.show_warning(one)
    return written, not left_out


def _rescue(model: PNMF) -> str:
    """Save a model where there is room, and return where."""
    path = os.path.join(tempfile.mkdtemp(prefix="pnmf-pyro-"), "model.npz")
    model.save(path)
    return path


def _deviance_explained(model: PNMF, table: CountTable) -> float:
    counts, mask = as_counts(table.X), table.mask
    s = counts.values.new_ones(counts.shape[0], 1)
    if model.model_.size_factors is not None:
        s *= model.model_.size_factors.cpu()[:, None]
    observed = s.sum() if mask is None else torch.from_numpy(mask.T.astype(s.numpy().dtype)) @ s
    totals = counts.transposed_matmul(counts.values, torch.ones_like(s))
    feature_means = totals / observed.clamp_min(torch.finfo(s.dtype).tiny)
    factors = torch.as_tensor(get_factors(model)).to(s) * s
    loadings = torch.as_tensor(get_loadings(model)).to(s)
    by_means = deviance(counts, (s, feature_means), mask=mask)
    if not by_means:
        return 0.0
    left = deviance(counts, (factors, loadings), mask=mask)
    e = model.model_.exposure.without_size_factors.to("cpu", s.dtype)
    alone = Exposure(None, hidden=e.hidden)
    rise = (
        e.log_at(counts).sum()
        - (e.total(factors.mT, loadings) - alone.total(factors.mT, loadings)).sum()
    )
    entries = counts.numel() if mask is None else mask.sum()
    return float(1 - (left - 2 * rise / entries) / by_means)  # less what effects explain
