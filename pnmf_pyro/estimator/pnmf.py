"""The scikit-learn estimator."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import Tags
from sklearn.utils.validation import check_is_fitted

import pnmf_pyro.estimator.prediction as prediction
from pnmf_pyro.data.counts import CountsLike, MaybeArray
from pnmf_pyro.data.design import Covariates, Labels
from pnmf_pyro.data.isolation import isolated
from pnmf_pyro.data.masks import Mask
from pnmf_pyro.data.places import Places
from pnmf_pyro.estimator.checkpoints import EVERY, checkpoint_of
from pnmf_pyro.estimator.inputs import Scales, encode_places
from pnmf_pyro.estimator.published import fit_and_publish, publish
from pnmf_pyro.estimator.results import NamesOfSamples
from pnmf_pyro.estimator.saved_models import read_model, write_model
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.transforms import get_factors

Callback = Callable[["PNMF", int, float], None]


class PNMF(NamesOfSamples, ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Probabilistic non-negative matrix factorisation of counts, by variational inference.

    The model is X_ij ~ Poisson(s_i sum_l W_jl exp F_il) with F_il ~ N(0, scale_pf^2) and W >= 0
    learned. :meth:`fit_transform` returns the factors E exp F, and `components_` is W^T.

    Parameters
    ----------
    n_components : int
        Number of components L.
    loadings_mode : {'softplus', 'exp', 'projected', 'multiplicative'}
        How W stays non-negative: through a function, by clamping, or by updates in closed form.
    mode : {'simple', 'expanded', 'lower-bound'}
        Form of the ELBO: draws, draws for the log rate only, or none but Jensen's lower bound.
    training_mode : {'standard', 'natural'}
        What trains q(F): the optimiser, or natural-gradient steps.
    E : int or 'fixed'
        Monte Carlo draws at each step, or points for them, :mod:`pnmf_pyro.models.points`.
    max_iter, tol : int, float
        Number of steps at most, in all stages together; and the rise that is left, relative to the
        ELBO, at which a stage stops; over ten noisy steps.
    learning_rate, optimizer : float, {'Adam', 'AdamW', 'NAdam', 'SGD', 'RMSprop'}
        Optimiser of what has no steps of its own, and its learning rate.
    random_state : int, RandomState, Generator or None
        Seed. None gives a different fit at each call.
    verbose, device : bool or int, {'cpu', 'cuda', 'mps', 'auto'}
        Whether to show the plan and the progress of a fit; and where to compute, `auto` for CUDA.
    init : {'random', 'nndsvd', 'nndsvda', 'nndsvdar', 'biwhitened', 'k-means', None}, array, tuple
        See :func:`~pnmf_pyro.initialization.initialize_factors`; or loadings (D, L). The best.
    scheduler : {'one_cycle', 'plateau', None}
        Schedule of the learning rate.
    scheduler_patience, scheduler_factor, min_lr : int, float, float
        For `plateau`: number of steps without a rise of 1e-4 after which the learning rate is
        multiplied by `scheduler_factor`, and its least value.
    scheduler_pct_start, scheduler_div_factor, scheduler_final_div_factor : float
        For `one_cycle`: fraction of the steps in which the learning rate rises, from itself divided
        by the second; it then falls to that divided by the third.
    batch_size, y_batch_size, shuffle : int, int, bool
        Number of samples and of features in a minibatch, all unless given; and whether each pass
        has a new random order.
    spatial, local : bool
        Whether log-factors are Gaussian-process fields over coordinates, and whether each place is
        then conditioned on `K` neighbours, see :class:`~pnmf_pyro.priors.LCGP`.
    kernel : {'Matern12', 'Matern32', 'Matern52', 'RBF'}, Kernel of pyro.contrib.gp, or tuple
        Correlation of a field; of several, the one that predicts best. A `MultiGroupKernel` brings
        the distances between groups, a `SpatialKernel` all hyperparameters to begin with.
    multigroup, group_diff_param : bool, float
        Whether there are fields of several groups; 0 for one field, the larger the less they share.
    num_inducing, jitter : int, float
        Number of inducing points, all distinct places where there are no more; and that added to
        the diagonal of their covariance, relative to its mean.
    lengthscale, sigma : float
        Lengthscale in the unit of coordinates, where it is not learned, and standard deviation.
    train_lengthscale : bool
        Whether to learn the lengthscale, as `learn=("lengthscale",)`.
    cholesky_mode, diagonal_only : {'exp', 'softplus'}, bool
        In standard training, how scales of q(u), or with `local` of q(F), stay positive, and
        whether inducing values are independent.
    inducing_allocation : {'proportional', 'equal', 'derived'}
        How groups share inducing points, see :func:`~pnmf_pyro.gp.inducing.inducing_points`.
    K, precompute_knn : int, bool
        Number of neighbours of a place where `local`, and whether to find them once or each step.
    neighbors : {'knn', 'probabilistic'}
        How neighbours are chosen, see :func:`~pnmf_pyro.gp.neighbors.build_graph`.
    scale_ll_D, scale_kl_NM : bool
        Whether likelihood and divergence of a batch are scaled to those of all features, samples.
    scale_pf : float or 'auto'
        Standard deviation of log-factors that know no space, also those of a warm-up; `auto` for
        what maximises the ELBO.
    learn : tuple of {'lengthscale', 'sigma', 'nugget', 'group_diff_param'}
        Hyperparameters of fields to learn for each component. The nugget is the standard deviation
        of what each place has for itself.
    stages : list of stages, optional
        What a fit does in turn, see :mod:`pnmf_pyro.estimator.stages`.
    prior : Prior, optional
        Prior made for the samples of X and `n_components`. A copy of it is trained.
    likelihood : {'poisson', 'negative-binomial', 'auto'} or callable, optional
        Distribution of the counts; `auto` for the one of these that describes hidden entries
        better. A callable as for :class:`~pnmf_pyro.models.PoissonFactorization`.
    non_spatial_components : int
        Number of the components, the last ones, that know no space where the others do.

    Attributes
    ----------
    components_ : ndarray of shape (n_components, n_features)
        Loadings W^T.
    n_components_, n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features,)
        Names of the features, where X had names.
    elbo_, elbo_se_ : float
        ELBO in nats, constants included: a lower bound on log p(X | W); and its standard error over
        20 draws, 0 in `lower-bound` mode.
    history_, n_iter_ : History, int
        ELBO at each step of what was trained then, with its `stages`; and their number.
    likelihood_, likelihood_densities_ : str or callable, dict or None
        The likelihood; for `auto` the chosen one, and the mean log density of a hidden entry under
        each.
    dispersion_ : ndarray of shape (n_features,), or None
        Dispersions r of a negative binomial of variance mean + mean^2 / r; infinite for a Poisson.
    batch_effects_, batch_effects_se_ : ndarray of shape (n_features, n_batches), or None
        Effects of the `batches_` on the logarithm of rates, of which the mean over samples is 0,
        and their standard errors.
    covariate_effects_, covariate_effects_se_ : ndarray of shape (n_features, P), or None
        The same for one unit of each of the `covariates_`.
    batches_, covariates_, design_ : list or None, list of str or None, Design or None
        Labels of the batches, names of covariates or of their categories, and how these become
        columns of a design.
    model_ : PoissonFactorization
        The Pyro model and guide, fitted.
    groups_, group_columns_ : list or None, tuple of str or None
        Sorted names of the groups, of two columns all pairs; and the names of the columns.
    mean_total_, keys_ : float or None, AnnDataKeys or None
        Mean total of the samples of a fit with size_factors="total", and what was read of AnnData.
    """

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
        learn=(),
        stages=None,
        prior=None,
        likelihood=None,
        non_spatial_components=0,
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
        self.learn = learn
        self.stages = stages
        self.prior = prior
        self.likelihood = likelihood
        self.non_spatial_components = non_spatial_components

    @isolated
    def fit(
        self,
        X: CountsLike,
        y: object = None,
        coordinates: MaybeArray = None,
        groups: MaybeArray = None,
        return_history: bool = False,
        callback: Callback | None = None,
        callback_interval: int = 100,
        *,
        size_factors: MaybeArray = None,
        mask: Mask = None,
        batches: Labels = None,
        covariates: Covariates = None,
        checkpoint: str | os.PathLike | None = None,
        every: float = EVERY,
    ) -> Any:
        """Fit the model to counts; return self, or what `return_history` says.

        What cannot be used is a ValueError. A fit that fails, or is interrupted, leaves the
        estimator as it was. A ConvergenceWarning says that the ELBO still rose at the end of a
        stage or was not finite, or that the fit is of no use.

        Parameters
        ----------
        X : array-like, Tensor, DataFrame, sparse matrix or AnnData of shape (n_samples, n_features)
            Counts; any finite non-negative numbers are accepted. Sparse input stays sparse. Of an
            AnnData object they are its X, and obsm["spatial"] are the coordinates unless given.
        y : ignored
        coordinates, groups : array-like of shape (n_samples, p) and (n_samples,), optional
            Places of a spatial model, in any unit, and labels of a multi-group model, or a table of
            two columns of them, (n_samples, 2).
        return_history : bool
            Whether to return (history, self), where history is the list of ELBO values.
        callback, callback_interval : callable, int, optional
            Function of (model, iteration, elbo), called every `callback_interval` steps, when
            `components_` and factors are where that step led; `elbo` is of where it began.
        size_factors, mask, batches, covariates, checkpoint, every
            What scales the rates, and where the fit is kept, see :func:`pnmf_pyro.fit`.
        """
        scales = Scales(size_factors, mask, batches, covariates)
        told = callback, callback_interval, checkpoint_of(checkpoint, every)
        fit_and_publish(self, X, coordinates, groups, scales, *told)
        return (self.history_, self) if return_history else self

    def fit_transform(
        self,
        X: CountsLike,
        y: object = None,
        coordinates: MaybeArray = None,
        groups: MaybeArray = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """Fit the model as :meth:`fit` does, and return its factors E exp F, (N, L)."""
        self.fit(X, y, coordinates=coordinates, groups=groups, **kwargs)
        return prediction.typed_like(X, np.asarray(get_factors(self)))

    @isolated
    def transform(
        self,
        X: CountsLike | None,
        coordinates: MaybeArray = None,
        groups: MaybeArray = None,
        *,
        size_factors: MaybeArray = None,
        mask: Mask = None,
        batches: Labels = None,
        covariates: Covariates = None,
    ) -> np.ndarray:
        """Return factors exp F, (n_samples, n_components), of new samples, given the fit.

        Without space they maximise the likelihood given the loadings, by multiplicative updates
        (:func:`~pnmf_pyro.transforms.one_side.transform_F` has the posterior). `size_factors` are
        for this case: "total" if the fit had that; where it had others they must be given.
        A spatial model predicts E exp F at `coordinates`, for `groups`, from the field alone: X may
        be None. AnnData objects have coordinates and groups where that of the fit had them.
        """
        check_is_fitted(self)
        scales = Scales(size_factors, mask, batches, covariates)
        return prediction.new_factors(self, X, coordinates, groups, scales)

    def inverse_transform(
        self,
        transformed: ArrayLike,
        *,
        totals: MaybeArray = None,
        batches: Labels = None,
        covariates: Covariates = None,
    ) -> np.ndarray:
        """Return expected counts (N, D): factors exp F (N, L) times `components_`, and effects.

        These are the mean ones unless batches and covariates are given. Known `totals` (N,) are
        shared out in proportion to the rates. Size factors play no part.
        """
        check_is_fitted(self)
        return prediction.expected_counts(self, transformed, totals, batches, covariates)

    @isolated
    def score(
        self,
        X: CountsLike,
        y: object = None,
        coordinates: MaybeArray = None,
        groups: MaybeArray = None,
        *,
        size_factors: MaybeArray = None,
        mask: Mask = None,
        batches: Labels = None,
        covariates: Covariates = None,
    ) -> float:
        """Return the mean log-likelihood of samples given the fit, in nats per sample.

        Without space the lower bound on log p(X | W), which does not rise merely because there are
        more components; in space with factors predicted from places. Parameters: :meth:`transform`.
        """
        check_is_fitted(self)
        scales = Scales(size_factors, mask, batches, covariates)
        return prediction.mean_log_likelihood(self, X, coordinates, groups, scales)

    def encode_places(self, coordinates: MaybeArray, groups: MaybeArray) -> Places:
        """Check new places, and give their groups the codes that the fit has."""
        return encode_places(self, coordinates, groups)

    def save(self, path: str | os.PathLike) -> None:
        """Save the fitted model to one file, usually .npz, which is read without running code."""
        check_is_fitted(self)
        write_model(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike) -> PNMF:
        """Open a model saved by :meth:`save`; what is damaged, or no such file, is a ValueError."""
        return read_model(path, cls)

    @property
    def kernel_(self) -> str:
        """Name of the kernel of a spatial model, of several the one chosen."""
        return ", ".join(field.kernel.name for field in self.model_.prior.fields)

    @property
    def _n_features_out(self) -> int:
        return self.n_components_

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _publish(self, model: PoissonFactorization) -> None:
        publish(self, model)
