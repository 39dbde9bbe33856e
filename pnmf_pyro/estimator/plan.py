"""The parts that the parameters of the estimator name: priors, optimisers, stages of training.

Below this there are objects and no words: everything that a parameter chooses by name is made here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pyro.contrib.gp.kernels import Kernel

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.counts import Counts
from pnmf_pyro.data.places import typical_lengthscale
from pnmf_pyro.estimator.parameters import Parameters
from pnmf_pyro.estimator.space import Space
from pnmf_pyro.gp.correlation import check_kernels
from pnmf_pyro.gp.kernels import SpatialKernel
from pnmf_pyro.gp.multi_group import MultiGroupKernel, check_group_distances
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import LCGP, SVGP, GaussianPrior, Prior
from pnmf_pyro.priors.base import NO_SITES
from pnmf_pyro.priors.natural import EveryNth, Still
from pnmf_pyro.training.convergence import Convergence
from pnmf_pyro.training.hyperparameters import HyperparameterSearch
from pnmf_pyro.training.loadings import ClosedFormLoadings, ClosedFormScale, ShrunkLoadings
from pnmf_pyro.training.schedules import (
    OPTIMIZERS,
    Constant,
    Decreasing,
    OneCycle,
    Plateau,
    Schedule,
)

logger = logging.getLogger("pnmf_pyro")

# A warm-up of the same factors only has to bring a fit near; it settles at this multiple of the
# tolerance.
WARM_UP_TOL = 10

# First step of q and W where batches see parts of a field: from a cold start, a whole step that the
# samples of one batch ask for carries the others too far.
PARTIAL = 0.3

# Draws for the ELBO of a finished fit, which is quoted and compared.
FINAL_DRAWS = 20


@dataclass
class Stage:
    """One run of the training loop: an objective and the steps that raise it.

    `prepare` is called before it, and `warns` says whether to warn where it has not converged.
    """

    model: PoissonFactorization
    objective: FactorizationELBO
    optimizers: list[torch.optim.Optimizer]
    schedules: list[Schedule]
    convergence: Convergence
    monotone: bool
    prepare: Callable[[], Any] = lambda: None
    warns: bool = True


class Parts(Parameters):
    """An estimator's parameters, and the parts that they name."""

    def _final_objective(self) -> FactorizationELBO:
        return FactorizationELBO(self.mode, max(self.E, FINAL_DRAWS))

    def _stages(
        self, model: PoissonFactorization, counts: Counts, random: np.random.RandomState
    ) -> list[Stage]:
        """What to train with, one stage after another."""
        self._check_stages()
        refinements = model.prior.refinements()
        if self._restores:
            refinements.insert(0, lambda: model.prior.restore_spread(self.kl_weight))
        stages = self._stages_to_settle(model, counts, random)
        if refinements:
            last = self._stage(model, self.mode, self.tol, q_moves=not self._restores)
            stages.append(replace(last, prepare=lambda: [refine() for refine in refinements]))
        if self.shrink_loadings and not self._restores:
            stages.append(self._stage(model, self.mode, self.tol, q_moves=False))
        return stages

    @property
    def _restores(self) -> bool:
        return self.restore_spread and self.kl_weight != 1

    def _check_stages(self) -> None:
        """Refuse what cannot be done once the fit has settled."""
        if self._restores and not (self.spatial and self.training_mode == "natural"):
            raise ValueError(NO_SITES)
        if self.shrink_loadings and self.loadings_mode != "multiplicative":
            raise ValueError(
                "shrink_loadings needs loadings in closed form; set loadings_mode='multiplicative' "
                f"or shrink_loadings=False. loadings_mode is {self.loadings_mode!r}."
            )

    def _stages_to_settle(
        self, model: PoissonFactorization, counts: Counts, random: np.random.RandomState
    ) -> list[Stage]:
        last = self._stage(model, self.mode, self.tol)
        learned = self._learned_hyperparameters()
        searched = learned or not isinstance(self.kernel, (str, Kernel))
        if self.spatial and (self.warm_up or searched):
            source = self._independent(model) if self.warm_up else model
            search = HyperparameterSearch(model, counts, learned, self.criterion, random)
            last.prepare = lambda: search.learn_from(source)
            return [replace(self._stage(source, "lower-bound", self.tol), warns=False), last]
        if self.warm_up and self.mode != "lower-bound":
            first = self._stage(model, "lower-bound", WARM_UP_TOL * self.tol)
            return [replace(first, warns=False), last]
        return [last]

    def _independent(self, model: PoissonFactorization) -> PoissonFactorization:
        """The same factorisation, of the same loadings, with factors that know no space."""
        y = torch.empty((model.D, model.N), dtype=model.W.dtype, device="meta")
        prior = GaussianPrior(y, model.L, use_natural_gradients=self.training_mode == "natural")
        independent = PoissonFactorization(
            prior, y, model.L, self.loadings_mode, self.mode, size_factors=model.size_factors
        )
        independent.W = model.W
        return independent.to(model.W.device)

    def _learned_hyperparameters(self) -> list[str]:
        """Names of the kernel's hyperparameters that are to be learned."""
        wanted = {
            "lengthscale": self.train_lengthscale,
            "sigma": self.train_sigma,
            "nugget": self.train_nugget,
            "group_diff_param": self.train_group_diff_param and self.multigroup,
        }
        return [name for name, learned in wanted.items() if learned and self.spatial]

    def _stage(
        self, model: PoissonFactorization, mode: str, tol: float, q_moves: bool = True
    ) -> Stage:
        natural = self.training_mode == "natural"
        batched = self.batch_size is not None or self.y_batch_size is not None
        shrinks = self._shrinks(q_moves)
        monotone = natural and mode == "lower-bound" and not batched and not shrinks
        apart = model.prior.steps_apart if monotone and self.warm_up and q_moves else 1
        steps = self._steps(model, mode, apart, q_moves)
        schedules = [schedule for _, schedule in steps]
        warm_up = max(schedule.warm_up(self.max_iter) for schedule in schedules)
        # An ELBO without noise can be judged sooner.
        settled = {"window": max(5, apart), "patience": 1} if monotone else {}
        return Stage(
            model,
            FactorizationELBO(mode, self.E, natural, self.kl_weight),
            [optimizer for optimizer, _ in steps],
            schedules,
            Convergence(tol, start=warm_up, **settled),
            monotone,
        )

    def _empty_model(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        size_factors: torch.Tensor | None,
        space: Space | None,
    ) -> PoissonFactorization:
        y = torch.empty(shape, dtype=dtype, device="meta")
        prior = self._gaussian_prior(y) if space is None else self._spatial_prior(space, dtype)
        return PoissonFactorization(
            prior, y, self.n_components, self.loadings_mode, self.mode, size_factors=size_factors
        )

    def _gaussian_prior(self, y: torch.Tensor) -> GaussianPrior:
        scale = 1.0 if self.scale_pf == "auto" else self.scale_pf
        return GaussianPrior(y, self.n_components, scale, self.training_mode == "natural")

    def _spatial_prior(self, space: Space, dtype: torch.dtype) -> Prior:
        kernel, L = self._kernel(space), self.n_components
        common: dict[str, Any] = {
            "cholesky_mode": self.cholesky_mode,
            "use_natural_gradients": self.training_mode == "natural",
            "dtype": dtype,
        }
        if space.inducing is None:
            return LCGP(
                kernel,
                space.places,
                L,
                K=self.K,
                neighbors=self.neighbors,
                precompute_knn=self.precompute_knn,
                rank=self.rank,
                seed=space.seed,
                **common,
            )
        return SVGP(
            kernel,
            space.places,
            space.inducing,
            L,
            jitter=self.jitter,
            diagonal_only=self.diagonal_only,
            **common,
        )

    def _kernel(self, space: Space) -> SpatialKernel:
        start = typical_lengthscale(space.places) if self.train_lengthscale else self.lengthscale
        kernels, a, distances = self.kernel, self.group_diff_param, self.group_distances
        if isinstance(kernels, MultiGroupKernel):
            distances, a = kernels.group_distances, float(kernels.group_diff_param.detach())
            kernels = kernels.kern
            if space.groups is None:
                raise ValueError(
                    "kernel is one over groups, and multigroup=False. Set multigroup=True and pass "
                    "groups to fit, or pass the kernel that it wraps, kernel.kern."
                )
        if space.groups is not None:
            distances = check_group_distances(distances, len(space.groups.names))
        kernel = SpatialKernel(
            kernels,
            start,
            self.sigma,
            self.n_components if self._learned_hyperparameters() else 1,
            nugget=self.nugget,
            group_diff_param=a,
            group_distances=None if space.groups is None else distances,
        )
        kernel.check(space.places)
        for one in check_kernels(kernels):
            if isinstance(one, Kernel):
                logger.info(
                    "kernel %s: of the coordinates divided by lengthscale, times sigma^2; its own "
                    "hyperparameters stay as they are given",
                    type(one).__name__,
                )
        return kernel

    def _steps(
        self, model: PoissonFactorization, mode: str, apart: int, q_moves: bool
    ) -> list[tuple[torch.optim.Optimizer, Schedule]]:
        """Optimisers of q, W and the prior's scale, with the schedules of their learning rates.

        Closed-form steps are of size 1 unless they are noisy, and take no learning rate; the
        optimiser has what they leave.
        """
        shared_q = not isinstance(model.prior, GaussianPrior)
        noisy_q = mode != "lower-bound" or self.y_batch_size is not None
        by_parts = self.batch_size is not None and shared_q
        start = PARTIAL if by_parts else 1.0
        for_q = for_W = Decreasing(start=start) if noisy_q or by_parts else Constant()
        if self.batch_size is not None:  # each batch sees W anew: average over many of them
            for_W = Decreasing(delay=100.0, start=start)
        steps: list[tuple[torch.optim.Optimizer, Schedule]] = []
        by_gradient: list[torch.nn.Parameter] = []
        if not q_moves:
            steps.append((Still(model.prior.parameters()), Constant()))
        elif self.training_mode == "natural":
            natural = model.prior.natural_optimizer(1 / self.kl_weight)
            seldom = model.prior.seldom_moved()
            steps.append((EveryNth(natural, apart, seldom) if apart > 1 else natural, for_q))
        else:
            by_gradient += model.prior.parameters()
        if self.loadings_mode == "multiplicative":
            steps.append((self._closed_form_loadings(model, q_moves), for_W))
        else:
            by_gradient.append(model.W.raw)
        if self.scale_pf == "auto" and isinstance(model.prior, GaussianPrior):
            steps.append((ClosedFormScale(model.prior), for_W))
        if by_gradient:
            optimizer = OPTIMIZERS[self.optimizer](by_gradient, lr=self.learning_rate)
            steps.insert(0, (optimizer, self._schedule()))
        return steps

    def _closed_form_loadings(
        self, model: PoissonFactorization, q_moves: bool
    ) -> ClosedFormLoadings:
        kind = ShrunkLoadings if self._shrinks(q_moves) else ClosedFormLoadings
        return kind(model.W, model.expected_totals)

    def _shrinks(self, q_moves: bool) -> bool:
        """Whether the loadings have their prior in a stage: around a q at rest."""
        return self.shrink_loadings and not q_moves

    def _schedule(self) -> Schedule:
        schedules: dict[str | None, Schedule] = {
            "one_cycle": OneCycle(
                self.scheduler_pct_start,
                self.scheduler_div_factor,
                self.scheduler_final_div_factor,
            ),
            "plateau": Plateau(self.scheduler_patience, self.scheduler_factor, self.min_lr),
            None: Constant(),
        }
        return schedules[self.scheduler]

    def _batches(self, counts: Counts, generator: torch.Generator) -> Batches:
        return Batches(
            counts,
            self.batch_size,
            self.y_batch_size,
            self.shuffle,
            self.scale_ll_D,
            self.scale_kl_NM,
            generator,
        )
