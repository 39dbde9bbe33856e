"""The parameters of the estimator, declared in one place with what they may be."""

from __future__ import annotations

from numbers import Integral, Real
from typing import ClassVar

from pyro.contrib.gp.kernels import Kernel
from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import Interval, StrOptions

from pnmf_pyro.custom_modules import POSITIVE_MODES
from pnmf_pyro.data.checks import DEVICES, MODES
from pnmf_pyro.gp.correlation import KERNELS
from pnmf_pyro.gp.inducing import ALLOCATIONS
from pnmf_pyro.initialization import INITS
from pnmf_pyro.priors.svgp import CHOLESKY_MODES
from pnmf_pyro.training.hyperparameters import CRITERIA
from pnmf_pyro.training.schedules import OPTIMIZERS

_POSITIVE = Interval(Real, 0, None, closed="neither")
_COUNT = Interval(Integral, 1, None, closed="left")


class Parameters(BaseEstimator):
    """Parameters of :class:`~pnmf_pyro.PNMF`, which documents them."""

    _parameter_constraints: ClassVar[dict] = {
        "n_components": [_COUNT],
        "loadings_mode": [StrOptions(set(POSITIVE_MODES))],
        "mode": [StrOptions(set(MODES))],
        "training_mode": [StrOptions({"standard", "natural"})],
        "E": [_COUNT],
        "max_iter": [_COUNT],
        "tol": [Interval(Real, 0, None, closed="left")],
        "learning_rate": [_POSITIVE],
        "optimizer": [StrOptions(set(OPTIMIZERS))],
        "verbose": ["verbose"],
        "device": [StrOptions(set(DEVICES))],
        "init": [StrOptions(set(INITS)), "array-like", None],
        "scheduler": [StrOptions({"one_cycle", "plateau"}), None],
        "scheduler_patience": [Interval(Integral, 0, None, closed="left")],
        "scheduler_factor": [Interval(Real, 0, 1, closed="neither")],
        "scheduler_pct_start": [Interval(Real, 0, 1, closed="both")],
        "scheduler_div_factor": [Interval(Real, 1, None, closed="left")],
        "scheduler_final_div_factor": [Interval(Real, 1, None, closed="left")],
        "min_lr": [Interval(Real, 0, None, closed="left")],
        "batch_size": [_COUNT, None],
        "y_batch_size": [_COUNT, None],
        "shuffle": ["boolean"],
        "spatial": ["boolean"],
        "local": ["boolean"],
        "kernel": [StrOptions(set(KERNELS)), Kernel, "array-like"],
        "multigroup": ["boolean"],
        "num_inducing": [_COUNT],
        "lengthscale": [_POSITIVE],
        "sigma": [_POSITIVE],
        "group_diff_param": [Interval(Real, 0, None, closed="left")],
        "jitter": [_POSITIVE],
        "train_lengthscale": ["boolean"],
        "cholesky_mode": [StrOptions(set(CHOLESKY_MODES))],
        "diagonal_only": ["boolean"],
        "inducing_allocation": [StrOptions(set(ALLOCATIONS))],
        "K": [_COUNT],
        "precompute_knn": ["boolean"],
        "neighbors": [StrOptions({"knn", "probabilistic"})],
        "scale_ll_D": ["boolean"],
        "scale_kl_NM": ["boolean"],
        "scale_pf": [_POSITIVE, StrOptions({"auto"})],
        "warm_up": ["boolean"],
        "kl_weight": [_POSITIVE],
        "restore_spread": ["boolean"],
        "shrink_loadings": ["boolean"],
        "train_sigma": ["boolean"],
        "train_group_diff_param": ["boolean"],
        "nugget": [Interval(Real, 0, None, closed="left")],
        "train_nugget": ["boolean"],
        "criterion": [StrOptions(set(CRITERIA))],
        "group_distances": ["array-like", None],
        "rank": [Interval(Integral, 0, None, closed="left")],
    }

    def __init__(
        self,
        n_components=10,
        loadings_mode="projected",
        mode="expanded",
        training_mode="standard",
        E=3,
        max_iter=200,
        tol=0.0001,
        learning_rate=0.01,
        optimizer="Adam",
        random_state=None,
        verbose=False,
        device="auto",
        init="random",
        scheduler="one_cycle",
        scheduler_patience=200,
        scheduler_factor=0.8,
        scheduler_pct_start=0.3,
        scheduler_div_factor=25.0,
        scheduler_final_div_factor=10000.0,
        min_lr=1e-05,
        batch_size=None,
        y_batch_size=None,
        shuffle=True,
        spatial=False,
        local=False,
        kernel="Matern32",
        multigroup=False,
        num_inducing=3000,
        lengthscale=1.0,
        sigma=1.0,
        group_diff_param=10.0,
        jitter=1e-05,
        train_lengthscale=False,
        cholesky_mode="exp",
        diagonal_only=False,
        inducing_allocation="proportional",
        K=50,
        precompute_knn=True,
        neighbors="knn",
        scale_ll_D=True,
        scale_kl_NM=True,
        *,
        scale_pf=1.0,
        warm_up=False,
        kl_weight=1.0,
        restore_spread=False,
        shrink_loadings=False,
        train_sigma=False,
        train_group_diff_param=False,
        nugget=0.0,
        train_nugget=False,
        criterion="leave-one-out",
        group_distances=None,
        rank=30,
    ):
        self.n_components = n_components
        self.loadings_mode = loadings_mode
        self.mode = mode
        self.training_mode = training_mode
        self.E = E
        self.max_iter = max_iter
        self.tol = tol
        self.learning_rate = learning_rate
        self.optimizer = optimizer
        self.random_state = random_state
        self.verbose = verbose
        self.device = device
        self.init = init
        self.scheduler = scheduler
        self.scheduler_patience = scheduler_patience
        self.scheduler_factor = scheduler_factor
        self.scheduler_pct_start = scheduler_pct_start
        self.scheduler_div_factor = scheduler_div_factor
        self.scheduler_final_div_factor = scheduler_final_div_factor
        self.min_lr = min_lr
        self.batch_size = batch_size
        self.y_batch_size = y_batch_size
        self.shuffle = shuffle
        self.spatial = spatial
        self.local = local
        self.kernel = kernel
        self.multigroup = multigroup
        self.num_inducing = num_inducing
        self.lengthscale = lengthscale
        self.sigma = sigma
        self.group_diff_param = group_diff_param
        self.jitter = jitter
        self.train_lengthscale = train_lengthscale
        self.cholesky_mode = cholesky_mode
        self.diagonal_only = diagonal_only
        self.inducing_allocation = inducing_allocation
        self.K = K
        self.precompute_knn = precompute_knn
        self.neighbors = neighbors
        self.scale_ll_D = scale_ll_D
        self.scale_kl_NM = scale_kl_NM
        self.scale_pf = scale_pf
        self.warm_up = warm_up
        self.kl_weight = kl_weight
        self.restore_spread = restore_spread
        self.shrink_loadings = shrink_loadings
        self.train_sigma = train_sigma
        self.train_group_diff_param = train_group_diff_param
        self.nugget = nugget
        self.train_nugget = train_nugget
        self.criterion = criterion
        self.group_distances = group_distances
        self.rank = rank
