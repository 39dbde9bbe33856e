"""What is asked for fits in memory where the dense table, or several copies of it, would not."""

import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from pnmf_pyro import PNMF, posterior_predictive_check
from pnmf_pyro import transforms as T
from pnmf_pyro.data.blocks import BLOCK_ENTRIES
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.priors import GaussianPrior
from pnmf_pyro.training.fitted import by_samples

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits of memory are set as on Linux"
)

MIB = 1 << 20


@contextmanager
def at_most(mib: float):
    """Let the process take that much more address space and no more: beyond it allocations fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + int(mib * MIB)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_the_limit_is_felt():
    with at_most(200), pytest.raises((MemoryError, RuntimeError)):
        torch.empty(300 * MIB, dtype=torch.uint8)
    with at_most(200):
        torch.empty(100 * MIB, dtype=torch.uint8)


@pytest.fixture(scope="module")
def large() -> sp.csr_matrix:
    """50,000 by 20,000 with 100,000 entries; 4 GB as a dense table of float32."""
    random = np.random.default_rng(0)
    rows, columns = random.integers(0, 50_000, 100_000), random.integers(0, 20_000, 100_000)
    values = np.ones(100_000, np.float32)
    return sp.csr_matrix((values, (rows, columns)), shape=(50_000, 20_000))


@pytest.mark.filterwarnings("ignore:.*have no counts at all:UserWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_large_sparse_tables_stay_sparse(large):
    """A fit, and inference with either side fixed, in a quarter of what the dense table takes."""
    model = PNMF(2, mode="lower-bound", max_iter=2, random_state=0)
    with at_most(1000):
        model.fit(large)
        factors = model.transform(large)
        assert factors.shape == (50_000, 2)
        empty = np.diff(large.indptr) == 0
        assert empty.sum() > 1000
        assert (factors[empty] == 0).all()
        assert np.isfinite(model.score(large[:500]))
        W = T.transform_W(large, T.get_factors(model), max_iter=5)
        assert W.shape == (20_000, 2)
        inferred = T.transform_F(large, T.get_loadings(model), max_iter=2, E=1)
        assert inferred.shape == (50_000, 2)
        assert np.isfinite(inferred).all()


def test_predictive_checks_stay_sparse(large):
    """A table of 800 MB if it were dense, in half of that."""
    y = torch.empty(20_000, 10_000, device="meta")
    model = PoissonFactorization(GaussianPrior(y, 2), y, 2)
    model.W.assign(torch.full((20_000, 2), 1e-4))
    with at_most(400):
        result = posterior_predictive_check(
            model, large[:10_000], statistics=["total", "zero_fraction", "correlation"], n_draws=1
        )
    assert [len(one.observed) for one in result.results] == [20_000, 10_000] * 2 + [1225]


@pytest.fixture(scope="module")
def wide() -> PoissonFactorization:
    """q(F) of 300,000 samples in 5 components, 6 MB for each of its moments."""
    y = torch.empty(1, 300_000, device="meta")
    model = PoissonFactorization(GaussianPrior(y, 5), y, 5)
    mean = torch.arange(1_500_000.0).reshape(5, 300_000) / 1e6
    model.prior.assign(mean, 0.1 + mean)
    return model


def test_posterior_quantities_need_little_more_than_their_output(wide):
    """Forty draws take 240 MB; with a second copy of any part they would pass the limit."""
    with at_most(229 + 120):
        draws = T.factor_samples(wide, 40, return_exp=True, random_state=0)
    assert draws.shape == (40, 300_000, 5)
    assert draws.dtype == np.float32
    log = np.log(draws[:, ::1000])
    mean, scale = T.log_factors(wide)[::1000], T.factor_uncertainty(wide)[::1000]
    # 1500 means of 40 at 5.5 standard errors: a false alarm in 10^4 seeds; the seed is fixed
    assert (np.abs(log.mean(0) - mean) < 5.5 * scale / 40**0.5).all()
    assert np.mean(log.std(0, ddof=1) / scale) == pytest.approx(1, abs=0.03)


def test_blocks_are_small_and_together_are_all_samples(wide):
    prior, sizes = wide.prior, []

    def mean(index):
        loc = prior.marginal(index).loc
        sizes.append(loc.shape[1])
        return loc

    found = by_samples(prior, mean, return_tensor=True)
    assert len(sizes) > 1
    assert max(sizes) * 5 <= BLOCK_ENTRIES
    assert torch.equal(found, prior.mean.detach().T)
    repeated = by_samples(prior, lambda index: mean(index).expand(7, -1, -1), False, (7,))
    assert repeated.shape == (7, 300_000, 5)
    np.testing.assert_array_equal(repeated[3], found)
