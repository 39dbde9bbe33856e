"""Fits on the CPU and, where there is one, on a CUDA card: seconds, steps, ELBO, its memory."""

from __future__ import annotations

import argparse
import sys

import torch

import pnmf_pyro
from benchmarks import ours, tables
from benchmarks.measure import report, table, timed


def device(options: argparse.Namespace) -> None:
    """Print fits of a simulated tissue of `--N` x `--D` counts without space and with each prior.

    `--density` of the counts are not zero; `--L` components, `--M` inducing points, `--K`
    neighbours. `--devices` names where to fit.
    """
    X, coordinates, *_ = tables.tissue(options.N, options.D, options.density, options.L)
    small = tables.tissue(200, 20, 0.5, 2)
    fits = {
        "non-spatial": (None, {}),
        f"SVGP, M = {options.M}": (1, {"local": False, "num_inducing": options.M}),
        f"LCGP, K = {options.K}": (1, {"local": True, "K": options.K}),
    }
    rows = [["fit", "device", "seconds", "steps", "ELBO", "GiB of the card at its peak"]]
    for where in options.devices.split(","):
        card = where == "cuda"
        ours.quietly(lambda: pnmf_pyro.fit(small[0], n_components=2, device=where))  # noqa: B023
        for name, (spatial, settings) in fits.items():
            given = {"n_components": options.L, "device": where, **settings}
            coords = coordinates if spatial else None
            if card:
                torch.cuda.reset_peak_memory_stats()
            seconds, model = timed(
                lambda: ours.quietly(lambda: pnmf_pyro.fit(X, coords, **given))  # noqa: B023
            )
            line = report(
                benchmark="device",
                fit=name,
                device=torch.cuda.get_device_name() if card else where,
                shape=X.shape,
                stored=X.nnz,
                seconds=seconds,
                steps=model.n_iter_,
                elbo=model.elbo_,
                gib=torch.cuda.max_memory_allocated() / 2**30 if card else 0.0,
            )
            numbers = (f"{line[key]:.6g}" for key in ("seconds", "steps", "elbo", "gib"))
            rows.append([name, str(line["device"]), *numbers])
    sys.stdout.write(table(rows))
