"""What surrounds a call changes no bit of it, and a call moves nothing of what surrounds it."""

from contextlib import ExitStack, contextmanager

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

import pnmf_pyro
from pnmf_pyro import PNMF
from pnmf_pyro.data import blocks, isolation
from pnmf_pyro.data.counts import DenseCounts
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.transforms import factor_samples, get_factors, transform_F, transform_W
from tests.support.interrupts import shared_state

pytestmark = [
    pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

random = np.random.default_rng(0)
X, PLACES = random.poisson(3.0, (30, 8)), random.uniform(size=(30, 2))


@contextmanager
def default_type(kind: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(kind)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# From the outermost to the innermost: `block` hides what is around it.
SURROUNDINGS = {
    "no_grad": (torch.no_grad, lambda: default_type(torch.float64)),
    "inference_mode": (torch.inference_mode, lambda: default_type(torch.bfloat16)),
    "device meta": (lambda: torch.device("meta"),),
    "autocast": (
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        poutine.block,
        lambda: poutine.scale(scale=3.0),
        lambda: pyro.plate("components", 7),
    ),
    "mask": (
        lambda: poutine.mask(mask=False),
        poutine.trace,
        lambda: poutine.seed(rng_seed=5),
    ),
}


def results() -> dict[str, np.ndarray]:
    """What fits, draws, predictions and checks give, some of each."""
    flat = PNMF(2, max_iter=6, random_state=0).fit(X)
    steps = pnmf_pyro.fit(X, n_components=2, max_iter=8)
    space = pnmf_pyro.fit(X, PLACES, n_components=2, max_iter=8)
    local = pnmf_pyro.fit(X, PLACES, n_components=2, max_iter=8, local=True, K=5)
    check = pnmf_pyro.posterior_predictive_check(flat, X, n_draws=5, random_state=0)
    groups, short = np.arange(len(X)) % 2, {"n_components": 2, "max_iter": 6}
    types = pnmf_pyro.fit(X, PLACES, groups, **short)
    mixed = pnmf_pyro.fit(X, PLACES, non_spatial_components=1, **short)
    runs = pnmf_pyro.fit(X, batches=groups, **short)
    again = {"n_seeds": 2, "batches": groups, "max_iter": 4, "random_state": 0}
    found = {f"factors {i}": get_factors(m) for i, m in enumerate((flat, steps, space, local))}
    return found | {
        "draws": factor_samples(space, 3, coordinates=PLACES[:5] + 0.01, random_state=0),
        "local draws": factor_samples(local, 3, random_state=0),
        "transform": flat.transform(X),
        "new places": space.transform(None, PLACES[:4] + 0.02),
        "score": np.array([flat.score(X), space.score(X, coordinates=PLACES)]),
        "transform_F": transform_F(X, flat.components_.T, max_iter=5),
        "transform_W": transform_W(X, get_factors(flat), max_iter=5),
        "check": np.asarray(check.table()["replicated"]),
        "deviance": np.array(pnmf_pyro.deviance(X, (get_factors(flat), flat.components_.T))),
        "groups": pnmf_pyro.group_levels(types).levels,
        "importance": np.asarray(pnmf_pyro.importance_of_space(mixed)["importance"]),
        "effects": np.stack([runs.batch_effects_, runs.batch_effects_se_]),
        "selection": pnmf_pyro.select_n_components(X, [2], **again).deviance,
        "calibration": pnmf_pyro.calibrate(mixed, 2, random_state=0).z,
        "elbo": np.array([flat.elbo_, steps.elbo_, space.elbo_, local.elbo_]),
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    return results()


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_surroundings_change_no_bit(name, alone, users_parameter):
    with ExitStack() as around:
        for surrounding in SURROUNDINGS[name]:
            around.enter_context(surrounding())
        before = shared_state() if name != "device meta" else None
        found = results()
        if before is not None:
            assert shared_state() == before
    for what, expected in alone.items():
        np.testing.assert_array_equal(found[what], expected, err_msg=what)


@pytest.mark.parametrize(
    "fit",
    [
        lambda: PNMF(2, loadings_mode="exp", learning_rate=1e4, scheduler=None, random_state=0),
        lambda: PNMF(2, spatial=True, jitter=1e30, random_state=0, max_iter=5),
    ],
    ids=["diverges", "refused"],
)
def test_a_fit_that_fails_reads_and_moves_no_generator(fit, users_parameter):
    def ended() -> str:
        model = fit()
        where = {"coordinates": PLACES} if model.spatial else {}
        try:
            return repr(model.fit(X, **where).elbo_)
        except (FloatingPointError, ValueError) as error:
            return str(error)

    before = shared_state()
    first = ended()
    assert shared_state() == before
    torch.manual_seed(99)
    assert ended() == first


def test_an_isolated_function_is_a_fresh_process():
    @isolated
    def inside() -> tuple:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            torch.empty(0).device.type,
            len(pyro.poutine.runtime._PYRO_STACK),
        )

    with torch.inference_mode(), torch.device("meta"), default_type(torch.float64), poutine.block():
        assert inside() == (True, False, torch.float32, "cpu", 0)
        assert torch.is_inference_mode_enabled()
        assert torch.empty(0).device.type == "meta"


def short_of_memory(most: int):
    """A product of more entries than `most` does not fit on the card."""
    whole = DenseCounts.inner

    def inner(self: DenseCounts, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        if self.values.numel() > most:
            raise torch.cuda.OutOfMemoryError("Tried to allocate 9 GiB. GPU 0 has 8 GiB.")
        return whole(self, A, B)

    return inner


def test_blocks_become_smaller_where_the_memory_of_a_card_ends(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ENTRIES", X.size)
    whole = PNMF(2, mode="lower-bound", random_state=0).fit(X)
    monkeypatch.setattr(DenseCounts, "inner", short_of_memory(X.size // 8))
    with pytest.warns(UserWarning, match=r"allocate 9 GiB\).* again in blocks 1/8 .*batch_size"):
        model = PNMF(2, mode="lower-bound", random_state=0).fit(X)
    np.testing.assert_allclose(model.components_, whole.components_, rtol=1e-4)
    assert model.history_ == pytest.approx(whole.history_, rel=1e-6)
    assert blocks.at_once(1) == X.size


def test_a_fit_goes_on_from_its_checkpoint_where_the_memory_of_a_card_ended(monkeypatch, tmp_path):
    whole, calls, steps = DenseCounts.inner, [], []

    def inner(self: DenseCounts, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 40:
            raise torch.cuda.OutOfMemoryError("Tried to allocate 9 GiB.")
        return whole(self, A, B)

    def noted(model: PNMF, iteration: int, elbo: float) -> None:
        steps.append(iteration)

    monkeypatch.setattr(DenseCounts, "inner", inner)
    model = PNMF(2, mode="lower-bound", random_state=0, max_iter=60, tol=0)
    told = {"callback": noted, "callback_interval": 1}
    with pytest.warns(UserWarning, match="All was done again"):
        model.fit(X, **told, checkpoint=tmp_path / "run.ckpt", every=0)
    assert len(calls) > 40
    assert len(steps) <= 60 + 1


def test_ranks_do_not_try_again(monkeypatch):
    calls = []

    @isolated
    def full() -> None:
        calls.append(1)
        raise torch.cuda.OutOfMemoryError("Tried to allocate 9 GiB.")

    monkeypatch.setattr(isolation, "alone", lambda: False)
    with pytest.raises(MemoryError):
        full()
    assert len(calls) == 1


def test_a_card_without_memory_is_said_with_what_to_do(monkeypatch):
    model = PNMF(2, mode="lower-bound").fit(X)
    before = model.components_.copy()
    monkeypatch.setattr(DenseCounts, "inner", short_of_memory(0))
    with pytest.raises(MemoryError, match=r"allocate 9 GiB\)\. Fewer neighbours .*batch_size"):
        model.fit(X)
    np.testing.assert_array_equal(model.components_, before)
