"""Parameters with constraints, as torch modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from pnmf_pyro.data.batches import Index
from pnmf_pyro.data.checks import MODES, check_choice
from pnmf_pyro.data.counts import Counts, MatrixLike, transposed_counts
from pnmf_pyro.data.log_rate import log_rate_with_gradients

Shape = int | tuple[int, ...]
Map = Callable[[Tensor], Tensor]


class Terms(TypedDict, total=False):
    """What the expected log-likelihood is made of, see :class:`~pnmf_pyro.models.reference`."""

    exp_mu: Tensor
    exp_mu_sigma: Tensor
    exp_F_samples: Tensor
    size_factors: Tensor | None
    log_rate: Tensor
    total_rate: Tensor
    log_likelihood: Tensor
    rate_mean: Tensor
    rate_samples: Tensor


class ConstrainedParameter(nn.Module):
    """Base class of parameters with constraints.

    A subclass writes `_to_constrained` and `_to_unconstrained`, the map from the raw parameter to
    the constrained value and back. Moving (`to`, `cpu`, `cuda`, `float`, `double`, `half`) works
    as for every torch module.

    Parameters
    ----------
    shape : int or tuple of int
        Shape of the constrained value.
    mode : str
        How the constraint is kept; the words are the subclass's.
    """

    def __init__(self, shape: Shape, mode: str):
        super().__init__()
        self.mode = mode
        self._raw = nn.Parameter(torch.zeros(shape))

    def _to_constrained(self, raw: Tensor) -> Tensor:
        """Map the raw parameter to the constrained value."""
        raise NotImplementedError

    def _to_unconstrained(self, value: Tensor) -> Tensor:
        """Map a constrained value to the raw parameter."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """Return the constrained value, differentiable in the raw parameter."""
        return self.data

    def assign(self, value: Tensor) -> None:
        """Set the constrained value, of this parameter's shape, in place."""
        with torch.no_grad():
            self._raw.copy_(self._to_unconstrained(value.to(self._raw)))

    def project(self) -> None:
        """Project the raw parameter to where the constraint holds; nothing to do by default."""

    @property
    def data(self) -> Tensor:
        """Constrained value, differentiable in the raw parameter."""
        return self._to_constrained(self._raw)

    @property
    def raw(self) -> nn.Parameter:
        """Underlying unconstrained parameter."""
        return self._raw

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the constrained value."""
        return tuple(self._raw.shape)

    @property
    def requires_grad(self) -> bool:
        """Whether the underlying parameter is trained by gradients."""
        return self._raw.requires_grad

    @property
    def device(self) -> torch.device:
        """Device of the underlying parameter."""
        return self._raw.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the underlying parameter."""
        return self._raw.dtype

    @property
    def grad(self) -> Tensor | None:
        """Gradient of the underlying parameter."""
        return self._raw.grad

    @property
    def is_cuda(self) -> bool:
        """Whether the underlying parameter is on a CUDA device."""
        return self._raw.is_cuda

    @property
    def is_leaf(self) -> bool:
        """Whether the underlying parameter is a leaf of the graph."""
        return self._raw.is_leaf

    def freeze(self) -> None:
        """Stop training this parameter."""
        self._raw.requires_grad_(False)

    def unfreeze(self) -> None:
        """Train this parameter again."""
        self._raw.requires_grad_(True)

    def __getitem__(self, idx: Index | tuple[Index, ...]) -> Tensor:
        """Index into the constrained value."""
        return self.data[idx]

    def dim(self) -> int:
        """Return the number of dimensions."""
        return self._raw.dim()

    def size(self, dim: int | None = None) -> torch.Size | int:
        """Return the shape, or the size of one dimension."""
        return self._raw.shape if dim is None else self._raw.shape[dim]

    def numel(self) -> int:
        """Return the number of elements."""
        return self._raw.numel()

    def detach(self) -> Tensor:
        """Return a copy of the constrained value that is not part of the graph."""
        return self.data.detach().clone()

    def clone(self) -> Tensor:
        """Return a copy of the constrained value that is part of the graph."""
        return self.data.clone()

    def contiguous(self) -> Tensor:
        """Return the constrained value as a contiguous tensor."""
        return self.data.contiguous()

    def numpy(self) -> np.ndarray:
        """Return the constrained value as an array."""
        return self.detach().cpu().numpy()


def _inverse_softplus(value: Tensor) -> Tensor:
    """Solve log(1 + exp x) = value, as value + log(1 - exp(-value))."""
    return value + torch.log(-torch.expm1(-value))


def _identity(value: Tensor) -> Tensor:
    return value


_POSITIVE_MAPS: dict[str, tuple[Map, Map]] = {
    "softplus": (nn.functional.softplus, _inverse_softplus),
    "exp": (torch.exp, torch.log),
    "projected": (_identity, _identity),
    "multiplicative": (_identity, _identity),
}
POSITIVE_MODES = tuple(_POSITIVE_MAPS)


class PositiveParameter(ConstrainedParameter):
    """A parameter that is never negative.

    Parameters
    ----------
    shape : int or tuple of int
    mode : {'softplus', 'exp', 'projected', 'multiplicative'}
        `softplus` and `exp` train an unconstrained parameter through these functions, `projected`
        clamps at zero after each step (:meth:`project`), and `multiplicative` is not given to a
        gradient optimiser but set by :meth:`multiplicative_update`.
    elbo_mode : {'lower-bound', 'expanded', 'simple'}
        Form of the ELBO that the multiplicative update increases.

    Notes
    -----
    The value is `unit` times the function of the raw parameter. `unit`, a buffer of ones until
    :meth:`set_unit`, lets optimisers that take steps of about one learning rate treat loadings of
    a rare and of an abundant feature alike.
    """

    unit: Tensor

    def __init__(self, shape: Shape, mode: str = "softplus", elbo_mode: str = "expanded"):
        check_choice("mode", mode, POSITIVE_MODES)
        check_choice("elbo_mode", elbo_mode, MODES)
        super().__init__(shape, mode)
        self.elbo_mode = elbo_mode
        self.register_buffer("unit", torch.ones(self.shape[:1] + (1,) * len(self.shape[1:])))
        self.assign(torch.ones(self.shape))

    def _to_constrained(self, raw: Tensor) -> Tensor:
        return self.unit * _POSITIVE_MAPS[self.mode][0](raw)

    def _to_unconstrained(self, value: Tensor) -> Tensor:
        inverse = _POSITIVE_MAPS[self.mode][1]
        if inverse is not _identity:
            value = value.clamp_min(self.unit * torch.finfo(value.dtype).eps)
        return inverse(value / self.unit)

    def set_unit(self, unit: Tensor) -> None:
        """Measure the raw parameter in positive units, (shape[0], 1, ...), and keep the value."""
        value = self.detach()
        self.unit = unit.to(self._raw)
        self.assign(value)

    def project(self) -> None:
        """Clamp at zero in `projected` mode, after a step of an optimiser; else do nothing."""
        if self.mode == "projected":
            with torch.no_grad():
                self._raw.clamp_min_(0)

    def multiplicative_update(
        self,
        X: Counts | MatrixLike,
        terms: Terms,
        idy: Tensor | None = None,
        eps: float = 1e-8,
        *,
        step: float = 1.0,
    ) -> None:
        r"""Update loadings in closed form, so that the ELBO of these terms does not fall.

        With F^e draws from q (`simple`, `expanded`) or F^1 = mu (`lower-bound`),

        .. math:: W_{jl} \leftarrow W_{jl}
            \frac{\mathrm{mean}_e \sum_i X_{ij} / \rho^e_{ij} \exp F^e_{il}}
                 {\sum_i s_i E_q \exp F_{il}}, \qquad \rho^e_{ij} = \sum_l W_{jl} \exp F^e_{il},

        the multiplicative rule of Lee and Seung (2001) for the Kullback-Leibler divergence, with
        expectations in place of values.

        Parameters
        ----------
        X : Tensor of shape (D, N) or (D_batch, N), or Counts of shape (N, D)
            Counts; sparse ones are visited at their stored entries only.
        terms : mapping of str to Tensor
            Terms of :meth:`PoissonFactorization.compute_log_likelihood_terms`: `exp_mu` and
            `exp_mu_sigma`, of shape (L, N), except for `lower-bound` `exp_F_samples`, of shape
            (E, L, N), and perhaps `size_factors`, of shape (N,). The rates are those of W now.
        idy : Tensor of int64, optional
            Rows of W to update: the features in X.
        eps : float
            Number added to the denominator.
        step : float in (0, 1]
            How far to go towards the updated value; less than 1 averages over minibatches.
        """
        counts = (X if isinstance(X, Counts) else transposed_counts(X)).to(self.data.dtype)
        with torch.no_grad():
            W = self.data if idy is None else self.data[idy]
            numerator, denominator = self._update_terms(counts, W, terms)
            W = W.lerp(W * (numerator / (denominator + eps)), step)
            value = self.detach()
            value[slice(None) if idy is None else idy] = W
            self.assign(value)

    def _update_terms(self, counts: Counts, W: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
        """Numerator (D, L) and denominator (L,) of the multiplicative update."""
        needed = {"exp_mu", "exp_mu_sigma"}
        if self.elbo_mode != "lower-bound":
            needed.add("exp_F_samples")
        if needed - terms.keys():
            raise ValueError(
                f"terms must have {sorted(needed)} for elbo_mode={self.elbo_mode!r}; they have "
                f"{sorted(terms)}. Take those that forward of a model of this mode returns."
            )
        fields = [terms["exp_mu"]] if self.elbo_mode == "lower-bound" else terms["exp_F_samples"]
        expected = terms["exp_mu_sigma"]
        if self.elbo_mode == "simple":
            expected = torch.stack(tuple(fields)).mean(0)
        if (s := terms.get("size_factors")) is not None:
            expected = expected * s
        numerator = torch.zeros_like(W)
        for field in fields:
            numerator += log_rate_with_gradients(counts, field.T.contiguous(), W)[2]
        return numerator / len(fields), expected.sum(1)
