"""What a prior over factors offers to the model, the guide, training and the transforms."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar, NamedTuple, Protocol, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import Normal
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.runtime import InferDict
from torch import Tensor, nn

from pnmf_pyro.data.batches import Batch
from pnmf_pyro.data.places import Places
from pnmf_pyro.gp.kernels import SpatialKernel

Draws = Callable[[Tensor | None], Tensor]

NO_SITES = (
    "natural-gradient steps need a prior that holds q in sites; make it with "
    "use_natural_gradients=True and a full covariance (diagonal_only=False)."
)


class Sites(NamedTuple):
    """Sites of samples, with the mean of q(F) there; each of shape (L, n).

    Attributes
    ----------
    precision : Tensor
        h, never negative.
    shift : Tensor
        b, the precision times what is observed of F.
    mean : Tensor
        m, the mean of q(F).
    """

    precision: Tensor
    shift: Tensor
    mean: Tensor


class Field(Protocol):
    """q(F) at L components and N samples or places.

    Attributes
    ----------
    L, N : int
        Number of components, and of samples or places.
    """

    L: int
    N: int

    def marginal(self, index: Tensor | None = None) -> Normal:
        """Return q(F_il) for the samples `index` (all if None), with loc and scale (L, n)."""

    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of samples to draws there, (n_draws, L, n).

        Calls for different samples belong to the same draws.
        """


class Prior(nn.Module):
    """A prior over log-factors F of shape (L, N), with its variational family.

    A subclass writes :meth:`model`, :meth:`guide` and :meth:`marginal`; gradient training needs no
    more. A subclass of :class:`GaussianPrior` that writes another `model` for the sample statement
    "F" keeps q(F) as it is. Natural-gradient training needs :meth:`sites` and
    :meth:`posterior_from_sites` as well, and a prior over places :meth:`at` and `places`.

    Attributes
    ----------
    L, N : int
        Number of components, and of samples.
    kernel : SpatialKernel
        Covariance of the fields, which only a prior over places has.
    matrix_entries : int
        Number of entries of the matrices that a step multiplies or factorises, beside the counts.
    steps_apart : int
        Number of steps from one that moves the covariance of q to the next, where it may wait.
    cheap_mean : bool
        Whether the mean of q moves at little cost while its covariance stands still.
    divergence_by_samples : bool
        Whether the divergence of q from the prior is a sum over samples, which a batch scales.
    independent : bool
        Whether samples are independent, under the prior and under q.
    watched : Normal or None
        q(F) of the last batch that the guide saw, with its gradients, for
        :class:`~pnmf_pyro.priors.natural.SiteSteps`.
    attended : bool
        Whether such steps are under way.
    joint_covariance : Tensor of shape (N, L (L + 1) / 2) or None
        Covariances of the joint posterior of each sample, packed, where it was found; see
        :mod:`~pnmf_pyro.priors.joint`.
    joint_draws : Tensor of shape (L, M + 1, R) or None
        Deviations of all components together from their mean, in what a field is held in, and of
        their levels, where they were found; see :meth:`coupled`.
    given_buffers : tuple of str
        Names of the buffers that no step of training changes, so that none needs a copy of them.
    """

    L: int
    N: int
    kernel: SpatialKernel
    matrix_entries: int = 0
    steps_apart: int = 1
    cheap_mean: bool = False
    divergence_by_samples: bool = True
    independent: bool = False
    watched: Normal | None = None
    attended: bool = False
    joint_covariance: Tensor | None
    joint_draws: Tensor | None
    given_buffers: ClassVar[tuple[str, ...]] = (
        "place_coordinates",
        "place_groups",
        "joint_covariance",
        "joint_draws",
    )

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("joint_covariance", None)
        self.register_buffer("joint_draws", None)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "watched": None, "attended": False}

    @property
    def places(self) -> Places | None:
        """Places of the samples, (N,); None for a prior that knows nothing of places."""
        return None

    @property
    def parts(self) -> tuple[Prior, ...]:
        """Priors that stand side by side in this one; itself, unless it is made of others."""
        return (self,)

    @property
    def fields(self) -> tuple[Prior, ...]:
        """Parts that are over places."""
        return tuple(part for part in self.parts if part.places is not None)

    @property
    def is_mixed(self) -> bool:
        """Whether some parts are over places and others are not."""
        return 0 < len(self.fields) < len(self.parts)

    def of_parts(self) -> Iterator[tuple[Prior, slice]]:
        """Return each part with the numbers of its components."""
        start = 0
        for part in self.parts:
            yield part, slice(start, start + part.L)
            start += part.L

    def model(self, batch: Batch, samples: pyro.plate) -> Tensor:
        """Make the generative statements and return F of the batch, shape (L, n).

        F is drawn in :meth:`local_plates`, as in the guide; where it stands in other plates, Pyro
        warns that those of the two programs differ.

        Parameters
        ----------
        batch : Batch
            The part of the data that the step sees.
        samples : pyro.plate
            The plate over the samples of the batch.
        """
        raise NotImplementedError

    def guide(self, batch: Batch, samples: pyro.plate) -> Tensor:
        """Make the variational statements and return F of the batch, shape (L, n)."""
        raise NotImplementedError

    def marginal(self, index: Tensor | None = None) -> Normal:
        """Return q(F_il) for the samples `index` (all if None), with loc and scale (L, n)."""
        raise NotImplementedError

    def assign(self, mean: Tensor, scale: Tensor) -> None:
        """Start q(F) from what is known of each F_il: N(mean_il, scale_il^2), of shape (L, N).

        A prior that does not write this method starts from its own parameters.
        """

    def draws(self, n_draws: int) -> Draws:
        """Return a function from the numbers of samples to draws of q(F), (n_draws, L, n).

        They are independent over samples, unless a prior says otherwise.
        """
        return lambda index: self.marginal(index).rsample(torch.Size([n_draws]))

    def at(self, places: Places) -> Field:
        """Return q(F) at other places.

        Raises
        ------
        ValueError
            If the prior knows nothing of places.
        """
        raise ValueError(
            "coordinates and groups are for spatial models; the factors of this model know "
            "nothing of places. Leave them out, or fit with spatial=True."
        )

    def beside(self, places: Places) -> Field:
        """Return q(F) at other places, where it stands beside a prior that knows places."""
        return self.at(places)

    def before(self, places: Places) -> Normal:
        """Return the marginals of p(F) at places, with loc and scale (L, n).

        For a prior over places, with the attributes `mean` and `kernel`; a ValueError otherwise.
        """
        if self.places is None:
            raise ValueError(
                f"{type(self).__name__} does not say what it knows of samples before their counts; "
                "write its method `before`."
            )
        level = cast(Tensor, self.mean)[:, None].expand(-1, len(places))
        scale = self.kernel.variance(places).sqrt().expand_as(level)
        return Normal(level, scale, validate_args=False)

    def apart_from_own(self, precision: Tensor) -> Tensor | None:
        """Return the precision of each F_il given all but the counts of its own sample.

        None for a prior that does not say, of which there is no joint posterior.

        Parameters
        ----------
        precision : Tensor of shape (L, N)
            Precisions h of the sites of all samples.

        Returns
        -------
        Tensor of shape (L, N), float64, or None
        """
        return None

    def coupled(
        self, information: Tensor, told: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor] | None:
        """Solve (Q + H) x = told, Q the precision of the field and H that of each place's counts.

        With a generator noise of covariance Q is added to the right side, so that what counts say
        with noise of covariance H makes x a draw of the posterior (perturbation, Papandreou and
        Yuille 2010).

        Parameters
        ----------
        information : Tensor of shape (N, L, L)
            H of each sample, which couples its components.
        told : Tensor of shape (L, N, R)
        generator : torch.Generator or None
            Source of the noise; None for none.

        Returns
        -------
        held : Tensor of shape (L, M, R)
            x in what the field is held in: at inducing points, or at the samples.
        at_samples : Tensor of shape (L, N, R)
            x at the samples.
            None in place of both for a prior that is no field.
        """
        return None

    def carry(self, places: Places | None, held: Tensor) -> tuple[Tensor, Tensor]:
        """Return held values (L, M, R) carried to n places, (L, n, R), and the variance left there.

        The places are those of the samples unless given. The variance, (L, n), is that of the
        field given all that is held.
        """
        raise ValueError("this prior knows nothing of places")

    @property
    def natural(self) -> bool:
        """Whether q is held in sites, so that natural-gradient steps can move it."""
        return False

    def check_sites(self) -> None:
        """Raise a ValueError unless q is held in sites."""
        if not self.natural:
            raise ValueError(NO_SITES)

    def sites(self, index: Tensor | None = None) -> Sites:
        """Return the sites of the samples `index` (all if None), each array of shape (L, n)."""
        raise ValueError(NO_SITES)

    def posterior_from_sites(
        self,
        precision: Tensor | None,
        shift: Tensor,
        index: Tensor | None = None,
        mean: Tensor | None = None,
    ) -> None:
        """Set the sites of some samples, and q to the posterior given all sites.

        Parameters
        ----------
        precision : Tensor of shape (L, n) or None
            h; None leaves it and the covariance of q as they are.
        shift : Tensor of shape (L, n)
            b, the precision times what is observed of F.
        index : Tensor of int64, shape (n,), optional
            The samples; all unless given.
        mean : Tensor of shape (L, N), optional
            Mean of that posterior, where it is known already; of the samples alone where they are
            `independent`.
        """
        raise ValueError(NO_SITES)

    def towards_sites(
        self, precision: Tensor | None, shift: Tensor, index: Tensor | None = None
    ) -> None:
        """Take a step to the posterior given these sites; as far as is safe, where that is less."""
        self.posterior_from_sites(precision, shift, index)

    @torch.no_grad()
    def restore_spread(self, weight: float) -> None:
        """Undo what training with the factor `weight` on the divergence did to the spread of q.

        The precisions of the sites become `weight` times what they are, and the mean of q stays.

        Raises
        ------
        ValueError
            If the prior does not hold q in sites.
        """
        h, b, mean = self.sites()
        self.posterior_from_sites(weight * h, b - (1 - weight) * h * mean)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: object
    ) -> None:
        self.joint_covariance = None
        self.joint_draws = None
        if f"{prefix}joint_covariance" in state_dict:
            self.joint_covariance = torch.empty(self.N, self.L * (self.L + 1) // 2)
        if (draws := state_dict.get(f"{prefix}joint_draws")) is not None:
            rows = getattr(self, "M", self.N) + 1
            self.joint_draws = torch.empty(self.L, rows, draws.shape[-1])
        super()._load_from_state_dict(state_dict, prefix, *args)

    def watch(self, q: Normal) -> Normal:
        """Return q(F) of a batch as the guide uses it: with gradients where steps are under way."""
        if self.attended and torch.is_grad_enabled():
            q = self.watched = _watched(q)
        return q

    @contextmanager
    def local_plates(self, batch: Batch, samples: pyro.plate) -> Iterator[None]:
        """Enter the plates, components by samples, in which F of a batch is drawn."""
        components = pyro.plate("components", self.L, dim=-2)
        with samples, components, poutine.scale(scale=batch.prior_scale):
            yield


def stating(marginal: TorchDistributionMixin) -> InferDict:
    """Return the `infer` of a sample statement by which a guide states the marginal of a value."""
    return cast(InferDict, {"marginal": marginal})


def _watched(q: Normal) -> Normal:
    """Return q(F) of a batch, (L, n), with a mean and a scale that keep their gradients."""
    loc, scale = (moment.detach().requires_grad_() for moment in (q.loc, q.scale))
    return Normal(loc, scale, validate_args=False)
