"""The scikit-learn estimator."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from pyro.contrib.gp.kernels import Kernel
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from pnmf_pyro.data.batches import Batches
from pnmf_pyro.data.checks import (
    check_array,
    check_callback,
    check_counts,
    check_device,
    check_size_factors,
    warn_empty,
)
from pnmf_pyro.data.counts import Counts, as_counts
from pnmf_pyro.data.places import GroupCodes, Places, check_coordinates
from pnmf_pyro.data.random_state import check_random_state, torch_generator
from pnmf_pyro.estimator.archive import read_archive, write_archive
from pnmf_pyro.estimator.plan import Parts, Stage
from pnmf_pyro.estimator.space import check_space, refuse_places, saved_space
from pnmf_pyro.gp.correlation import KERNELS
from pnmf_pyro.initialization import start_values
from pnmf_pyro.models import PoissonFactorization
from pnmf_pyro.models.poisson import PoissonFactors
from pnmf_pyro.training.given_one_side import factors_given_loadings, held_out_bound
from pnmf_pyro.training.loop import TrainingResult, evaluate_elbo, train
from pnmf_pyro.transforms import get_factors

# Steps after which starts are compared: the ELBO of ten still misleads.
TRIAL_STEPS = 20

Callback = Callable[["PNMF", int, float], None]


class PNMF(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Parts):
    r"""Probabilistic non-negative matrix factorisation of counts, by variational inference.

    The model is X_ij ~ Poisson(s_i sum_l W_jl exp F_il) with F_il ~ N(0, scale_pf^2) and W >= 0
    learned. :meth:`fit_transform` returns the factors E exp F, and `components_` is W^T.

    Parameters
    ----------
    n_components : int
        Number of components.
    loadings_mode : {'softplus', 'exp', 'projected', 'multiplicative'}
        How W stays non-negative: through a function, by clamping after each step, or by updates in
        closed form that need no learning rate.
    mode : {'simple', 'expanded', 'lower-bound'}
        Form of the ELBO: plain draws; draws for the expected log rate only; no draws but a lower
        bound on it (Jensen).
    training_mode : {'standard', 'natural'}
        Train q by the optimiser, or by natural-gradient steps with the optimiser for W alone.
    E : int
        Monte Carlo draws at each step.
    max_iter : int
        Number of steps at most.
    tol : float
        Stop when the smoothed ELBO rises by less than this, relative to its size, over ten steps,
        three times in a row; 0 to go on to `max_iter`.
    learning_rate : float
        Learning rate of the optimiser.
    optimizer : {'Adam', 'AdamW', 'NAdam', 'SGD', 'RMSprop'}
        Optimiser; of W alone where `training_mode` is natural.
    random_state : int, RandomState or None
        Seed. None gives a different fit at each call.
    verbose : bool or int
        Show a progress bar with the ELBO.
    device : {'cpu', 'cuda', 'mps', 'auto'}
        Where to compute. `auto` is CUDA where there is one, else the CPU.
    init : {'random', 'nndsvd', 'nndsvda', 'nndsvdar', 'biwhitened', 'k-means', None} or tuple
        Where to start, see :func:`~pnmf_pyro.initialization.initialize_factors`. Of several, the
        one from which 20 steps lead to the highest ELBO.
    scheduler : {'one_cycle', 'plateau', None}
        Schedule of the learning rate.
    scheduler_patience, scheduler_factor, min_lr : int, float, float
        Of `plateau`: after more than `scheduler_patience` steps in which the ELBO did not rise by
        one part in 10^4 multiply the learning rate by `scheduler_factor`, down to `min_lr`.
    scheduler_pct_start, scheduler_div_factor, scheduler_final_div_factor : float
        Of `one_cycle`: fraction of `max_iter` in which the learning rate rises from
        `learning_rate / scheduler_div_factor`; it then falls to that divided by
        `scheduler_final_div_factor`.
    batch_size, y_batch_size : int, optional
        Samples and features in a minibatch; all unless given.
    shuffle : bool
        Visit samples and features in a new random order in each pass.
    spatial : bool
        Make the log-factors Gaussian-process fields over the coordinates given to :meth:`fit`.
    local : bool
        Condition each place on `K` neighbours rather than on inducing points: the cost is
        proportional to the number of places, and fine structure is kept, see
        :class:`~pnmf_pyro.priors.LCGP`.
    kernel : {'Matern12', 'Matern32', 'Matern52', 'RBF'}, Kernel of pyro.contrib.gp, or tuple
        Correlation of a field: by name, from rough to smooth, or a kernel of Pyro, sums and
        products of them, or a subclass of one's own. An object is a function of the coordinates
        divided by the lengthscale, its own hyperparameters stay as they are given, and a model that
        has one is not saved. Of several, the one that is best by `criterion`.
    multigroup : bool
        Fields of several groups that are alike as far as `group_diff_param` says.
    num_inducing : int
        Inducing points; all distinct places where there are no more.
    lengthscale : float
        Of the kernel, in the unit of the coordinates. With `train_lengthscale` the search starts
        from the spacing and the extent of the places instead.
    sigma : float
        Standard deviation of a field.
    group_diff_param : float
        0 for one field for all groups; the larger, the less they share.
    jitter : float
        Added to the diagonal of a covariance of inducing points, relative to its mean; it grows,
        with a warning, where a factorisation fails.
    nugget : float
        Standard deviation of what each place has for itself beside the field, in log-factors.
    train_lengthscale, train_sigma, train_group_diff_param, train_nugget : bool
        Learn one value for each component, see
        :class:`~pnmf_pyro.training.hyperparameters.HyperparameterSearch`.
    cholesky_mode : {'exp', 'softplus'}
        How the diagonal of the Cholesky factor of q(u), or with `local` the standard deviations
        of q(F), stay positive, in standard training.
    diagonal_only : bool
        Independent inducing values in q(u), in standard training.
    inducing_allocation : {'proportional', 'equal', 'derived'}
        How groups share inducing points, see :func:`~pnmf_pyro.gp.inducing.inducing_points`.
    K : int
        Neighbours of a place where `local`; all others, with a warning, where there are fewer.
    precompute_knn : bool
        Find neighbours and their weights once. Otherwise at each step, for those of its batch
        alone in standard training: less memory and more time for the same result.
    neighbors : {'knn', 'probabilistic'}
        Which of the places that come before it in the ordering a place is conditioned on: the
        nearest, or some drawn by the covariance, see :func:`~pnmf_pyro.gp.neighbors.build_graph`.
    scale_ll_D : bool
        Scale the likelihood of a batch of features to that of all features.
    scale_kl_NM : bool
        Scale the divergence of a batch of samples to that of all samples.
    scale_pf : float or 'auto'
        Standard deviation of the prior of the log-factors; `auto` learns it from the data, as the
        value that maximises the ELBO.
    warm_up : bool
        Begin with `lower-bound` steps until they have settled to within 10 `tol`, for up to
        `max_iter` iterations of their own, before those of `mode`. A spatial model begins with
        factors that know no space, which settle to `tol`: they decide which components are found.
    kl_weight : float
        Factor on the divergence from the prior in all training; `elbo_` is with 1. Below 1 factors
        follow the counts of their own sample more closely, and their uncertainty is too small.
    restore_spread : bool
        When a spatial model has been trained by natural gradients with a `kl_weight` other than 1,
        give q the covariance that weight 1 says, around the means as they are. Then the loadings
        settle once more, for up to `max_iter` iterations of their own.
    shrink_loadings : bool
        Once the factors have settled, give multiplicative loadings a gamma prior that is learned
        from them, and make them its posterior means, for up to `max_iter` iterations of their own:
        see :class:`~pnmf_pyro.training.loadings.ShrunkLoadings`. New samples are predicted better where
        features have few counts, at the cost of a little of the bound.
    criterion : {'leave-one-out', 'elbo'}
        What learned hyperparameters of fields are judged by.
    group_distances : array-like of shape (n_groups, n_groups), optional
        Distances between groups in sorted order; 1 between any two unless given.
    rank : int
        Where `local`, columns of the part of q(F) that is correlated over places. They make
        uncertainties and draws those of the posterior, and are set when the fit has settled
        without them, after which it settles once more, for up to `max_iter` iterations of its own.
        0 leaves marginals independent: standard deviations are then too small.

    Attributes
    ----------
    components_ : ndarray of shape (n_components, n_features)
        Loadings W^T.
    n_components_ : int
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features,)
        Where X had names.
    elbo_ : float
        ELBO of the fit in nats, constants included: a lower bound on log p(X | W), estimated from
        at least 20 draws where `mode` needs draws.
    history_ : list of float
        ELBO at each step; those of a warm-up are of its own, lower bound, and where `local` those
        after it has settled first are with `rank` columns. With a `kl_weight`, of what is trained.
    n_iter_ : int
        Number of steps taken.
    kernel_ : str
        Name of the kernel of a spatial model, or its class if it is an object; of several, of the
        one chosen.
    groups_ : list or None
        Names of the groups of a multi-group model, in sorted order.
    model_ : PoissonFactorization
        The Pyro model and guide, fitted.

    Examples
    --------
    >>> import numpy as np
    >>> from pnmf_pyro import PNMF
    >>> X = np.random.default_rng(0).poisson(3, size=(100, 50))
    >>> model = PNMF(n_components=5, tol=0.1, random_state=42)
    >>> transformed = model.fit_transform(X)
    >>> transformed.shape, model.components_.shape
    ((100, 5), (5, 50))
    >>> model.inverse_transform(transformed).shape
    (100, 50)
    """

    def fit(
        self,
        X: Any,
        y: Any = None,
        coordinates: Any = None,
        groups: Any = None,
        return_history: bool = False,
        callback: Callback | None = None,
        callback_interval: int = 100,
        *,
        size_factors: Any = None,
    ) -> Any:
        """Fit the model to counts.

        Parameters
        ----------
        X : array-like, Tensor, DataFrame or sparse matrix of shape (n_samples, n_features)
            Counts; any finite non-negative numbers are accepted. Sparse input stays sparse.
        y : ignored
        coordinates : array-like of shape (n_samples, p), optional
            Needed by spatial models, an error otherwise; in any unit and number of dimensions.
        groups : array-like of shape (n_samples,), optional
            Needed by multi-group models, an error otherwise; numbers, strings or categories.
        return_history : bool
            Return (history, self), where history is the list of ELBO values.
        callback : callable, optional
            Called as callback(model, iteration, elbo) every `callback_interval` steps, at which
            time `components_` and the factors are those of that step.
        callback_interval : int
        size_factors : array-like of shape (n_samples,), optional
            Positive factor on all rates of a sample, such as its sequencing depth; 1 unless given.

        Returns
        -------
        self, or (list of float, self) if `return_history`

        Raises
        ------
        ValueError
            For input or parameters that cannot be used; the message says what to change.

        Warns
        -----
        ConvergenceWarning
            If `max_iter` ended the fit while the ELBO still rose, or the ELBO ceased to be finite.
        """
        check_callback(callback, callback_interval)
        self._validate_params()
        counts = self._check_counts(X, reset=True)
        s = check_size_factors(size_factors, counts.shape[0], counts)
        random = check_random_state(self.random_state)
        space = check_space(self, coordinates, groups, counts.shape[0], random)
        inits: Any = self.init if isinstance(self.init, list | tuple) else [self.init]
        if not inits:
            raise ValueError("init must name at least one start; got none.")
        starts = [start_values(counts, self.n_components, init, random, s) for init in inits]
        model = self._empty_model(counts.shape[::-1], counts.dtype, s, space).to(counts.device)
        stages = self._stages(model, counts, random)
        generator = torch_generator(random)
        self.groups_ = None if space is None or space.groups is None else space.groups.names
        self.history_ = self._start(stages[0], starts, counts, generator)

        def report(elbo: float) -> None:
            self.history_.append(elbo)
            iteration = len(self.history_)
            if callback is not None and iteration % callback_interval == 0:
                self._publish(stage.model)
                callback(self, iteration, elbo)

        for stage in stages:
            stage.prepare()
            self._train(
                stage,
                counts,
                generator,
                max_iter=self.max_iter,
                convergence=stage.convergence,
                verbose=int(self.verbose),
                on_step=report,
                warn=stage.warns,
            )
        self._publish(model)
        self.n_iter_ = len(self.history_)
        batches = Batches(counts, self.batch_size)
        self.elbo_ = evaluate_elbo(model, batches, self._final_objective(), generator)
        return (self.history_, self) if return_history else self

    def _start(
        self, stage: Stage, starts: list[Any], counts: Counts, generator: torch.Generator
    ) -> list[float]:
        """Set the model to the best of several starts; return the ELBO of the steps it took."""
        tried = []
        for start in starts:
            stage.model.assign(*start)
            if len(starts) == 1:
                return []
            steps = min(TRIAL_STEPS, self.max_iter)
            history = self._train(stage, counts, generator, max_iter=steps, warn=False).history
            tried.append((history, {k: v.clone() for k, v in stage.model.state_dict().items()}))
        history, state = max(tried, key=lambda one: one[0][-1])
        stage.model.load_state_dict(state)
        return history

    def _train(
        self, stage: Stage, counts: Counts, generator: torch.Generator, **how: Any
    ) -> TrainingResult:
        return train(
            stage.model,
            self._batches(counts, generator),
            stage.objective,
            stage.optimizers,
            generator,
            schedules=stage.schedules,
            monotone=stage.monotone,
            **how,
        )

    def fit_transform(
        self, X: Any, y: Any = None, coordinates: Any = None, groups: Any = None, **kwargs: Any
    ) -> np.ndarray:
        """Fit the model and return the factors E exp F of its samples.

        Parameters
        ----------
        X, y, coordinates, groups
            As for :meth:`fit`.
        **kwargs
            More arguments of :meth:`fit`.

        Returns
        -------
        ndarray of shape (n_samples, n_components)
        """
        self.fit(X, y, coordinates=coordinates, groups=groups, **kwargs)
        return get_factors(self)  # type: ignore[return-value]

    def transform(
        self, X: Any, coordinates: Any = None, groups: Any = None, *, size_factors: Any = None
    ) -> np.ndarray:
        """Find factors exp F of new samples, given the fit.

        Without space they maximise the Poisson likelihood given the loadings, by multiplicative
        updates; the prior plays no part. For the posterior of a new sample see
        :func:`~pnmf_pyro.transforms.transform_F`. A spatial model predicts E exp F at the
        coordinates, from the field alone: X is not looked at and may be None.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        coordinates : array-like of shape (n_samples, p), optional
            Needed by spatial models, an error otherwise.
        groups : array-like of shape (n_samples,), optional
            Needed by multi-group models, an error otherwise.
        size_factors : array-like of shape (n_samples,), optional
            For models without space.

        Returns
        -------
        ndarray of shape (n_samples, n_components)
        """
        check_is_fitted(self)
        if self.spatial:
            return self._predict(coordinates, groups, size_factors)
        refuse_places(coordinates, groups)
        counts, loadings, s = self._new_data(X, size_factors)
        factors = factors_given_loadings(counts, loadings, s, max_iter=max(self.max_iter, 200))
        return factors.cpu().numpy()

    def _predict(self, coordinates: Any, groups: Any, size_factors: Any) -> np.ndarray:
        if size_factors is not None:
            raise ValueError(
                "size_factors do not change what a spatial model predicts at new places, the "
                "factors; multiply the expected counts by them instead."
            )
        return get_factors(self, coordinates=coordinates, groups=groups)  # type: ignore

    def inverse_transform(self, transformed: Any, *, totals: Any = None) -> np.ndarray:
        """Return expected counts for factors, the product with `components_`; no size factors.

        Parameters
        ----------
        transformed : array-like of shape (n_samples, n_components)
            Factors exp F.
        totals : array-like of shape (n_samples,), optional
            Total counts of the samples, where these are known: the expected counts given them.
            Independent Poisson counts given their sum are multinomial, with the total shared out
            in proportion to the rates.

        Returns
        -------
        ndarray of shape (n_samples, n_features)
        """
        check_is_fitted(self)
        factors = check_array("transformed", transformed)
        if factors.ndim != 2 or factors.shape[1] != self.n_components_:
            raise ValueError(
                f"transformed must have shape (n_samples, {self.n_components_}); got "
                f"{factors.shape}."
            )
        rates = factors @ self.components_
        if totals is None:
            return rates
        n = check_array("totals", totals)
        if n.shape != (len(factors),) or not (n >= 0).all():
            raise ValueError(
                f"totals must be the total count of each of the {len(factors)} samples, not "
                f"negative; got shape {n.shape} and values from {n.min(initial=0):g}."
            )
        seen = rates.sum(1)
        return rates * np.divide(n, seen, out=np.zeros_like(seen), where=seen > 0)[:, None]

    def score(
        self,
        X: Any,
        y: Any = None,
        coordinates: Any = None,
        groups: Any = None,
        *,
        size_factors: Any = None,
    ) -> float:
        """Return the mean log-likelihood of samples given the fit, in nats per sample.

        Without space, the lower bound on log p(X | W) / n_samples in `lower-bound` mode, with the
        factors integrated out under the prior: it does not rise merely because there are more
        components. A spatial model predicts the factors from the coordinates, and the score is the
        lower bound on the log density of X under that prediction.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
        y : ignored
        coordinates, groups : array-like, optional
            As for :meth:`transform`.
        size_factors : array-like of shape (n_samples,), optional

        Returns
        -------
        float
        """
        check_is_fitted(self)
        counts, loadings, s = self._new_data(X, size_factors)
        if not self.spatial:
            refuse_places(coordinates, groups)
            prior: Any = self.model_.prior
            return held_out_bound(counts, loadings, s, prior.scale_pf) / counts.shape[0]
        with torch.no_grad():
            q = self.model_.prior.at(
                self.encode_places(coordinates, groups, counts.shape[0])
            ).marginal()
            predicted = PoissonFactors(q.loc, loadings, s)
            return float(predicted.expected_log_prob(counts, q, "lower-bound").mean())

    def encode_places(self, coordinates: Any, groups: Any, n_samples: int) -> Places:
        """Check new places against those of the fit, and give their groups the codes of it.

        Parameters
        ----------
        coordinates : array-like of shape (n_samples, p)
        groups : array-like of shape (n_samples,), optional
        n_samples : int

        Raises
        ------
        ValueError
            For a model that is not spatial, and for places that do not fit it.
        """
        prior: Any = self.model_.prior
        if not self.spatial:
            refuse_places(coordinates, groups)
        if self.groups_ is None and groups is not None:
            raise ValueError("groups are for models with multigroup=True; leave them out.")
        coordinates = check_coordinates(
            coordinates, n_samples, prior.place_coordinates.shape[1] if self.spatial else None
        )
        codes = None if self.groups_ is None else GroupCodes(self.groups_).encode(groups, n_samples)
        return Places(coordinates, codes)

    def save(self, path: str | os.PathLike) -> None:
        """Save the fitted model to one file, which :meth:`load` reads without running code.

        Parameters
        ----------
        path : path
            Usually ending in .npz.

        Raises
        ------
        ValueError
            If `kernel` is an object: files hold names.
        """
        check_is_fitted(self)
        _check_named(self.kernel)
        header = {
            "parameters": _plain(self.get_params(deep=False)),
            "groups": self.groups_,
            "n_samples": self.model_.N,
            "elbo": self.elbo_,
        }
        arrays = {f"model.{k}": v.cpu().numpy() for k, v in self.model_.state_dict().items()}
        arrays["history"] = np.asarray(self.history_, dtype=np.float64)
        if hasattr(self, "feature_names_in_"):
            arrays["feature_names"] = np.asarray(self.feature_names_in_, dtype=str)
        write_archive(path, header, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike) -> PNMF:
        """Open a model saved by :meth:`save`.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If the file is damaged or is not a saved model.
        """
        header, arrays = read_archive(path)
        try:
            return cls._from_archive(header, arrays)
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{path} is not a saved PNMF model, or is damaged: {error}."
            ) from error

    @classmethod
    def _from_archive(cls, header: dict[str, Any], arrays: dict[str, np.ndarray]) -> PNMF:
        self = cls(**header["parameters"])
        state = {
            name.removeprefix("model."): torch.from_numpy(array)
            for name, array in arrays.items()
            if name.startswith("model.")
        }
        shape = (len(state["W._raw"]), header["n_samples"])
        self.groups_ = header["groups"]
        space = saved_space(state, self.groups_)
        model = self._empty_model(shape, state["W._raw"].dtype, state.get("size_factors"), space)
        model.load_state_dict(state)
        self.n_features_in_ = model.D
        if "feature_names" in arrays:
            self.feature_names_in_ = arrays["feature_names"].astype(object)
        self._publish(model)
        self.history_ = arrays["history"].tolist()
        self.n_iter_ = len(self.history_)
        self.elbo_ = header["elbo"]
        return self

    @property
    def kernel_(self) -> str:
        """Name of the kernel of a spatial model, of several the one chosen."""
        prior: Any = self.model_.prior
        return prior.kernel.name

    @property
    def _n_features_out(self) -> int:
        return self.n_components_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.input_tags.positive_only = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _check_counts(self, X: Any, reset: bool) -> Counts:
        if isinstance(X, torch.Tensor):
            X = as_counts(X.detach()).numpy()
        with warnings.catch_warnings():
            if sp.issparse(X):  # which cannot hold names, to be compared with those of the fit
                warnings.filterwarnings("ignore", "X does not have valid feature names")
            X = validate_data(self, X, reset=reset, accept_sparse="csr", dtype="numeric")
        counts = check_counts(X)
        if reset:
            warn_empty(counts, getattr(self, "feature_names_in_", None))
        if reset and self.n_components > max(counts.shape):
            raise ValueError(
                f"n_components={self.n_components} is larger than both n_samples="
                f"{counts.shape[0]} and n_features={counts.shape[1]}. Use fewer components."
            )
        return counts.to(check_device(self.device))

    def _new_data(self, X: Any, size_factors: Any) -> tuple[Counts, torch.Tensor, Any]:
        counts = self._check_counts(X, reset=False)
        loadings = torch.from_numpy(self.components_.T.copy()).to(counts.values)
        return counts, loadings, check_size_factors(size_factors, counts.shape[0], counts)

    def _publish(self, model: PoissonFactorization) -> None:
        """Make a model readable as this estimator's."""
        self.model_ = model
        self.components_ = np.ascontiguousarray(model.W.numpy().T)
        self.n_components_ = self.n_components


def _check_named(kernel: Any) -> None:
    """Raise a ValueError unless a kernel, or each of several, is given by name."""
    several = kernel if isinstance(kernel, (list, tuple)) else [kernel]
    objects = [type(one).__name__ for one in several if isinstance(one, Kernel)]
    if objects:
        raise ValueError(
            f"kernel must be given by name for a model that is saved, one of {list(KERNELS)}; the "
            f"file cannot hold the object of class {objects[0]}."
        )


def _plain(parameters: dict[str, Any]) -> dict[str, Any]:
    """Turn parameters into what JSON can hold; a RandomState is only where a seed came from."""
    plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in parameters.items()}
    if plain["group_distances"] is not None:
        plain["group_distances"] = np.asarray(plain["group_distances"]).tolist()
    if not isinstance(plain["random_state"], int):
        plain["random_state"] = None
    return plain
