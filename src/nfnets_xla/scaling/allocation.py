"""How to divide compute between model size and epochs: three methods, after Hoffmann et al.

Size is M, multiply-accumulates per image, and data is D, rows (images shown), so that training
costs exactly C = 6 M D. M replaces the number of parameters, used for language models: a
convolutional network's compute is proportional to M, not to its parameters.

- `parametric`: L(M, D) = E + A / M^alpha + B / D^beta (arXiv 2203.15556, equation 2).
- `isoflop`: the best size at each budget by a parabola in log M, then a line through the vertices.
- `frontier_sizes`: a line through the runs that no cheaper run beats. On a grid of sizes and
  lengths these include the cheapest run and nearly always the most expensive one, which pull the
  line to the grid's diagonal.

arXiv 2310.16764 finds that size and epochs should grow at the same rate. With M_opt ~ C^a that is
a = 1/2, since D_opt ~ C^(1 - a). `same_rate` says whether the interval of `a` allows it; only the
interval of `parametric` is suitable for that.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize, nnls

from nfnets_xla.scaling.account import FLOPS_PER_MAC, FORWARDS_PER_STEP
from nfnets_xla.scaling.law import (
    DRAWS,
    Floats,
    Interval,
    enough,
    frontier,
    intervals,
    positive,
    r_squared,
    residuals,
)

FLOPS_PER_ROW_MAC = FLOPS_PER_MAC * FORWARDS_PER_STEP  # the 6 of C = 6 M D
WIDEST = 0.5  # an exponent whose interval is at least this wide is not resolved
HUBER = 1e-3  # arXiv 2203.15556, appendix D.3, on log loss
EXPONENTS = (0.1, 0.3, 0.6, 1.0, 1.6)  # starting values for alpha and for beta

# Why the interval of a method does not tell whether an exponent is allowed.
NO_VERDICT = {
    "isoflop": "of the line alone, and too narrow",
    "frontier": "by a line from the cheapest run to the dearest, whatever the exponent",
}


@dataclass(frozen=True)
class Allocation:
    """M_opt = `coefficient` C^`exponent`, and so D_opt ~ C^(1 - exponent)."""

    way: str
    coefficient: float  # MACs, for C in FLOPs
    exponent: float
    interval: Interval
    budgets: list[float]  # FLOPs of the points that the line is fitted to
    sizes: list[float]  # best MACs at each budget
    notes: list[str]
    undone_by: str = ""  # if set: why the exponent is not resolved, whatever its interval

    def size(self, flops: float) -> float:
        return self.coefficient * flops**self.exponent

    def rows(self, flops: float) -> float:
        return flops / (FLOPS_PER_ROW_MAC * self.size(flops))

    @property
    def resolved(self) -> bool:
        """Whether the exponent is above 0, and precise enough to divide compute with."""
        low, high = self.interval
        return not self.undone_by and low > 0 and high - low < WIDEST

    def same_rate(self) -> str:
        """Whether size and epochs grow at the same rate, as the paper found."""
        if self.undone_by:
            return f"not resolved: {self.undone_by}"
        low, high = self.interval
        span = f"size ~ C^{self.exponent:.2f} [{low:.2f}, {high:.2f}], epochs ~ C^"
        span += f"{1 - self.exponent:.2f} [{1 - high:.2f}, {1 - low:.2f}]"
        if self.way in NO_VERDICT:
            return f"{span}, {NO_VERDICT[self.way]}: no verdict"
        if not self.resolved:
            return f"not resolved: {span}"
        if round(low, 2) <= 0.5 <= round(high, 2):  # as they are printed
            return f"the same rate is within the interval: {span}"
        return f"not at the same rate, {'size' if low > 0.5 else 'epochs'} faster: {span}"


# ---- frontier ---------------------------------------------------------------------------------


def frontier_sizes(
    macs: ArrayLike, rows: ArrayLike, loss: ArrayLike, *, draws: int = DRAWS, seed: int = 0
) -> Allocation:
    """A line through log M of the runs on the frontier; arguments are (n,). ValueError for fewer
    than 3 runs there, and for fewer than 3 sizes or amounts of data, which would determine the
    slope."""
    macs, rows, loss = _three(macs, rows, loss)
    enough(len(np.unique(macs)), 3, "a line through the frontier over sizes")
    enough(len(np.unique(rows)), 3, "a line through the frontier over data")
    flops = FLOPS_PER_ROW_MAC * macs * rows
    kept = frontier(flops, loss)
    enough(len(kept), 3, "a line through the frontier")
    return _line_of_sizes("frontier", flops[kept], macs[kept], draws, seed, [])


# ---- isoFLOP ----------------------------------------------------------------------------------


def isoflop(
    macs: ArrayLike,
    rows: ArrayLike,
    loss: ArrayLike,
    *,
    budgets: Sequence[float] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Allocation:
    """Parabolas of log loss over log M at equal budgets, and a line through their vertices.

    Arguments are (n,). The runs of each size are interpolated linearly in log C and log loss (equal
    runs at their mean) at the `budgets`, in FLOPs. By default these are spread over the range where
    three sizes overlap: as many as a size has runs, but no more than the runs have different
    budgets there. A budget counts if three sizes span it and its parabola has its minimum among
    them; ValueError for fewer than 3. The interval takes the vertices as exact, so it is too
    narrow.
    """
    curves = _curves_of_sizes(*_three(macs, rows, loss))
    if budgets is None:
        budgets = _shared_budgets(curves)
    enough(len({*budgets}), 3, "an isoFLOP line over budgets")
    kept: list[float] = []
    sizes: list[float] = []
    lost: dict[str, list[str]] = {}
    for budget in budgets:
        found = _lowest_point(curves, math.log(budget))
        if isinstance(found, str):
            lost.setdefault(found, []).append(f"{budget:.3g}")
        else:
            kept.append(budget)
            sizes.append(math.exp(found))
    notes = [f"{reason} at {', '.join(where)} FLOPs" for reason, where in lost.items()]
    if len(kept) < 3:
        raise ValueError(
            f"isoFLOP parabolas have their lowest point within the sizes at {len(kept)} budgets; "
            f"a line needs at least 3: run more sizes or epochs ({'; '.join(notes)})"
        )
    return _line_of_sizes("isoflop", np.array(kept), np.array(sizes), draws, seed, notes)


class _Curve(NamedTuple):
    """The runs of one size, by increasing length; all values are logarithms."""

    size: float
    flops: Floats
    loss: Floats

    def spans(self, flops: float) -> bool:
        return bool(self.flops[0] - 1e-9 <= flops <= self.flops[-1] + 1e-9)


def _curves_of_sizes(macs: Floats, rows: Floats, loss: Floats) -> list[_Curve]:
    curves: list[_Curve] = []
    for size in np.unique(macs):
        of = macs == size
        lengths, places, counts = np.unique(rows[of], return_inverse=True, return_counts=True)
        log_loss: Floats = np.bincount(places, np.log(loss[of])) / counts
        curves.append(_Curve(math.log(size), np.log(FLOPS_PER_ROW_MAC * size * lengths), log_loss))
    enough(len(curves), 3, "an isoFLOP parabola over sizes")
    return curves


def _shared_budgets(curves: Sequence[_Curve]) -> list[float]:
    """Budgets, in FLOPs, in the range where three sizes overlap; as many as the runs have there."""
    first = sorted(float(curve.flops[0]) for curve in curves)[2]
    last = sorted(float(curve.flops[-1]) for curve in curves)[-3]
    of_runs: Floats = np.unique(np.concatenate([curve.flops for curve in curves]).round(6))
    shared = int(np.sum((of_runs > first - 1e-5) & (of_runs < last + 1e-5)))
    enough(shared, 3, "an isoFLOP line over budgets that three sizes share")
    count = min(shared, max(len(curve.flops) for curve in curves))
    return [math.exp(flops) for flops in np.linspace(first, last, count)]


def _lowest_point(curves: Sequence[_Curve], flops: float) -> float | str:
    """Log of the best size at a budget, by a parabola through the sizes; or why there is none."""
    inside = [curve for curve in curves if curve.spans(flops)]
    if len(inside) < 3:
        return f"only {len(inside)} sizes have runs around it"
    at: Floats = np.array([curve.size for curve in inside])
    losses: Floats = np.array([np.interp(flops, curve.flops, curve.loss) for curve in inside])
    curvature, slope, _ = np.polyfit(at, losses, 2)
    vertex = float(-slope / (2 * curvature)) if curvature > 0 else math.nan
    if not at.min() <= vertex <= at.max():
        return "the best size is not among those that were run"
    return vertex


def _line_of_sizes(
    way: str, flops: Floats, sizes: Floats, draws: int, seed: int, notes: list[str]
) -> Allocation:
    middle = np.log(flops).mean()
    log_c: Floats = np.log(flops) - middle
    log_m: Floats = np.log(sizes)
    slope, intercept = np.polyfit(log_c, log_m, 1)
    fitted = intercept + slope * log_c
    rng = np.random.default_rng(seed)
    noise = residuals(log_m - fitted, 2, draws, rng)
    slopes = (log_c @ (fitted + noise).T) / (log_c @ log_c)
    (interval,) = intervals(slopes[:, None])
    return Allocation(
        way,
        math.exp(intercept - slope * middle),
        float(slope),
        interval,
        flops.tolist(),
        sizes.tolist(),
        notes,
    )


# ---- parametric -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parametric:
    """L = E + A / M^alpha + B / D^beta, fitted."""

    values: dict[str, float]  # E, A, B, alpha, beta
    intervals: dict[str, Interval]
    share: Interval  # the interval of a = beta / (alpha + beta)
    falls: dict[str, Interval]  # for size, data: share of the loss by which its term falls
    r2: float  # of log loss
    points: int

    def loss(self, macs: ArrayLike, rows: ArrayLike) -> Floats:
        value = self.values
        size, data = np.asarray(macs, dtype=float), np.asarray(rows, dtype=float)
        return np.asarray(
            value["E"] + value["A"] * size ** -value["alpha"] + value["B"] * data ** -value["beta"]
        )

    def allocation(self) -> Allocation:
        """arXiv 2203.15556, equation 4, with C = 6 M D.

        If the loss hardly depends on size, or on data, its exponent is near 0, and any division is
        as good: `a` is then not resolved, however narrow its interval.
        """
        undone_by = "; ".join(
            f"over the runs the loss falls with {name} by {low:.0%} to {high:.0%}"
            for name, (low, high) in self.falls.items()
            if low < HUBER
        )
        if undone_by:
            return Allocation("parametric", math.nan, math.nan, self.share, [], [], [], undone_by)
        alpha, beta = self.values["alpha"], self.values["beta"]
        exponent = beta / (alpha + beta)
        scale = (alpha * self.values["A"] / (beta * self.values["B"])) ** (1 / (alpha + beta))
        coefficient = scale * FLOPS_PER_ROW_MAC**-exponent
        return Allocation("parametric", coefficient, exponent, self.share, [], [], [])


def parametric(
    macs: ArrayLike, rows: ArrayLike, loss: ArrayLike, *, draws: int = 200, seed: int = 0
) -> Parametric:
    """Minimise Huber's loss of the log loss by L-BFGS from 25 starts; arguments are (n,).

    The intervals resample the runs, as arXiv 2404.10102 does. A start is a pair of exponents, with
    E, A and B from the linear problem that remains, solved exactly. Each draw starts from the fit
    and from the draw's best start, since a fit with a term of 0 has no gradient to leave it.
    ValueError for fewer than 6 points, or fewer than 3 sizes or 3 amounts of data.
    """
    macs, rows, loss = _three(macs, rows, loss)
    enough(len(loss), 6, "L(M, D)")
    enough(len(np.unique(macs)), 3, "L(M, D) over sizes")
    enough(len(np.unique(rows)), 3, "L(M, D) over data")
    units = np.exp([np.log(macs).mean(), np.log(rows).mean()])
    log_m, log_d, log_l = np.log(macs / units[0]), np.log(rows / units[1]), np.log(loss)
    theta = _best_fit(_starts(log_m, log_d, log_l), log_m, log_d, log_l)
    rng = np.random.default_rng(seed)
    drawn: list[Floats] = []
    for _ in range(draws):
        some = rng.integers(len(loss), size=len(loss))
        runs = log_m[some], log_d[some], log_l[some]
        drawn.append(_best_fit([theta, _starts(*runs)[0]], *runs))
    natural = np.array([_natural(one, units) for one in [theta, *drawn]])
    names = ("E", "A", "B", "alpha", "beta")
    both = natural[1:, 3:].sum(axis=1, keepdims=True)
    shares = np.divide(natural[1:, 4:], both, out=np.zeros_like(both), where=both > 0)
    falls = np.array([_falls(one, log_m, log_d) for one in drawn])
    fitted = _log_loss(theta, log_m, log_d)
    return Parametric(
        dict(zip(names, natural[0].tolist(), strict=True)),
        dict(zip(names, intervals(natural[1:]), strict=True)),
        intervals(shares)[0],
        dict(zip(("size", "data"), intervals(falls), strict=True)),
        r_squared(log_l, fitted),
        len(loss),
    )


def _starts(log_m: Floats, log_d: Floats, log_l: Floats) -> list[Floats]:
    """Starts for all pairs of exponents, best first."""
    loss = np.exp(log_l)
    found: list[tuple[float, Floats]] = []
    for alpha, beta in product(EXPONENTS, EXPONENTS):
        columns = np.stack([np.ones_like(loss), np.exp(-alpha * log_m), np.exp(-beta * log_d)], 1)
        parts, _ = nnls(columns / loss[:, None], np.ones_like(loss))
        theta = np.array([*np.log(np.maximum(parts, 1e-3 * loss.min())), alpha, beta])
        found.append((float(np.abs(_log_loss(theta, log_m, log_d) - log_l).sum()), theta))
    return [theta for _, theta in sorted(found, key=lambda one: one[0])]


def _best_fit(starts: list[Floats], log_m: Floats, log_d: Floats, log_l: Floats) -> Floats:
    fits = (_huber_fit(start, log_m, log_d, log_l) for start in starts)
    return min(fits, key=lambda one: one[1])[0]


def _log_loss(theta: Floats, log_m: Floats, log_d: Floats) -> Floats:
    """theta: log E, log A, log B, alpha, beta."""
    return np.logaddexp(
        theta[0], np.logaddexp(theta[1] - theta[3] * log_m, theta[2] - theta[4] * log_d)
    )


def _falls(theta: Floats, log_m: Floats, log_d: Floats) -> list[float]:
    """How far the terms of size and data fall over the runs, as shares of the middle loss."""
    middle = math.exp(_log_loss(theta, np.zeros(()), np.zeros(())))
    return [
        math.exp(log_a) * (math.exp(-power * log_x.min()) - math.exp(-power * log_x.max())) / middle
        for log_a, power, log_x in ((theta[1], theta[3], log_m), (theta[2], theta[4], log_d))
    ]


def _huber_fit(start: Floats, log_m: Floats, log_d: Floats, log_l: Floats) -> tuple[Floats, float]:
    def objective(theta: Floats) -> tuple[float, Floats]:
        size, data = theta[1] - theta[3] * log_m, theta[2] - theta[4] * log_d
        value = _log_loss(theta, log_m, log_d)
        error = value - log_l
        small = np.abs(error) <= HUBER
        total = np.where(small, 0.5 * error**2, HUBER * (np.abs(error) - 0.5 * HUBER)).sum()
        pull = np.where(small, error, HUBER * np.sign(error))
        of_floor, of_size, of_data = (
            np.exp(term - value) * pull for term in (theta[0], size, data)
        )
        gradient = [
            of_floor.sum(),
            of_size.sum(),
            of_data.sum(),
            -(of_size @ log_m),
            -(of_data @ log_d),
        ]
        # In units of Huber's threshold, since L-BFGS stops at an absolute size of gradients.
        return float(total) / HUBER, np.array(gradient) / HUBER

    bounds = [(-12, 12), (-12, 12), (-12, 12), (0, 3), (0, 3)]
    start = np.clip(start, *np.array(bounds, dtype=float).T)
    found = minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-13, "gtol": 1e-9},
    )
    return np.asarray(found.x), float(found.fun)


def _natural(theta: Floats, units: Floats) -> list[float]:
    alpha, beta = float(theta[3]), float(theta[4])
    return [
        math.exp(theta[0]),
        math.exp(theta[1] + alpha * math.log(units[0])),
        math.exp(theta[2] + beta * math.log(units[1])),
        alpha,
        beta,
    ]


def _three(*named: ArrayLike) -> tuple[Floats, Floats, Floats]:
    macs, rows, loss = (
        positive(name, values) for name, values in zip(("macs", "rows", "loss"), named, strict=True)
    )
    if not len(macs) == len(rows) == len(loss):
        raise ValueError(f"macs, rows and loss are {len(macs)}, {len(rows)}, {len(loss)} values")
    return macs, rows, loss
