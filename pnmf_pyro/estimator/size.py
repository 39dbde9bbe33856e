"""How large a fit is: what its work and its memory grow with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pnmf_pyro.data.blocks import BLOCK_ENTRIES
from pnmf_pyro.data.memory import available_memory
from pnmf_pyro.data.places import Places
from pnmf_pyro.estimator.parameters import Settings, learned
from pnmf_pyro.models.points import FIXED
from pnmf_pyro.priors import LCGP, SVGP
from pnmf_pyro.priors.lcgp import draws_at_once
from pnmf_pyro.training.hyperparameters import JUDGED

# Work at an entry of the factors, at a neighbour of a place in a component, and at a pair of sample
# and inducing point in a component, relative to that at a stored count.
AT_FACTOR, AT_NEIGHBOUR, AT_INDUCING = 5.0, 2.5, 0.5

# Bytes that a fit takes at its peak: what is loaded when first used, and all arrays for each entry
# of a kind, see `Size.memory`. Measured, see docs/performance.md.
LOADED = 70e6
BYTES = {
    "count": 26,
    "block of counts": 60,
    "factor": 110,
    "draw": 18,
    "inducing": 28,
    "inducing pair": 28,
}
NEIGHBOUR_BYTES, JUDGED_BYTES, DRAWN_BYTES, COLUMN_BYTES = 30, 32_000, 24, 4

# Columns of the correlated part of q(F) over places that have neighbours.
RANK = 30

# Neighbours that are enough for most fields, and inducing points of which no fewer are advised.
FEWER_NEIGHBOURS, FEWEST_INDUCING = 16, 100


@dataclass(frozen=True)
class Size:
    """Numbers that the work and the memory of a fit grow with.

    Attributes
    ----------
    samples, features, stored, components : int
        Rows and columns of X, its stored counts, and the number of components.
    prior : str
        Name of the class of the prior.
    inducing, neighbours : int
        Inducing points, and neighbours of a place; 0 for a prior that has none.
    sets : int
        Sets of hyperparameters of the kernel: one for all components, or one for each.
    draws : int
        Draws of q(F) at each step, or points in their place.
    """

    samples: int
    features: int
    stored: int
    components: int
    prior: str = "GaussianPrior"
    inducing: int = 0
    neighbours: int = 0
    sets: int = 1
    draws: int = 0

    @classmethod
    def of(
        cls, settings: Settings, shape: tuple[int, int], stored: int, places: Places | None = None
    ) -> Size:
        """Return the size of a fit; where places are given, inducing points are distinct ones."""
        (N, D), L, prior = shape, int(settings.n_components), settings.prior
        size = cls(N, D, stored, L, draws=_draws(settings))
        if prior is not None:
            prior = (*prior.fields, prior)[0]
            size = replace(size, prior=type(prior).__name__)
        elif settings.spatial:
            size = replace(size, prior="LCGP" if settings.local else "SVGP")
        sets = L if learned(settings) else 1
        if size.prior == "LCGP":
            K = prior.neighborhoods.K if isinstance(prior, LCGP) else int(settings.K)
            return replace(size, neighbours=min(K, N - 1), sets=sets)
        if size.prior == "SVGP":
            M = prior.M if isinstance(prior, SVGP) else int(settings.num_inducing)
            distinct = N if places is None else len(places.distinct())
            return replace(size, inducing=min(M, distinct), sets=sets)
        return size

    @property
    def plain(self) -> Size:
        """The same with a prior that knows no space."""
        return replace(self, prior="GaussianPrior", inducing=0, neighbours=0, sets=1)

    @property
    def work(self) -> float:
        """Work of a step, in units of that at one stored count."""
        N, L = self.samples, self.components
        of_prior = AT_NEIGHBOUR * self.neighbours + AT_INDUCING * self.inducing
        return self.stored + AT_FACTOR * (N + self.features) * L + of_prior * N * L

    @property
    def judged(self) -> int:
        """Factors of the samples by which a search of hyperparameters is judged."""
        return min(self.samples, JUDGED) * self.components

    @property
    def memory(self) -> float:
        """Bytes that a fit takes at its peak, beside those that the process held before."""
        N, M, L = self.samples, self.inducing, self.components
        entries = {
            "count": self.stored,
            "block of counts": min(self.stored, BLOCK_ENTRIES),
            "factor": (N + self.features) * L,
            "draw": self.draws * N * L,
            "inducing": L * N * M,
            "inducing pair": L * M * M,
        }
        arrays = sum(BYTES[kind] * number for kind, number in entries.items())
        # A search of hyperparameters; after it weights of neighbours, and draws with them.
        searched = JUDGED_BYTES * self.judged * (self.prior in ("LCGP", "SVGP"))
        of_draws = DRAWN_BYTES * min(RANK, draws_at_once(N * L)) + COLUMN_BYTES * RANK
        drawn = of_draws * N * L * (self.prior == "LCGP")
        weighted = NEIGHBOUR_BYTES * self.sets * N * self.neighbours
        return LOADED + arrays + max(searched, weighted + drawn)

    def smaller(self) -> list[tuple[str, Size]]:
        """Return ways to make a fit smaller, in words, and the sizes that they lead to."""
        ways = []
        if self.neighbours > FEWER_NEIGHBOURS:
            ways.append((f"K={FEWER_NEIGHBOURS}", replace(self, neighbours=FEWER_NEIGHBOURS)))
        if (M := self.inducing // 2) >= FEWEST_INDUCING:
            ways.append((f"num_inducing={M}", replace(self, inducing=M)))
        if (L := self.components // 2) > 1:
            sets, draws = max(1, self.sets // 2), self.draws // 2
            fewer = replace(self, components=L, sets=sets, draws=draws)
            ways.append((f"n_components={L}", fewer))
        if (D := self.features // 2) > 1:
            fewer = replace(self, features=D, stored=self.stored // 2)
            ways.append(("half of the features", fewer))
        return ways


def _draws(settings: Settings) -> int:
    """Draws at each step, of which fixed points take the next power of two above L."""
    if settings.mode == "lower-bound":
        return 0
    return 1 << int(settings.n_components).bit_length() if settings.E == FIXED else int(settings.E)


def check_memory(size: Size) -> None:
    """Raise a ValueError for a fit that takes more memory than there is."""
    available = available_memory()
    if size.memory <= available:
        return
    smaller = [f"{change} takes {gigabytes(one.memory)}" for change, one in size.smaller()]
    raise ValueError(
        f"X of {size.samples:,} samples x {size.features:,} features, {size.stored:,} stored "
        f"counts, with n_components={size.components} takes about {gigabytes(size.memory)} of "
        f"memory to fit, and {gigabytes(available)} are available. A smaller fit: "
        f"{', '.join([*smaller, 'or fewer samples'])}. Or use a machine with more memory."
    )


def gigabytes(size: float) -> str:
    """Return a number of bytes in words."""
    return f"{size / 1e9:,.{1 if size < 100e9 else 0}f} GB"
