"""Laws recover what was planted, agree with scipy's own fits, and their intervals are valid."""

import warnings
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import curve_fit

from nfnets_xla.scaling import law

COMPUTE = np.geomspace(1e15, 1e19, 9)
PLANTED = {
    "power": {"a": 120.0, "b": 0.11},
    "floor": {"a": 3e4, "b": 0.31, "c": 1.4},
    "saturating": {"a": 2e6, "b": 0.42, "c": 0.09, "d": 4e15},
}


def planted(form: str, x: np.ndarray) -> np.ndarray:
    """The formulas, as their papers print them."""
    p = PLANTED[form]
    return p["a"] * (x + p.get("d", 0)) ** -p["b"] + p.get("c", 0)


@pytest.mark.parametrize("form", law.FORMS)
def test_planted_parameters_are_recovered(form: str) -> None:
    """Exactly from exact data; inside narrow intervals with half a percent of noise."""
    y = planted(form, COMPUTE)
    exact = law.fit(form, COMPUTE, y, draws=20)
    assert exact.values == pytest.approx(PLANTED[form], rel=1e-3)
    assert exact.r2 == pytest.approx(1, abs=1e-9)
    noise = np.exp(0.005 * np.random.default_rng(2).standard_normal(len(y)))
    found = law.fit(form, COMPUTE, y * noise)
    for name, value in PLANTED[form].items():
        low, high = found.intervals[name]
        assert low < value < high
    low, high = found.intervals["b"]
    assert found.resolved("b")
    assert high / low < {"power": 1.2, "floor": 1.6, "saturating": 2.5}[form]


def test_a_power_law_is_scipys_regression_with_its_interval() -> None:
    """linregress on logarithms, and Student's interval of its slope, to a tenth of its width."""
    noise = np.exp(0.02 * np.random.default_rng(0).standard_normal(len(COMPUTE)))
    y = planted("power", COMPUTE) * noise
    found = law.fit("power", COMPUTE, y, draws=4000)
    twin: Any = stats.linregress(np.log(COMPUTE), np.log(y))
    assert found.values["b"] == pytest.approx(-twin.slope, rel=1e-9)
    assert found.values["a"] == pytest.approx(np.exp(twin.intercept), rel=1e-6)
    assert found.r2 == pytest.approx(twin.rvalue**2, rel=1e-9)
    half = stats.t.ppf(0.975, len(y) - 2) * twin.stderr
    expected = (-twin.slope - half, -twin.slope + half)
    assert found.intervals["b"] == pytest.approx(expected, abs=0.1 * 2 * half)


def test_a_floor_is_scipys_curve_fit() -> None:
    """scipy starts from the planted values, which ours does not know."""
    noise = np.exp(0.01 * np.random.default_rng(1).standard_normal(len(COMPUTE)))
    y = planted("floor", COMPUTE) * noise
    found = law.fit("floor", COMPUTE, y, draws=20).values
    start = PLANTED["floor"]
    twin, _ = curve_fit(
        lambda log_x, log_a, b, c: np.log(np.exp(log_a - b * log_x) + c),
        np.log(COMPUTE),
        np.log(y),
        p0=(np.log(start["a"]), start["b"], start["c"]),
    )
    assert (found["b"], found["c"]) == pytest.approx(twin[1:], rel=1e-4)


@pytest.mark.parametrize("points", [4, 8])
def test_intervals_hold_the_truth_as_often_as_they_say(points: int) -> None:
    """95 %, within 3 standard deviations over 300 tries, with as few as 4 points."""
    x = np.geomspace(1e15, 1e18, points)
    rng = np.random.default_rng(7)
    inside = inside_next = 0
    for trial in range(300):
        y = planted("power", x) * np.exp(0.02 * rng.standard_normal(points))
        found = law.fit("power", x, y, draws=300, seed=trial)
        low, high = found.intervals["b"]
        inside += low < PLANTED["power"]["b"] < high
        low, high = found.predict(3e18).interval
        truth = planted("power", np.array([3e18]))[0] * np.exp(0.02 * rng.standard_normal())
        inside_next += low < truth < high
    assert inside / 300 == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / 300))
    assert inside_next / 300 == pytest.approx(0.95, abs=3 * np.sqrt(0.95 * 0.05 / 300))


def test_noise_without_a_slope_is_not_resolved() -> None:
    y = 2 * np.exp(0.05 * np.random.default_rng(4).standard_normal(len(COMPUTE)))
    found = law.fit("power", COMPUTE, y)
    assert not found.resolved("b")
    assert found.says("b").startswith("b not resolved [-0.0")
    steep = law.fit("power", COMPUTE, planted("power", COMPUTE))
    assert steep.says("b") == "b = 0.11 [0.11, 0.11]"


def test_a_floor_that_is_not_there_is_not_resolved() -> None:
    """Fitted to a logarithm, the floor is small, with an interval of positive numbers."""
    bare = law.fit("floor", COMPUTE, planted("power", COMPUTE))
    assert bare.says("c").startswith("c not resolved [")
    assert law.fit("floor", COMPUTE, planted("floor", COMPUTE)).says("c") == "c = 1.4 [1.4, 1.4]"


def test_a_prediction_warns_beyond_a_decade() -> None:
    found = law.fit("floor", COMPUTE, planted("floor", COMPUTE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        near = found.predict(9e19)
    assert near.value == pytest.approx(planted("floor", np.array([9e19]))[0], rel=1e-4)
    assert near.decades_beyond == pytest.approx(np.log10(9))
    with pytest.warns(law.Extrapolation, match="1e\\+21 lies 2.0 decades beyond the fitted runs"):
        far = found.predict(1e21)
    assert far.decades_beyond == pytest.approx(2)


def noisy_power(seed: int, draws: int) -> tuple[np.ndarray, law.Law]:
    noise = np.exp(0.02 * np.random.default_rng(seed).standard_normal(len(COMPUTE)))
    y = planted("power", COMPUTE) * noise
    return y, law.fit("power", COMPUTE, y, draws=draws)


def test_the_curve_and_the_next_run_have_students_intervals() -> None:
    """A regression's on logarithms, from the textbook, to a tenth of their widths; inside the runs
    and beyond."""
    y, found = noisy_power(0, 4000)
    log_x, freedom = np.log(COMPUTE), len(y) - 2
    twin: Any = stats.linregress(log_x, np.log(y))
    left = np.log(y) - twin.intercept - twin.slope * log_x
    scatter = np.sqrt((left**2).sum() / freedom)
    assert found.scatter == pytest.approx(scatter, rel=1e-9)
    for x in (1e16, 3e17, 5e19):
        log_value = twin.intercept + twin.slope * np.log(x)
        away = (np.log(x) - log_x.mean()) ** 2 / ((log_x - log_x.mean()) ** 2).sum()
        of_curve, of_run = 1 / len(y) + away, 1 + 1 / len(y) + away
        value, low, high = (end[0] for end in found.curve([x]))
        seen = found.predict(x)
        assert np.log(value) == pytest.approx(log_value, rel=1e-9)
        assert seen.value == pytest.approx(value, rel=1e-12)
        for interval, variance in (((low, high), of_curve), (seen.interval, of_run)):
            half = stats.t.ppf(0.975, freedom) * scatter * np.sqrt(variance)
            expected = (log_value - half, log_value + half)
            assert np.log(interval) == pytest.approx(expected, abs=0.1 * 2 * half)


def test_a_prediction_is_the_same_each_time_and_prints_its_interval() -> None:
    _, found = noisy_power(3, 50)
    first, again = found.predict(2e19), found.predict(2e19)
    assert first == again
    assert str(law.Prediction(1.23456, (1.2, 1.25), 0.0)) == "1.235 [1.2, 1.25]"
    last = np.array([theta @ (1.0, -np.log(2e19 / found.unit)) for theta in found.draws])
    noise = found.scatter * np.random.default_rng([0, 1]).standard_t(7, 50)
    assert np.log(first.interval) == pytest.approx(np.quantile(last + noise, [0.025, 0.975]))


def test_decades_are_counted_on_both_sides_of_the_runs() -> None:
    _, found = noisy_power(4, 20)
    assert [found.predict(x).decades_beyond for x in (1e15, 1e17, 1e19)] == [0, 0, 0]
    assert found.predict(2e14).decades_beyond == pytest.approx(np.log10(5))
    says = r"1e\+12 lies 3.0 decades beyond the fitted runs \(1e\+15 to 1e\+19\)"
    with pytest.warns(law.Extrapolation, match=says):
        found.predict(1e12)


def test_a_law_of_compute_in_other_units_is_the_same_law() -> None:
    """Also for integers, and for compute below 1."""
    y, found = noisy_power(6, 30)
    small = law.fit("power", COMPUTE / 1e19, y, draws=30)
    for ours, theirs in zip(
        small.curve([0.001, 0.5]), found.curve([10**16, 5 * 10**18]), strict=True
    ):
        assert ours == pytest.approx(theirs)
    assert small.predict(0.5).value == pytest.approx(found.predict(5e18).value)
    assert law.frontier([1, 2, 3], [3, 1, 2]) == law.frontier(["1", "2", "3"], ["3", "1", "2"])


def test_a_frontier_of_noise_is_no_law() -> None:
    """It falls by construction. Of 200 studies of 36 runs whose losses are noise, the interval
    excludes 0 in more than a third, but at most 5 % count as resolved. With a law and 1 % noise,
    all do."""
    rng = np.random.default_rng(0)
    compute = np.geomspace(1e19, 1e22, 36)
    excluded, resolved, real, fitted = 0, 0, 0, 0
    for _ in range(200):
        noise = np.exp(0.05 * rng.standard_normal(36))
        with suppress(ValueError):  # fewer than three runs on the frontier
            found = law.fit_frontier("power", compute, noise)
            fitted += 1
            excluded += found.intervals["b"][0] > 0
            resolved += found.resolved("b")
        real += law.fit_frontier("power", compute, compute**-0.05 * noise**0.2).resolved("b")
    assert excluded > fitted / 3
    assert resolved <= 0.05 * fitted
    assert real == 200
    three = law.fit_frontier("power", [1, 2, 4], [4, 2, 1])
    assert (
        three.says("b") == "b not resolved [1, 1], as losses may not fall with compute (p = 0.17)"
    )
    assert law.fit_frontier("power", [1, 2, 4, 8], [4, 2, 1, 0.5]).resolved("b")


def test_three_runs_of_which_one_blew_up_give_ends_and_no_warning() -> None:
    """Warnings are errors here: of overflow in exp, and of quantiles between infinities."""
    found = law.fit_frontier("power", [1, 2, 4], [11416.0, 5.3, 4.9])
    assert not found.resolved("b")
    low, high = found.curve([1.0, 4.0])[1:]
    assert (low <= high).all()
    assert not np.isnan(found.predict(40.0).interval).any()
    with pytest.raises(ValueError, match="compute is inf; it must be a number greater than 0"):
        found.predict(np.inf)


def test_an_end_among_infinities_is_one() -> None:
    """Between two infinities numpy's interpolation gives no number, and warns."""
    drawn = np.array([[number, 1.0] for number in [2.0] * 90 + [np.inf] * 10])
    assert law.intervals(drawn) == [(2.0, np.inf), (1.0, 1.0)]


def test_the_frontier_is_what_nothing_cheaper_beats() -> None:
    x = [3, 1, 2, 5, 4, 5]
    y = [2.0, 3.0, 3.5, 1.0, 2.0, 0.9]
    kept = law.frontier(x, y)
    assert kept == [1, 0, 5]
    for index in range(len(x)):
        beaten = any(
            x[other] <= x[index]
            and y[other] <= y[index]
            and (x[other], y[other]) != (x[index], y[index])
            for other in range(len(x))
        )
        assert (index in kept) == (not beaten)


def test_what_cannot_be_fitted_is_refused() -> None:
    with pytest.raises(ValueError, match="form is 'cubic'; it must be one of power, floor"):
        law.fit("cubic", [1, 2, 3], [1, 2, 3])
    with pytest.raises(ValueError, match="found 2 distinct points; the form power needs at le"):
        law.fit("power", [1, 2, 2], [3, 2, 2.1])
    with pytest.raises(ValueError, match="loss has a value of -1; it must be one row of numbers"):
        law.fit("power", [1, 2, 3], [3, 2, -1])
    with pytest.raises(ValueError, match="there are 3 values of compute and 2 of loss"):
        law.fit("power", [1, 2, 3], [3, 2])
    with pytest.raises(ValueError, match="compute is 0; it must be a number greater than 0"):
        law.fit("power", [1, 2, 3], [3, 2, 1.5]).predict(0)


def test_a_loss_without_a_logarithm_is_refused() -> None:
    with pytest.raises(ValueError, match="loss has a value of inf"):
        law.fit("power", [1, 2, 3], [3, 2, np.inf])


def test_what_is_resolved_is_so_against_the_ends_of_the_runs() -> None:
    """A floor is compared with the lowest loss, a flattening with the smallest compute."""
    flat = law.fit("saturating", COMPUTE, planted("saturating", COMPUTE), draws=20)
    assert flat.resolved("d")
    low = 100 * (COMPUTE / 1e15) ** -0.5 + 0.01
    assert law.fit("floor", COMPUTE, low, draws=20).resolved("c")
    with pytest.warns(law.Extrapolation):  # 1.3 decades beyond
        law.fit("power", COMPUTE, low, draws=20).predict(2e20)
    bare = law.fit("saturating", COMPUTE, planted("floor", COMPUTE), draws=20)
    assert not bare.resolved("d")
    for form, name, there in (("floor", "c", True), ("power", "c", False)):
        small = law.fit("floor", COMPUTE, 1e-4 * planted(form, COMPUTE), draws=20)
        assert small.resolved(name) is there  # for losses in any unit


# ---- its parts ----------------------------------------------------------------------------------


def test_an_interval_is_the_middle_95_percent_of_a_column() -> None:
    drawn = np.linspace([0.0, 1.0], [1.0, 3.0], 1001)
    assert np.array(law.intervals(drawn)) == pytest.approx(np.array([[0.025, 0.975], [1.05, 2.95]]))
    _, found = noisy_power(7, 200)
    curves = np.exp(
        [found.form.log_value(theta, np.log(2e17 / found.unit)) for theta in found.draws]
    )
    _, low, high = found.curve(2e17)
    assert (low, high) == pytest.approx(tuple(np.quantile(curves, [0.025, 0.975])))


def test_residuals_are_drawn_with_signs_of_their_own() -> None:
    drawn = law.residuals(np.arange(1.0, 7), 2, 4000, np.random.default_rng(0))
    signs = np.sign(drawn)
    assert abs(signs.mean()) < 0.03
    assert abs(np.corrcoef(signs.T) - np.eye(6)).max() < 0.08


def test_the_ends_of_what_is_taken() -> None:
    _, found = noisy_power(8, 20)
    assert found.predict(1e20).decades_beyond == 1  # and gives no warning
    with pytest.raises(ValueError, match="compute has a value of 0; it must be one row"):
        law.fit("power", [0, 1, 2], [3, 2, 1])
    with pytest.raises(ValueError, match=r"loss has shape \(1, 3\); it must be one row"):
        law.fit("power", [1, 2, 3], [[3, 2, 1]])
    assert np.isnan(law.r_squared(np.ones(3), np.ones(3)))
