"""Three ways to divide compute between size and epochs, on losses with a known optimal division."""

from pathlib import Path

import numpy as np
import pytest

from nfnets_xla.scaling import allocation, published
from nfnets_xla.scaling.account import macs_per_image
from nfnets_xla.scaling.allocation import Parametric
from nfnets_xla.scaling.plan import best_of_study
from nfnets_xla.scaling.runs import fitted_to, read_points

STUDY = Path(__file__).parents[2] / "benchmarks" / "results" / "scaling_study"

# arXiv 2203.15556, equation 10: published for language models, with parameters in place of M.
HOFFMANN = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
# Balanced: size and rows grow at the same rate.
EVEN = {"E": 1.2, "A": 3e3, "B": 8e3, "alpha": 0.4, "beta": 0.4}


def law(values: dict[str, float]) -> Parametric:
    spans = dict.fromkeys(values, (0.0, 0.0))
    return Parametric(values, spans, (0.4, 0.6), {}, 1.0, 0)


def grid(values: dict[str, float], noise: float = 0.0) -> tuple[np.ndarray, ...]:
    """7 sizes by 8 amounts of data, with fixed relative noise."""
    macs, rows = (
        axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e10, 7), np.geomspace(1e7, 1e11, 8))
    )
    errors = np.exp(noise * np.random.default_rng(3).standard_normal(len(macs)))
    return macs, rows, law(values).loss(macs, rows) * errors


@pytest.mark.parametrize("values", [HOFFMANN, EVEN])
def test_planted_parameters_are_recovered(values: dict[str, float]) -> None:
    """Within one percent from exact losses; inside their intervals with noise of 0.2 %."""
    exact = allocation.parametric(*grid(values), draws=5)
    assert exact.values == pytest.approx(values, rel=0.01)
    found = allocation.parametric(*grid(values, 0.002))
    for name, value in values.items():
        low, high = found.intervals[name]
        assert low < value < high
    low, high = found.share
    assert low < values["beta"] / (values["alpha"] + values["beta"]) < high
    assert high - low < 0.05


def test_one_run_gone_wrong_hardly_counts() -> None:
    """With Huber's loss, one of 56 losses 20 % too high moves E by less than half a percent."""
    macs, rows, loss = grid(EVEN)
    loss[30] *= 1.2
    found = allocation.parametric(macs, rows, loss, draws=5)
    assert found.values["E"] == pytest.approx(EVEN["E"], rel=0.005)


@pytest.mark.parametrize("values", [HOFFMANN, EVEN])
def test_the_optimum_is_that_of_a_search(values: dict[str, float]) -> None:
    """The best of 20,001 sizes at one budget is the formula's, within the search's step."""
    fitted = law(values)
    found = fitted.allocation()
    for budget in (1e18, 1e21):
        sizes = np.geomspace(1e5, 1e13, 20_001)
        losses = fitted.loss(sizes, budget / 6 / sizes)
        assert found.size(budget) == pytest.approx(sizes[losses.argmin()], rel=0.001)
        assert 6 * found.size(budget) * found.rows(budget) == pytest.approx(budget)


def test_the_published_exponents() -> None:
    """Hoffmann et al. print size ~ C^0.46, from constants that they round; the paper finds 1/2."""
    assert law(HOFFMANN).allocation().exponent == pytest.approx(0.46, abs=0.01)
    assert law(EVEN).allocation().exponent == 0.5


@pytest.mark.parametrize(("values", "expected"), [(HOFFMANN, 0.28 / 0.62), (EVEN, 0.5)])
def test_iso_flop_parabolas_find_the_exponent(values: dict[str, float], expected: float) -> None:
    """20 sizes at five budgets. A parabola is not the law itself, so within 0.02."""
    fitted, budgets = law(values), np.geomspace(1e17, 1e19, 5)
    sizes = np.geomspace(3e6, 1e10, 20)
    macs, flops = (axis.ravel() for axis in np.meshgrid(sizes, budgets))
    optimum = fitted.allocation()
    best = np.array([optimum.size(budget) for budget in flops])
    near = (macs > best / 6) & (macs < best * 6)  # as a study would choose them
    macs, rows = macs[near], flops[near] / 6 / macs[near]
    found = allocation.isoflop(macs, rows, fitted.loss(macs, rows), budgets=budgets.tolist())
    assert found.exponent == pytest.approx(expected, abs=0.02)
    assert len(found.budgets) == 5
    assert [found.size(budget) for budget in budgets] == pytest.approx(found.sizes, rel=0.15)
    assert found.sizes == pytest.approx([optimum.size(budget) for budget in budgets], rel=0.15)


def test_iso_flop_reads_between_the_runs_of_a_size() -> None:
    """The budgets are the method's own, and only by chance was a run at one of them."""
    found = allocation.isoflop(*grid(EVEN))
    assert found.exponent == pytest.approx(0.5, abs=0.08)
    assert found.interval[0] < 0.5 < found.interval[1]
    assert len(found.budgets) + len(found.notes) == 8
    assert not [note for note in found.notes if "only" in note]
    assert found.same_rate().endswith("of the line alone, and too narrow: no verdict")


def test_iso_flop_takes_equal_runs_at_their_mean() -> None:
    """In any order: seeds of one size and length."""
    macs, rows, loss = grid(EVEN)
    twice = [np.concatenate([axis, axis]) for axis in (macs, rows)]
    losses = [np.concatenate([loss * up, loss / up]) for up in (1.03, 1 / 1.03)]
    one, other = (allocation.isoflop(twice[0], twice[1], both) for both in losses)
    assert one.sizes == pytest.approx(other.sizes) == allocation.isoflop(macs, rows, loss).sizes


def test_iso_flop_reads_no_more_budgets_than_were_run() -> None:
    """Each size is twice the one before, trained half as long: all at the same four budgets."""
    macs, budgets = (
        axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e17, 1e18, 4))
    )
    fitted = law(EVEN)
    more = (np.array([1e7] * 9), np.geomspace(1e11, 1e12, 9))
    macs = np.concatenate([macs, more[0]])
    rows = np.concatenate([budgets / 6 / macs[:20], more[1]])
    found = allocation.isoflop(macs, rows, fitted.loss(macs, rows))
    assert len(found.budgets) + len(found.notes) == 4


def test_iso_flop_needs_three_budgets() -> None:
    macs = np.array([1e7, 1e7, 1e8, 1e8, 1e9, 1e9])
    rows = np.array([1e10, 1e11, 1e10, 1e9, 1e9, 1e10])  # only 6e18 FLOPs are shared by the sizes
    with pytest.raises(ValueError, match="1 distinct point; an isoFLOP line over budgets that"):
        allocation.isoflop(macs, rows, np.full(6, 2.0))
    with pytest.raises(ValueError, match="1 distinct point; an isoFLOP line over budgets needs"):
        allocation.isoflop(*grid(EVEN), budgets=[1e17] * 3)


def test_a_hump_has_no_best_size() -> None:
    macs, rows = (
        axis.ravel() for axis in np.meshgrid(np.geomspace(1e7, 1e9, 5), np.geomspace(1e9, 1e12, 6))
    )
    loss = 3 - 0.1 * np.log10(macs / 1e8) ** 2 - 0.01 * np.log10(rows)
    with pytest.raises(ValueError, match="at 0 budgets"):
        allocation.isoflop(macs, rows, loss)


def test_the_frontier_is_a_line_in_size_and_compute() -> None:
    """Not in rows and compute; and a run that a cheaper one beats is not on it."""
    flops = np.geomspace(1e16, 1e20, 5)
    macs = 2 * flops**0.25
    rows = flops / 6 / macs
    found = allocation.frontier_sizes([*macs, 1e9], [*rows, 1e12], [5, 4, 3, 2, 1.5, 9])
    assert found.exponent == pytest.approx(0.25)
    assert found.size(1e18) == pytest.approx(2 * 1e18**0.25)
    with pytest.raises(ValueError, match="1 distinct point; a line through the frontier needs"):
        allocation.frontier_sizes([1, 2, 4], [1, 2, 4], [1, 2, 3])


def test_the_falls_are_shares_of_the_loss_at_the_middle() -> None:
    exact = allocation.parametric(*grid(EVEN), draws=5)
    middle = float(law(EVEN).loss(10**8.5, 1e9))
    share = EVEN["A"] * (1e7**-0.4 - 1e10**-0.4) / middle
    assert exact.falls["size"] == pytest.approx((share, share), rel=0.01)


def test_the_frontier_grows_with_the_planted_rate() -> None:
    """Roughly, since its sizes are the grid's: the interval must contain the truth."""
    found = allocation.frontier_sizes(*grid(EVEN))
    assert found.interval[0] < 0.5 < found.interval[1]
    assert found.resolved


def test_a_frontier_gives_no_verdict() -> None:
    """On the paper's own grid it rejects a planted 1/2, given exact losses: the optimum runs
    through F3 at one epoch. L(M, D) does not reject it."""
    macs, epochs = (
        axis.ravel()
        for axis in np.meshgrid(
            [float(macs_per_image(name, 224)) for name in published.PAPER_MODELS],
            published.PAPER_EPOCHS,
        )
    )
    rows, f3 = epochs * published.JFT_IMAGES, macs_per_image("nfnet_f3", 224)
    loss = 1 + 0.5 * (macs / f3) ** -0.3 + 0.5 * epochs**-0.3
    found = allocation.frontier_sizes(macs, rows, loss)
    assert found.interval[1] < 0.5
    assert found.same_rate().endswith("to the dearest, whatever the exponent: no verdict")
    judged = allocation.parametric(macs, rows, loss, draws=20).allocation()
    assert judged.same_rate().startswith("the same rate is within the interval")


def test_a_frontier_of_one_length_settles_nothing() -> None:
    """Its sizes grow with compute, whatever the truth is."""
    with pytest.raises(ValueError, match="1 distinct point; a line through the frontier over da"):
        allocation.frontier_sizes([1, 2, 4, 8], [5, 5, 5, 5], [4, 3, 2, 1])


def test_what_is_said_about_the_rate() -> None:
    def said(exponent: float, low: float, high: float) -> str:
        return allocation.Allocation("", 1, exponent, (low, high), [], [], []).same_rate()

    assert said(0.5, 0.4, 0.6).startswith(
        "the same rate is within the interval: size ~ C^0.50 [0.40, 0.60], epochs ~ C^0.50 [0.40, 0"
    )
    assert said(0.7, 0.6, 0.8).startswith("not at the same rate, size faster")
    assert said(0.3, 0.2, 0.4).startswith("not at the same rate, epochs faster")
    assert said(0.1, -0.1, 0.3).startswith("not resolved: size ~ C^0.10 [-0.10, 0.30]")
    assert said(0.5, 0.02, 0.93).startswith("not resolved: size ~ C^0.50 [0.02, 0.93]")
    assert said(0.5, 0.25, 0.75).startswith("not resolved")
    assert said(0.5, 0.26, 0.75).startswith("the same rate is within the interval")


@pytest.mark.parametrize(("dead", "name"), [("A", "size"), ("B", "data")])
def test_a_loss_that_does_not_go_with_one_of_them_settles_nothing(dead: str, name: str) -> None:
    """Whatever the interval of the exponent is."""
    found = allocation.parametric(*grid({**EVEN, dead: 0.0}, 0.002), draws=20)
    optimum = found.allocation()
    assert not optimum.resolved
    assert optimum.same_rate().startswith(
        f"not resolved: over the runs the loss falls with {name} by "
    )


def test_a_draw_leaves_a_fit_without_a_term_of_size() -> None:
    """As with the study in miniature: alpha and A are 0, and no gradient leads away. A fifth of the
    draws got stuck there. Compared with a twin, in which each draw begins from all 25 starts."""
    study = best_of_study(fitted_to(read_points(STUDY)[0]))
    macs, rows, loss = np.array([(p.macs, p.rows, p.loss) for p in study], dtype=float).T
    found = allocation.parametric(macs, rows, loss, draws=20)
    assert found.values["alpha"] == 0
    log_m, log_d = (np.log(axis) - np.log(axis).mean() for axis in (macs, rows))
    rng = np.random.default_rng(0)
    falls: list[float] = []
    for _ in range(20):
        some = rng.integers(len(loss), size=len(loss))
        runs = log_m[some], log_d[some], np.log(loss[some])
        theta = allocation._best_fit(allocation._starts(*runs), *runs)
        falls.append(allocation._falls(theta, log_m, log_d)[0])
    highest = np.quantile(falls, 0.975)
    assert highest > 0.1
    assert found.falls["size"][1] == pytest.approx(highest, rel=0.1)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 distinct points; L\(M, D\) over sizes needs at least"):
        allocation.parametric([1, 2] * 4, range(1, 9), range(1, 9))
    with pytest.raises(ValueError, match="5 distinct points; L"):
        allocation.parametric([1, 2, 3, 4, 5], [5, 4, 1, 2, 3], [5, 4, 3, 2, 1])
    with pytest.raises(ValueError, match="macs, rows and loss are 2, 3, 2 values"):
        allocation.parametric([1, 2], [1, 2, 3], [1, 2])
    macs, rows, loss = grid(EVEN)
    with pytest.raises(ValueError, match="2 distinct points; an isoFLOP parabola over sizes"):
        allocation.isoflop(*(axis[macs < 4e7] for axis in (macs, rows, loss)))
    edge = (macs < 1.2e8) & (rows > 1e9)  # the largest is the best at every budget
    with pytest.raises(
        ValueError, match=r"lowest point within the sizes at \d budgets; a line nee"
    ):
        allocation.isoflop(*(axis[edge] for axis in (macs, rows, loss)))
