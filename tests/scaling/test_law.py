"""Laws recover what was planted, agree with scipy's own fits, and their intervals hold."""

import warnings
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
    """Exactly from exact data; inside narrow intervals from data with half a percent of noise."""
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
    """From the planted values, which ours is not told."""
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
    """95 %, within 3 standard deviations of 300 tries, at as few as 4 points."""
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


def test_intervals_widen_with_the_distance_from_the_data() -> None:
    noise = np.exp(0.01 * np.random.default_rng(5).standard_normal(len(COMPUTE)))
    found = law.fit("power", COMPUTE, planted("power", COMPUTE) * noise)
    _, low, high = found.curve(np.array([1e17, 1e19, 1e21]))
    widths = np.log(high / low)
    assert widths[0] < widths[1] < widths[2]


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
    with pytest.raises(
        ValueError, match="there are 2 different points; the form power needs at le"
    ):
        law.fit("power", [1, 2, 2], [3, 2, 2.1])
    with pytest.raises(ValueError, match="loss has a value of -1; it must be one row of numbers"):
        law.fit("power", [1, 2, 3], [3, 2, -1])
    with pytest.raises(ValueError, match="there are 3 values of compute and 2 of loss"):
        law.fit("power", [1, 2, 3], [3, 2])
    with pytest.raises(ValueError, match="compute is 0; it must be greater than 0"):
        law.fit("power", [1, 2, 3], [3, 2, 1.5]).predict(0)
