"""The Poisson factorisation: a Pyro model and its guide."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, pairwise
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.nn.module import PyroModule, PyroParam, PyroSample
from pyro.params.param_store import StateDict
from torch import Tensor, nn
from torch.distributions import transform_to

from pnmf_pyro.custom_modules import POSITIVE_MODES, PositiveParameter
from pnmf_pyro.data.batches import Batch, take
from pnmf_pyro.data.checks import MODES, check_choice, check_data, like_data
from pnmf_pyro.data.counts import Counts, MatrixLike, as_counts
from pnmf_pyro.data.exposure import Exposure, as_exposure
from pnmf_pyro.data.parallel import ALONE, Ranks
from pnmf_pyro.data.random_state import RandomState, torch_generator
from pnmf_pyro.data.stored import StoredCounts
from pnmf_pyro.models.points import DrawnForAllRanks
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.models.reference import ReferenceModel
from pnmf_pyro.priors import Prior
from pnmf_pyro.priors.natural import Step

logger = logging.getLogger("pnmf_pyro")

ALL = Batch()

Likelihood = Callable[[PoissonFactors, Batch], TorchDistributionMixin]

_numbers = count()


def has_closed_form(likelihood: object) -> bool:
    """Whether a likelihood has a bound and steps in closed form, as the Poisson (None) has.

    One that has says so by its `closed_form`, and returns a :class:`PoissonFactors`.
    """
    return likelihood is None or bool(getattr(likelihood, "closed_form", False))


def _slices(batch: Batch) -> Iterator[Batch]:
    """Iterate over the samples of a batch, by slices where its counts are in a store."""
    if not isinstance(batch.counts, StoredCounts):
        yield batch
        return
    for start, stop in pairwise(batch.counts.cuts):
        yield replace(batch, samples=torch.arange(start, stop))


def _registered(program: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a program of a model begin with the registration of the model's parameters."""

    @functools.wraps(program)
    def run(self: PoissonFactorization, batch: Batch | Counts | MatrixLike = ALL) -> Tensor:
        self._register(trains_q=program.__name__ == "guide")
        return program(self, batch if isinstance(batch, Batch) else Batch(as_counts(batch)))

    return run


class PoissonFactorization(ReferenceModel, nn.Module):
    """X_ij ~ Poisson(s_i sum_l W_jl exp F_il), with a prior on F and non-negative W.

    :meth:`model` and :meth:`guide` are ordinary Pyro programs of a batch of the data, or of all
    counts, a matrix of shape (N, D). They register the parameters of the module under its `name`,
    so that `pyro.infer.SVI` trains them.

    To change the likelihood, write another :meth:`likelihood` in a subclass, or pass one. To change
    more, write another :meth:`model` or :meth:`guide`. A new parameter is a `torch.nn.Parameter` of
    the subclass or a `pyro.param` statement. :func:`~pnmf_pyro.fit_model` trains it.

    Parameters
    ----------
    prior : Prior
        Prior of F and its variational family.
    y : Tensor of shape (D, N)
        Data; only its shape, floating-point type and device are used, so a tensor on the device
        "meta" does.
    L : int
        Number of components.
    loadings_mode : {'softplus', 'exp', 'projected', 'multiplicative'}
        How W stays non-negative, see :class:`PositiveParameter`.
    mode : {'simple', 'expanded', 'lower-bound'}
        Form of the ELBO.
    size_factors : Tensor of shape (N,), or Exposure, optional
        s, positive; or what else scales the rates. 1 unless given.
    random_state : int, RandomState or None
        Seed of the loadings to start from.
    likelihood : callable, optional
        Function from the Poisson distribution of a batch and the batch to the distribution of its
        counts, which has a sample's row of counts for its event. A `torch.nn.Module` may have
        parameters, which are trained. Poisson unless given.

    Attributes
    ----------
    name : str
        Name of this instance in Pyro's parameter store. Each copy has one of its own.
    W : PositiveParameter of shape (D, L)
        Loadings.
    loading_blocks, loading_coupling : Tensor or None
        Errors of the loadings, where they were found; see
        :class:`~pnmf_pyro.models.loading_errors.LoadingErrors`.
    D, N, L : int
        Number of features, samples and components.
    ranks : Ranks
        Processes among which the samples of a fit are shared out, while it trains.

    Examples
    --------
    >>> import torch
    >>> from pnmf_pyro.priors import GaussianPrior
    >>> from pnmf_pyro.models import PoissonFactorization
    >>> y = torch.poisson(torch.ones(100, 50))
    >>> model = PoissonFactorization(GaussianPrior(y, L=10), y, L=10)
    >>> terms, qF, pF = model(E=10, X=y)
    >>> tuple(qF.loc.shape)
    (10, 50)
    """

    loading_blocks: Tensor | None
    loading_coupling: Tensor | None
    ranks: Ranks = ALONE

    def __init__(
        self,
        prior: Prior,
        y: Tensor,
        L: int = 10,
        loadings_mode: str = "softplus",
        mode: str = "expanded",
        *,
        size_factors: Tensor | Exposure | None = None,
        random_state: RandomState = None,
        likelihood: Likelihood | None = None,
    ):
        super().__init__()
        self.name = f"factorization_{next(_numbers)}"
        self._statements: StateDict = {"params": {}, "constraints": {}}
        self._may_warn = True
        self.observation = likelihood
        check_choice("loadings_mode", loadings_mode, POSITIVE_MODES)
        check_choice("mode", mode, MODES)
        check_data(y)
        self.D, self.N = (int(size) for size in y.shape)
        if (prior.L, prior.N) != (L, self.N):
            raise ValueError(
                f"prior must be over L={L} components and N={self.N} samples, like y and L; it is "
                f"over L={prior.L} and N={prior.N}."
            )
        self.L = prior.L
        self.prior = prior
        self.loadings_mode = loadings_mode
        self.mode = mode
        self.W = PositiveParameter((self.D, L), loadings_mode, mode)
        self.W.assign(torch.rand(self.D, L, generator=torch_generator(random_state)) + 0.5)
        like_data(self.W, y)
        exposure = copy.deepcopy(as_exposure(size_factors))
        self.exposure = exposure.to(self.W.device, self.W.dtype)
        self.register_buffer("loading_blocks", None)
        self.register_buffer("loading_coupling", None)

    @property
    def size_factors(self) -> Tensor | None:
        """Size factors s of the samples, (N,), where there are any."""
        return self.exposure.size_factors

    def __init_subclass__(cls, **keywords: object):
        """Register the parameters in programs of a subclass as well."""
        super().__init_subclass__(**keywords)
        for name in {"model", "guide"} & vars(cls).keys():
            setattr(cls, name, _registered(vars(cls)[name]))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, PyroSample):
            raise ValueError(
                f"{name} cannot be a PyroSample; write {name} = pyro.sample({name!r}, ...) in a "
                "`model` of your own, before the plate over samples."
            )
        if isinstance(value, PyroParam) and not isinstance(self, PyroModule):
            raise ValueError(
                f"{name} can be a PyroParam of a PyroModule only; derive the class from "
                "PyroModule[PoissonFactorization], or use a torch.nn.Parameter or pyro.param."
            )
        super().__setattr__(name, value)

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)
        self.name = f"factorization_{next(_numbers)}"
        self._may_warn = True

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: object
    ) -> None:
        sizes = {"blocks": (self.D, self.L * (self.L + 1) // 2), "coupling": 2 * (self.L**2,)}
        for name, size in sizes.items():
            held = f"{prefix}loading_{name}" in state_dict
            setattr(self, f"loading_{name}", torch.empty(size) if held else None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _register(self, trains_q: bool) -> None:
        """Register the parameters in Pyro's store, and those that `pyro.param` statements learned.

        Say so, once, where gradients leave q as it is.
        """
        training, self.training = self.training, False  # or Pyro warns of each frozen parameter
        pyro.module(self.name, self)
        self.training = training
        store, learned = pyro.get_param_store(), self._statements["params"]
        for name in learned.keys() - store.keys():
            constraint = self._statements["constraints"][name]
            value = transform_to(constraint)(learned[name].detach())
            kept: Any = pyro.param(name, value, constraint=constraint)
            learned[name] = kept.unconstrained()
        told = training and self._may_warn and torch.is_grad_enabled()
        if trains_q and told and self.prior.natural and not self.prior.attended:
            self._may_warn = False  # once is enough
            logger.warning(
                "q(F) is held in sites, which natural-gradient steps move and Pyro's optimisers do "
                "not. For SVI make the prior with use_natural_gradients=False."
            )

    @_registered
    def model(self, batch: Batch = ALL) -> Tensor:
        """Generate counts of shape (n, d), or observe those of the batch."""
        samples = batch.plate(self.N)
        F = self.prior.model(batch, samples)
        with samples, poutine.scale(scale=batch.likelihood_scale):
            X = self.likelihood(F, batch)
            seen = batch.counts if isinstance(X, PoissonFactors) else batch.dense_counts
            return pyro.sample("X", X, obs=cast(Tensor | None, seen))

    def likelihood(self, F: Tensor, batch: Batch = ALL) -> TorchDistributionMixin:
        """Return the distribution of the batch's counts given F.

        Overriding this method is enough for another likelihood. What the method of this class
        returns has the `mean` s_i sum_l W_jl exp F_il to start from.

        Parameters
        ----------
        F : Tensor of shape (..., L, n)
        batch : Batch
        """
        W = take(self.W.data, batch.features, dim=0)
        exposure = self.exposure.of(batch.samples, batch.features)
        poisson = PoissonFactors(F, W, exposure, validate_args=False)
        return poisson if self.observation is None else self.observation(poisson, batch)

    @_registered
    def guide(self, batch: Batch = ALL) -> Tensor:
        """Draw F from q."""
        with DrawnForAllRanks(ALONE if batch.counts is None else batch.counts.ranks):
            return self.prior.guide(batch, batch.plate(self.N))

    @contextmanager
    def apart(self, inherit: bool = False) -> Iterator[None]:
        """Run the programs in a parameter store of their own; that of the caller stays as it is.

        It holds what `pyro.param` statements of the programs had when it was last left.

        Parameters
        ----------
        inherit : bool
            Let the statements see the parameters of the caller as well, where they have none.
        """
        store = pyro.get_param_store()
        state = self._statements
        if inherit:
            outer = store.get_state()
            state = {
                "params": outer["params"] | state["params"],
                "constraints": outer["constraints"] | state["constraints"],
            }
        before, self._may_warn = self._may_warn, False
        try:
            with store.scope(state):
                yield
        finally:
            self._may_warn = before
        if not inherit:
            mine = f"{self.name}$$$"

            def others(values: dict) -> dict:
                return {k: v for k, v in values.items() if not k.startswith(mine)}

            params, constraints = others(state["params"]), others(state["constraints"])
            self._statements = {"params": params, "constraints": constraints}

    def trained_parameters(self) -> list[Tensor]:
        """Return the parameters of the module, and those of `pyro.param` statements in programs.

        Statements that have run in :meth:`apart`, that is; the parameters are unconstrained.
        """
        return [*self.parameters(), *self._statements["params"].values()]

    def state_of_training(self) -> list[Tensor]:
        """Return all that steps can change: parameters, and buffers that no module calls given."""
        moved = [
            buffer
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in getattr(module, "given_buffers", ())
        ]
        return [tensor.detach() for tensor in (*self.trained_parameters(), *moved)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all trained parameters."""
        super().zero_grad(set_to_none)
        for parameter in self._statements["params"].values():
            parameter.grad = None

    def assign(self, W: Tensor, exp_F: Tensor, scale: float = 0.1) -> None:
        """Start from loadings W (D, L) and factors exp F (N, L), with a common scale of q(F)."""
        mean = exp_F.T.log()
        self.prior.assign(mean, torch.full_like(mean, scale))
        typical = W.mean(1, keepdim=True)
        self.W.set_unit(typical.clamp_min(typical[typical > 0].min() if (typical > 0).any() else 1))
        self.W.assign(W)

    def expected_totals(self, batch: Batch = ALL) -> tuple[Tensor, Tensor]:
        """Return sums over all samples, as the batch estimates them.

        Returns
        -------
        totals : Tensor of shape (d, L), or (1, L) where they are the same for all features
            sum_i e_ij E exp F_il.
        levels : Tensor of shape (L,)
            sum_i s_i E exp F_il.
        """
        with torch.no_grad():
            found = []
            for part in _slices(batch):
                factors = self._expected_factors(part)
                X = cast(PoissonFactors, self.likelihood(factors, part))
                totals = X.totals(cast(Counts, part.counts), factors)
                found.append((totals, self._levels(factors, part)))
            each = (self._estimate(batch, parts) for parts in zip(*found, strict=True))
            totals, levels = self.ranks.totals(*each)
            return totals, levels

    def levels(self, batch: Batch = ALL) -> Tensor:
        """Return sum_i s_i E exp F_il over all samples, as the batch estimates it, shape (L,)."""
        with torch.no_grad():
            parts = [self._levels(self._expected_factors(p), p) for p in _slices(batch)]
            return self.ranks.total(self._estimate(batch, parts))

    def _estimate(self, batch: Batch, parts: Sequence[Tensor]) -> Tensor:
        """Estimate a sum over all samples, given those over parts of a batch."""
        n = self.N if batch.samples is None else len(batch.samples)
        return self.N / n * torch.stack([*parts]).sum(0, dtype=torch.float64).to(self.W.dtype)

    def _levels(self, factors: Tensor, batch: Batch) -> Tensor:
        scaled = self.exposure.of(batch.samples, None).scaled(factors)
        return scaled.sum(1, dtype=torch.float64).to(factors.dtype)

    def _expected_factors(self, batch: Batch) -> Tensor:
        q = self.prior.marginal(batch.samples)
        return q.variance.div_(2).add_(q.loc).exp_()

    def in_closed_form(self, F: Tensor, batch: Batch = ALL) -> PoissonFactors:
        """Return the likelihood where it has a closed form, else the Poisson of the same mean.

        The loadings carry no gradient.
        """
        W = take(self.W.data.detach(), batch.features, dim=0)
        exposure = self.exposure.of(batch.samples, batch.features)
        poisson = PoissonFactors(F, W, exposure, validate_args=False)
        if self.observation is None or not self.has_closed_form:
            return poisson
        return cast(PoissonFactors, self.observation(poisson, batch))

    @property
    def has_closed_form(self) -> bool:
        """Whether the likelihood has a bound and steps in closed form."""
        return has_closed_form(self.observation)

    def own_steps(self, at_once: bool = False) -> list[Step]:
        """Return the steps of training that the likelihood brings, from the first on or later."""
        steps = getattr(self.observation, "steps", None)
        return [] if steps is None else steps(self, at_once)

    def project_parameters(self) -> None:
        """Clamp the loadings at zero in `projected` mode."""
        self.W.project()
