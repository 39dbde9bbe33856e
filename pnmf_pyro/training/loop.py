"""The training loop: loss, gradients, accept or shorten, steps; until the ELBO has settled."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pyro
import torch
from sklearn.exceptions import ConvergenceWarning
from tqdm.auto import tqdm

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.checks import warn
from pnmf_pyro.data.isolation import isolated, openmp
from pnmf_pyro.data.random_state import drawing_from, torch_generator
from pnmf_pyro.data.resumable import Resumable
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.priors.natural import SiteSteps, Step
from pnmf_pyro.training.convergence import Convergence, Judge
from pnmf_pyro.training.course import NOTHING_KEPT, Course, Keeper
from pnmf_pyro.training.extrapolation import MOST, Accepted, Extrapolation
from pnmf_pyro.training.schedules import Schedule
from pnmf_pyro.training.slices import loss_and_grads, parts, sums_over

logger = logging.getLogger("pnmf_pyro")

# Stored counts, and entries of the prior's matrices, up to which one thread is about as fast as
# two: a natural step took 8.2 ms against 7.2 there, and 6.1 against 7.1 at a quarter of it.
FEW_ENTRIES = 200_000

OnStep = Callable[[float], None]


@dataclass
class TrainingResult:
    """What a fit did.

    Attributes
    ----------
    history : list of float
        ELBO at each step, in nats for the whole data set; an estimate where steps are noisy.
    converged : bool
        Whether it stopped because the ELBO had settled.
    failure : str or None
        What stopped the fit early, where something did.
    """

    history: list[float] = field(repr=False)
    converged: bool = False
    failure: str | None = None


Steps = Sequence[tuple[Step, Schedule]]


@isolated
def train(
    model: PoissonFactorization,
    batches: Iterable[Batch],
    objective: FactorizationELBO,
    steps: Steps,
    generator: torch.Generator,
    *,
    max_iter: int = 200,
    convergence: Judge | None = None,
    verbose: int = 0,
    on_step: OnStep = lambda elbo: None,
    warn: bool = True,
    monotone: bool = False,
    extrapolates: bool = True,
    keeper: Keeper = NOTHING_KEPT,
) -> TrainingResult:
    """Train a model and its guide.

    Parameters
    ----------
    model : PoissonFactorization
        Model, guide and prior. They are trained in place.
    batches : iterable of Batch
        At least `max_iter` batches; see :class:`~pnmf_pyro.data.batches.Batches`.
    objective : FactorizationELBO
        What is raised.
    steps : sequence of (Step, Schedule)
        The steps that move the parameters, in this order, and how their sizes change.
    generator : torch.Generator
        Source of all draws.
    max_iter : int
        Number of steps at most.
    convergence : Convergence or Settled, optional
        When to stop; only at `max_iter` unless given.
    verbose : int
        Show a progress bar with the ELBO if positive.
    on_step : callable
        Function that is called with the ELBO of each step, after it.
    warn : bool
        Warn of a fit that has not converged; a failure is always warned of.
    monotone : bool
        Halve a step for as long as the ELBO falls; for objectives without noise.
    extrapolates : bool
        Take steps further where they are monotone, see :mod:`~pnmf_pyro.training.extrapolation`.
    keeper : Keeper
        What is told after each step where the run stands, and has where it is to go on from.

    Returns
    -------
    TrainingResult

    Raises
    ------
    FloatingPointError
        If the ELBO is not finite at the very start.
    ValueError
        If natural-gradient steps are to be taken by an objective without `newton`.

    Warns
    -----
    ConvergenceWarning
        If `max_iter` ended the fit while the ELBO still rose, and if the ELBO became NaN or
        infinite; the model is then left at the last state for which it was finite.
    """
    _check_objective(objective, steps)
    convergence = convergence or Convergence(tol=0.0)
    result = TrainingResult([])
    moved = [step for step, _ in steps]
    most = MOST if extrapolates else 0.0
    accepted = Extrapolation(model, moved, most) if monotone else Accepted(model)
    stream, go_on = iter(batches), True
    with _under_way(model, steps), progress_bar(max_iter, verbose, "ELBO") as progress:
        after = [schedule.attach(step, max_iter) for step, schedule in steps]
        streams = [stream] if isinstance(stream, Resumable) else []
        course = Course(result.history, accepted, convergence, *streams, *moved, *after)
        if keeper.begun is not None:
            course.resume(keeper.begun)
        while go_on and len(result.history) < max_iter:
            with keeper.whole():
                elbo = _iterate(model, next(stream), objective, steps, accepted, generator, result)
                if elbo is None:
                    break
                for set_next_size in after:
                    set_next_size(elbo)
                progress.update()
                progress.set_postfix_str(f"{elbo:.6g}", refresh=False)
                on_step(elbo)
                settled = accepted.moved and convergence.reached(accepted.values)
                result.converged = settled or accepted.at_rest
            go_on = not result.converged
            if go_on:
                keeper.passed(course)
    accepted.finish()
    _report(result, convergence, accepted.values, max_iter, warn)
    return result


def _iterate(
    model: PoissonFactorization,
    batch: Batch,
    objective: FactorizationELBO,
    steps: Steps,
    accepted: Accepted,
    generator: torch.Generator,
    result: TrainingResult,
) -> float | None:
    """Return the ELBO of one more step, which comes into the history; None for a failure."""
    iteration = len(result.history) + 1
    try:
        with threads_for(batch, model), drawing_from(generator, model.W.device):
            _one_step(model, batch, objective, steps, accepted, validate=iteration == 1)
    except (FloatingPointError, torch.linalg.LinAlgError) as error:
        result.failure = _describe_failure(error, iteration, model, objective, batch)
        accepted.restore()
        return None
    except KeyboardInterrupt:
        accepted.restore()
        raise
    result.history.append(accepted.values[-1])
    return result.history[-1]


def _check_objective(objective: FactorizationELBO, steps: Steps) -> None:
    if not objective.newton and any(isinstance(step, SiteSteps) for step, _ in steps):
        raise ValueError(
            "SiteSteps take the gradients of the expected log-likelihood alone; make the objective "
            "with newton=True."
        )


@contextmanager
def _under_way(model: PoissonFactorization, steps: Steps) -> Iterator[None]:
    """Train in a parameter store of the model's own, without what earlier gradients left."""
    with model.apart():
        for step, _ in steps:
            step.start()
        try:
            yield
        finally:
            for step, _ in steps:
                step.close()
            model.zero_grad()


def _one_step(
    model: PoissonFactorization,
    batch: Batch,
    objective: FactorizationELBO,
    steps: Steps,
    accepted: Accepted,
    validate: bool,
) -> None:
    """Take gradients; then step with all, or go back half of the last step if it was too long."""
    with pyro.validation_enabled(validate):
        model.zero_grad()
        loss = loss_and_grads(model, objective, batch)
    if not accepted.accept(loss):
        return
    for step, _ in steps:
        step.prepare(batch)
    for step, _ in steps:
        step.step()
    model.project_parameters()
    accepted.go_on()


def progress_bar(total: int, verbose: int, label: str) -> tqdm:
    """Return a progress bar, silent unless `verbose` is positive."""
    return tqdm(total=total, disable=not verbose, desc=label)


@isolated
def evaluate_elbo(
    model: PoissonFactorization,
    batches: Batches,
    objective: FactorizationELBO,
    generator: torch.Generator,
) -> float:
    """Return the ELBO of all the data as the model stands, in nats, in one pass.

    A sum over batches, each of which estimates the whole, weighted by its share of the samples.
    """
    N = batches.counts.shape[0]
    total = 0.0
    source = drawing_from(generator, batches.counts.device)
    with model.apart(inherit=True), source, pyro.validation_enabled(False):
        for batch in (part for whole in batches.one_pass() for part in parts(whole)):
            assert batch.counts is not None
            share = batch.counts.shape[0] / N
            with threads_for(batch, model):
                total -= share * objective.loss(model.model, model.guide, batch)
    ranks = sums_over(model, batches.counts)
    return float(ranks.total(torch.tensor(total, dtype=torch.float64)))


def final_elbo(
    model: PoissonFactorization,
    batches: Batches,
    mode: str,
    n_draws: int,
    generator: torch.Generator,
) -> tuple[float, float]:
    """Return the ELBO of all the data in nats, and its standard error.

    In `lower-bound` mode it is exact. Both other modes have the same expectation, of which
    `simple` has far less noise: near the optimum the log-likelihood hardly depends on the draw,
    while its two terms do, and of these `expanded` draws only one.
    """
    if mode == "lower-bound":
        return evaluate_elbo(model, batches, FactorizationELBO(mode), generator), 0.0
    one_draw = FactorizationELBO("simple", 1)
    values = [evaluate_elbo(model, batches, one_draw, generator) for _ in range(n_draws)]
    error = statistics.stdev(values) / math.sqrt(n_draws)
    return statistics.fmean(values), error


@contextmanager
def threads_for(batch: Batch, model: PoissonFactorization) -> Iterator[None]:
    """Work in one thread within the block where a step is small, and as before after it.

    Threads gain little there, and where other programs keep the cores busy they lose much: each
    product waits for a thread that waits for a core.
    """
    entries = 0 if batch.counts is None else batch.counts.values.numel()
    few = entries + model.prior.matrix_entries < FEW_ENTRIES
    with openmp().limit(limits=1 if few else None):
        yield


def _describe_failure(
    error: Exception,
    iteration: int,
    model: PoissonFactorization,
    objective: FactorizationELBO,
    batch: Batch,
) -> str:
    """Say what went wrong: which quantity was the first to be NaN or infinite, where one was."""
    if isinstance(error, torch.linalg.LinAlgError):
        what = "the covariance of q(F) could not be factorised"
    else:
        what = f"{error}; {_culprit(model, objective, batch)} is the first that is not finite"
    if iteration == 1:
        raise FloatingPointError(
            f"The fit failed at its first step: {what}. Check X for extreme values, or start from "
            "another init."
        ) from error
    return f"at iteration {iteration} {what}"


def _culprit(model: PoissonFactorization, objective: FactorizationELBO, batch: Batch) -> str:
    """Name a parameter or a term of the ELBO that is not finite."""
    culprit = _first_not_finite(dict(model.named_parameters()))
    if culprit is None:
        source = drawing_from(torch_generator(0), model.W.device)
        with torch.no_grad(), source, pyro.validation_enabled(False):
            terms = objective.terms(model.model, model.guide, batch)
        culprit = _first_not_finite(terms) or "ELBO"
    return culprit


def _first_not_finite(quantities: dict[str, torch.Tensor]) -> str | None:
    return next((name for name, q in quantities.items() if not bool(q.isfinite().all())), None)


def _report(
    result: TrainingResult,
    convergence: Judge,
    values: list[float],
    max_iter: int,
    warn_unsettled: bool,
) -> None:
    n_iter, tol = len(result.history), convergence.tol
    if result.failure:
        message = (
            f"The fit stopped: {result.failure}. It is left as it was at iteration {n_iter}, the "
            "last with a finite ELBO. Use a smaller learning_rate or another loadings_mode."
        )
        warn(message, ConvergenceWarning)
    elif warn_unsettled and not result.converged and convergence.still_rising(values):
        message = (
            f"The fit did not converge: the ELBO was still rising after {max_iter} iterations. "
            f"Increase max_iter or learning_rate{', or accept a larger tol' * bool(tol)}."
        )
        warn(message, ConvergenceWarning)
    else:
        ended = "converged" if result.converged else "ended"
        logger.info("%s after %d iterations, ELBO %.6g", ended, n_iter, result.history[-1])
