"""Priors side by side: some components under one prior, the others under another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import pyro
import torch
from pyro.distributions import Delta, Normal
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import InferDict, Message
from torch import Tensor, nn

from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.places import Places
from pnmf_pyro.priors.base import Draws, Field, Prior, Sites


class SideBySide(Prior):
    """Components of several priors over the same samples, those of the first one first.

    The fields of one part are smooth in space and those of another one free, say: the hybrid of
    non-negative spatial factorisation (Townes and Engelhardt 2023). Parts are independent, under
    the prior and under q. The sample statements of part k, and its plates over components, have
    `part_k_` before their names, and "F" is the value of all parts together.

    Parameters
    ----------
    *priors : Prior
        Parts, over the same samples. Either all hold q in sites or none does. Those over places
        have the same ones. A part that is itself made of parts counts as these.

    Attributes
    ----------
    sides : ModuleList of Prior
        The parts.

    Raises
    ------
    ValueError
        For parts that cannot stand side by side.

    Examples
    --------
    >>> import torch
    >>> from pnmf_pyro.data.places import Places
    >>> from pnmf_pyro.priors import LCGP, GaussianPrior, SideBySide
    >>> places = Places(torch.rand(50, 2, dtype=torch.float64))
    >>> smooth = LCGP("Matern32", places, L=5, K=8)
    >>> prior = SideBySide(smooth, GaussianPrior(torch.empty(100, 50), L=3))
    >>> prior.L, tuple(prior.marginal().loc.shape)
    (8, (8, 50))
    """

    def __init__(self, *priors: Prior):
        super().__init__()
        parts = [part for prior in priors for part in _checked(prior).parts]
        if not parts:
            raise ValueError("priors must be one prior at least; got none.")
        if len({part.N for part in parts}) > 1:
            raise ValueError(
                f"priors must be over the same samples; they are over {[p.N for p in parts]}."
            )
        if len({part.natural for part in parts}) > 1:
            raise ValueError(
                "priors must all hold q(F) in sites or none; make them with the same "
                f"use_natural_gradients. {[_kind(p) for p in parts if p.natural]} do, "
                f"{[_kind(p) for p in parts if not p.natural]} do not."
            )
        known = [part.places for part in parts if part.places is not None]
        if not all(_same(known[0], places) for places in known):
            raise ValueError("priors over places must have the same places of their samples.")
        self.sides = nn.ModuleList(parts)
        self.L, self.N = sum(part.L for part in parts), parts[0].N
        self.matrix_entries = sum(part.matrix_entries for part in parts)

    @property
    def parts(self) -> tuple[Prior, ...]:
        """The parts, none of which is made of parts."""
        return tuple(cast("Iterator[Prior]", iter(self.sides)))

    @property
    def places(self) -> Places | None:
        """Places of the samples, of the parts that have them."""
        return next((part.places for part in self.parts if part.places is not None), None)

    def model(self, batch: Batch, samples: pyro.plate) -> Tensor:
        """Run the models of the parts, and return F of the batch, shape (L, n)."""
        values = []
        for number, part in enumerate(self.parts):
            with _Part(number, samples):
                values.append(part.model(batch, samples))
        return self._together(values, batch, samples)

    def guide(self, batch: Batch, samples: pyro.plate) -> Tensor:
        """Run the guides of the parts, and return F of the batch, shape (L, n).

        Where each part draws its F from a normal, or states a normal marginal of it, these are the
        marginals that "F" has.
        """
        values, sources = [], []
        for number, part in enumerate(self.parts):
            with _Part(number, samples) as found:
                values.append(part.guide(batch, samples))
            sources.append(found.source_of(values[-1]))
        infer: dict[str, Any] = {"is_auxiliary": True}
        if None not in sources:
            marginals = [q for _, q in cast("list[tuple[str, Normal]]", sources)]
            names = [name for name, _ in cast("list[tuple[str, Normal]]", sources)]
            infer |= {"marginal": side_by_side(marginals), "made_of": names}
        return self._together(values, batch, samples, infer)

    def _together(
        self,
        values: Sequence[Tensor],
        batch: Batch,
        samples: pyro.plate,
        infer: dict[str, Any] | None = None,
    ) -> Tensor:
        """State F, which is made of the values of the parts and has no density of its own."""
        F = _one_after_another(values)
        with self.local_plates(batch, samples):
            made = Delta(F, event_dim=0).mask(False)
            told = cast(InferDict, {"_deterministic": True, **(infer or {})})
            return pyro.sample("F", made, obs=F, infer=told)

    def marginal(self, index: Tensor | None = None) -> Normal:
        """Return q(F_il) for the samples `index` (all if None), with loc and scale (L, n)."""
        return side_by_side([part.marginal(index) for part in self.parts])

    def assign(self, mean: Tensor, scale: Tensor) -> None:
        """Start each part from what is known of its components, each of shape (L, N)."""
        for part, *known in self._split(mean, scale):
            part.assign(*known)

    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of samples to draws of q(F), (n_draws, L, n)."""
        return _drawn_together([part.draws(n_draws) for part in self.parts])

    def at(self, places: Places) -> Field:
        """Return q(F) at other places: what fields say, and the prior of what knows no places."""
        if self.places is None:
            return super().at(places)
        return FieldsSideBySide([part.beside(places) for part in self.parts])

    def before(self, places: Places) -> Normal:
        """Return the marginals of p(F) at places, with loc and scale (L, n)."""
        return side_by_side([part.before(places) for part in self.parts])

    def apart_from_own(self, precision: Tensor) -> Tensor | None:
        """Return the precision of each F_il given all but the counts of its own sample."""
        found = [part.apart_from_own(h) for part, h in self._split(precision)]
        if any(one is None for one in found):
            return None
        return torch.cat(cast("list[Tensor]", found))

    @property
    def natural(self) -> bool:
        """Whether q is held in sites, by each part."""
        return all(part.natural for part in self.parts)

    @property
    def attended(self) -> bool:  # type: ignore[override]
        """Whether natural-gradient steps are under way, in any part."""
        return any(part.attended for part in self.parts)

    def check_sites(self) -> None:
        """Raise a ValueError: natural-gradient steps are those of the parts."""
        raise ValueError(
            "natural-gradient steps of priors side by side are those of each: make "
            "SiteSteps(part) for each part of prior.parts."
        )

    def sites(self, index: Tensor | None = None) -> Sites:
        """Return the sites of the samples `index` (all if None), each array of shape (L, n)."""
        each = zip(*(part.sites(index) for part in self.parts), strict=True)
        return Sites(*(torch.cat([one.double() for one in kind]) for kind in each))

    @torch.no_grad()
    def posterior_from_sites(
        self,
        precision: Tensor | None,
        shift: Tensor,
        index: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> None:
        """Set the sites of some samples, and each part to its posterior given all of its sites."""
        for part, h, b, m in self._split(precision, shift, mean):
            part.posterior_from_sites(h, b, index, m)

    @torch.no_grad()
    def restore_spread(self, weight: float) -> None:
        """Undo what training with the factor `weight` on the divergence did to the spread of q."""
        for part in self.parts:
            part.restore_spread(weight)

    def _split(self, *values: Tensor | None) -> Iterator[tuple[Any, ...]]:
        """Each part with its components of values (L, n)."""
        for part, mine in self.of_parts():
            yield part, *(None if value is None else value[mine] for value in values)


class FieldsSideBySide:
    """q(F) of several fields at the same samples or places, components one after another."""

    def __init__(self, fields: Sequence[Field]):
        self.fields = fields
        self.L, self.N = sum(field.L for field in fields), fields[0].N

    def marginal(self, index: Tensor | None = None) -> Normal:
        """Return q(F_il) at the places `index` (all if None), with loc and scale (L, n)."""
        return side_by_side([field.marginal(index) for field in self.fields])

    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of places to draws of q(F), (n_draws, L, n)."""
        return _drawn_together([field.draws(n_draws) for field in self.fields])


class _Part(Messenger):
    """Give statements of a part, and plates other than that of the samples, names of its own."""

    def __init__(self, number: int, samples: pyro.plate):
        super().__init__()
        self.prefix, self.shared = f"part_{number}_", samples.name
        self.found: list[Message] = []

    def _pyro_sample(self, msg: Message) -> None:
        msg["name"] = f"{self.prefix}{msg['name']}"
        msg["cond_indep_stack"] = tuple(
            frame if frame.name == self.shared else frame._replace(name=self.prefix + frame.name)
            for frame in msg["cond_indep_stack"]
        )

    def _pyro_post_sample(self, msg: Message) -> None:
        self.found.append(msg)

    def source_of(self, value: Tensor) -> tuple[str, Normal] | None:
        """Return name and normal marginal of the statement that made a value, if there is one."""
        for msg in self.found:
            if msg["value"] is value:
                q = (msg["infer"] or {}).get("marginal", msg["fn"])
                return (str(msg["name"]), q) if isinstance(q, Normal) else None
        return None


def side_by_side(marginals: Sequence[Normal]) -> Normal:
    """Return the marginals of all components together, with loc and scale (L, n)."""
    loc, scale = ([getattr(q, name) for q in marginals] for name in ("loc", "scale"))
    return Normal(_one_after_another(loc), _one_after_another(scale), validate_args=False)


def _one_after_another(values: Sequence[Tensor]) -> Tensor:
    """Values (..., L, n) of parts as those of all components, repeated along leading dimensions."""
    shape = torch.broadcast_shapes(*(value.shape[:-2] for value in values))
    return torch.cat([value.expand(*shape, *value.shape[-2:]) for value in values], -2)


def _drawn_together(each: Sequence[Draws]) -> Draws:
    return lambda index: _one_after_another([draw(index) for draw in each])


def _checked(prior: object) -> Prior:
    if not isinstance(prior, Prior):
        raise ValueError(
            f"priors must be of pnmf_pyro.priors, one after another; got {_kind(prior)}. Pass "
            "them as SideBySide(first, second), not as a list."
        )
    return prior


def _kind(value: object) -> str:
    return type(value).__name__


def _same(a: Places, b: Places) -> bool:
    """Whether two parts have the same places of their samples, in the same groups."""
    if (a.groups is None) != (b.groups is None) or a.coordinates.shape != b.coordinates.shape:
        return False
    alike = a.groups is None or torch.equal(a.groups, cast(Tensor, b.groups))
    return alike and torch.equal(a.coordinates, b.coordinates)
