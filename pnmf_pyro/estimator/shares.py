"""A fit of several ranks: what it may be, the rows of each, and at its end the model of all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from pnmf_pyro.data.checks import check_device
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.parallel import Ranks
from pnmf_pyro.data.tables import hash_of, hash_of_table
from pnmf_pyro.estimator.checkpoints import parameters_of, versions
from pnmf_pyro.estimator.inputs import Data, Scales
from pnmf_pyro.estimator.plain import HasParameters
from pnmf_pyro.estimator.plan import make_model
from pnmf_pyro.estimator.stages import (
    Correlate,
    LearnHyperparameters,
    RestoreSpread,
    Settle,
    SettleLoadings,
    WarmUp,
)
from pnmf_pyro.models import PoissonFactorization

# Tensors of a model that have a row for each sample, and the dimension of these.
OF_SAMPLES = {
    "prior.q.theta1": 1,
    "prior.q.theta2": 1,
    "prior.joint_covariance": 0,
    "exposure.size_factors": 0,
}

# Parameters that must have one of a few values where the rows are shared out, or a fit in space.
ONE_OF: dict[str, tuple[object, ...]] = {
    "prior": (None,),
    "likelihood": (None, "poisson"),
    "training_mode": ("natural",),
    "loadings_mode": ("multiplicative",),
    "batch_size": (None,),
    "y_batch_size": (None,),
    **dict.fromkeys(("mask", "batches", "covariates", "callback"), (None,)),
}
IN_SPACE = {**ONE_OF, "mode": ("lower-bound",), "non_spatial_components": (0,)}
STAGES = (WarmUp, Settle, SettleLoadings)
STAGES_IN_SPACE = (*STAGES, LearnHyperparameters, RestoreSpread, Correlate)


@dataclass(frozen=True)
class Outline:
    """Shape, type and device of counts."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    ranks: Ranks


def refuse(ranks: Ranks, values: Mapping[str, Any]) -> None:
    """Raise a ValueError for arguments of a fit, by name, that several ranks cannot share."""
    if ranks.size == 1:
        return
    spatial = bool(values.get("spatial"))
    wanted = IN_SPACE if spatial else ONE_OF
    odd = [k for k, one_of in wanted.items() if k in values and not _is_one_of(values[k], one_of)]
    init, stages = values.get("init"), values.get("stages") or ()
    starts = init if isinstance(init, list | tuple) else [init]
    if any(isinstance(start, str) and start == "k-means" for start in starts):
        odd.append("init")
    if check_device(values.get("device", "cpu")).type != "cpu":
        odd.append("device")
    known = STAGES_IN_SPACE if spatial else STAGES
    modes = {getattr(one, "mode", None) for one in stages if spatial}
    if modes - {None, "lower-bound"} or any(type(one) not in known for one in stages):
        odd.append("stages")
    if odd:
        shown = "an array" if isinstance(values[odd[0]], np.ndarray) else repr(values[odd[0]])
        raise ValueError(
            f"{odd[0]}={shown[:60]} is not for a fit of {ranks.size} ranks, which is of Poisson "
            "counts, in closed form and full passes, and in space with mode='lower-bound'. "
            "Leave it out, or start one process."
        )
    if not isinstance(values.get("random_state", 0), int | np.integer):
        raise ValueError(
            "random_state must be a whole number for a fit of several ranks, which must all draw "
            f"the same; it is {values['random_state']!r}."
        )


def agree_on_fit(
    ranks: Ranks, settings: HasParameters, scales: Scales, callback: object, path: Path | None
) -> None:
    """Raise a ValueError for a fit that ranks cannot share, or of which they were told otherwise.

    The path is that of a checkpoint.
    """
    if ranks.size > 1:
        given = {**settings.get_params(deep=False), **scales._asdict(), "callback": callback}
        refuse(ranks, given)
        ranks.agree(**versions(), **parameters_of(settings), checkpoint=path)
        if given["spatial"] and given["n_components"] < ranks.size:
            raise ValueError(
                f"n_components={given['n_components']} are fewer than {ranks.size} ranks, among "
                "which the components of a fit in space are shared out. Start fewer processes."
            )


def _is_one_of(value: object, allowed: tuple[object, ...]) -> bool:
    return any(value is one or (isinstance(value, type(one)) and value == one) for one in allowed)


def own_rows(ranks: Ranks, data: Data) -> Data:
    """Return the data of the rows of this rank, of data that are the same on all.

    Of a store each rank has read its own rows already; in space it holds all.
    """
    if ranks.size == 1:
        return data
    counts, s = data.counts, data.size_factors
    if data.places is not None:
        places = hash_of(data.places.coordinates, data.places.groups)
        ranks.agree(X=hash_of_table(counts.numpy()), size_factors=hash_of(s), places=places)
        return data
    if counts.ranks.size == 1:
        ranks.agree(X=hash_of_table(counts.numpy()), size_factors=hash_of(s))
        own, (first, last) = ranks.sharing([0, counts.shape[0]])
        counts = counts.rows(slice(first, last))
        counts.ranks = own
        s = None if s is None else s[own.rows]
    return replace(data, counts=counts, size_factors=s)


def of_all_rows(settings: Any, data: Data, model: PoissonFactorization) -> PoissonFactorization:
    """Return the model of the rows of all ranks, the same on each, from those of their own."""
    ranks = model.ranks
    if ranks.size == 1:
        return model
    state = {
        name: ranks.stacked(value, OF_SAMPLES[name]) if name in OF_SAMPLES else value
        for name, value in model.state_dict().items()
    }
    counts = data.counts
    outline = Outline(counts.ranks.whole(counts.shape), counts.dtype, counts.device, type(ranks)())
    s = state.get("exposure.size_factors")
    whole = replace(data, counts=cast(Counts, outline), size_factors=s)
    found = make_model(settings, whole, np.random.RandomState(0))
    found.load_state_dict(state)
    return found.eval()
