"""Where the samples are: coordinates and groups, checked here once and trusted below."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy.spatial import cKDTree
from torch import Tensor

from pnmf_pyro.data.checks import check_array, warn
from pnmf_pyro.data.tables import refuse_masked

# What selects from tensors and from arrays, in the same way.
Selection: TypeAlias = Tensor | np.ndarray | slice | tuple[slice, None]

# Kinds of names of groups that files of models hold.
PLAIN_LABELS = (str, int, float, bool, bytes, date, datetime)


# Largest coordinate, and one over the smallest extent, of which the squares are still numbers.
FARTHEST = 1e100

# How many times as far apart the places of one group may be as those of another, in one unit; and
# how many places say how far apart they are.
OTHER_UNIT, TELLING = 50, 10

# Share of the places with a neighbour of another part, above which parts lie over one another. Of
# two sections drawn over each other it is a half, of tiles of one section what lies at their rims.
OVER_ONE_ANOTHER = 0.25


NO_GROUP = "groups must not be missing (None, NaN or NA). Give each sample a group."


@dataclass(frozen=True)
class Places:
    """Points in space, each perhaps in a group: what a covariance is a function of.

    Parameters
    ----------
    coordinates : Tensor of shape (..., n, p), float64
        Finite coordinates, in one unit.
    groups : Tensor of shape (..., n), int64, optional
        Codes of the groups.
    """

    coordinates: Tensor
    groups: Tensor | None = None

    def __len__(self) -> int:
        return self.coordinates.shape[-2]

    def __getitem__(self, index: Selection) -> Places:
        """Select places; an index of shape (..., n) gives places of that shape."""
        groups = None if self.groups is None else self.groups[index]
        return Places(self.coordinates[index], groups)

    @classmethod
    def concatenate(cls, parts: Sequence[Places]) -> Places:
        """Return the places of all parts, one part after another, each of shape (..., n)."""
        groups = [part.groups for part in parts if part.groups is not None]
        return cls(
            torch.cat([part.coordinates for part in parts], -2),
            torch.cat(groups, -1) if groups else None,
        )

    def take(self, index: Tensor | None) -> Places:
        """Select places by their numbers; all of them if the index is None."""
        return self if index is None else self[index]

    @classmethod
    def of_inputs(cls, inputs: Tensor, grouped: bool) -> Places:
        """Return the places that inputs of a kernel, of shape (..., n, q), stand for."""
        if not grouped:
            return cls(inputs)
        return cls(inputs[..., :-1], inputs[..., -1].long())

    @property
    def inputs(self) -> Tensor:
        """Inputs of a kernel: coordinates and, where there are groups, their codes as a column."""
        if self.groups is None:
            return self.coordinates
        return torch.cat([self.coordinates, self.groups[..., None].to(self.coordinates)], -1)

    def distinct(self) -> Places:
        """Return the places without repetitions, in the order in which they first occur."""
        _, first = np.unique(self.inputs.cpu().numpy(), axis=0, return_index=True)
        return self[torch.from_numpy(np.sort(first))]

    def to(self, device: torch.device) -> Places:
        """Return the places on a device."""
        groups = None if self.groups is None else self.groups.to(device)
        return Places(self.coordinates.to(device), groups)


def check_coordinates(
    coordinates: ArrayLike | None, n_samples: int | None, dimensions: int | None = None
) -> Tensor:
    """Return coordinates as a float64 tensor of shape (n_samples, dimensions).

    Coordinates that are missing, of another shape or not finite raise a ValueError. Any number of
    samples, or of dimensions, is right where it is None.
    """
    if coordinates is None:
        raise ValueError(
            "coordinates must be given for a spatial model, of shape (n_samples, dimensions); got "
            "None. Pass coordinates=, or "
            "use spatial=False."
        )
    values = check_array("coordinates", coordinates).astype(np.float64)
    wanted = f"({n_samples or 'n_samples'}, {dimensions or 'dimensions'})"
    fits = values.ndim == 2 and n_samples in (None, len(values)) and values.shape[1] > 0
    if not fits or dimensions not in (None, values.shape[1]):
        raise ValueError(
            f"coordinates must have one row for each sample, shape {wanted}; got {values.shape}."
        )
    bad = np.flatnonzero(~np.isfinite(values).all(1))
    if len(bad):
        raise ValueError(
            f"coordinates must be finite; {len(bad)} samples have NaN or infinity there, the first "
            f"is sample {bad[0]}. Remove these samples."
        )
    far = np.abs(values).max(initial=0)
    span = np.ptp(values, axis=0).max() if len(values) else 0.0
    if far > FARTHEST or 0 < span < 1 / FARTHEST:
        raise ValueError(
            f"coordinates must be from {1 / FARTHEST:g} to {FARTHEST:g} apart, since distances "
            f"are squared; the largest is {far:g}, and they extend over {span:g}. Use another unit."
        )
    return torch.from_numpy(values)


class GroupCodes:
    """Names of groups, whose codes 0, 1, ... are their positions in this sequence.

    Groups of two columns, such as a section and a type of cells, are pairs: all combinations of
    what occurs in either column. `columns` are the names of these, where they have any.
    """

    def __init__(self, names: Sequence[Hashable], columns: Sequence[str] | None = None):
        self.names, self.columns = list(names), columns and tuple(columns)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of groups; of pairs, of what occurs in the first column, and in the second."""
        if not isinstance(self.names[0], tuple):
            return (len(self.names),)
        return tuple(len(set(labels)) for labels in zip(*self.names, strict=True))

    @classmethod
    def of(cls, groups: ArrayLike | None, n_samples: int) -> GroupCodes:
        """Return the codes for the groups that occur, in sorted order."""
        columns = _columns_of(groups, n_samples)
        each = [
            sorted(set(_group_labels(labels, n_samples)), key=lambda g: (str(type(g)), g))
            for labels in columns.values()
        ]
        if len(each) == 1:
            return cls(each[0])
        named = all(isinstance(name, str) for name in columns)
        return cls(list(product(*each)), tuple(map(str, columns)) if named else None)

    def encode(self, groups: ArrayLike | None, n_samples: int) -> Tensor:
        """Return the code of each sample's group, int64, (n_samples,).

        Groups that are missing, of a wrong length or not among the names raise a ValueError.
        """
        columns = _columns_of(groups, n_samples)
        if len(columns) != len(self.sizes):
            raise ValueError(
                f"groups must have the {len(self.sizes)} columns of the fit"
                f"{f', {self.columns}' if self.columns else ''}; got {len(columns)}."
            )
        given = list(columns)
        if self.columns and all(isinstance(name, str) for name in given):
            if {*given} != {*self.columns}:
                raise ValueError(
                    f"groups must have the columns of the fit, {self.columns}; got {tuple(given)}."
                )
            given = list(self.columns)
        each = [_group_labels(columns[name], n_samples) for name in given]
        labels = each[0] if len(each) == 1 else list(zip(*each, strict=True))
        code = {name: number for number, name in enumerate(self.names)}
        unknown = sorted({str(label) for label in labels if label not in code})
        if unknown:
            raise ValueError(
                f"groups must be among those of the fit, {self.names}; got {unknown}. The model "
                "knows nothing of other groups: fit it again with samples of them."
            )
        return torch.tensor([code[label] for label in labels], dtype=torch.int64)

    def decode(self, codes: Tensor) -> np.ndarray:
        """Return the names of the groups of these codes, (n,), or of pairs, (n, 2)."""
        if len(self.sizes) == 1:
            return np.asarray(self.names)[codes.cpu().numpy()]
        return np.array(self.names, dtype=object)[codes.cpu().numpy()]


def _columns_of(groups: Any, n_samples: int) -> dict[Hashable, Any]:
    """Return the columns of groups by name, or by number where they have no names."""
    if groups is None:
        raise ValueError(
            "groups must be given for a model with multigroup=True, one for each of the "
            f"{n_samples} samples; got None. Pass groups=, or use multigroup=False."
        )
    refuse_masked("groups", groups)
    if np.ndim(groups) != 2:
        return {0: groups}
    names, width = getattr(groups, "columns", None), np.shape(groups)[1]
    if width != 2 or (names is not None and len(set(names)) != 2):
        raise ValueError(
            f"groups must have one entry for each of the {n_samples} samples, shape "
            f"({n_samples},), or two columns, such as a section and a type, of different names; "
            f"got shape {np.shape(groups)}{'' if names is None else f' and columns {list(names)}'}."
        )
    if names is not None:
        return {str(name): np.asarray(groups[name]) for name in names}
    if isinstance(groups, list | tuple):
        return dict(enumerate(zip(*groups, strict=True)))
    return {number: groups[:, number] for number in range(2)}


def _group_labels(groups: ArrayLike, n_samples: int) -> list[Hashable]:
    if isinstance(groups, list | tuple) and any(_is_missing(label) for label in groups):
        raise ValueError(NO_GROUP)  # in an array of text NaN would be the word
    if isinstance(groups, Tensor):
        groups = groups.detach().cpu()
    labels = np.asarray(groups)
    if labels.shape != (n_samples,):
        raise ValueError(
            f"groups must have one entry for each of the {n_samples} samples, shape "
            f"({n_samples},); got shape {labels.shape}."
        )
    found = labels.tolist()
    if any(_is_missing(label) for label in found):
        raise ValueError(NO_GROUP)
    if any(isinstance(label, complex) for label in found):
        raise ValueError("groups must be names or real numbers; got complex numbers.")
    return [_plain_label(label) for label in found]


def _plain_label(label: Hashable) -> Hashable:
    """Text, numbers, bytes and dates as they are, and the text of anything else."""
    label = label.item() if isinstance(label, np.generic) else label
    return label if type(label) in PLAIN_LABELS else str(label)


def _is_missing(label: Any) -> bool:
    try:
        return label is None or bool(label != label)
    except (TypeError, ValueError):  # pandas.NA is neither equal nor unequal; an array has many
        return not hasattr(label, "shape")


def spacing(places: Places) -> float:
    """Median distance from a place to the nearest other one (of its group, where there are any)."""
    groups = [part.coordinates.cpu().numpy() for part in _by_group(places.distinct())]
    gaps = [cKDTree(points).query(points, k=2)[0][:, 1] for points in groups if len(points) > 1]
    return float(np.median(np.concatenate(gaps))) if gaps else 0.0


def extent(places: Places) -> float:
    """Largest side of the box around the places (of one group, where there are any)."""
    sides = [np.ptp(part.coordinates.cpu().numpy(), axis=0).max() for part in _by_group(places)]
    return float(max(sides))


def _by_group(places: Places) -> list[Places]:
    if places.groups is None:
        return [places]
    return [places[places.groups == group] for group in places.groups.unique()]


def check_extent(places: Places) -> None:
    """Raise a ValueError where all places are one and the same."""
    if places.groups is not None and len(places.groups.unique()) == len(places):
        raise ValueError(
            "groups must have samples at several places; each of these has one sample alone. Use "
            "fewer groups, or spatial=False."
        )
    if extent(places) == 0:
        raise ValueError(
            "coordinates must differ between samples; all samples are at one single place. Use "
            "spatial=False, or pass the true coordinates."
        )


def warn_lengthscale(lengthscale: float, places: Places) -> None:
    """Warn of a lengthscale in the wrong unit, and name a sensible one."""
    low, high = spacing(places), extent(places)
    if lengthscale < low / 5 or lengthscale > 10 * high:
        warn(
            f"lengthscale={lengthscale:g} does not suit the coordinates, whose neighbours are "
            f"{low:.3g} apart and which extend over {high:.3g}: is it in another unit? "
            f"A sensible value is {typical_lengthscale(places):.3g}; train_lengthscale=True learns "
            "it."
        )


def warn_units(places: Places, names: Sequence[Hashable]) -> None:
    """Warn of groups of which the places of one are far wider apart than those of another."""
    assert places.groups is not None
    present = [names[code] for code in places.groups.unique().tolist()]
    parts = zip(present, _by_group(places), strict=True)
    apart = {
        name: spacing(Places(part.coordinates)) for name, part in parts if len(part) >= TELLING
    }
    known = {name: gap for name, gap in apart.items() if gap > 0}
    if known and max(known.values()) > OTHER_UNIT * min(known.values()):
        close, wide = (pick(known, key=lambda name: known[name]) for pick in (min, max))
        warn(
            f"Neighbouring places are {known[close]:.3g} apart in group {close!r} and "
            f"{known[wide]:.3g} in group {wide!r}: are their coordinates in different units? Bring "
            "all groups to one unit, or one lengthscale cannot suit them."
        )


def lie_over_one_another(coordinates: np.ndarray, parts: np.ndarray) -> bool:
    """Say whether parts (N,), codes from 0 on, are mixed in space as sections on one map are.

    Parts of fewer than ten places and negative codes are of no part, as half may be at most.
    """
    where = check_coordinates(coordinates, len(parts)).numpy()
    sizes = np.bincount(parts[parts >= 0], minlength=1)
    kept = np.flatnonzero((parts >= 0) & (sizes[parts] >= TELLING))
    if np.count_nonzero(sizes >= TELLING) < 2 or len(kept) < len(parts) / 2:
        return False
    nearest = cKDTree(where[kept]).query(where[kept], k=2)[1]
    next_to = np.where(nearest[:, 0] == np.arange(len(kept)), nearest[:, 1], nearest[:, 0])
    mine, other = parts[kept], parts[kept][next_to]
    shares = np.bincount(mine, weights=mine != other) / np.maximum(np.bincount(mine), 1)
    return bool(shares[sizes[: len(shares)] >= TELLING].mean() > OVER_ONE_ANOTHER)


def typical_lengthscale(places: Places) -> float:
    """Geometric mean of the places' spacing and their extent, from which to start learning."""
    low, high = spacing(places), extent(places)
    return float(np.sqrt(low * high)) if low > 0 else high / 10
