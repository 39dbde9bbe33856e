"""One file for a fitted model: what of it is in the file, and what a file must hold to be used.

The names in a file are those of the table `NAMES`, whatever attributes of the package are called.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import asdict
from math import prod
from typing import Any, Protocol, TypeVar, cast

import numpy as np
import torch

from pnmf_pyro.data.checks import check_choice
from pnmf_pyro.data.counts import SparseCounts
from pnmf_pyro.data.design import Design
from pnmf_pyro.data.exposure import Exposure
from pnmf_pyro.data.places import GroupCodes, Places
from pnmf_pyro.estimator.anndata_bridge import AnnDataKeys
from pnmf_pyro.estimator.archive import Arrays, read_archive, write_archive
from pnmf_pyro.estimator.course import History
from pnmf_pyro.estimator.parameters import FittedEstimator, check_parameters
from pnmf_pyro.estimator.plain import label_of, plain_label, plain_parameters
from pnmf_pyro.estimator.plan import likelihood_part
from pnmf_pyro.estimator.prior import beside_plain, spatial_prior
from pnmf_pyro.estimator.stages import stage_of
from pnmf_pyro.estimator.version_1 import PREFIX, of_version_1
from pnmf_pyro.gp.kernels import OF_GROUPS
from pnmf_pyro.gp.multi_group import check_group_distances
from pnmf_pyro.models import LIKELIHOODS, PoissonFactorization
from pnmf_pyro.priors import GaussianPrior, Prior
from pnmf_pyro.transforms import factor_uncertainty, get_factors


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

# What an array is called in a file, and where a model holds it. An array "unconstrained" is mapped
# to values by the mode of its parameter; multiplied by "unit".
NAMES = {
    "loadings/unconstrained": "W._raw",
    "loadings/unit": "W.unit",
    "loadings/errors/blocks": "loading_blocks",
    "loadings/errors/coupling": "loading_coupling",
    "size_factors": "exposure.size_factors",
    "hidden/starts": "exposure.hidden_starts",
    "hidden/columns": "exposure.hidden_columns",
    "effects/design": "exposure.design",
    "effects/codes": "exposure.codes",
    "effects/values": "exposure.effects",
    "effects/errors": "exposure.errors",
    "dispersion/inverse": "observation.inverse",
    "prior/scale": "prior.scale_pf",
    "prior/mean": "prior.mean",
    "prior/kernel/lengthscale": "prior.kernel.lengthscale",
    "prior/kernel/sigma": "prior.kernel.sigma",
    "prior/kernel/nugget": "prior.kernel.nugget",
    "prior/kernel/group_diff_param": "prior.kernel.group_diff_param",
    "prior/kernel/group_distances": "prior.kernel.group_distances",
    "prior/kernel/group_diff_param_2": "prior.kernel.group_diff_param_2",
    "prior/kernel/group_distances_2": "prior.kernel.group_distances_2",
    "prior/kernel/chosen": "prior.kernel.chosen",
    "places/coordinates": "prior.place_coordinates",
    "places/groups": "prior.place_groups",
    "inducing/coordinates": "prior.inducing_coordinates",
    "inducing/groups": "prior.inducing_groups",
    "factors/joint_covariance": "prior.joint_covariance",
    "factors/joint_draws": "prior.joint_draws",
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
    "non_spatial/prior/scale": "prior.sides.1.scale_pf",
    "non_spatial/mean": "prior.sides.1.q.mean",
    "non_spatial/scale/unconstrained": "prior.sides.1.q.scale._raw",
    "non_spatial/scale/unit": "prior.sides.1.q.scale.unit",
    "non_spatial/natural/first": "prior.sides.1.q.theta1",
    "non_spatial/natural/second": "prior.sides.1.q.theta2",
}

# What a model calls its field where other components stand beside it.
FIELD = "prior.sides.0."

_HELD = {held: name for name, held in NAMES.items()}
_OF_ESTIMATOR = ("components", "history", "feature_names")
_KNOWN = {*NAMES, *_OF_ESTIMATOR, *(PREFIX + held for held in _HELD)}


def write_model(path: str | os.PathLike, model: Saved) -> None:
    """Write a fitted estimator to one file; an object of the user in it is a ValueError."""
    header = {
        "parameters": plain_parameters(model),
        "groups": None if model.groups_ is None else [plain_label(g) for g in model.groups_],
        "group_columns": model.group_columns_,
        "n_samples": model.model_.N,
        "elbo": model.elbo_,
        "elbo_se": model.elbo_se_,
        "stages": model.history_.stages,
        "mean_total": model.mean_total_,
        "likelihood": getattr(model, "likelihood_", None),
        "design": None if model.design_ is None else model.design_.plain(plain_label),
        "keys": None if model.keys_ is None else asdict(model.keys_),
    }
    state = model.model_.state_dict().items()
    arrays = {_HELD[k.replace(FIELD, "prior.")]: v.cpu().numpy() for k, v in state}
    arrays["components"] = model.components_
    arrays["history"] = np.asarray(model.history_, dtype=np.float64)
    if hasattr(model, "feature_names_in_"):
        arrays["feature_names"] = np.asarray(model.feature_names_in_, dtype=str)
    try:
        check_usable(model)
    except ValueError as error:
        raise ValueError(
            f"this fit cannot be saved, since no use can be made of it: {error}"
        ) from error
    write_archive(path, header, arrays)


def read_model(path: str | os.PathLike, kind: type[Model]) -> Model:
    """Open a fitted estimator of class `kind` that :func:`write_model` wrote, or version 0.1.

    A file that is damaged, is no saved model, or holds a model of which no use can be made is a
    ValueError.
    """
    header, arrays = read_archive(path, _KNOWN.__contains__)
    try:
        if header["format_version"] == 1:
            header, arrays = of_version_1(header, arrays, _HELD)
        model = _model_of(kind, header, arrays)
        check_usable(model)
    except Exception as error:  # a header of any values leads to any error
        why = " ".join(str(error).split())[:200].rstrip(".")
        why = f"it lacks {why}" if isinstance(error, KeyError) else why
        raise ValueError(f"{path} is not a saved PNMF model, or is damaged: {why}.") from error
    return model


def _model_of(kind: type[Model], header: dict[str, Any], arrays: Arrays) -> Model:
    listed = header["parameters"].items()
    parameters = {name: tuple(v) if isinstance(v, list) else v for name, v in listed}
    if parameters["stages"] is not None:
        parameters["stages"] = tuple(stage_of(one) for one in parameters["stages"])
    if parameters["device"] == "cuda" and not torch.cuda.is_available():
        parameters["device"] = "auto"  # where to compute is no part of what was found
    model = kind(**parameters)
    check_parameters(model)
    state = {held: torch.from_numpy(arrays[name]) for name, held in NAMES.items() if name in arrays}
    model.likelihood_ = header.get("likelihood") or "poisson"
    check_choice("likelihood", model.likelihood_, LIKELIHOODS)
    model.groups_ = _groups(header["groups"], state)
    model.group_columns_ = _group_columns(header.get("group_columns"))
    plain = header.get("design")
    model.design_ = None if plain is None else Design.of_plain(plain, label_of)
    y = _shape_of(model, header["n_samples"], state)
    module = PoissonFactorization(
        _prior(model, state, y),
        y,
        model.n_components,
        model.loadings_mode,
        model.mode,
        size_factors=_exposure(state, y, model.design_),
        likelihood=likelihood_part(model, len(y)),
    )
    module.load_state_dict(_beside(state) if model.non_spatial_components else state)
    model.n_features_in_ = module.D
    if "feature_names" in arrays:
        model.feature_names_in_ = arrays["feature_names"].astype(object)
    model._publish(module.eval())
    if "components" in arrays:
        if not np.allclose(arrays["components"], model.components_, rtol=1e-4, atol=0):
            raise ValueError("components are not those of its loadings")
        model.components_ = arrays["components"]
    model.history_ = History(arrays["history"].tolist(), header.get("stages", ()))
    model.n_iter_, model.elbo_ = len(model.history_), header["elbo"]
    model.elbo_se_ = float(header.get("elbo_se", "nan"))  # version 0.1 did not tell
    model.mean_total_ = _mean_total(header.get("mean_total"))
    model.keys_ = _keys(header.get("keys"))
    return model


def _beside(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give what is of the field the name that it has where other components stand beside it."""
    whole = ("prior.joint_", "prior.sides.")
    return {
        k if k.startswith(whole) else k.replace("prior.", FIELD, 1): v for k, v in state.items()
    }


def _groups(plain: list[Any] | None, state: dict[str, torch.Tensor]) -> list[Hashable] | None:
    """The names of groups, of which there are as many as a kernel has distances."""
    names = (f"prior.kernel.{name}" for name in OF_GROUPS.values())
    sizes = [len(state[name]) for name in names if name in state]
    if plain is None:
        return None
    if not isinstance(plain, list) or (sizes and prod(sizes) != len(plain)):
        raise ValueError(f"groups are {str(plain)[:80]}")
    return [label_of(one) for one in plain]


def _group_columns(plain: Any) -> tuple[str, ...] | None:
    """The names of the two columns of groups that are pairs."""
    if plain is None:
        return None
    if not isinstance(plain, list) or len(plain) != 2 or not all(type(p) is str for p in plain):
        raise ValueError(f"group_columns are {str(plain)[:80]}")
    return tuple(plain)


def _exposure(state: dict[str, torch.Tensor], y: torch.Tensor, design: Design | None) -> Exposure:
    """What scales the rates: size factors, effects, and which entries are hidden."""
    D, N = y.shape
    starts, columns = (state.get(f"exposure.hidden_{name}") for name in ("starts", "columns"))
    hidden = None
    if starts is not None and columns is not None:
        fits = bool((starts.diff() >= 0).all()) and int(starts[-1]) == len(columns)
        if not fits or (len(columns) and not 0 <= int(columns.min()) <= int(columns.max()) < D):
            raise ValueError("hidden entries are not those of a table")
        hidden = SparseCounts(starts, columns, torch.ones(len(columns)), (len(starts) - 1, D))
    names = ("design", "codes", "effects", "errors")
    rows, codes, effects, errors = (state.get(f"exposure.{name}") for name in names)
    if design is None or rows is None or codes is None or effects is None:
        if design is not None or effects is not None:
            raise ValueError("it lacks effects or what they are of")
        return Exposure(state.get("exposure.size_factors"), hidden=hidden)
    shapes = [part.shape for part in (effects, errors) if part is not None]
    fits = rows.ndim == 2 and rows.shape[1] == design.P and codes.shape == (N,)
    fits = fits and all(shape == (D, design.P) for shape in shapes)
    if (
        not fits
        or codes.dtype != torch.int64
        or not 0 <= int(codes.min()) <= int(codes.max()) < len(rows)
    ):
        raise ValueError("effects are not those of its samples and features")
    of_design = rows, codes, effects, hidden, len(design.batches), True, errors
    return Exposure(state.get("exposure.size_factors"), *of_design)


def _mean_total(value: object) -> float | None:
    """The mean total of the samples of a fit with size factors `total`."""
    if value is None or (type(value) in (int, float) and 0 < cast(float, value) < np.inf):
        return cast("float | None", value)
    raise ValueError(f"mean_total is {str(value)[:20]!r}")


def _keys(plain: dict[str, Any] | None) -> AnnDataKeys | None:
    """The keys by which a fit read an AnnData object."""
    if plain is None:
        return None
    keys = AnnDataKeys(**plain)
    if not all(isinstance(key, str | bool | list | None) for key in plain.values()):
        raise ValueError(f"keys are {str(plain)[:80]}")
    return keys


def _shape_of(model: Saved, n_samples: object, state: dict[str, torch.Tensor]) -> torch.Tensor:
    """A tensor (D, N) without memory, if the header's sizes are those of the arrays."""
    W = state["W._raw"]
    per_sample = ("prior.place_coordinates", "prior.q.mean", "prior.q.theta1")
    first = next(state[name] for name in per_sample if name in state)
    N = first.shape[0 if first is state.get(per_sample[0]) else -1]
    if type(n_samples) is not int or n_samples != N:
        raise ValueError(f"n_samples is {str(n_samples)[:20]}, and its arrays are of {N} samples")
    if W.ndim != 2 or W.shape[1] != model.n_components:
        raise ValueError(
            f"loadings have shape {tuple(W.shape)} for {model.n_components} components"
        )
    return torch.empty((len(W), N), dtype=W.dtype, device="meta")


def _prior(model: Saved, state: dict[str, torch.Tensor], y: torch.Tensor) -> Prior:
    """Make the prior that the arrays of a file belong to."""
    if "prior.place_coordinates" not in state:
        natural = "prior.q.theta1" in state
        return GaussianPrior(y, model.n_components, use_natural_gradients=natural)
    places = Places(state["prior.place_coordinates"], state.get("prior.place_groups"))
    inducing = None
    if "prior.inducing_coordinates" in state:
        inducing = Places(state["prior.inducing_coordinates"], state.get("prior.inducing_groups"))
    groups = None if model.groups_ is None else GroupCodes(model.groups_, model.group_columns_)
    settings = model
    if "prior.q.u_loc" in state and model.training_mode == "natural":  # of version 0.1
        held = {"training_mode": "standard", "cholesky_mode": "exp"}
        settings = type(model)(**{**model.get_params(deep=False), **held})
    prior = spatial_prior(settings, places, groups, y.dtype, np.random.RandomState(0), inducing)
    for name in prior.kernel.hyperparameters:  # one value for each component, or one for all
        getattr(prior.kernel, name).resize_(state[f"prior.kernel.{name}"].shape)
    return beside_plain(model, prior, y)


# Numbers of priors that are positive, and those that are not negative.
_SIGNS = ("scale_pf", "lengthscale", "sigma"), ("nugget", *OF_GROUPS)


def _of_priors(prior: Prior, names: tuple[str, ...]) -> dict[str, torch.Tensor | None]:
    """Numbers of the parts of a prior and of their kernels, by name."""
    return {
        f"prior/{number}/{name}": getattr(holder, name, None)
        for number, part in enumerate(prior.parts)
        for holder in (part, getattr(part, "kernel", None))
        for name in names
        if hasattr(holder, name)
    }


def check_usable(model: Saved) -> None:
    """Raise a ValueError unless all that a fitted estimator is asked for is a number."""
    module = model.model_
    positive, never_negative = (_of_priors(module.prior, names) for names in _SIGNS)
    with torch.no_grad():
        q = module.prior.marginal()
    positive |= {
        "size_factors": module.size_factors,
        "scales of q": q.scale,
        "standard deviations of factors": torch.as_tensor(factor_uncertainty(model)),
    }
    never_negative |= {"components": torch.as_tensor(model.components_)}
    found = {
        **{name: held.float() for name, held in module.state_dict().items()},  # draws are float32
        **_elsewhere(module.prior),
        "factors": get_factors(model, return_tensor=True),
        "history": torch.tensor(model.history_, dtype=torch.float64),
        "elbo": torch.tensor(float(model.elbo_)),
        **positive,
        **never_negative,
    }
    for name, values in found.items():
        if values is not None and not bool(torch.isfinite(values).all()):
            raise ValueError(f"{name} must be finite numbers")
        if values is not None and values.numel() and name in {*positive, *never_negative}:
            lowest = float(values.float().min())
            if lowest < 0 or (lowest == 0 and name in positive):
                raise ValueError(f"{name} must not be negative or too small; got {lowest:g}")
    _check_names(model)


@torch.no_grad()
def _elsewhere(prior: Prior) -> dict[str, torch.Tensor]:
    """What a spatial prior predicts at a place, as at one of no sample."""
    if prior.places is None:
        return {}
    field = prior.at(prior.places[:1]).marginal()
    return {"predicted factors": (field.mean + field.variance / 2).exp()}


def _check_names(model: Saved) -> None:
    """Raise a ValueError unless names and settings are those of a model of this kind."""
    features = getattr(model, "feature_names_in_", None)
    if features is not None and np.shape(features) != (model.model_.D,):
        raise ValueError(f"feature_names must be {model.model_.D}; got {np.shape(features)}")
    places = model.model_.prior.places
    codes = None if places is None else places.groups
    is_spatial, is_grouped = places is not None, codes is not None
    if model.spatial != is_spatial or (is_spatial and model.multigroup != is_grouped):
        raise ValueError(
            f"spatial={model.spatial}, multigroup={model.multigroup} are of another fit"
        )
    n = 0 if codes is None else int(codes.max()) + 1
    if codes is not None and (int(codes.min()) < 0 or n > len(model.groups_ or ())):
        raise ValueError(f"groups of samples must have names; got {model.groups_}")
    for part in model.model_.prior.fields if is_grouped else ():
        sizes = GroupCodes(model.groups_ or ()).sizes
        if sizes != part.kernel.sizes_of_groups:
            raise ValueError(f"groups must be those of the kernel; got {model.groups_}")
        for held, size in zip(OF_GROUPS.values(), sizes, strict=False):
            check_group_distances(getattr(part.kernel, held), size)
    if model.groups_ is not None and len(set(model.groups_)) != len(model.groups_):
        raise ValueError(f"groups must differ; got {model.groups_}")
