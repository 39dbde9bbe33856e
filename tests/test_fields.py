"""Kernels, inducing-point fields and their natural gradients against dense matrices."""

import numpy as np
import pyro
import pytest
import torch
from pyro.contrib.gp import kernels as pyro_kernels
from pyro.contrib.gp.models import VariationalSparseGP

from pnmf_pyro.data.batches import Batch, Batches
from pnmf_pyro.data.counts import as_counts
from pnmf_pyro.data.places import Places
from pnmf_pyro.data.random_state import torch_generator
from pnmf_pyro.gp.cholesky import inverse_diagonal, jittered_cholesky, solve
from pnmf_pyro.gp.inducing import inducing_points
from pnmf_pyro.gp.kernels import KERNELS, MultiGroupKernel, SpatialKernel, check_group_distances
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.elbo import FactorizationELBO
from pnmf_pyro.priors import SVGP
from pnmf_pyro.priors import svgp_posterior as families
from pnmf_pyro.priors.fields import NaturalNormal, WhitenedNormal, WhitenedPrior, weighted_gram
from pnmf_pyro.priors.natural import EveryNth
from pnmf_pyro.priors.svgp_sites import SiteNormal, SiteSpread
from pnmf_pyro.training.loadings import ClosedFormLoadings
from pnmf_pyro.training.loop import evaluate_elbo, train
from pnmf_pyro.training.schedules import Decreasing
from tests import dense_fields

TIGHT = {"rtol": 1e-8, "atol": 1e-9}


def scattered(n, p=2, seed=0, groups=None):
    random = np.random.default_rng(seed)
    codes = None if groups is None else torch.from_numpy(random.integers(groups, size=n))
    return Places(torch.from_numpy(random.uniform(size=(n, p)) * 3), codes)


def as_numpy(places):
    return places.coordinates.numpy(), None if places.groups is None else places.groups.numpy()


def make_prior(N=12, M=None, L=2, natural=True, dtype=torch.float64, places=None, **settings):
    places = scattered(N) if places is None else places
    inducing = places if M is None else places[torch.arange(M)]
    kernel = SpatialKernel("Matern32", 0.8, 1.3, n_sets=L)
    with torch.no_grad():
        kernel.lengthscale.copy_(torch.linspace(0.5, 1.2, L))
    settings = {"jitter": 1e-10, **settings}
    prior = SVGP(
        kernel, places, inducing, L, use_natural_gradients=natural, dtype=dtype, **settings
    )
    prior.mean.copy_(torch.linspace(-0.3, 0.4, L))
    return prior


def observations(prior, seed=1):
    random = np.random.default_rng(seed)
    shape = (prior.L, prior.N)
    return random.normal(size=shape), random.uniform(0.2, 1.5, size=shape)


def assigned(**settings):
    prior = make_prior(**settings)
    y, scale = observations(prior)
    prior.assign(torch.from_numpy(y), torch.from_numpy(scale))
    return prior


def dense_prior(prior, component, x, z):
    lengthscale, sigma = float(prior.kernel.lengthscale[component]), float(prior.kernel.sigma[0])
    return dense_fields.covariance("Matern32", x, z, lengthscale, sigma)


def test_of_several_kernels_one_is_meant():
    names, a = ("Matern32", "RBF"), scattered(5)
    several, other = SpatialKernel(names, 0.7), SpatialKernel(names, 0.7)
    for name in ("Matern32", "RBF", "Matern32"):
        several.choose(name)
        assert several.name == several.one(0).name == name
        assert torch.equal(several(a, a), SpatialKernel(name, 0.7)(a, a))
        other.load_state_dict(several.state_dict())
        assert other.name == name
    assert "chosen" not in SpatialKernel("RBF").state_dict()
    with pytest.raises(ValueError, match="kernel must be one of"):
        SpatialKernel(("Matern32", "cubic"))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("p", [1, 2, 3])
def test_kernel_is_its_formula(name, p):
    a, b = scattered(5, p), scattered(4, p, seed=1)
    b.coordinates[1] = a.coordinates[2]
    found = SpatialKernel(name, 0.7, 1.5, nugget=0.4)(a, b)
    expected = dense_fields.covariance(name, as_numpy(a)[0], as_numpy(b)[0], 0.7, 1.5, nugget=0.4)
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


@pytest.mark.parametrize("name", KERNELS)
def test_multi_group_kernel_is_its_formula_and_a_covariance(name):
    places = scattered(14, groups=3)
    d = np.array([[0, 1, 2.0], [1, 0, 1.5], [2, 1.5, 0]])
    kernel = MultiGroupKernel(name, 0.7, 1.5, nugget=0.4, group_diff_param=2.5, group_distances=d)
    places.coordinates[1] = places.coordinates[0]
    x, g = as_numpy(places)
    expected = dense_fields.covariance(name, x, x, 0.7, 1.5, g, g, 2.5, d, nugget=0.4)
    found = kernel(places, places)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert np.linalg.eigvalsh(found)[0] > -1e-8


def test_limits_of_the_group_difference():
    places = scattered(10, groups=2)
    plain = SpatialKernel("Matern52", 0.7, 1.5)(places, places)[0]
    same = places.groups[:, None] == places.groups
    for a, expected in ((0.0, plain), (1e12, plain * same)):
        kernel = MultiGroupKernel(
            "Matern52", 0.7, 1.5, group_diff_param=a, group_distances=1 - np.eye(2)
        )
        np.testing.assert_allclose(kernel(places, places)[0], expected, atol=1e-6)
    one = Places(places.coordinates, torch.zeros(10, dtype=torch.int64))
    kernel = MultiGroupKernel("Matern52", 0.7, 1.5, group_distances=np.zeros((1, 1)))
    np.testing.assert_allclose(kernel(one, one)[0], plain, **TIGHT)


def test_kernels_leave_the_parameter_store_alone():
    store = pyro.get_param_store()
    before = dict(store.items())
    with pyro.poutine.trace() as trace:
        SpatialKernel()(scattered(3), scattered(3))
    assert dict(store.items()) == before
    assert not trace.trace.nodes


@pytest.mark.parametrize(
    ("distances", "message"),
    [
        (np.zeros((3, 3)), "shape"),
        (np.array([[0, 1.0], [2, 0]]), "symmetric"),
        (np.array([[0, np.nan], [np.nan, 0]]), "finite"),
    ],
)
def test_group_distances_are_checked(distances, message):
    with pytest.raises(ValueError, match=f"group_distances.*{message}"):
        check_group_distances(distances, 2)


def test_group_distances_must_be_euclidean():
    with pytest.raises(ValueError, match="Euclidean"):
        check_group_distances([[0, 1, 5.0], [1, 0, 1], [5.0, 1, 0]], 3)


@pytest.mark.parametrize("natural", [True, False])
def test_all_inducing_is_the_exact_gp(natural):
    prior = assigned(natural=natural)
    y, scale = observations(prior)
    new = scattered(6, seed=3)
    with torch.no_grad():
        at_samples, at_new = prior.marginal(), prior.at(new).marginal()
    x, z = as_numpy(prior.places)[0], as_numpy(new)[0]
    for l in range(prior.L):
        K, K_star, K_new = (dense_prior(prior, l, *pair) for pair in ((x, x), (x, z), (z, z)))
        level = float(prior.mean[l])
        for q, args in ((at_samples, (K, K, K)), (at_new, (K, K_star, K_new))):
            mean, cov = dense_fields.regression(*args, level, y[l], scale[l] ** 2)
            np.testing.assert_allclose(q.loc[l], mean, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(q.variance[l], np.diag(cov), rtol=1e-5, atol=1e-6)


def test_marginals_and_divergence_are_those_of_pyros_sparse_gp():
    """`VariationalSparseGP`, whitened, with the same q(u)."""
    prior = assigned(M=5, jitter=1e-6)
    q = prior.distributions(None, None, None, True)[1]
    new = scattered(6, seed=3)
    with torch.no_grad():
        found = prior.at(new).marginal()
    for l in range(prior.L):
        with pyro.get_param_store().scope():
            kernel = pyro_kernels.Matern32(2).double()
            kernel.lengthscale = prior.kernel.lengthscale[l].clone()
            kernel.variance = prior.kernel.variance[l].clone()
            gp = VariationalSparseGP(
                prior.places.coordinates,
                torch.zeros(prior.N, dtype=torch.float64),
                kernel,
                prior.inducing.coordinates.clone(),
                pyro.contrib.gp.likelihoods.Gaussian(),
                whiten=True,
                jitter=1e-6 * float(prior.kernel.variance[l]),
            )
            gp.u_loc = torch.nn.Parameter(q.mean[l].clone())
            gp.u_scale_tril = torch.linalg.cholesky(q.covariance_matrix[l])
            with torch.no_grad():
                loc, variance = gp(new.coordinates)
        np.testing.assert_allclose(found.loc[l], loc + prior.mean[l], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found.variance[l], variance, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "family",
    [{"natural": True, "M": 5}, {"natural": True}, {"natural": False}, {"diagonal_only": True}],
)
@pytest.mark.parametrize("cholesky_mode", ["exp", "softplus"])
def test_divergence_of_each_family(family, cholesky_mode):
    prior = assigned(**{"M": 7, "cholesky_mode": cholesky_mode, **family})
    q, p = prior.distributions(None, None, None, True)[1:]
    with torch.no_grad():
        found = float(torch.distributions.kl_divergence(q, p))
    expected = 0.0
    for l in range(prior.L):
        if isinstance(q, WhitenedNormal):
            m, S = q.mean[l], q.covariance_matrix[l]
        elif isinstance(prior.q, families.DiagonalInducing):
            m, S = q.mean[l], torch.diag(q.variance[l])
        else:
            m, S = q.mean[l], q.base_dist.covariance_matrix[l]
        m, S = m.detach().numpy(), S.detach().numpy()
        expected += dense_fields.kl_normal(m, S, np.eye(len(m)))
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_natural_gradients_are_those_in_expectation_parameters():
    """Against autograd in (m, S): d/dm1 = d/dm - 2 (d/dS) m and d/dm2 = d/dS."""
    generator = torch.Generator().manual_seed(0)
    L, M, n = 2, 4, 7
    A = torch.randn(L, M, n, dtype=torch.float64, generator=generator)
    root = torch.randn(L, M, M, dtype=torch.float64, generator=generator)
    precision = root @ root.mT + 2 * torch.eye(M, dtype=torch.float64)
    theta1 = torch.randn(L, M, dtype=torch.float64, generator=generator).requires_grad_()
    theta2 = (-precision / 2).requires_grad_()

    def loss(mean, variance):
        return (mean.exp() * variance + 0.3 * variance.square() - 2 * mean).sum()

    q = NaturalNormal(theta1, theta2)
    value = loss(*q.marginals(A)) + torch.distributions.kl_divergence(q, WhitenedPrior(L, M))
    value.backward()

    S = torch.linalg.inv(precision).requires_grad_()
    m = (S.detach() @ theta1.detach()[..., None])[..., 0].requires_grad_()
    mean = (A.mT @ m[..., None])[..., 0]
    variance = torch.einsum("lmn,lmk,lkn->ln", A, S, A)
    trace = S.diagonal(dim1=-2, dim2=-1).sum()
    dense_kl = (trace + m.square().sum() - L * M - torch.linalg.slogdet(S)[1].sum()) / 2
    dense = loss(mean, variance) + dense_kl
    dm, dS = torch.autograd.grad(dense, (m, S))
    torch.testing.assert_close(value.detach(), dense.detach())
    torch.testing.assert_close(theta1.grad, dm - 2 * (dS @ m[..., None])[..., 0].detach())
    torch.testing.assert_close(theta2.grad, dS)


def factorization(prior, D=15, seed=0, **settings):
    random = np.random.default_rng(seed)
    X = random.poisson(4.0, size=(prior.N, D)).astype(np.float64)
    y = torch.empty(D, prior.N, dtype=torch.float64, device="meta")
    settings = {"loadings_mode": "multiplicative", "mode": "lower-bound", **settings}
    model = PoissonFactorization(prior, y, prior.L, random_state=0, **settings)
    return model, as_counts(X)


def trained(model, counts, objective, optimizers, max_iter, monotone=False):
    schedules = None if monotone else [Decreasing()] * len(optimizers)
    generator = torch_generator(0)
    return train(
        model,
        Batches(counts),
        objective,
        optimizers,
        generator,
        max_iter=max_iter,
        monotone=monotone,
        schedules=schedules if objective.newton else None,
        warn=False,
    )


def test_a_natural_step_of_size_one_is_the_closed_form():
    """precision_u = I + A diag(h) A^T, h = s (sum_j W_jl) E exp F."""
    prior = assigned(N=12, M=6)
    model, counts = factorization(prior)
    with torch.no_grad():
        q = prior.marginal()
    h = (q.loc + q.variance / 2).exp() * model.W.data.sum(0)[:, None]
    A, _ = prior._design(None)
    expected = torch.eye(6, dtype=torch.float64) + (A * h[:, None].detach()) @ A.mT
    batches, objective = Batches(counts), FactorizationELBO("lower-bound")
    train(
        model,
        batches,
        objective,
        [prior.natural_optimizer()],
        torch_generator(0),
        max_iter=1,
        warn=False,
    )
    torch.testing.assert_close(-2 * prior.q.theta2.detach(), expected.detach())


def by_sites_and_densely():
    """The same q(u), in sites and in natural parameters."""
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(2, 4, 7, dtype=torch.float64, generator=generator)
    shift = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    w = torch.rand(2, 7, dtype=torch.float64, generator=generator) + 0.1
    precision = torch.eye(4, dtype=torch.float64) + (A * w[:, None]) @ A.mT
    dense = NaturalNormal((A @ shift[..., None])[..., 0].requires_grad_(), -precision / 2)
    dense.theta2.requires_grad_()
    return SiteNormal(shift.requires_grad_(), w.requires_grad_(), SiteSpread(w, A, A.mT @ A)), dense


def test_sites_are_another_form_of_natural_parameters():
    q, dense = by_sites_and_densely()
    torch.testing.assert_close(q.mean, dense.mean)
    torch.testing.assert_close(q.covariance_matrix, dense.covariance_matrix)
    u = torch.randn(3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(q.log_prob(u), dense.log_prob(u))
    elsewhere = torch.randn(2, 4, 5, dtype=torch.float64)
    for found, expected in zip(
        (*q.at_sites(), *q.marginals(elsewhere)),
        (*dense.marginals(q.A), *dense.marginals(elsewhere)),
        strict=True,
    ):
        torch.testing.assert_close(found.detach(), expected.detach())


def test_gradients_of_sites_are_those_of_natural_parameters():
    """theta1 = A b and theta2 = -(I + A diag(w) A^T) / 2: their steps follow from those of b, w."""
    q, dense = by_sites_and_densely()
    prior = WhitenedPrior(2, 4)
    values = []
    for one, (mean, variance) in ((q, q.at_sites()), (dense, dense.marginals(q.A))):
        loss = (mean.exp() * variance + 0.3 * variance.square() - 2 * mean).sum()
        values.append(loss + torch.distributions.kl_divergence(one, prior))
        values[-1].backward()
    torch.testing.assert_close(values[0], values[1])
    torch.testing.assert_close((q.A @ q.shift.grad[..., None])[..., 0], dense.theta1.grad)
    step = (q.A * q.precision.grad[:, None]) @ q.A.mT
    torch.testing.assert_close(-step / 2, dense.theta2.grad)


def test_gradients_with_the_covariance_given_are_those_in_the_mean():
    """With S given, theta1 = S^-1 m moves by the slope in m: against autograd in m."""
    q, dense = by_sites_and_densely()
    S = dense.covariance_matrix
    m = dense.mean.clone().requires_grad_()
    variance = torch.einsum("lmn,lmk,lkn->ln", q.A, S, q.A)
    prior = WhitenedPrior(2, 4)

    def loss(mean, variance):
        return (mean.exp() * variance + 0.3 * variance.square() - 2 * mean).sum()

    expected = loss((q.A.mT @ m[..., None])[..., 0], variance) + m.square().sum() / 2
    (slope,) = torch.autograd.grad(expected, m)
    for one, marginals in ((q, q.at_sites), (dense, lambda: dense.marginals(q.A))):
        second = one.precision if one is q else one.theta2
        second.requires_grad_(False)
        value = loss(*marginals()) + torch.distributions.kl_divergence(one, prior)
        value.backward()
        assert second.grad is None
    torch.testing.assert_close(dense.theta1.grad, slope)
    torch.testing.assert_close((q.A @ q.shift.grad[..., None])[..., 0], slope)


@pytest.mark.parametrize("M", [30, 10])  # in sites, and in natural parameters
def test_steps_of_the_mean_between_those_of_the_covariance_lead_to_the_same_optimum(M):
    ends = []
    for apart in (1, 10):
        prior = assigned(N=30, M=M)
        model, counts = factorization(prior)
        steps = prior.natural_optimizer()
        if apart > 1:
            steps = EveryNth(steps, apart, prior.seldom_moved())
        objective = FactorizationELBO("lower-bound")
        history = trained(model, counts, objective, [steps], 600, monotone=True).history
        assert (np.diff(history) >= -1e-6 * abs(history[0])).all()
        ends.append(history[-1])
    assert ends[1] == pytest.approx(ends[0], rel=1e-9)


def test_a_step_of_the_mean_factorises_nothing(monkeypatch):
    prior = assigned(N=30, M=10)
    model, counts = factorization(prior)
    steps = EveryNth(prior.natural_optimizer(), 1000, prior.seldom_moved())
    made = []
    cholesky = torch.linalg.cholesky
    monkeypatch.setattr(torch.linalg, "cholesky", lambda *a: (made.append(1), cholesky(*a))[1])
    trained(model, counts, FactorizationELBO("lower-bound"), [steps], 20)
    assert len(made) <= 2


def test_draws_of_sites_have_their_moments():
    q, _ = by_sites_and_densely()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u = q.sample((40_000,))
    torch.testing.assert_close(u.mean(0), q.mean, atol=0.03, rtol=0)
    for component in range(2):
        covariance = torch.cov(u[:, component].T)
        torch.testing.assert_close(covariance, q.covariance_matrix[component], atol=0.03, rtol=0)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_training_by_sites_is_training_in_natural_parameters(batch_size, monkeypatch):
    fields = []
    for sites in (0, 100):
        monkeypatch.setattr("pnmf_pyro.priors.svgp_posterior.SITES", sites)
        prior = assigned(N=10, M=8)
        model, counts = factorization(prior)
        batches = Batches(counts, batch_size, generator=torch_generator(1))
        objective = FactorizationELBO("lower-bound")
        train(
            model,
            batches,
            objective,
            [prior.natural_optimizer(0.5)],
            torch_generator(0),
            max_iter=6,
            warn=False,
        )
        fields.append(prior.marginal())
    assert isinstance(prior.q, families.SiteInducing)
    torch.testing.assert_close(fields[0].loc, fields[1].loc)
    torch.testing.assert_close(fields[0].scale, fields[1].scale)


def test_weighted_gram():
    A = torch.randn(1, 150, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    w = torch.rand(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.einsum("kn,ln,mn->lkm", A[0], w, A[0])
    torch.testing.assert_close(weighted_gram(A, w), expected, **TIGHT)


@pytest.mark.parametrize("n", [3, 128, 200])
def test_inverse_diagonal(n):
    root = torch.randn(2, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = root @ root.mT + torch.eye(n, dtype=torch.float64)
    found = inverse_diagonal(torch.linalg.cholesky(matrix))
    expected = torch.linalg.inv(matrix).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("draws", [(), (3,), (2, 3)])
def test_solve(draws):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(2, 5, 5, dtype=torch.float64, generator=generator)
    matrix = root @ root.mT + torch.eye(5, dtype=torch.float64)
    b = torch.randn(*draws, 2, 5, dtype=torch.float64, generator=generator)
    found = solve(torch.linalg.cholesky(matrix), b)
    torch.testing.assert_close(torch.einsum("lij,...lj->...li", matrix, found), b, **TIGHT)


@pytest.mark.parametrize("M", [4, None])
def test_elbo_never_falls_in_monotone_training(M):
    prior = assigned(N=20, M=M)
    model, counts = factorization(prior)
    optimizers = [prior.natural_optimizer(), ClosedFormLoadings(model.W, model.expected_totals)]
    objective = FactorizationELBO("lower-bound")
    result = trained(model, counts, objective, optimizers, 40, monotone=True)
    rises = np.diff(result.history)
    assert (rises >= -1e-7 * abs(result.history[-1])).all()
    assert result.history[-1] > result.history[0] + 1
    assert rises[-5:].max() < 0.01 * (result.history[-1] - result.history[0])


@pytest.mark.parametrize("settings", [{}, {"diagonal_only": True}, {"cholesky_mode": "softplus"}])
def test_standard_training_comes_near_natural_training(settings):
    objective = FactorizationELBO("lower-bound")
    best, counts = factorization(assigned(N=12, M=4))
    best.W.freeze()
    trained(best, counts, objective, [best.prior.natural_optimizer()], 200, monotone=True)
    model, _ = factorization(assigned(N=12, M=4, natural=False, **settings))
    model.W.assign(best.W.data.detach())
    model.W.freeze()
    adam = torch.optim.Adam(model.prior.parameters(), lr=0.05)
    trained(model, counts, objective, [adam], 200)
    reached, optimum = (
        evaluate_elbo(one, Batches(counts), objective, torch_generator(0)) for one in (model, best)
    )
    assert reached < optimum + 1e-6
    assert reached > optimum - (6.0 if settings.get("diagonal_only") else 1.0)


@pytest.mark.parametrize("mode", ["simple", "expanded"])
def test_natural_steps_raise_the_bound_of_noisy_modes(mode):
    """Above what the optimum of `lower-bound` mode reaches in that mode, which is near."""
    final = FactorizationELBO(mode, 500)
    reached = {}
    for name in ("lower-bound", mode):
        model, counts = factorization(assigned(N=12, M=4), mode=name)
        model.W.freeze()
        objective = FactorizationELBO(name, 5, newton=True)
        steps = [model.prior.natural_optimizer()]
        trained(model, counts, objective, steps, 150, monotone=name == "lower-bound")
        reached[name] = evaluate_elbo(model, Batches(counts), final, torch_generator(0))
    assert reached[mode] > reached["lower-bound"] + 0.5


def test_batches_add_up_to_the_whole():
    prior = assigned(N=12, M=5)
    model, counts = factorization(prior)
    objective = FactorizationELBO("lower-bound")
    with torch.no_grad():
        whole = objective.terms(model.model, model.guide, Batch(counts))
        parts = [
            objective.terms(model.model, model.guide, batch)
            for batch in Batches(counts, 3).one_pass()
        ]
    for name, value in whole.items():
        average = torch.stack([part[name] for part in parts]).mean()
        torch.testing.assert_close(average, value)


def test_draws_are_joint():
    """Covariance of draws at samples is that of the exact posterior."""
    prior = assigned(N=6, L=1)
    y, scale = observations(prior)
    x = as_numpy(prior.places)[0]
    K = dense_prior(prior, 0, x, x)
    _, expected = dense_fields.regression(K, K, K, float(prior.mean[0]), y[0], scale[0] ** 2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = prior.draws(40_000)(None)[:, 0]
        from_marginal = prior.marginal().rsample(torch.Size([40_000]))[:, 0].detach()
        elsewhere = prior.at(prior.places).draws(40_000)(None)[:, 0]
    for one in (draws, from_marginal, elsewhere):
        # standard error of a covariance: at most 2 var / sqrt(n), so 5 of them
        np.testing.assert_allclose(np.cov(one.numpy().T), expected, atol=10 * expected.max() / 200)


def test_the_guides_field_gives_any_number_of_draws():
    prior = assigned(N=6, L=2)
    model, _ = factorization(prior, D=2)
    with torch.no_grad():
        trace = pyro.poutine.trace(model.guide).get_trace()
        drawn = trace.nodes["F"]["fn"].sample((3,))
    assert drawn.shape == (3, 2, 6)
    # given u, all that is left at an inducing point is the jitter
    torch.testing.assert_close(drawn[0], trace.nodes["F"]["value"], atol=1e-3, rtol=0)


def test_prior_draws_have_the_kernels_covariance():
    prior = make_prior(N=5, L=1)
    model, _ = factorization(prior, D=2)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        draws = torch.stack(
            [
                pyro.poutine.trace(model.model).get_trace().nodes["F"]["value"][0]
                for _ in range(3_000)
            ]
        )
    x = as_numpy(prior.places)[0]
    expected = dense_prior(prior, 0, x, x)
    np.testing.assert_allclose(np.cov(draws.numpy().T), expected, atol=10 * expected.max() / 54)


def test_float32_fields_are_near_float64_ones():
    exact, single = assigned(), assigned(dtype=torch.float32)
    with torch.no_grad():
        a, b = exact.marginal(), single.marginal()
    assert b.loc.dtype == torch.float32
    torch.testing.assert_close(b.loc.double(), a.loc, rtol=1e-5, atol=1e-5)


def test_jitter_grows_with_a_warning_and_gives_up_with_an_error():
    singular = torch.ones(3, 3, dtype=torch.float64) - 1e-7 * torch.eye(3, dtype=torch.float64)
    with pytest.warns(UserWarning, match="jitter was raised"):
        tril = jittered_cholesky(singular, 1e-9)
    assert torch.isfinite(tril).all()
    with pytest.raises(ValueError, match="jitter"):
        jittered_cholesky(-torch.eye(2, dtype=torch.float64), 1e-9)


def test_inducing_points_are_all_distinct_places_where_these_are_few():
    places = Places(torch.tensor([[0.0, 0], [1, 0], [0, 0], [2, 2]], dtype=torch.float64))
    chosen = inducing_points(places, 10, "proportional", np.random.RandomState(0))
    np.testing.assert_array_equal(chosen.coordinates, [[0, 0], [1, 0], [2, 2]])


@pytest.mark.parametrize(
    ("allocation", "expected"), [("proportional", [32, 8]), ("equal", [20, 20])]
)
def test_allocation_of_inducing_points(allocation, expected):
    random = np.random.default_rng(0)
    codes = np.repeat([0, 1], [400, 100])
    places = Places(torch.from_numpy(random.uniform(size=(500, 2))), torch.from_numpy(codes))
    chosen = inducing_points(places, 40, allocation, np.random.RandomState(0))
    np.testing.assert_array_equal(np.bincount(chosen.groups), expected)


def test_derived_allocation_follows_space_and_forgets_no_group():
    random = np.random.default_rng(0)
    far = random.uniform(size=(300, 2)) + np.repeat([[0, 0], [10, 0]], [200, 100], axis=0)
    hidden = random.uniform(size=(5, 2))  # amid the first group, of which each centre is
    coordinates = torch.from_numpy(np.concatenate([far, hidden]))
    codes = torch.from_numpy(np.repeat([0, 1, 2], [200, 100, 5]))
    chosen = inducing_points(Places(coordinates, codes), 30, "derived", np.random.RandomState(0))
    right = chosen.coordinates[:, 0] > 5
    assert (chosen.groups[right] == 1).all()
    assert set(chosen.groups.tolist()) == {0, 1, 2}


def test_allocation_never_exceeds_a_groups_places():
    codes = np.repeat([0, 1], [3, 200])
    coordinates = torch.from_numpy(np.random.default_rng(0).uniform(size=(203, 2)))
    places = Places(coordinates, torch.from_numpy(codes))
    chosen = inducing_points(places, 20, "equal", np.random.RandomState(0))
    np.testing.assert_array_equal(np.bincount(chosen.groups), [3, 17])


@pytest.mark.parametrize("M", [12, 5])  # in sites, and in natural parameters
def test_restoring_the_spread_keeps_means_and_takes_sites_at_their_weight(M):
    """q after training with weight k is prior + w / k; then it is prior + w."""
    weight = 0.4
    prior = make_prior(M=M)
    y, scale = observations(prior)
    prior.assign(torch.from_numpy(y), torch.from_numpy(scale * weight**0.5))
    before = prior.marginal()
    prior.restore_spread(weight)
    after = prior.marginal()
    torch.testing.assert_close(after.loc, before.loc, **TIGHT)
    x, z = (as_numpy(places)[0] for places in (prior.places, prior.inducing))
    for l in range(2):
        Kzz, Kzx = dense_prior(prior, l, z, z), dense_prior(prior, l, z, x)
        B = np.linalg.solve(Kzz, Kzx)  # E[F | u] = B^T u
        S = np.linalg.inv(np.linalg.inv(Kzz) + (B / scale[l] ** 2) @ B.T)
        variance = 1.3**2 - (Kzx * B).sum(0) + (B * (S @ B)).sum(0)
        np.testing.assert_allclose(after.variance[l].detach(), variance, rtol=1e-6)


def test_only_sites_have_a_spread_to_restore():
    with pytest.raises(ValueError, match="restore_spread needs"):
        make_prior(natural=False).restore_spread(0.5)
