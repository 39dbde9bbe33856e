"""Files of format 1, of version 0.1, in which arrays bear the names of attributes of that time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pnmf_pyro.estimator.archive import Arrays
from pnmf_pyro.estimator.drafts import Stage
from pnmf_pyro.estimator.stages import (
    Correlate,
    LearnHyperparameters,
    RestoreSpread,
    Settle,
    SettleLoadings,
    WarmUp,
    plain_stage,
)

# What the names of a model's arrays began with.
PREFIX = "model."


def of_version_1(
    header: dict[str, Any], arrays: Arrays, names: Mapping[str, str]
) -> tuple[dict[str, Any], Arrays]:
    """Translate a file of format 1; `names` are those of arrays in files by those in a model."""
    renamed = {k: v for k, v in arrays.items() if not k.startswith(PREFIX)}
    state = {k.removeprefix(PREFIX): v for k, v in arrays.items() if k.startswith(PREFIX)}
    if "prior.inducing_coordinates" in state and "prior.q.theta2" in state:
        state |= _covariance_form(state.pop("prior.q.theta1"), state.pop("prior.q.theta2"))
    renamed |= {names[held]: array for held, array in state.items()}
    old = header["parameters"]
    extra = {k: old.pop(k) for k in list(old) if k in _OF_VERSION_1}
    learn = [name for name in ("sigma", "nugget", "group_diff_param") if extra[f"train_{name}"]]
    parameters = {**old, "learn": learn, "stages": _stages_of_version_1(extra, old)}
    return {**header, "parameters": parameters}, renamed


_OF_VERSION_1 = (
    *("warm_up", "kl_weight", "restore_spread", "shrink_loadings", "train_sigma"),
    *("train_group_diff_param", "nugget", "train_nugget", "criterion", "group_distances", "rank"),
)


def _stages_of_version_1(extra: dict[str, Any], old: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages that the parameters of version 0.1 stood for."""
    weight, shrink = extra["kl_weight"], extra["shrink_loadings"]
    learns = old["train_lengthscale"] or extra["train_sigma"] or extra["train_nugget"]
    learns = learns or (extra["train_group_diff_param"] and old["multigroup"])
    searches = learns or extra["warm_up"] or not isinstance(old["kernel"], str)
    restores = extra["restore_spread"] and weight != 1
    last = Settle(kl_weight=weight)
    stages: list[Stage] = [WarmUp(weight)] if extra["warm_up"] else []
    if old["spatial"] and searches:
        stages = stages or [Settle("lower-bound", weight)]
        stages.append(LearnHyperparameters(extra["criterion"]))
    elif old["mode"] == "lower-bound":  # a warm-up would have been the same
        stages = []
    stages.append(last)
    refined: list[Stage] = [RestoreSpread()] if restores else []
    if old["local"] and extra["rank"]:
        refined.append(Correlate(extra["rank"]))
    if refined:
        stages += [*refined, SettleLoadings(shrink) if restores else last]
    if shrink and not restores:
        stages.append(SettleLoadings(True))
    return [plain_stage(one) for one in stages]


def _covariance_form(theta1: np.ndarray, theta2: np.ndarray) -> Arrays:
    """q(u) in mean and Cholesky factor, from its natural parameters theta1 and theta2.

    With theta2 = -S^{-1} / 2 and theta1 = S^{-1} m. The diagonal of the factor is held by its
    logarithm, as `cholesky_mode='exp'` has it.
    """
    S = np.linalg.inv(-2 * theta2)
    tril = np.linalg.cholesky((S + S.swapaxes(-1, -2)) / 2)
    diagonal = np.diagonal(tril, axis1=-2, axis2=-1)
    return {
        "prior.q.u_loc": (S @ theta1[..., None])[..., 0],
        "prior.q.u_scale._raw": np.log(diagonal),
        "prior.q.u_scale.unit": np.ones((len(tril), 1)),
        "prior.q.u_below": tril,
    }
