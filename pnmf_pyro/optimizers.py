"""Optimisers and learning-rate schedules by name, and natural-gradient ascent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import unwrap
from typing import Any, Protocol

import torch
from pyro.optim import PyroOptim
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler

from pnmf_pyro.custom_modules import PositiveParameter
from pnmf_pyro.data import Batch, take

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "NAdam": torch.optim.NAdam,
    "SGD": torch.optim.SGD,
    "RMSprop": torch.optim.RMSprop,
}


class ClosedForm(Optimizer):
    """Base class of optimisers whose step solves for the optimum instead of following a slope.

    They need more than the gradient: :meth:`prepare` is called with the batch when the gradients
    of its loss are there and before any parameter moves.
    """

    batch: Batch = Batch()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Take parameters, without importing torch's compiler first, which takes seconds."""
        unwrap(Optimizer.add_param_group)(self, param_group)

    def prepare(self, batch: Batch) -> None:
        """Take note of the batch that the gradients are of."""
        self.batch = batch

    def close(self) -> None:
        """Leave the parameters as others can train them, at the end of training."""


class Descent(ClosedForm):
    """Gradient descent, for parameters whose gradients are natural ones.

    Parameters
    ----------
    parameters : iterable of Parameter
    lr : float
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 1.0):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move all parameters that have gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad, alpha=group["lr"])


class EveryNth(ClosedForm):
    """Steps of an optimiser that move some of its parameters once in `n` times, at the first.

    For parameters whose steps cost more than those of the others, which move in the meantime:
    gradients of them are not taken when they are not to move, and optimisers leave parameters
    without gradients as they are.

    Parameters
    ----------
    optimizer : Optimizer
    n : int
    parameters : sequence of Parameter
        Those that move once in `n` times.
    """

    def __init__(self, optimizer: Optimizer, n: int, parameters: Sequence[nn.Parameter]):
        super().__init__(optimizer.param_groups, {})
        self.param_groups = optimizer.param_groups  # shared: schedules change them
        self.optimizer, self.n, self.parameters, self.turn = optimizer, n, parameters, 0

    def prepare(self, batch: Batch) -> None:
        """Take note of the batch that the gradients are of."""
        if isinstance(self.optimizer, ClosedForm):
            self.optimizer.prepare(batch)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step with all parameters that have gradients."""
        self.optimizer.step()
        self.turn += 1
        _take_gradients(self.parameters, self.turn % self.n == 0)

    def close(self) -> None:
        """Let gradients be taken again."""
        _take_gradients(self.parameters, True)


class Still(ClosedForm):
    """Leaves parameters where they are, and takes no gradients of them after the first.

    Parameters
    ----------
    parameters : iterable of Parameter
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Drop the gradients."""
        _take_gradients(self.param_groups[0]["params"], False)

    def close(self) -> None:
        """Let gradients be taken again."""
        _take_gradients(self.param_groups[0]["params"], True)


def _take_gradients(parameters: Iterable[nn.Parameter], wanted: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(wanted)
        if not wanted:
            parameter.grad = None


class NaturalGradient(ClosedForm):
    r"""Natural-gradient steps on normal distributions held in their natural parameters.

    For q = N(mu, sigma^2) with theta1 = mu / sigma^2 and theta2 = -1 / (2 sigma^2), the natural
    gradient in theta is the plain gradient in the expectation parameters m1 = mu and
    m2 = mu^2 + sigma^2:

        dL/dm1 = dL/dmu - 2 mu dL/dsigma^2,    dL/dm2 = dL/dsigma^2.

    A step of size 1 is a Newton step on mu with the new precision for curvature. Rates are
    exponential in mu and sigma^2, so a long step upwards overshoots. Therefore where Newton would
    raise mu by delta > 0, it is raised by log(1 + delta), which with sigma fixed never passes the
    optimum; and sigma^2 rises by at most `LARGEST_RISE` in one step.

    The gradients of a batch are those of the whole data set as the batch estimates it; each
    sample's own q is stepped by its own gradient, with the scale of the estimate taken out.

    Parameters
    ----------
    params : sequence of two Parameters
        theta1 and theta2, of shape (L, N).
    lr : float in (0, 1]
        Step size.

    References
    ----------
    Khan and Lin (2017), Conjugate-computation variational inference, section 3.
    """

    LARGEST_RISE = 1.0

    def __init__(self, params: Sequence[nn.Parameter], lr: float = 1.0):
        super().__init__(list(params), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move theta by one step against the gradients of the loss."""
        index = self.batch.samples
        for group in self.param_groups:
            theta1, theta2 = group["params"]
            if theta1.grad is None or theta2.grad is None:
                continue
            now = take(theta1, index), take(theta2, index)
            share = now[0].shape[1] / theta1.shape[1]
            gradients = take(theta1.grad, index) * share, take(theta2.grad, index) * share
            new = self._moved(now, gradients, group["lr"])
            for theta, value in zip((theta1, theta2), new, strict=True):
                if index is None:
                    theta.copy_(value)
                else:
                    theta.index_copy_(1, index, value)

    def _moved(
        self, theta: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], lr: float
    ) -> tuple[Tensor, Tensor]:
        (theta1, theta2), (grad1, grad2) = theta, gradients
        variance = -0.5 / theta2
        mean = theta1 * variance
        d_mean = grad1 / variance
        d_variance = (grad2 - 2 * variance * mean * d_mean) / (2 * variance.square())
        least_precision = (variance + self.LARGEST_RISE).reciprocal()
        precision = torch.maximum(1 / variance + 2 * lr * d_variance, least_precision)
        change = -lr * d_mean / precision
        mean = mean + torch.where(change > 0, change.log1p(), change)
        return precision * mean, -0.5 * precision


class ClosedFormLoadings(ClosedForm):
    r"""The multiplicative update of W, from the gradient that the ELBO has already taken.

    With R_jl the expected counts of feature j that come from component l,

    .. math:: R_{jl} = W_{jl} \left(\frac{\partial ELBO}{\partial W_{jl}}
        + \sum_i s_i E \exp F_{il}\right), \qquad
        W_{jl} \leftarrow \frac{R_{jl}}{\sum_i s_i E \exp F_{il}},

    the second sum taken after q has moved. Both q and W then move up the same lower bound
    (expectation conditional maximisation), for the price of one pass over the counts.

    Parameters
    ----------
    W : PositiveParameter of shape (D, L)
    totals : callable
        From a batch to its estimate of sum_i s_i E exp F_il, shape (L,).
    lr : float in (0, 1]
        Fraction of the way to go; less than 1 averages over noisy steps.
    """

    def __init__(self, W: PositiveParameter, totals: Callable[[Batch], Tensor], lr: float = 1.0):
        super().__init__([W.raw], {"lr": lr})
        self.W = W
        self.totals = totals

    @torch.no_grad()
    def prepare(self, batch: Batch) -> None:
        """Take the expected counts from the gradients of the batch."""
        super().prepare(batch)
        W, gradient = self.W, self.W.raw.grad
        assert gradient is not None
        slope = -take(gradient / W.unit, batch.features, dim=0) / batch.likelihood_scale
        self.expected_counts = take(W.data, batch.features, dim=0) * (slope + self.totals(batch))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move W towards the expected counts over the totals."""
        totals = self.totals(self.batch)
        target = self.expected_counts / totals.clamp_min(torch.finfo(totals.dtype).tiny)
        features = slice(None) if self.batch.features is None else self.batch.features
        value = self.W.detach()
        value[features] = value[features].lerp(target.clamp_min(0), self.param_groups[0]["lr"])
        self.W.assign(value)


class ShrunkLoadings(ClosedFormLoadings):
    r"""The multiplicative update of W under a gamma prior around what the margins say.

    Given R_jl counts of feature j from component l, and e_l = sum_i s_i E exp F_il,

    .. math:: R_{jl} \sim \mathrm{Poisson}(W_{jl} e_l), \qquad
        W_{jl} \sim \mathrm{Gamma}(a, a e_l / \bar R_{jl}), \qquad
        \bar R_{jl} = R_{j\cdot} R_{\cdot l} / R_{\cdot\cdot},

    so that a priori all components have the features in the same proportions. W becomes its
    posterior mean, times what keeps the total of each feature,

    .. math:: W_{jl} \leftarrow \frac{R'_{jl}}{e_l} \frac{R_{j\cdot}}{R'_{j\cdot}}, \qquad
        R'_{jl} = \bar R_{jl} \frac{a + R_{jl}}{a + \bar R_{jl}}.

    Empirical Bayes (Clayton and Kaldor 1987): the shape a is that of the loadings before they are
    shrunk, by the moment of :math:`\chi^2 = \sum_{jl} (R_{jl} - \bar R_{jl})^2 / \bar R_{jl}`, of
    which the expectation is the number of entries and :math:`R_{\cdot\cdot} / a`. Where there are
    many counts it is the update without a prior.

    Parameters
    ----------
    W, totals
        As for :class:`ClosedFormLoadings`.

    Attributes
    ----------
    shape : float or None
        a, from the first batch.
    """

    LARGEST_SHAPE = 1e3

    shape: float | None = None

    @torch.no_grad()
    def prepare(self, batch: Batch) -> None:
        """Take the expected counts from the gradients of the batch, and shrink them."""
        super().prepare(batch)
        R = self.expected_counts.clamp_min(0)
        tiny = torch.finfo(R.dtype).tiny
        of_features = R.sum(1, keepdim=True)
        by_margins = of_features * (R.sum(0) / R.sum().clamp_min(tiny))
        if self.shape is None:
            self.shape = self._shape_by_moments(R, by_margins)
        shrunk = by_margins * (self.shape + R) / (self.shape + by_margins)
        self.expected_counts = shrunk * (of_features / shrunk.sum(1, keepdim=True).clamp_min(tiny))

    def _shape_by_moments(self, R: Tensor, by_margins: Tensor) -> float:
        there = by_margins > torch.finfo(R.dtype).eps * R.sum()  # absent but for rounding
        R, by_margins = R[there].double(), by_margins[there].double()
        excess = ((R - by_margins).square() / by_margins - 1).sum()
        return float(R.sum() / excess.clamp_min(R.sum() / self.LARGEST_SHAPE))


class ClosedFormScale(ClosedForm):
    """The scale of a normal prior that maximises the ELBO: scale^2 = mean of mu^2 + sigma^2.

    Empirical Bayes, in closed form (an M step). The prior's mean stays 0: the loadings hold the
    level of a component.

    Parameters
    ----------
    prior : GaussianPrior
    lr : float in (0, 1]
        Fraction of the way to go, in scale^2.
    """

    def __init__(self, prior: Any, lr: float = 1.0):
        super().__init__([prior.scale_pf], {"lr": lr})
        self.prior = prior

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move the scale towards its optimum given q."""
        q = self.prior.marginal(self.batch.samples)
        optimum = (q.loc.square() + q.variance).mean()
        scale = self.prior.scale_pf
        scale.copy_(scale.square().lerp(optimum, self.param_groups[0]["lr"]).sqrt())


class JointOptimizer(PyroOptim):
    """Torch optimisers over all parameters at once, in the form that `pyro.infer.SVI` takes.

    Pyro makes an optimiser for each parameter. Here one optimiser may hold several, as a natural
    gradient has to, and works through fewer calls.

    Parameters
    ----------
    optimizers : iterable of torch.optim.Optimizer
        They step in this order.
    before_step : callable
        Called when gradients are there and before any parameter moves; says whether to step.
    after_step : callable
        Called when all have stepped.

    Attributes
    ----------
    batch : Batch
        What the next step is of; set by the training loop.
    """

    def __init__(
        self,
        optimizers: Iterable[Optimizer],
        before_step: Callable[[], bool] = lambda: True,
        after_step: Callable[[], None] = lambda: None,
    ):
        super().__init__(torch.optim.SGD, {})
        self.optimizers = list(optimizers)
        self.before_step, self.after_step = before_step, after_step
        self.batch = Batch()

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Take one step with every optimiser, unless `before_step` advises against it."""
        if not self.before_step():
            return
        for optimizer in self.optimizers:
            if isinstance(optimizer, ClosedForm):
                optimizer.prepare(self.batch)
        for optimizer in self.optimizers:
            optimizer.step()
        self.after_step()

    def close(self) -> None:
        """Tell the optimisers that training has ended."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, ClosedForm):
                optimizer.close()


class Schedule(Protocol):
    """How the learning rate changes over a fit."""

    def warm_up(self, max_iter: int) -> int:
        """Return the number of steps over which the learning rate still rises."""

    def attach(self, optimizer: Optimizer, max_iter: int) -> Callable[[float], Any]:
        """Return a function that is called with the ELBO after each step."""


@dataclass(frozen=True)
class Constant:
    """The learning rate stays as it is."""

    def warm_up(self, max_iter: int) -> int:
        """Return 0."""
        return 0

    def attach(self, optimizer: Optimizer, max_iter: int) -> Callable[[float], Any]:
        """Return a function that does nothing."""
        return lambda elbo: None


@dataclass(frozen=True)
class Decreasing:
    """The learning rate falls from `start` as (offset + step / delay) ** -forgetting.

    For noisy closed-form steps. With `forgetting` in (0.5, 1] they satisfy the conditions of
    Robbins and Monro (1951), as in stochastic variational inference (Hoffman et al. 2013).
    """

    delay: float = 10.0
    forgetting: float = 0.7
    start: float = 1.0

    def warm_up(self, max_iter: int) -> int:
        """Return 0."""
        return 0

    def attach(self, optimizer: Optimizer, max_iter: int) -> Callable[[float], Any]:
        """Return a function that sets the learning rate of the next step."""
        offset = self.start ** (-1 / self.forgetting)
        scheduler = lr_scheduler.LambdaLR(
            optimizer, lambda step: (offset + step / self.delay) ** -self.forgetting
        )
        return lambda elbo: scheduler.step()


@dataclass(frozen=True)
class OneCycle:
    """Linear warm-up to the learning rate, then cosine annealing.

    Parameters
    ----------
    pct_start : float
        Fraction of the iterations spent in warm-up.
    div_factor : float
        The first learning rate is the optimiser's divided by this.
    final_div_factor : float
        The last one is the first divided by this.
    """

    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def warm_up(self, max_iter: int) -> int:
        """Return the number of warm-up steps."""
        return int(self.pct_start * max_iter)

    def attach(self, optimizer: Optimizer, max_iter: int) -> Callable[[float], Any]:
        """Return a function that sets the learning rate of the next step."""
        scheduler = lr_scheduler.LambdaLR(
            optimizer, lambda step: self.factor(step / max(max_iter - 1, 1))
        )
        return lambda elbo: scheduler.step()

    def factor(self, progress: float) -> float:
        """Return the learning rate at a fraction of the fit, relative to the highest."""
        first = 1 / self.div_factor
        if progress < self.pct_start:
            return first + (1 - first) * progress / self.pct_start
        last = first / self.final_div_factor
        remaining = min(1.0, (progress - self.pct_start) / max(1 - self.pct_start, 1e-12))
        return last + (1 - last) * (1 + math.cos(math.pi * remaining)) / 2


@dataclass(frozen=True)
class Plateau:
    """Reduce the learning rate where the ELBO stops rising.

    Parameters
    ----------
    patience : int
        Steps without a rise, of one part in 10^4 at least, to wait for.
    factor : float
        The learning rate is multiplied by this.
    min_lr : float
        It does not fall below this.
    """

    patience: int = 200
    factor: float = 0.8
    min_lr: float = 1e-5

    def warm_up(self, max_iter: int) -> int:
        """Return 0."""
        return 0

    def attach(self, optimizer: Optimizer, max_iter: int) -> Callable[[float], Any]:
        """Return a function that takes note of the ELBO."""
        scheduler = lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="min", factor=self.factor, patience=self.patience, min_lr=self.min_lr
        )
        return lambda elbo: scheduler.step(-elbo)
