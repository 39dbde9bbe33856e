"""A fit of several processes against one: seconds of a step, ELBO, bits, and bytes sent."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import warnings
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.distributed as dist

import pnmf_pyro
from benchmarks import tables
from benchmarks.measure import peak_memory_mib, report, timed
from pnmf_pyro.transforms import get_factors

# Steps of the shorter of two fits, of which the difference is that of steps alone.
FEW = 2


def ranks(options: argparse.Namespace) -> None:
    """Print fits of `--N` x `--D` by one process, two, and two again, each with one thread."""
    given = {k: getattr(options, k) for k in ("N", "D", "density", "L", "steps")}
    alone, two, again = (_started(size, given) for size in (1, 2, 2))
    for size, found in ((1, alone), (2, two), (2, again)):
        report(benchmark="ranks", ranks=size, **found)
    report(
        benchmark="ranks",
        ratio_of_steps=alone["step_seconds"] / two["step_seconds"],
        ratio_of_steps_again=alone["step_seconds"] / again["step_seconds"],
        ratio_of_fits=alone["fit_seconds"] / two["fit_seconds"],
        elbo_differs=abs(two["elbo"] / alone["elbo"] - 1),
        same_bits=two["bits"] == again["bits"],
        bytes_allowed=2 * 8 * (options.D * options.L + options.L + 10),
    )


def ranks_in_space(options: argparse.Namespace) -> None:
    """Print fits of `--N` places with `--K` neighbours by one process, and by two, one thread each.

    CPU seconds of a process say what is shared out where other programs keep the machine busy.
    """
    given = {k: getattr(options, k) for k in ("N", "D", "L", "K")}
    alone, two = (_started(size, given, "rank_in_space") for size in (1, 2))
    for size, found in ((1, alone), (2, two)):
        report(benchmark="ranks_in_space", ranks=size, **given, **found)
    report(
        benchmark="ranks_in_space",
        ratio_of_cpu=alone["cpu_seconds"] / two["cpu_seconds"],
        ratio_of_fits=alone["seconds"] / two["seconds"],
        elbo_differs=abs(two["elbo"] / alone["elbo"] - 1),
    )


def rank_in_space(options: argparse.Namespace) -> None:
    """Be one of the processes of :func:`ranks_in_space`, and print what it found."""
    N, D, L = options.N, options.D, options.L
    random, several, sent = np.random.default_rng(0), int(os.environ["WORLD_SIZE"]) > 1, []
    places = random.uniform(size=(N, 2)) * N**0.5
    waves = places @ random.normal(size=(2, L)) / 8
    rates = np.exp(np.sin(waves)) @ random.gamma(0.3, size=(L, D)) * 0.2
    X = sp.csr_matrix(random.poisson(rates).astype("f4"))
    if several:
        sent = _count_bytes()
        dist.init_process_group("gloo")
    warnings.simplefilter("ignore")
    few = {"local": True, "K": 5, "max_iter": 6}
    pnmf_pyro.fit(X[:200], places[:200], n_components=2, **few)  # the first fit imports
    before, cpu = len(sent), time.process_time()
    seconds, model = timed(
        lambda: pnmf_pyro.fit(X, places, n_components=L, local=True, K=options.K)
    )
    report(
        seconds=seconds,
        cpu_seconds=time.process_time() - cpu,
        bytes=sum(sent[before:]),
        steps=model.n_iter_,
        elbo=model.elbo_,
        peak_mib=peak_memory_mib(),
    )
    if several:
        dist.destroy_process_group()


def _started(size: int, given: dict[str, Any], name: str = "rank") -> dict[str, Any]:
    """Start the processes of a fit; return what the first one found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks", name]
    command += [f"--{key}={value}" for key, value in given.items()]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **told, "RANK": str(number), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(size)
    ]
    outputs = [one.communicate()[0] for one in processes]
    return json.loads(outputs[0].strip().splitlines()[-1])


def rank(options: argparse.Namespace) -> None:
    """Be one of the processes of :func:`ranks`, and print what it found."""
    X = tables.simulated(options.N, options.D, options.density, options.L).astype(np.float64)
    several, sent = int(os.environ["WORLD_SIZE"]) > 1, _count_bytes()
    if several:
        dist.init_process_group("gloo")
    common = {"n_components": options.L, "random_state": 0, "tol": 0.0, "init": "nndsvda"}
    warnings.simplefilter("ignore")  # that so few steps do not settle
    taken = []
    for steps in (FEW, FEW + options.steps):
        before = len(sent)
        start, cpu = time.perf_counter(), time.process_time()
        model = pnmf_pyro.fit(X, max_iter=2 * steps, **common)
        seconds = time.perf_counter() - start
        taken.append((seconds, time.process_time() - cpu, sum(sent[before:]), model.n_iter_))
    apart = [many - few for few, many in zip(*taken, strict=True)]
    values = model.components_.tobytes() + get_factors(model).tobytes()
    report(
        step_seconds=apart[0] / apart[3],
        step_cpu_seconds=apart[1] / apart[3],
        step_bytes=apart[2] / apart[3],
        fit_seconds=taken[1][0],
        fit_cpu_seconds=taken[1][1],
        steps=model.n_iter_,
        elbo=model.elbo_,
        bits=hashlib.md5(values).hexdigest(),
        peak_mib=peak_memory_mib(),
    )
    if several:
        dist.destroy_process_group()


def _count_bytes() -> list[int]:
    """Let `torch.distributed` add what each exchange sends to other processes to a list."""
    sent: list[int] = []
    to_all, gather = dist.all_to_all_single, dist.all_gather

    def counted_to_all(received: torch.Tensor, given: torch.Tensor) -> None:
        others = dist.get_world_size() - 1
        sent.append(given.nbytes * others // dist.get_world_size())
        to_all(received, given)

    def counted_gather(shares: list[torch.Tensor], own: torch.Tensor) -> None:
        sent.append(own.nbytes * (dist.get_world_size() - 1))
        gather(shares, own)

    dist.all_to_all_single, dist.all_gather = counted_to_all, counted_gather
    return sent
