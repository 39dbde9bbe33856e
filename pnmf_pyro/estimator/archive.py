"""One file for a fitted model: arrays and JSON in a .npz archive, which runs no code when read.

The names in a file are those of the table `NAMES`, whatever attributes of the package are called.
Files of format 1, of version 0.1, have the names that its attributes had.
"""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike

from pnmf_pyro.data.places import GroupCodes, Places
from pnmf_pyro.estimator.anndata_bridge import AnnDataKeys
from pnmf_pyro.estimator.parameters import FittedEstimator
from pnmf_pyro.estimator.plan import History, spatial_prior
from pnmf_pyro.estimator.results import named
from pnmf_pyro.estimator.stages import (
    STAGES,
    Correlate,
    LearnHyperparameters,
    RestoreSpread,
    Settle,
    SettleLoadings,
    Stage,
    WarmUp,
)
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors import GaussianPrior, Prior


class Saved(FittedEstimator, Protocol):
    """A fitted :class:`~pnmf_pyro.PNMF`, with what else a file holds of it."""

    history_: History
    n_iter_: int
    n_features_in_: int
    keys_: AnnDataKeys | None
    feature_names_in_: np.ndarray

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the parameters by name."""

    def _publish(self, model: PoissonFactorization) -> None:
        """Make a model readable as this estimator's."""


Model = TypeVar("Model", bound=Saved)
Arrays = dict[str, np.ndarray]

FORMAT = "pnmf_pyro"
FORMAT_VERSION = 2
_HEADER = "header"


def write_archive(
    path: str | os.PathLike, header: dict[str, Any], arrays: Mapping[str, ArrayLike]
) -> None:
    """Write arrays and a JSON header to one file, which appears whole or not at all.

    A folder that does not exist, and arrays of objects, are a ValueError.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"path must be in an existing folder; there is no {path.parent}.")
    held = {name: np.asarray(array) for name, array in arrays.items()}
    if objects := [name for name, array in held.items() if array.dtype.hasobject]:
        raise ValueError(f"arrays must hold numbers or text; {objects} hold Python objects.")
    text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **header})
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            content: dict[str, Any] = {_HEADER: np.array(text), **held}
            np.savez_compressed(file, **content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read_archive(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return header and arrays of a file that :func:`write_archive` wrote.

    A file that is damaged, of another kind, or of a newer version is a ValueError.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        header = json.loads(str(arrays.pop(_HEADER)))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a model saved by pnmf_pyro, or it is damaged ({error}). "
            "Save it again with PNMF.save."
        ) from error
    if header.get("format") != FORMAT or header.get("format_version", 0) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {header.get('format')!r} {header.get('format_version')}; this "
            f"version reads {FORMAT!r} up to {FORMAT_VERSION}. Upgrade pnmf_pyro to open it."
        )
    return header, arrays


# What an array is called in a file, and where a model holds it. An array "unconstrained" is mapped
# to values by the mode of its parameter; multiplied by "unit".
NAMES = {
    "loadings/unconstrained": "W._raw",
    "loadings/unit": "W.unit",
    "size_factors": "size_factors",
    "prior/scale": "prior.scale_pf",
    "prior/mean": "prior.mean",
    "prior/kernel/lengthscale": "prior.kernel.lengthscale",
    "prior/kernel/sigma": "prior.kernel.sigma",
    "prior/kernel/nugget": "prior.kernel.nugget",
    "prior/kernel/group_diff_param": "prior.kernel.group_diff_param",
    "prior/kernel/group_distances": "prior.kernel.group_distances",
    "prior/kernel/chosen": "prior.kernel.chosen",
    "places/coordinates": "prior.place_coordinates",
    "places/groups": "prior.place_groups",
    "inducing/coordinates": "prior.inducing_coordinates",
    "inducing/groups": "prior.inducing_groups",
    "factors/mean": "prior.q.mean",
    "factors/scale/unconstrained": "prior.q.scale._raw",
    "factors/scale/unit": "prior.q.scale.unit",
    "factors/natural/first": "prior.q.theta1",
    "factors/natural/second": "prior.q.theta2",
    "inducing/mean": "prior.q.u_loc",
    "inducing/scale/unconstrained": "prior.q.u_scale._raw",
    "inducing/scale/unit": "prior.q.u_scale.unit",
    "inducing/below_diagonal": "prior.q.u_below",
    "sites/shift": "prior.q.site_shift",
    "sites/precision": "prior.q.site_precision",
    "local/mean": "prior.q.loc",
    "local/variance": "prior.q.diagonal",
    "local/low_rank": "prior.low_rank",
    "local/sites/precision": "prior.q.curvature",
    "local/sites/shift": "prior.q.pull",
}


def write_model(path: str | os.PathLike, model: Saved) -> None:
    """Write a fitted estimator to one file; an object of the user in it is a ValueError."""
    names = {held: name for name, held in NAMES.items()}
    header = {
        "parameters": plain_parameters(model),
        "groups": model.groups_,
        "n_samples": model.model_.N,
        "elbo": model.elbo_,
        "stages": model.history_.stages,
        "mean_total": model.mean_total_,
        "keys": None if model.keys_ is None else asdict(model.keys_),
    }
    arrays = {names[k]: v.cpu().numpy() for k, v in model.model_.state_dict().items()}
    arrays["components"] = model.components_
    arrays["history"] = np.asarray(model.history_, dtype=np.float64)
    if hasattr(model, "feature_names_in_"):
        arrays["feature_names"] = np.asarray(model.feature_names_in_, dtype=str)
    write_archive(path, header, arrays)


def plain_parameters(model: Saved) -> dict[str, Any]:
    """Return the parameters of an estimator as values that JSON can hold.

    An object of the user, for which a file has no name, is a ValueError.
    """
    plain = {}
    for name, value in model.get_params(deep=False).items():
        if name == "random_state" and not isinstance(value, int | np.integer):
            value = None  # it is only where a seed came from
        elif name == "stages" and value is not None:
            value = [_plain(one) for one in value]
        elif isinstance(value, np.generic):
            value = value.item()
        elif isinstance(value, tuple | np.ndarray):
            value = [str(one) if isinstance(one, str) else one for one in value]
        try:
            json.dumps(value)
        except TypeError as error:
            raise ValueError(
                f"{name}={named(value)!r} cannot be saved: it is an object, and a file holds names "
                "and numbers. Keep model_.state_dict() and the program that made the object."
            ) from error
        plain[name] = value
    return plain


def read_model(path: str | os.PathLike, kind: type[Model]) -> Model:
    """Open a fitted estimator of class `kind` that :func:`write_model` wrote, or version 0.1.

    A file that is damaged or no saved model is a ValueError.
    """
    header, arrays = read_archive(path)
    try:
        first = header["format_version"] == 1
        return _model_of(kind, *(_of_version_1(header, arrays) if first else (header, arrays)))
    except (KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is not a saved PNMF model, or is damaged: {error}.") from error


def _model_of(kind: type[Model], header: dict[str, Any], arrays: dict[str, np.ndarray]) -> Model:
    listed = header["parameters"].items()
    parameters = {name: tuple(v) if isinstance(v, list) else v for name, v in listed}
    model = kind(**{**parameters, "stages": _stages(parameters["stages"])})
    state = {held: torch.from_numpy(arrays[name]) for name, held in NAMES.items() if name in arrays}
    model.groups_ = header["groups"]
    W = state["W._raw"]
    y = torch.empty((len(W), header["n_samples"]), dtype=W.dtype, device="meta")
    module = PoissonFactorization(
        _prior(model, state, y),
        y,
        model.n_components,
        model.loadings_mode,
        model.mode,
        size_factors=state.get("size_factors"),
    )
    module.load_state_dict(state)
    model.n_features_in_ = module.D
    if "feature_names" in arrays:
        model.feature_names_in_ = arrays["feature_names"].astype(object)
    model._publish(module.eval())
    if "components" in arrays:
        model.components_ = arrays["components"]
    model.history_ = History(arrays["history"].tolist(), header.get("stages", ()))
    model.n_iter_, model.elbo_ = len(model.history_), header["elbo"]
    model.mean_total_, keys = header.get("mean_total"), header.get("keys")
    model.keys_ = None if keys is None else AnnDataKeys(**keys)
    return model


def _prior(model: Saved, state: dict[str, torch.Tensor], y: torch.Tensor) -> Prior:
    """Make the prior that the arrays of a file belong to."""
    if "prior.place_coordinates" not in state:
        natural = "prior.q.theta1" in state
        return GaussianPrior(y, model.n_components, use_natural_gradients=natural)
    places = Places(state["prior.place_coordinates"], state.get("prior.place_groups"))
    inducing = None
    if "prior.inducing_coordinates" in state:
        inducing = Places(state["prior.inducing_coordinates"], state.get("prior.inducing_groups"))
    groups = None if model.groups_ is None else GroupCodes(model.groups_)
    settings = model
    if "prior.q.u_loc" in state and model.training_mode == "natural":  # of version 0.1
        held = {"training_mode": "standard", "cholesky_mode": "exp"}
        settings = type(model)(**{**model.get_params(deep=False), **held})
    prior = spatial_prior(settings, places, groups, y.dtype, np.random.RandomState(0), inducing)
    for name in prior.kernel.hyperparameters:  # one value for each component, or one for all
        getattr(prior.kernel, name).resize_(state[f"prior.kernel.{name}"].shape)
    return prior


def _plain(stage: Any) -> dict[str, Any]:
    """A stage as its name and values."""
    return {"stage": type(stage).__name__, **asdict(stage)}


def _stages(plain: Sequence[dict[str, Any]] | None) -> tuple[Stage, ...] | None:
    if plain is None:
        return None
    kinds = {stage.__name__: stage for stage in STAGES}
    fields = ({k: v for k, v in one.items() if k != "stage"} for one in plain)
    return tuple(kinds[one["stage"]](**f) for one, f in zip(plain, fields, strict=True))


def _of_version_1(
    header: dict[str, Any], arrays: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Translate a file of format 1, in which arrays bear the names of attributes of that time."""
    names = {held: name for name, held in NAMES.items()}
    renamed = {k: v for k, v in arrays.items() if not k.startswith("model.")}
    state = {k.removeprefix("model."): v for k, v in arrays.items() if k.startswith("model.")}
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
    return [_plain(one) for one in stages]


def _covariance_form(theta1: np.ndarray, theta2: np.ndarray) -> dict[str, np.ndarray]:
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
