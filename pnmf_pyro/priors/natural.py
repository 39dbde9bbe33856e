r"""Natural-gradient steps: one rule for every prior, by pseudo-observations of the log-factors.

With m the mean of q(F_il), g the slope of the expected log-likelihood in m and -h its curvature, a
sample tells q(F_il) what one normal observation of m + g / h with precision h would. This
pseudo-observation is the *site* of the sample, held as its precision h and its shift b. A
natural-gradient step of size 1 replaces each site by the one of the present q,

.. math:: (h, b) \leftarrow (h, \; g + h m),

and q by the posterior of the prior given all sites (Khan and Lin 2017, Conjugate-computation
variational inference, section 3). A divergence of weight k divides the right side by k. A smaller
step goes part of the way from the old sites to the new ones. Where the covariance of q is to stand
still, h stays and b alone moves: a Newton step of the mean with that covariance for its curvature.

A prior takes part with three methods, see :class:`~pnmf_pyro.priors.base.Prior`: `sites`,
`posterior_from_sites` and, where a whole step would go too far, `towards_sites`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.blocks import at_once
from pnmf_pyro.data.resumable import Resumable
from pnmf_pyro.priors.base import Prior


class Step(Resumable):
    """One kind of steps that training takes: it moves some parameters, given the gradients.

    Attributes
    ----------
    lr : float
        Size of the next step, relative to a whole one.
    """

    lr: float = 1.0

    def start(self) -> None:
        """Take note that training begins."""

    def prepare(self, batch: Batch) -> None:
        """Take note of the batch whose gradients are there, before any parameter moves."""

    def step(self) -> None:
        """Move the parameters."""
        raise NotImplementedError

    def point(self) -> tuple[Tensor, ...]:
        """Return what may be extrapolated of that which the steps move; nothing unless they say."""
        return ()

    def move(self, *changes: Tensor) -> None:
        """Add a change to each part of the point."""

    def close(self) -> None:
        """Take note that training has ended."""


class SiteSteps(Step):
    """Natural-gradient steps on the q(F) of a prior.

    Parameters
    ----------
    prior : Prior
        A prior that holds q in sites.
    kl_weight : float
        Weight of the divergence in the objective.
    every : int
        The covariance of q moves at the first of each `every` steps. In between the mean moves
        alone, or nothing does where the mean costs as much.

    Raises
    ------
    ValueError
        If the prior does not hold q in sites.
    """

    carried = ("turn",)

    def __init__(self, prior: Prior, kl_weight: float = 1.0, every: int = 1):
        prior.check_sites()
        self.prior, self.kl_weight, self.every = prior, kl_weight, every
        self.turn, self.batch = 0, Batch()

    def start(self) -> None:
        """Let the guide keep the gradients of q(F)."""
        self.prior.attended = True

    def prepare(self, batch: Batch) -> None:
        """Take note of the batch that the gradients are of."""
        self.batch = batch

    @torch.no_grad()
    def step(self) -> None:
        """Move the sites of the batch, and q to the posterior given all sites."""
        whole = self.turn % self.every == 0
        self.turn += 1
        if not whole and not self.prior.cheap_mean:
            return
        prior, weight = self.prior, self.kl_weight
        if prior.divergence_by_samples:
            weight = weight * self.batch.prior_scale
        for part, index in self._pieces(self.batch.samples):
            h, b, mean = prior.sites(index)
            slope, curvature = (told.to(b) for told in self._told(part))
            target = curvature.div_(weight) if whole else h
            shift = slope.div_(weight).addcmul_(target, mean)
            if self.lr < 1:
                target, shift = h.lerp(target, self.lr), b.lerp(shift, self.lr)
            prior.towards_sites(target if whole else None, shift, index)
        prior.watched = None

    @torch.no_grad()
    def point(self) -> tuple[Tensor, ...]:
        """Return the mean m of q, and the pull r = b - h m of its sites, each (L, N)."""
        h, b, mean = self.prior.sites()
        return mean.clone(), b.addcmul(h, mean, value=-1)

    @torch.no_grad()
    def move(self, *changes: Tensor) -> None:
        """Add changes to m and r, with the covariance at rest."""
        for part, index in self._pieces(None):
            h, b, mean = self.prior.sites(index)
            of_mean, of_pull = (change[:, part] for change in changes)
            shift = (b + of_pull).addcmul_(h, of_mean)
            self.prior.posterior_from_sites(None, shift, index, mean + of_mean)

    def close(self) -> None:
        """Let the guide go on without gradients."""
        self.prior.attended, self.prior.watched = False, None

    def _pieces(self, index: Tensor | None) -> Iterator[tuple[slice, Tensor | None]]:
        """Iterate over samples, by their place among those of the index and by their numbers.

        In pieces where those of the prior are independent, so that little memory is needed.
        """
        n, size = self.prior.N if index is None else len(index), at_once(self.prior.L)
        if not self.prior.independent or n <= size:
            yield slice(None), index
            return
        numbers = torch.arange(n) if index is None else index
        for start in range(0, n, size):
            yield (part := slice(start, start + size)), numbers[part]

    def _told(self, part: slice) -> tuple[Tensor, Tensor]:
        """Return slope g and curvature h at samples of the batch, each (L, n)."""
        q = self.prior.watched
        if q is None or q.loc.grad is None or q.scale.grad is None:
            raise RuntimeError("SiteSteps.step needs the gradients of a loss at the guide's q(F)")
        share = q.loc.shape[1] / self.prior.N  # the loss is that of all samples, by the batch's
        curvature = (q.scale.grad[:, part] / q.scale.detach()[:, part]).clamp_min_(0)
        return q.loc.grad[:, part].mul(-share), curvature.mul_(share)
