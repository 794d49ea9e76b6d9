"""The best learning rates that never rise, against a search over all choices; the two trials."""

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from nfnets_xla.scaling.rate import Cell, cells_of, fit_rule, two_trials
from nfnets_xla.scaling.runs import read_points
from tests.scaling.made_runs import write_diverged, write_run

RATES = (0.4, 0.8, 1.6)


def planted(size: float, epochs: float, best: float, noise: float = 0.0, seed: int = 0) -> Cell:
    """Losses rise with the squared distance from `best` in powers of 2."""
    rng = np.random.default_rng([seed, int(size), int(8 * epochs)])
    losses = {
        rate: 2 + 0.05 * np.log2(rate / best) ** 2 + noise * rng.standard_normal() for rate in RATES
    }
    return Cell(f"of {size:g}", size, epochs, losses)


def searched(cells: list[Cell]) -> float:
    """The least sum of losses over every choice that never rises."""
    sums = []
    for choice in product(RATES, repeat=len(cells)):
        pairs = [
            (a, b) for a, b in product(range(len(cells)), repeat=2) if cells[a].before(cells[b])
        ]
        if all(choice[a] >= choice[b] for a, b in pairs):
            sums.append(sum(cell.losses[rate] for cell, rate in zip(cells, choice, strict=True)))
    return min(sums)


def test_a_falling_optimum_is_recovered() -> None:
    """The shape of Figure 3: 1.6 throughout for the smallest, falling for the larger ones."""
    best = {(1, 1): 1.6, (1, 4): 1.6, (2, 1): 1.6, (2, 4): 0.8, (4, 1): 0.8, (4, 4): 0.4}
    rule = fit_rule([planted(*key, rate) for key, rate in best.items()])
    assert rule.rates == list(best.values())
    assert not rule.rises
    assert rule.excess == 0
    assert str(rule) == "the best rate never rises with epochs or size"


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_is_better(seed: int) -> None:
    """The losses are mostly noise, so best rates rise here and there."""
    cells = [
        planted(size, epochs, 0.8, 0.1, seed) for size, epochs in product((1, 2, 3), (0.5, 1, 2))
    ]
    cells.pop(seed)  # a study need not be a full grid
    rule = fit_rule(cells)
    total = sum(cell.losses[rate] for cell, rate in zip(cells, rule.rates, strict=True))
    assert total == pytest.approx(searched(cells), rel=1e-9)


@pytest.mark.parametrize("exponent", [4, 9, 13, 18, 30])
def test_a_finite_loss_however_large_is_only_hopeless(exponent: int) -> None:
    """For grids that need not be full; costs of 1e13 beside 3 leave a linear program unsolved."""
    for seed in range(8):
        cells = [planted(m, e, 0.8, 0.1, seed) for m, e in product((1, 2, 3), (0.5, 1, 2))]
        cells.pop(seed)
        blown, hopeless = (
            [*cells[:3], replace(cells[3], losses={**cells[3].losses, 3.2: loss}), *cells[4:]]
            for loss in (10.0**exponent, math.inf)
        )
        assert fit_rule(blown).rates == fit_rule(hopeless).rates


def test_a_rise_is_told_with_what_it_costs() -> None:
    cells = [planted(1, 1, 0.8), planted(1, 2, 1.6)]
    rule = fit_rule(cells)
    assert [(a.epochs, b.epochs) for a, b in rule.rises] == [(1, 2)]
    assert rule.rates[0] == rule.rates[1]
    assert rule.excess == pytest.approx(0.05 / 2)
    assert str(rule).startswith(
        "the best rate rises in 1 pairs of cells; rates that never do cost 2.5"
    )


def test_a_rate_that_was_best_nowhere_is_not_said_to_be() -> None:
    """0.05 is best for the middle run, by little; rates that never rise are 0.2, 0.1, 0.1."""
    cells = [
        Cell("a", 1, 1, {0.1: 3.0, 0.2: 2.0}),
        Cell("a", 1, 2, {0.05: 1.999, 0.1: 2.0, 0.2: 3.0}),
        Cell("a", 1, 4, {0.05: 2.0, 0.1: 1.0, 0.2: 3.0}),
    ]
    assert two_trials(1, 3, cells=cells[:2]).because == "0.05 was best for a at 2 epochs"
    found = two_trials(1, 8, cells=cells)
    assert found.rates == (0.1, 0.05)
    because = "0.1 for a at 2 epochs, whose best is 0.05, of rates that never rise"
    assert found.because == because


def test_rates_that_were_never_tried_are_not_chosen() -> None:
    low, high = Cell("a", 1, 1, {0.4: 2.0}), Cell("b", 1, 2, {0.8: 2.0})
    with pytest.raises(
        ValueError, match=r"must rise with epochs or size somewhere: try 0\.4 for b"
    ):
        fit_rule([low, high])
    assert two_trials(2, 4, cells=[low, high]).rates == (0.4, 0.2)
    assert fit_rule([high, Cell("a", 1, 4, {0.4: 2.0})]).rates == [0.8, 0.4]
    with pytest.raises(ValueError, match="no cells"):
        fit_rule([])


def test_a_rate_that_diverged_bounds_the_best_and_is_never_chosen(tmp_path: Path) -> None:
    for rate in (0.8, 1.6):
        write_run(tmp_path / f"{rate}", loss=2 + 0.1 / rate, rate=rate)
    write_diverged(tmp_path / "3.2", rate=3.2)
    write_diverged(tmp_path / "longer", rate=1.6, epochs=2)  # no other rate was tried there
    cell, longer = cells_of(read_points(tmp_path)[0])
    assert (cell.ended, longer.ended) == (True, False)
    assert (cell.best, cell.bracketed) == (1.6, True)
    assert cell.tried() == "0.8 (2.1250), 1.6 (2.0625), 3.2 (diverged)"
    larger = Cell("b", 2 * cell.macs, 1, {1.6: 2.0, 3.2: 1.0})
    assert fit_rule([cell, larger]).rates == [1.6, 1.6]
    only_higher = Cell("b", 2 * cell.macs, 1, {1.6: math.inf, 3.2: 1.0})
    with pytest.raises(ValueError, match=r"somewhere: (3\.2|1\.6) for \S+ at 1 epochs diverged"):
        fit_rule([cell, only_higher])


def test_a_best_rate_at_the_edge_is_not_bracketed() -> None:
    assert planted(1, 1, 0.8).bracketed
    assert not planted(1, 1, 1.6).bracketed


def test_the_papers_two_trials() -> None:
    """1.6 if nothing is known, in proportion to the batch; then the best so far, and half of it."""
    assert two_trials(1e10, 0.25).rates == (1.6, 0.8)
    assert two_trials(1e10, 0.25, batch_size=1024).rates == (0.4, 0.2)
    assert two_trials(1e10, 1).because == "best at few epochs in the paper"
    assert "falls with epochs" in two_trials(1e10, 8).because
    cells = [planted(1, 1, 1.6), planted(2, 2, 0.8), planted(8, 1, 0.4)]
    assert two_trials(4, 4, cells=cells).rates == (0.8, 0.4)
    assert two_trials(4, 1, cells=cells).rates == (1.6, 0.8)  # the shorter runs of smaller models
    assert two_trials(8, 1, cells=cells).rates == (0.4, 0.2)  # itself
    assert "0.8 was best for of 2 at 2 epochs" in two_trials(4, 4, cells=cells).because
    with pytest.raises(ValueError, match="epochs is 0"):
        two_trials(1, 0)


def test_rates_that_all_diverged_are_not_tried_again_in_a_longer_run() -> None:
    best = planted(1, 0.25, 1.6)
    lost = Cell("of 1", 1, 0.5, {1.6: math.inf, 0.8: math.inf})
    found = two_trials(1, 1, cells=[best, lost])
    assert found.rates == (0.4, 0.2)
    assert found.because == "0.8 diverged for of 1 at 0.5 epochs, like all that was tried there"
    assert two_trials(1, 0.25, cells=[best, lost]).rates == (1.6, 0.8)  # it bounds no shorter run
    assert two_trials(1, 2, cells=[lost]).rates == (0.4, 0.2)  # not the paper's rates
    lower = Cell("of 1", 1, 1, {0.2: 2.0})
    assert two_trials(1, 2, cells=[best, lost, lower]).rates == (0.2, 0.1)


def test_two_trials_walk_down_a_falling_optimum() -> None:
    """From 0.25 to 8 epochs, doubling each time: the two trials include the best rate at each
    budget."""
    tried: list[Cell] = []
    truth = {0.25: 1.6, 0.5: 1.6, 1.0: 0.8, 2.0: 0.8, 4.0: 0.4, 8.0: 0.4}
    for epochs, best in truth.items():
        trials = two_trials(1.0, epochs, cells=tried).rates
        assert best in trials
        losses = {rate: 2 + 0.05 * np.log2(rate / best) ** 2 for rate in trials}
        tried.append(Cell("one", 1.0, epochs, losses))
