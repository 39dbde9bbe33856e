"""pnmf-pyro fit of a file that is too large for memory: it is read by slices."""

from __future__ import annotations

import argparse
import os

from pnmf_pyro.command_line import options as shared
from pnmf_pyro.command_line.exits import Exit
from pnmf_pyro.data.checks import check_output_path
from pnmf_pyro.data.parallel import Ranks
from pnmf_pyro.data.stores import is_store
from pnmf_pyro.estimator.fit import fit
from pnmf_pyro.estimator.stored_fit import exceeds_memory

# Options of a fit that need the counts in memory.
IN_MEMORY = (
    "mask",
    "coords",
    "batch_key",
    "batches",
    "covariates",
    "transpose",
    "report",
)


def stays_in_store(options: argparse.Namespace) -> bool:
    """Say whether the counts are read by slices, since they are too large for memory."""
    path = options.counts
    if not is_store(path) or not os.path.exists(path):
        return False
    try:
        return exceeds_memory(path, options.layer)
    except (ImportError, OSError, ValueError):  # of which the reading of a table tells
        return False


def fit_in_store(options: argparse.Namespace, ranks: Ranks) -> Exit:
    """Fit by slices, and write the results into the store."""
    given = [name for name in IN_MEMORY if getattr(options, name, None)]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise ValueError(
            f"{option} needs the counts in memory, and {options.counts} is read by slices. Leave "
            "it out, or use a machine with more memory."
        )
    if options.out is None or os.path.realpath(options.out) != os.path.realpath(options.counts):
        raise ValueError(
            f"--out must be {options.counts}: results of counts that are read by slices are "
            f"written into their own store; got {options.out}."
        )
    if options.save_model:
        check_output_path("--save-model", options.save_model, (".npz",))
    chosen = {
        "n_components": options.components,
        "layer": options.layer,
        "size_factors": "total" if options.size_factors == "total" else None,
        "spatial_key": None if options.no_space else options.spatial_key,
        "random_state": options.seed,
        "checkpoint": options.checkpoint,
        "every": options.every,
        **dict(options.set),
    }
    model, settled = shared.heard(lambda: fit(options.counts, **chosen))
    if not ranks.leads:
        return Exit.FINE
    written = [str(options.counts)]
    if options.save_model:
        model.save(options.save_model)
        written.append(options.save_model)
    shared.say(
        options,
        f"{model.model_.N} samples x {model.model_.D} features, read by slices\n"
        f"ELBO {model.elbo_:.6g} ± {model.elbo_se_:.2g} nats after {model.n_iter_} iterations\n"
        f"wrote {', '.join(written)}",
    )
    return Exit.FINE if settled else Exit.LOOK
