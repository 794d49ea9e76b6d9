"""The learning rate against epochs and size: the best so far, and the two to try next.

arXiv 2310.16764, section 2 and Figure 3: rates lie on a grid of factor 2; the best is about 1.6,
for a batch of 4096, for every model at few epochs, and falls with epochs, slowly for small models
and faster for large ones. Assuming that it never rises, two trials are enough at each number of
epochs: the best rate at the previous number, and half of it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linprog

from nfnets_xla.scaling.account import above
from nfnets_xla.scaling.published import BATCH, PEAK_LR
from nfnets_xla.scaling.runs import Point, mean_loss, runs_of_cells

HOPELESS = 1e3  # losses are capped at this multiple of the worst cell's best loss


@dataclass(frozen=True)
class Cell:
    """One model at one number of epochs: the mean held-out loss of each rate that was tried,
    infinite where a run diverged."""

    model: str
    macs: float
    epochs: float
    losses: dict[float, float]

    @property
    def ended(self) -> bool:
        """Whether no seed diverged at some rate; else there is no rate to choose."""
        return math.isfinite(self.losses[self.best])

    @property
    def best(self) -> float:
        return min(self.losses, key=lambda rate: self.losses[rate])

    @property
    def bracketed(self) -> bool:
        """Whether lower and higher rates than the best were tried."""
        return min(self.losses) < self.best < max(self.losses)

    def before(self, other: "Cell") -> bool:
        """Whether `other`, no smaller, no shorter and not the same, may not have a higher rate."""
        return self.bounds(other) and (self.macs, self.epochs) != (other.macs, other.epochs)

    def bounds(self, other: "Cell") -> bool:
        """Whether `other` is no smaller and no shorter; every cell bounds itself."""
        return self.macs <= other.macs and self.epochs <= other.epochs

    def __str__(self) -> str:
        return f"{self.model} at {self.epochs:g} epochs"

    def tried(self) -> str:
        """`0.1 (3.41), 0.2 (diverged)`."""
        said = {
            rate: f"{loss:.4f}" if math.isfinite(loss) else "diverged"
            for rate, loss in self.losses.items()
        }
        return ", ".join(f"{rate:g} ({loss})" for rate, loss in said.items())


def cells_of(points: Iterable[Point]) -> list[Cell]:
    """The cells of pre-training runs of one study, by size and epochs, averaged over seeds.
    ValueError as `check_cells`."""
    cells: list[Cell] = []
    for rates in runs_of_cells(points):
        one = next(iter(rates.values()))[0]
        losses = {rate: mean_loss(runs) for rate, runs in rates.items()}
        cells.append(Cell(one.model, one.macs, one.epochs, losses))
    return sorted(cells, key=lambda cell: (cell.macs, cell.epochs))


@dataclass(frozen=True)
class Rule:
    """Rates that never rise with epochs or size, and minimise the total loss."""

    cells: list[Cell]
    rates: list[float]  # one per cell, among those tried there
    rises: list[tuple[Cell, Cell]]  # pairs whose best rate rises with epochs or size

    @property
    def excess(self) -> float:
        """The largest relative excess, over cells, of the loss at the rule's rate."""
        pairs = zip(self.cells, self.rates, strict=True)
        return max(cell.losses[rate] / cell.losses[cell.best] - 1 for cell, rate in pairs)

    def __str__(self) -> str:
        if not self.rises:
            return "the best rate never rises with epochs or size"
        return (
            f"the best rate rises in {len(self.rises)} pairs of cells; rates that never do cost "
            f"{self.excess:.2%} of the loss at most"
        )


def fit_rule(cells: Sequence[Cell]) -> Rule:
    """The rule for cells that have a best rate. ValueError if there are none, or if no choice among
    the tried rates never rises.

    Exact, by a linear program: x[c, k] = 1 if cell c has at least the k-th rate. Costs are linear
    in x and all constraints are differences, so vertices are integral.
    """
    if not cells:
        raise ValueError("there are no cells of runs to fit learning rates to")
    rates = sorted({rate for cell in cells for rate in cell.losses})
    if len(rates) == 1:
        return Rule(list(cells), rates * len(cells), [])
    finite = [{r: loss for r, loss in c.losses.items() if math.isfinite(loss)} for c in cells]
    # A run may blow up with a finite loss, which is capped: the program is solved in floating
    # point, and with 1e13 beside 3 the solver finds no solution.
    hopeless = HOPELESS * max(cell.losses[cell.best] for cell in cells)
    capped = [{r: min(loss, hopeless) for r, loss in losses.items()} for losses in finite]
    dear = 10 * hopeless * len(cells)  # more than any choice costs
    costs = np.array([[losses.get(rate, dear) for rate in rates] for losses in capped])
    steps = len(rates) - 1
    lower: list[int] = []  # of each constraint x[lower] >= x[upper]
    upper: list[int] = []
    for c, cell in enumerate(cells):
        lower += [c * steps + k for k in range(steps - 1)]
        upper += [c * steps + k + 1 for k in range(steps - 1)]
        for d, other in enumerate(cells):
            if cell.before(other):
                lower += [c * steps + k for k in range(steps)]
                upper += [d * steps + k for k in range(steps)]
    objective = np.diff(costs, axis=1).ravel()
    constraints = np.zeros((len(lower), len(objective)))
    constraints[np.arange(len(lower)), lower] = -1
    constraints[np.arange(len(lower)), upper] = 1
    found = linprog(objective, constraints, np.zeros(len(lower)), bounds=(0, 1))
    assert found.x is not None  # never infeasible: all zeros are allowed
    chosen = found.x.reshape(len(cells), steps).round().sum(axis=1).astype(int)
    picked: list[float] = [rates[index] for index in chosen]
    for cell, rate, losses in zip(cells, picked, finite, strict=True):
        if rate not in losses:
            where = f"{rate:g} for {cell}"
            advice = f"{where} diverged" if rate in cell.losses else f"try {where}"
            raise ValueError(
                "with the rates that were tried, the rate must rise with epochs or size somewhere: "
                + advice
            )
    rises = [(a, b) for a in cells for b in cells if a.before(b) and b.best > a.best]
    return Rule(list(cells), picked, rises)


@dataclass(frozen=True)
class Trials:
    """The two learning rates to try, and why."""

    rates: tuple[float, float]
    because: str


def two_trials(
    macs: float,
    epochs: float,
    *,
    batch_size: int = BATCH,
    cells: Sequence[Cell] = (),
    downwards: bool = False,
) -> Trials:
    """The trials for one run: the lowest best rate among runs no larger and no longer, and half of
    it.

    If best rates rise from run to run, those of `fit_rule` are used instead, if it has a solution.
    If there is no such run, but `downwards`: the highest best rate among runs no smaller and no
    shorter, below which this run's should not be, and twice that. Without any run: the paper's 1.6,
    in proportion to the batch (arXiv 2102.06171, A.1), and half of it. If a run no larger and no
    longer diverged at all its rates, the first is at most half the lowest of these.
    """
    above("macs", macs)
    above("epochs", epochs)
    run = Cell("", macs, epochs, {})
    ended = [cell for cell in cells if cell.ended]
    found = by_the_best(run, ended, batch_size=batch_size, downwards=downwards)
    if lost := [cell for cell in cells if cell.bounds(run) and not cell.ended]:
        cell = min(lost, key=lambda cell: min(cell.losses))
        too_high = min(cell.losses)
        if max(found.rates) > too_high * (1 - 1e-9):
            also = f"{too_high:g} diverged for {cell}, like all that was tried there"
            return Trials((too_high / 2, too_high / 4), also)
    return found


def by_the_best(run: Cell, cells: Sequence[Cell], *, batch_size: int, downwards: bool) -> Trials:
    """Trials by the best rates of other runs, in `cells`; or by the paper's."""
    if known := [cell for cell in cells if cell.bounds(run)]:
        rate, because = min(ruled(known), key=lambda pair: pair[0])
        return Trials((rate, rate / 2), because)
    later = [cell for cell in cells if run.before(cell)]
    if downwards and later:
        rate, because = max(ruled(later), key=lambda pair: pair[0])
        return Trials((2 * rate, rate), f"{because}; a smaller or shorter run's may be higher")
    rate = PEAK_LR * batch_size / BATCH
    because = "best at few epochs in the paper"
    if not math.isclose(rate, PEAK_LR):
        because = f"{PEAK_LR:g} for a batch of {BATCH} in the paper, in proportion to the batch"
    if run.epochs >= 2:
        because += "; falls with epochs, the paper does not print how far: first try fewer"
    return Trials((rate, rate / 2), because)


def ruled(cells: Sequence[Cell]) -> list[tuple[float, str]]:
    """(rate, why) of each cell: by `fit_rule` if it has a solution, else the best."""
    try:
        rates = fit_rule(cells).rates
    except ValueError:
        rates = [cell.best for cell in cells]
    found: list[tuple[float, str]] = []
    for rate, cell in zip(rates, cells, strict=True):
        where = f"for {cell}"
        was_best = f"{rate:g} was {'best' if len(cell.losses) > 1 else 'the only rate'} {where}"
        instead = f"{rate:g} {where}, whose best is {cell.best:g}, of rates that never rise"
        found.append((rate, was_best if rate == cell.best else instead))
    return found
