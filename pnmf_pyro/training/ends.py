"""What is said of hyperparameters that a search has found at the end of what it tried."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from pnmf_pyro.data.checks import warn
from pnmf_pyro.gp.kernels import OF_GROUPS

logger = logging.getLogger("pnmf_pyro")

# Relative change of a hyperparameter that is a move.
MOVED = 1e-4

# Bounds of what is learned beside lengthscales. A large sigma makes E exp F explode between places.
SIGMA_BOUNDS = (0.05, 4.0)
NUGGET_BOUNDS = (0.001, 2.0)

# Values from which on groups share all there is or nothing, and bounds; of lengthscales they are
# the ends of what was tried. A small nugget is no fault.
ENDS = {
    **dict.fromkeys(OF_GROUPS, (0.01, 1000.0)),
    "sigma": SIGMA_BOUNDS,
    "nugget": (0.0, NUGGET_BOUNDS[1]),
}
CHECK = (
    "Check that coordinates are those of the samples, in their order, and in one unit for all "
    "sections; or fit without coordinates."
)
TOLD_BY = {
    "lengthscale": (
        "shorter than the samples are apart: neighbours do not resemble one another. " + CHECK,
        "longer than the samples extend: factors hardly vary over the places. " + CHECK,
    ),
    "group_diff_param": (
        "groups share all there is: fit them without groups.",
        "groups share nothing: check that their coordinates are aligned, or fit them apart.",
    ),
    "sigma": (
        "factors hardly vary: try fewer n_components, or check that the counts are raw ones.",
        "factors vary by more than counts can: look for places or features of extreme counts.",
    ),
    "nugget": (
        "",
        "factors vary from place to place with no regard to space. " + CHECK,
    ),
}

# The same of groups that are pairs, for the first and the second of these.
TOLD_OF_PAIRS = {
    name: (
        f"groups that differ in their {column} column share all there is: leave that column out.",
        f"groups that differ in their {column} column share nothing: check that their coordinates "
        "are aligned, or fit them apart.",
    )
    for name, column in zip(OF_GROUPS, ("first", "second"), strict=True)
}


def warn_of_ends(
    learned: Mapping[str, Tensor],
    grids: Mapping[str, Sequence[float] | np.ndarray],
    start: Mapping[str, Tensor],
) -> None:
    """Warn of hyperparameters that the samples do not tell.

    That is where all components are at an end, or did not move. Some that hardly vary over the
    places are no fault of a fit, and the log names them.

    Parameters
    ----------
    learned : dict of Tensor of shape (C,)
        Values by name, of each component.
    grids : dict of sequence of float
        What was tried, by name, rising.
    start : dict of Tensor of shape (C,)
        Values from which the search set out.
    """
    said = []
    told_by = TOLD_BY | (TOLD_OF_PAIRS if TOLD_OF_PAIRS.keys() <= start.keys() else {})
    for name, values in learned.items():
        if told_by[name][0] and torch.allclose(values, start[name], rtol=MOVED, atol=0):
            said.append(
                f"The {name} did not move from {start[name][0]:.3g}, where its search began: no "
                "other value that was tried predicts samples better, so the counts do not tell it."
            )
            continue
        low, high = ENDS.get(name) or (grids[name][0], grids[name][-1])
        ends = values <= 1.01 * low, values >= 0.99 * high
        for at_end, told in zip(ends, told_by[name], strict=True):
            if at_end.all():
                said.append(_of_components(name, values, at_end) + told)
            elif at_end.any():
                logger.info("%s", _of_components(name, values, at_end) + told)
    if said:
        warn(" ".join(said), ConvergenceWarning)


def _of_components(name: str, values: Tensor, chosen: Tensor) -> str:
    """Say which components have a hyperparameter at the end of what was tried."""
    numbers = chosen.nonzero()[:, 0].tolist()
    found = ", ".join(f"{values[number]:.3g}" for number in numbers)
    whose = "" if len(numbers) == len(values) else f" of components {numbers}"
    return f"The {name}{whose} was learned as {found}, the end of what was tried, "
