"""One progress bar for a whole fit: the stage, its ELBO and the time left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

# The bar counts seconds that are expected, so that its pace is the machine's.
FORM = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"

# Steps that a stage still takes at least, relative to those it has taken.
AT_LEAST = 0.2


@dataclass(frozen=True)
class StageCost:
    """What a stage is expected to take.

    Attributes
    ----------
    name : str
        Name of the stage, as in the `stages` of a history.
    steps : int
        Number of steps of the training loop, or of evaluations in a search; 0 where there are none.
    once, each : float
        Seconds of what is done once, and of each step.
    """

    name: str
    steps: int
    once: float
    each: float

    @property
    def seconds(self) -> float:
        """Seconds of the whole stage."""
        return self.once + self.steps * self.each


class Progress:
    """A progress bar over the stages of a fit; silent where no costs are given.

    Stages that take fewer steps than expected shorten what is left, and those that take more
    lengthen it.
    """

    def __init__(self, costs: Sequence[StageCost] = ()):
        self.left = list(costs)
        self.now: StageCost | None = None
        self.done, self.taken = 0.0, 0
        self.bar = tqdm(
            desc="start", total=self._after(), disable=not costs, smoothing=0, bar_format=FORM
        )

    def begin(self, name: str) -> None:
        """Go on to the next stage of a name."""
        self._end()
        names = [cost.name for cost in self.left]
        if name in names:
            place = names.index(name)
            self.now, self.left = self.left[place], self.left[place + 1 :]
        self.bar.set_description_str(name, refresh=False)
        self._show(0.0, 0.0 if self.now is None else self.now.seconds)
        self.bar.refresh()

    def telling(self, on_step: Callable[[float], None]) -> Callable[[float], None]:
        """Return a function of the ELBO of a step that takes note of it, and tells another."""

        def tell(elbo: float) -> None:
            on_step(elbo)
            self.step(elbo)

        return tell

    def step(self, elbo: float) -> None:
        """Take note of a step."""
        self.taken += 1
        self.bar.set_postfix_str(f"ELBO {elbo:.6g}", refresh=False)
        if (cost := self.now) is not None:
            more = max(cost.steps - self.taken, AT_LEAST * self.taken)
            so_far = cost.once + self.taken * cost.each
            self._show(so_far, so_far + more * cost.each)

    def close(self) -> None:
        """Take note that the fit is over."""
        self._end()
        self.left = []
        self._show(0.0, 0.0)
        self.bar.close()

    def _end(self) -> None:
        if (cost := self.now) is not None:
            self.done += cost.once + self.taken * cost.each if self.taken else cost.seconds
        self.now, self.taken = None, 0

    def _show(self, so_far: float, whole: float) -> None:
        self.bar.total = self.done + whole + self._after()
        self.bar.update(self.done + so_far - self.bar.n)

    def _after(self) -> float:
        return sum(cost.seconds for cost in self.left)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close() if error[0] is not None else self.close()
