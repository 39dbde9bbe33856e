"""What a statistic that a model misses means, and which argument of a fit would mend it."""

from __future__ import annotations

from dataclasses import dataclass

from pnmf_pyro.models.factorization import PoissonFactorization
from pnmf_pyro.models.negative_binomial import NegativeBinomial


@dataclass(frozen=True)
class FitFacts:
    """What a fit has, so that no argument is advised that it was given.

    Attributes
    ----------
    likelihood : {'poisson', 'negative-binomial', 'own'}
        Distribution of the counts.
    n_components : int
        Number of components.
    sized, spatial, batched : bool
        Whether it has size factors, places, and effects of batches or covariates.
    """

    likelihood: str
    n_components: int
    sized: bool
    spatial: bool
    batched: bool

    @classmethod
    def of(cls, module: PoissonFactorization) -> FitFacts:
        """Return those of a trained model."""
        part, named = module.observation, "own"
        if isinstance(part, NegativeBinomial):
            named = "negative-binomial"
        elif part is None and type(module).likelihood is PoissonFactorization.likelihood:
            named = "poisson"
        return cls(
            named,
            module.L,
            module.size_factors is not None,
            module.prior.places is not None,
            module.exposure.design is not None,
        )

    @property
    def more(self) -> str:
        """Advice of more components."""
        return f"try more components, n_components above {self.n_components}"

    @property
    def fewer(self) -> str:
        """Advice of fewer components."""
        if self.n_components == 1:
            return "there is one component, and no fewer"
        return f"try fewer components, n_components below {self.n_components}"

    @property
    def varied(self) -> str:
        """Advice where counts vary more than the likelihood lets them."""
        if self.likelihood == "poisson":
            return 'fit with likelihood="negative-binomial"'
        return self.more

    @property
    def steadier(self) -> str:
        """Advice where counts vary less than the model says."""
        if self.likelihood == "negative-binomial":
            return f'fit with likelihood="poisson", or {self.fewer}'
        return self.fewer


def meanings(name: str, of: str, fit: FitFacts) -> tuple[str, str, str]:
    """Return what it means that a named statistic is higher, lower, or both, in the data.

    Parameters
    ----------
    name, of : str
        Statistic, and what it has a number for.
    fit : FitFacts
        What the fit has.

    Returns
    -------
    above, below, mixed : str
        A meaning and an advice for each.
    """
    follow = f"the model does not follow it from one {of} to another: "
    if name == "total":
        if of == "sample" and not fit.sized:
            advice = 'fit with size_factors="total"'
        elif of == "sample":
            advice = fit.more
        else:
            advice = "the fit may not have settled, raise max_iter"
        return (
            f"the model expects too few counts: {advice}",
            f"the model expects too many counts: {advice}",
            follow + advice,
        )
    if name == "moran":
        space = fit.more if fit.spatial else "pass coords= to fit"
        noise = fit.varied if fit.likelihood == "poisson" else "learn a shorter lengthscale"
        return (
            f"neighbouring samples are more alike than the model makes them: {space}",
            "neighbouring samples are less alike than the model makes them, as noise beyond its "
            f"likelihood or a lengthscale that is too long leave them: {noise}",
            follow + space,
        )
    if name == "correlation":
        noise = fit.varied if fit.likelihood == "poisson" else fit.fewer
        beside = "" if fit.batched else ", or pass batches= where samples were made in batches"
        return (
            f"features go together more than the components explain: {fit.more}{beside}",
            "features go together less than the model says, as noise beyond its likelihood makes "
            f"them: {noise}",
            follow + fit.more,
        )
    above, below = _DISPERSED[name]
    return f"{above}: {fit.varied}", f"{below}: {fit.steadier}", follow + fit.more


# What says how much counts vary: higher, and lower.
_DISPERSED = {
    "variance_to_mean": (
        "counts vary more than the likelihood allows (overdispersion)",
        "counts vary less than the model says, which may have fitted noise",
    ),
    "zero_fraction": (
        "there are more zeros than the model makes, as overdispersion or dropout leaves",
        "there are fewer zeros than the model makes",
    ),
    "maximum": (
        "the largest counts are beyond the model's: outliers, or overdispersion",
        "the model makes larger counts than there are, its factors may vary too much",
    ),
}
