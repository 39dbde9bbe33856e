"""The command under torchrun, against the same command in one process."""

import os
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from pnmf_pyro.command_line.cli import main
from tests.support.ranks import counts

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path):
    path, one, two = (str(tmp_path / name) for name in ("cells.h5ad", "one.npz", "two.npz"))
    anndata.AnnData(sp.csr_matrix(counts())).write_h5ad(path)
    fit = ["fit", path, "--components", "2", "--no-space", "--set", "tol=0.01", "--out"]
    told = subprocess.run(
        [*TORCHRUN, "-m", "pnmf_pyro", *fit, two],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("ELBO") == 1  # the first process speaks
    assert main([*fit, one]) == 0
    with np.load(one) as expected, np.load(two) as found:
        assert set(found.files) == set(expected.files)
        for name in found.files:
            if expected[name].dtype.kind == "f":
                np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, err_msg=name)
