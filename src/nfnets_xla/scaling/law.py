"""Fits curves of loss or error against compute, with intervals, and extrapolates them.

Forms, x being compute in any unit and y a loss or an error:

- `power`: y = a x^-b, as in arXiv 2310.16764, Figure 2, which does not print a or b.
- `floor`: y = a x^-b + c, where c is the irreducible loss.
- `saturating`: y = a (x + d)^-b + c, arXiv 2106.04560, section 2.2: d flattens small compute.

All are fitted to log y by least squares, so that relative errors count equally at every scale. The
intervals come from a residual bootstrap in which each draw's scatter is widened by Student's
factor: n points with p parameters estimate their scatter with only n - p degrees of freedom, and
the usual percentiles would be far too narrow for the four to ten points of a scaling study.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from nfnets_xla.display import plural

Floats = NDArray[np.float64]
Interval = tuple[float, float]

LEVEL = 0.95  # of every interval
DECADES = 1.0  # beyond the data, from which on a prediction warns
DRAWS = 400
NOTHING = 1e-3  # c below this share of the lowest loss, or d of compute, counts as 0


class Extrapolation(UserWarning):
    """A law was read more than a decade of compute away from the runs it was fitted to."""


@dataclass(frozen=True)
class Form:
    """A family of curves. Its parameters are fitted as logarithms, except b, which may be < 0."""

    name: str
    formula: str
    parameters: tuple[str, ...]
    log_value: Callable[[Floats, Floats], Floats]  # (theta, log x) -> log y


def _power(theta: Floats, log_x: Floats) -> Floats:
    return theta[0] - theta[1] * log_x


def _floor(theta: Floats, log_x: Floats) -> Floats:
    return np.logaddexp(theta[0] - theta[1] * log_x, theta[2])


def _saturating(theta: Floats, log_x: Floats) -> Floats:
    return np.logaddexp(theta[0] - theta[1] * np.logaddexp(log_x, theta[3]), theta[2])


FORMS = {form.name: form for form in (
    Form("power", "a x^-b", ("a", "b"), _power),
    Form("floor", "a x^-b + c", ("a", "b", "c"), _floor),
    Form("saturating", "a (x + d)^-b + c", ("a", "b", "c", "d"), _saturating),
)}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    value: float
    interval: Interval  # for one more run: the curve's uncertainty and the runs' scatter
    decades_beyond: float  # of compute, outside the fitted runs; 0 within

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.interval[0]:.4g}, {self.interval[1]:.4g}]"


@dataclass(frozen=True)
class Law:
    """A fitted curve."""

    form: Form
    values: dict[str, float]
    intervals: dict[str, Interval]
    r2: float  # of log y
    scatter: float  # standard deviation of log y about the curve, n - p degrees of freedom
    points: int
    x_range: Interval
    unit: float  # x is divided by this before `theta` applies
    theta: Floats  # (p,)
    draws: Floats  # (DRAWS, p)
    seed: int
    chance: float = 0.0  # frontiers only: p-value of losses that do not depend on compute

    @property
    def is_chance(self) -> bool:
        return not self.chance <= 1 - LEVEL

    def resolved(self, name: str) -> bool:
        """Whether the parameter's interval excludes 0. As c and d are fitted as logarithms, for
        them it must exclude everything that counts as 0 (NOTHING)."""
        low, high = self.intervals[name]
        if self.is_chance:
            return False
        if name == "c":
            lowest = self.form.log_value(self.theta, np.log(self.x_range[1] / self.unit))
            return low > NOTHING * math.exp(lowest)
        if name == "d":
            return low > NOTHING * self.x_range[0]
        return low > 0 or high < 0

    def says(self, name: str) -> str:
        """`b = 0.31 [0.28, 0.34]`, or that it is not resolved."""
        low, high = self.intervals[name]
        if not self.resolved(name):
            chance = f", as losses may not fall with compute (p = {self.chance:.2g})"
            return f"{name} not resolved [{low:.3g}, {high:.3g}]" + chance * self.is_chance
        return f"{name} = {self.values[name]:.4g} [{low:.3g}, {high:.3g}]"

    def curve(self, x: ArrayLike) -> tuple[Floats, Floats, Floats]:
        """The curve at `x`, and the ends of its interval; each of the shape of `x`."""
        log_x = np.log(np.asarray(x, dtype=float) / self.unit)
        drawn = np.array([self.form.log_value(theta, log_x) for theta in self.draws])
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        with np.errstate(over="ignore"):
            return np.exp(self.form.log_value(self.theta, log_x)), np.exp(low), np.exp(high)

    def predict(self, x: float) -> Prediction:
        """The outcome of one more run at compute `x`. Warns beyond a decade from the data."""
        if not 0 < x < math.inf:
            raise ValueError(f"compute is {x:g}; it must be a number greater than 0")
        beyond = decades_beyond(x, self.x_range)
        if beyond > DECADES:
            warnings.warn(
                f"compute {x:.3g} lies {beyond:.1f} decades beyond the fitted runs "
                f"({self.x_range[0]:.3g} to {self.x_range[1]:.3g}); the interval knows nothing of "
                "what the law does there",
                Extrapolation,
                stacklevel=2,
            )
        log_x = np.array([math.log(x / self.unit)])
        rng = np.random.default_rng([self.seed, 1])
        drawn = np.array([self.form.log_value(theta, log_x)[0] for theta in self.draws])
        freedom = self.points - len(self.theta)
        drawn = drawn + self.scatter * rng.standard_t(freedom, len(drawn))
        with np.errstate(over="ignore"):  # an infinite end means that nothing is known
            low, high = np.exp(np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
            value = np.exp(self.form.log_value(self.theta, log_x)[0])
        return Prediction(float(value), (float(low), float(high)), beyond)


def fit(form: str, x: ArrayLike, y: ArrayLike, *, draws: int = DRAWS, seed: int = 0) -> Law:
    """Fit `form` to compute `x` and loss or error `y`, both (n,) and greater than 0.

    ValueError for an unknown form, values that have no logarithm, and fewer than p + 1 points.
    """
    if form not in FORMS:
        raise ValueError(f"form is {form!r}; it must be one of {', '.join(FORMS)}")
    chosen = FORMS[form]
    x, y = positive("compute", x), positive("loss", y)
    if len(x) != len(y):
        raise ValueError(f"there are {len(x)} values of compute and {len(y)} of loss; pair them")
    enough(len(np.unique(x)), len(chosen.parameters) + 1, f"the form {form}")
    unit = float(np.exp(np.log(x).mean()))  # the middle of the data: a and b are nearly independent
    log_x, log_y = np.log(x / unit), np.log(y)
    theta = _best(chosen, log_x, log_y)
    fitted = chosen.log_value(theta, log_x)
    freedom = len(x) - len(theta)
    scatter = math.sqrt(float(((log_y - fitted) ** 2).sum()) / freedom)
    rng = np.random.default_rng(seed)
    drawn = _refit(chosen, theta, log_x, fitted + residuals(log_y - fitted, len(theta), draws, rng))
    natural = _natural(chosen, drawn, unit)
    return Law(
        form=chosen,
        values=dict(
            zip(chosen.parameters, _natural(chosen, theta[None], unit)[0].tolist(), strict=True)
        ),
        intervals=dict(zip(chosen.parameters, intervals(natural), strict=True)),
        r2=r_squared(log_y, fitted),
        scatter=scatter,
        points=len(x),
        x_range=(float(x.min()), float(x.max())),
        unit=unit,
        theta=theta,
        draws=drawn,
        seed=seed,
    )


def fit_frontier(form: str, x: ArrayLike, y: ArrayLike, *, seed: int = 0) -> Law:
    """`fit` to the points on the frontier of compute `x` and loss `y`, both (n,).

    A frontier falls by construction, even if losses do not depend on compute, and the interval
    takes for granted which points are on it. So nothing is resolved unless the losses of all points
    fall with compute by the Mann-Kendall test: three points can never pass it, four only if
    perfectly ordered. ValueError as `fit`, for the points on the frontier.
    """
    from scipy.stats import kendalltau  # takes half a second: not needed for help and plans

    x, y = positive("compute", x), positive("loss", y)
    kept = frontier(x, y)
    law = fit(form, x[kept], y[kept], seed=seed)
    return replace(law, chance=float(kendalltau(x, y, alternative="less").pvalue))


def frontier(x: ArrayLike, y: ArrayLike) -> list[int]:
    """Indices, by growing compute, of points that no point of at most their compute beats."""
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    kept: list[int] = []
    for index in np.lexsort((y, x)).tolist():
        if not kept or y[index] < y[kept[-1]]:
            kept.append(index)
    return kept


# ---- fitting ----------------------------------------------------------------------------------


def _best(form: Form, log_x: Floats, log_y: Floats) -> Floats:
    """The best of many starts: floors from 1 to 95 % of the lowest y, flattenings along x."""
    if form.name == "power":
        return _line(log_x, log_y)
    starts: list[list[float]] = []
    for share in (0.01, 0.3, 0.6, 0.8, 0.95):
        floor = math.log(share) + log_y.min()
        above = np.log(np.exp(log_y) - math.exp(floor))
        slope = _line(log_x, above)
        if form.name == "floor":
            starts.append([*slope, floor])
        else:
            starts += [[*slope, floor, d] for d in (log_x.min() - 4, log_x.min(), log_x.mean())]
    fits = [_solve(form, np.array(start), log_x, log_y) for start in starts]
    return min(fits, key=lambda found: found[1])[0]


def _line(log_x: Floats, log_y: Floats) -> Floats:
    """(..., 2), log a and b of the power law, in closed form, of log y (..., n)."""
    centred = log_x - log_x.mean()
    slope = log_y @ centred / (centred @ centred)
    return np.stack([log_y.mean(axis=-1) - slope * log_x.mean(), -slope], axis=-1)


def _refit(form: Form, theta: Floats, log_x: Floats, drawn: Floats) -> Floats:
    """Parameters (draws, p) for log y (draws, n); each fit starts from `theta`."""
    if form.name == "power":
        return _line(log_x, drawn)
    return np.array([_solve(form, theta, log_x, log_y)[0] for log_y in drawn])


def _solve(form: Form, start: Floats, log_x: Floats, log_y: Floats) -> tuple[Floats, float]:
    """(theta, cost) from one start. Bounds keep exponents below 5, and c and d away from 0, where
    they no longer change anything."""
    low = np.array([-50.0, -5.0, log_y.min() - 9, log_x.min() - 9])[: len(start)]
    high = np.array([50.0, 5.0, log_y.max(), log_x.max() + 2])[: len(start)]
    found = least_squares(
        lambda theta: form.log_value(theta, log_x) - log_y,
        np.clip(start, low + 1e-6, high - 1e-6),
        bounds=(low, high),
    )
    return found.x, float(found.cost)


def _natural(form: Form, theta: Floats, unit: float) -> Floats:
    """(n, p) fitted parameters to those of the formula, with x in its own unit."""
    with np.errstate(over="ignore"):  # for a line that is far too steep it is infinite
        natural = np.exp(theta)
        natural[:, 1] = theta[:, 1]
        natural[:, 0] = np.exp(theta[:, 0] + theta[:, 1] * math.log(unit))
    if "d" in form.parameters:
        natural[:, 3] *= unit
    return natural


# ---- intervals --------------------------------------------------------------------------------


def residuals(found: Floats, parameters: int, draws: int, rng: np.random.Generator) -> Floats:
    """(draws, n) noise for a bootstrap: found residuals (n,), drawn again with random signs.

    They are scaled up for the `parameters` that were fitted to them, and each draw by
    sqrt(df / chi^2), so that intervals of a straight line are nearly Student's.
    """
    freedom = len(found) - parameters
    scaled = found * math.sqrt(len(found) / freedom)
    drawn = rng.choice(scaled, (draws, len(found))) * rng.choice([-1.0, 1.0], (draws, len(found)))
    return drawn * np.sqrt(freedom / rng.chisquare(freedom, (draws, 1)))


def intervals(drawn: Floats) -> list[Interval]:
    """The interval of every column of (draws, p)."""
    # Infinities cannot be interpolated: between two of them numpy returns NaN.
    method = "linear" if np.isfinite(drawn).all() else "closest_observation"
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0, method=method)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def r_squared(found: Floats, fitted: Floats) -> float:
    total = float(((found - found.mean()) ** 2).sum())
    return 1 - float(((found - fitted) ** 2).sum()) / total if total else math.nan


def decades_beyond(x: float, x_range: Interval) -> float:
    """Decades by which `x` is outside `x_range`; 0 inside."""
    return max(0.0, math.log10(x_range[0] / x), math.log10(x / x_range[1]))


# ---- at the door ------------------------------------------------------------------------------


def positive(name: str, values: ArrayLike) -> Floats:
    array = np.atleast_1d(np.asarray(values, dtype=float))
    bad = array[~(np.isfinite(array) & (array > 0))]
    if array.ndim != 1 or len(bad):
        found = f"a value of {bad[0]:g}" if len(bad) else f"shape {array.shape}"
        raise ValueError(f"{name} has {found}; it must be one row of numbers greater than 0")
    return array


def enough(found: int, needed: int, what: str) -> None:
    if found < needed:
        raise ValueError(
            f"found {plural(found, 'distinct point')}; {what} needs at least {needed}: run more, "
            "or fit a form with fewer parameters"
        )
