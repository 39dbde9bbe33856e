"""Programs that run as several processes of `torch.distributed`, over loopback."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

BEGIN = """
import json, os, sys
from datetime import timedelta
import numpy as np
import torch
import torch.distributed as dist
import pnmf_pyro
from tests.support.ranks import RANK, answer, counts, counts_in_space, failure, found, stop_at
dist.init_process_group("gloo", timeout=timedelta(seconds=120))
"""

END = "\ndist.destroy_process_group()\n"

RANK = int(os.environ.get("RANK", 0))


def started(size: int, program: str) -> list[subprocess.Popen]:
    """Start the processes of a program."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    root = str(Path(__file__).parents[2])
    path = {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", BEGIN + program + END],
            env={**os.environ, **told, **path, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def answers(size: int, program: str) -> list[list[dict]]:
    """Run a program; return what each rank has said by :func:`answer`."""
    told = [one.communicate(timeout=240) for one in started(size, program)]
    assert all("Error" not in err for _, err in told), told[0][1] + told[-1][1]
    return [[json.loads(line) for line in out.splitlines()] for out, _ in told]


def answer(**named: object) -> None:
    """Say something to the test that started the processes."""
    sys.stdout.write(json.dumps(named) + "\n")
    sys.stdout.flush()


def failure(call) -> str:
    """What a call fails with."""
    try:
        call()
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def stop_at(number: int, call) -> None:
    """Stop a call after so many checkpoints."""
    from pnmf_pyro.estimator.checkpoints import Checkpoint

    keep, done = Checkpoint.keep, []

    def counted(self, state) -> None:
        keep(self, state)
        done.append(1)
        if len(done) == number:
            raise KeyboardInterrupt

    Checkpoint.keep = counted
    try:
        call()
    except KeyboardInterrupt:
        Checkpoint.keep = keep


def counts():
    """Counts (53, 20) of two components, in float64."""
    import numpy as np

    random = np.random.default_rng(0)
    rates = np.exp(random.normal(size=(53, 2))) @ random.gamma(1.0, size=(2, 20))
    return random.poisson(3 * rates).astype(float)


def counts_in_space():
    """Counts (130, 20) of two components that vary in space, in float64, and places (130, 2)."""
    import numpy as np

    random = np.random.default_rng(0)
    places = random.uniform(size=(130, 2)) * 10
    rates = np.exp(np.sin(places)) @ random.gamma(0.7, size=(2, 20))
    return random.poisson(2 * rates).astype(float), places


def found(model) -> dict:
    """What a fit found, as numbers."""
    from pnmf_pyro import transforms

    return {
        "elbo": model.elbo_,
        "history": list(model.history_),
        "components": model.components_.tolist(),
        "factors": transforms.get_factors(model).tolist(),
        "sd": transforms.factor_uncertainty(model).tolist(),
    }
