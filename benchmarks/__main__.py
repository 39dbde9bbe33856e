"""python -m benchmarks NAME: lines of JSON, then a table of ratios."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import pnmf_pyro
from benchmarks import coverage, forecast, hidden, local, ours, peers, ranks, stored, tables, trust
from benchmarks import spatial as places
from benchmarks.device import device
from benchmarks.durability import all_killed
from benchmarks.labels import labels
from benchmarks.measure import (
    in_new_process,
    interleaved,
    median,
    memory_above,
    peak_memory_mib,
    per_iteration,
    ratios,
    report,
    table,
    timed,
)
from benchmarks.solves import solves
from benchmarks.stops import stops
from pnmf_pyro import PNMF
from pnmf_pyro.analysis.hold_out import thin_counts
from pnmf_pyro.data.counts import as_counts

BENCHMARKS: dict[str, Callable[[argparse.Namespace], Any]] = {}

# Which prior spatial fits have: the one that `fit` chooses by size, or another.
PRIORS: dict[str, dict[str, bool]] = {
    "chosen": {},
    "svgp": {"local": False},
    "lcgp": {"local": True},
}

SVGP_GROWTH = {
    "M": (250, 500, 1000, 2000),
    "N": (2000, 4000, 8000, 16000),
    "L": (2, 4, 8, 16),
}


BENCHMARKS |= {one.__name__: one for one in (trust.fuzz, trust.damage, trust.interrupts)}
BENCHMARKS |= {one.__name__: one for one in (trust.threads, solves, stops)}
BENCHMARKS |= {one.__name__: one for one in (forecast.plan, forecast.plan_once)}
BENCHMARKS |= {one.__name__: one for one in (hidden.hidden, hidden.hidden_recovery)}
BENCHMARKS["coverage"] = coverage.coverage
BENCHMARKS["device"] = device
BENCHMARKS["labels"] = labels
BENCHMARKS |= {one.__name__: one for one in (stored.stored, stored.batches)}
BENCHMARKS |= {one.__name__: one for one in (ranks.ranks, ranks.rank)}
BENCHMARKS |= {one.__name__: one for one in (ranks.ranks_in_space, ranks.rank_in_space)}
BENCHMARKS |= {one.__name__: one for one in (local.lcgp, local.local_fit)}
BENCHMARKS |= {one.__name__: one for one in (local.local_bound, local.local_step)}


def benchmark(run: Callable[[argparse.Namespace], Any]) -> Callable[[argparse.Namespace], Any]:
    """Register a benchmark under the name of its function."""
    BENCHMARKS[run.__name__] = run
    return run


def matrix(options: argparse.Namespace) -> Any:
    """The simulated table that the options describe."""
    return tables.simulated(options.N, options.D, options.density, options.L)


@benchmark
def step(options: argparse.Namespace) -> None:
    """Seconds of one full-data step, ours and the peers' in turn."""
    X, L = matrix(options), options.L
    calls: dict[str, Callable[[], float]] = {
        name: lambda s=settings: median(ours.step_seconds(X, L, options.steps, **s))
        for name, settings in ours.SETTINGS.items()
    }
    peer_steps = {
        "pnmf 0.1.0, E=3": (peers.pnmf_iterations, 1, 2),
        "scikit-learn KL-mu": (peers.kl_iterations, 2, 5),
        "torchnmf KL-mu": (peers.torchnmf_iterations, 1, 3),
    }
    for name, (run, few, many) in peer_steps.items():
        if options.peers == "all" or name.split()[0] in options.peers.split(","):
            calls[name] = lambda r=run, a=few, b=many: per_iteration(lambda n: r(X, L, n), a, b)
    ours.iterations(X, L, 2)  # the first step of a process imports and allocates
    values = interleaved(calls, options.repeats)
    for name, found in values.items():
        report(benchmark="step", what=name, shape=X.shape, stored=X.nnz, L=L, seconds=found)
    rows = [["step", "median seconds", *(f"{name} / it" for name in values if name in peer_steps)]]
    for name in ours.SETTINGS:
        over = [median(ratios(values[peer], values[name])) for peer in values if peer in peer_steps]
        rows.append([name, f"{median(values[name]):.4f}", *(f"{ratio:.1f}" for ratio in over)])
    sys.stdout.write(table(rows))


@benchmark
def reach(options: argparse.Namespace) -> None:
    """Seconds of `fit` to the deviance at which scikit-learn's KL-mu stops, against its own."""
    ours.fit(
        tables.simulated(50, 20, 0.2), 2
    )  # the first fit of a process imports torch's compiler
    rows = [["data", "deviance", "scikit-learn s", "ours s", "ours at the end", "ratio"]]
    for name in options.data.split(","):
        X = table_of(name, options)
        found = [reach_once(X, options) for _ in range(options.repeats)]
        line = {key: [one[key] for one in found] for key in found[0]}
        report(benchmark="reach", judge=options.judge, data=name, **line)
        over = median(ratios(line["peer_seconds"], line["our_seconds"]))
        keys = ("deviance", "peer_seconds", "our_seconds", "our_deviance")
        numbers = [median(line[k]) for k in keys] + [over]
        rows.append([name, *(f"{number:.4g}" for number in numbers)])
    sys.stdout.write(table(rows))


def table_of(name: str, options: argparse.Namespace) -> Any:
    """A table of real counts, or the simulated one; features without counts are left out."""
    X = matrix(options) if name == "simulated" else tables.real(name)
    return X[:, np.asarray(X.sum(0)).ravel() > 0]


def reach_once(X: Any, options: argparse.Namespace) -> dict[str, float]:
    """Fit scikit-learn's NMF, then ours until it is as near to the counts, or to its end.

    With `--judge held-out` both are fitted to half of the counts, drawn by binomial thinning, and
    judged by the other half.
    """
    judge = X
    if options.judge == "held-out":
        X, judge = thin_counts(X, 0.5, np.random.RandomState(0))
        seen = np.asarray(X.sum(0)).ravel() > 0
        X, judge = X[:, seen], judge[:, seen]
    counts = as_counts(judge)
    nmf = peers.kl_fit(options.L)
    peer_seconds, factors = timed(lambda: nmf.fit_transform(X))
    target = pnmf_pyro.deviance(counts, (factors, nmf.components_.T))
    watch = ours.fit_until(
        X,
        options.L,
        lambda model: ours.deviance(model, counts),
        lambda value: value <= target,
        options.every,
    )
    return {
        "deviance": target,
        "our_deviance": float(watch.best),
        "our_end_seconds": watch.total_seconds,
        "peer_seconds": peer_seconds,
        "our_seconds": watch.seconds or float("nan"),
        "peer_iterations": int(nmf.n_iter_),
        "our_iterations": watch.n_iter,
    }


@benchmark
def adam(options: argparse.Namespace) -> None:
    """ELBO of `fit` against that of many Adam steps of the standard mode, and their times."""
    ours.fit(tables.simulated(50, 20, 0.2), 2)
    rows = [["data", "Adam ELBO", "fit ELBO", "Adam s", "fit s to Adam's ELBO", "fit s", "ratio"]]
    for name in options.data.split(","):
        X = table_of(name, options)
        slow = PNMF(options.L, max_iter=options.steps, tol=0, learning_rate=0.05, random_state=0)
        adam_seconds, _ = timed(lambda X=X, slow=slow: ours.quietly(lambda: slow.fit(X)))
        target = ours.expanded_elbo(slow, X)
        found = [overtake(X, options.L, target, options.every) for _ in range(options.repeats)]
        seconds, fit_seconds, fit_elbo = (median(one) for one in zip(*found, strict=True))
        numbers = (target, fit_elbo, adam_seconds, seconds, fit_seconds, adam_seconds / seconds)
        report(benchmark="adam", data=name, found=found, adam=(target, adam_seconds))
        rows.append([name, *(f"{number:.6g}" for number in numbers)])
    sys.stdout.write(table(rows))


def overtake(X: Any, L: int, target: float, every: int) -> tuple[float, float, float]:
    """Seconds of `fit` until its ELBO is above a target, those of the whole fit, and its ELBO."""
    watch = ours.fit_until(
        X,
        L,
        lambda model: ours.expanded_elbo(model, X, 10),
        lambda elbo: elbo >= target,
        every,
    )
    seconds, model = timed(lambda: ours.fit(X, L))
    return watch.seconds or float("nan"), seconds, ours.expanded_elbo(model, X)


@benchmark
def spatial(options: argparse.Namespace) -> None:
    """Deviance at held-out places of `fit(X, coords)`, and of other ways to predict there."""
    rows = [["data", "method", "mean deviance", "over splits", "given totals", "over splits"]]
    settings: dict[str, Any] = dict(PRIORS[options.prior])
    if options.kernel:
        settings["kernel"] = options.kernel.split(",")
    if options.kl_weight:
        settings["stages"] = places.weighted(options.kl_weight, local=options.prior == "lcgp")
    for name in options.data.split(","):
        whole = places.task(name)
        found: dict[str, list[Any]] = {}
        for train, test in places.splits(name, whole, options.repeats):
            seconds, (deviance, model) = timed(
                lambda train=train, test=test: places.spatial(train, test, **settings)
            )
            line: dict[str, Any] = {"fit(X, coords)": deviance}
            for shrunk in (False, True):
                averages = places.neighbour_averages(train, test, shrunk)
                for K, value in averages.items():
                    line[f"average of {K} neighbours{', loadings shrunk' * shrunk}"] = value
            if train.groups is not None:
                line["groups pooled"] = places.pooled(train, test, **settings)
                line["groups apart"] = places.separately(train, test, **settings)
            prior = model.model_.prior
            learned = {k: v.tolist() for k, v in prior.kernel.hyperparameters.items()}
            report(
                benchmark="spatial",
                data=name,
                prior=options.prior,
                seconds=seconds,
                mib=peak_memory_mib(),
                elbo=model.elbo_,
                iterations=model.n_iter_,
                kernel=prior.kernel.name,
                learned=learned,
                **{method: value.tolist() for method, value in line.items()},
            )
            for method, value in line.items():
                found.setdefault(method, []).append(value)
        for method, values in found.items():
            cells = []
            for column in np.transpose(values):
                spread = f"{np.std(column, ddof=1):.4f}" if len(column) > 1 else ""
                cells += [f"{np.mean(column):.4f}", spread]
            rows.append([name, method, *cells, *[""] * (4 - len(cells))])
    sys.stdout.write(table(rows))


@benchmark
def memory(options: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of some natural steps above what the process held with the data alone."""
    X = matrix(options)
    ours.iterations(tables.simulated(50, 20, 0.2), options.L, 1, **ours.NATURAL)
    above, taken = memory_above(
        lambda: ours.iterations(X, options.L, options.steps, **ours.NATURAL)
    )
    return report(
        benchmark="memory",
        shape=X.shape,
        stored=X.nnz,
        L=options.L,
        mib_above_data=above,
        mib_in_all=peak_memory_mib(),
        seconds=taken,
        steps=options.steps,
    )


@benchmark
def growth(options: argparse.Namespace) -> None:
    """Seconds of a natural step as stored counts, samples, features and components grow."""
    base = {"N": 20_000, "D": 2_000, "density": 0.05, "L": 10, "steps": options.steps}
    series = {
        "stored": [{"N": n} for n in (1_000, 10_000, 100_000, 1_000_000)],
        "N": [{"N": n, "density": 1_000 / n} for n in (5_000, 20_000, 80_000)],
        "D": [{"D": d, "density": 100 / d} for d in (500, 2_000, 8_000)],
        "L": [{"L": L} for L in (5, 10, 20, 40)],
    }
    rows = [["grows", "from", "to", "log-log slope of step time"]]
    for name in options.series.split(","):
        measured = []
        for change in series[name]:
            line = in_new_process("one_step", **{**base, **change}, repeats=options.repeats)
            measured.append(report(**{**line, "benchmark": "growth", "grows": name}))
        size = {"stored": "stored", "L": "L", "N": "N", "D": "D"}[name]
        x, y = ([line[key] for line in measured] for key in (size, "median_seconds"))
        slope = np.polyfit(np.log(x), np.log(y), 1)[0]
        rows.append([name, f"{x[0]:g}", f"{x[-1]:g}", f"{slope:.2f}"])
    sys.stdout.write(table(rows))


@benchmark
def one_step(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of a natural step on one simulated table."""
    X = matrix(options)
    found = ours.step_seconds(X, options.L, max(options.steps, options.repeats), **ours.NATURAL)
    return report(
        benchmark="one_step",
        N=X.shape[0],
        D=X.shape[1],
        stored=X.nnz,
        L=options.L,
        seconds=found,
        median_seconds=median(found),
        mib_in_all=peak_memory_mib(),
    )


@benchmark
def svgp(options: argparse.Namespace) -> None:
    """Seconds of a natural step through inducing points, as M, N and L grow."""
    start = {"M": 500, "N": 4000, "L": 4}
    rows = [["what grows", "values", "ms a step", "log-log slope"]]
    for name, values in SVGP_GROWTH.items():
        lines = [in_new_process("svgp_step", **{**start, name: value}) for value in values]
        seconds = [report(**{**line, "benchmark": "svgp"})["step_seconds"] for line in lines]
        slope = np.polyfit(np.log(values), np.log(seconds), 1)[0]
        shown = ", ".join(f"{1000 * one:.0f}" for one in seconds)
        rows.append([name, ", ".join(map(str, values)), shown, f"{slope:.2f}"])
    sys.stdout.write(table(rows))


@benchmark
def svgp_step(options: argparse.Namespace) -> dict[str, Any]:
    """One natural step through inducing points, on a simulated tissue of 30 features."""
    X, coordinates, *_ = tables.tissue(options.N, 30, 0.2, options.L)
    model = PNMF(
        options.L,
        **ours.NATURAL,
        spatial=True,
        num_inducing=options.M,
        lengthscale=8.0,
        max_iter=options.steps,
        tol=0,
        random_state=0,
    )
    times: list[float] = []
    note = lambda *_: times.append(time.perf_counter())  # noqa: E731 - a callback of three arguments
    ours.quietly(lambda: model.fit(X, coordinates=coordinates, callback=note, callback_interval=1))
    return report(
        benchmark="svgp_step",
        M=options.M,
        N=options.N,
        L=options.L,
        step_seconds=median(np.diff(times).tolist()),
        mib_in_all=peak_memory_mib(),
    )


@benchmark
def kills(options: argparse.Namespace) -> None:
    """Files that a process was writing when it was killed, `--repeats` times for each kind."""
    rows = [["file", "seconds to write", "kills", "in the middle", "lost", "rests after a write"]]
    for line in all_killed(options.repeats, options.N, options.D, options.L):
        report(benchmark="kills", **line)
        keys = ("seconds", "kills", "interrupted", "lost", "rests")
        rows.append([line["file"], *(f"{line[key]:.3g}" for key in keys)])
    sys.stdout.write(table(rows))


def main() -> None:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--N", type=int, default=20_000)
    parser.add_argument("--D", type=int, default=2_000)
    parser.add_argument("--L", type=int, default=10)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--every", type=int, default=1, help="look at the fit every so many steps")
    parser.add_argument("--judge", choices=("training", "held-out"), default="training")
    parser.add_argument("--peers", default="all", help="all, or words such as scikit-learn,pnmf")
    parser.add_argument("--series", default="stored,N,D,L")
    parser.add_argument("--kernel", help="of spatial fits, or several to choose from")
    parser.add_argument("--kl-weight", type=float, help="on the divergence of spatial fits")
    parser.add_argument("--prior", choices=PRIORS, default="chosen", help="of spatial fits")
    parser.add_argument("--batch-size", type=int, default=1000, help="samples (batches)")
    parser.add_argument("--M", type=int, default=500, help="inducing points")
    parser.add_argument("--K", type=int, default=50, help="neighbours of a place")
    parser.add_argument("--sizes", default="5000,10000,20000", help="numbers of places")
    parser.add_argument("--init", default=None, help="where fits start")
    parser.add_argument(
        "--devices",
        default="cpu,cuda" if torch.cuda.is_available() else "cpu",
        help="where to fit (device)",
    )
    parser.add_argument("--data", default="digits,st_mob_rep11,simulated")
    options = parser.parse_args()
    BENCHMARKS[options.name](options)


if __name__ == "__main__":
    main()
