"""The report on the scaling study, in words, made from its records alone."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr, t

from _turns import Report
from nfnets_xla.scaling.figures import write_figures
from nfnets_xla.scaling.plan import best_of_study
from nfnets_xla.scaling.report import report
from nfnets_xla.scaling.runs import Point, nfnets, pretrained, read_points, source_of

FIGURES = Path(__file__).parents[1] / "docs" / "scaling"
PAIRS = (("vit_mini_d3_4", "nfnet_mini_f1"), ("vit_mini_d6_4", "nfnet_mini_f3"))  # of similar cost
FIRST_SEED = 0  # the seed whose runs decide which rate is best
DRAWS = 2000  # of the bootstrap
Grid = Mapping[tuple[str, float], Sequence[float]]  # rates by model and epochs


def write_report(records: Path, grid: Grid, tuning_grid: Grid, whole: int) -> None:
    """Write results/scaling_study.txt, and the figures of docs/scaling.md. `whole` is the number of
    runs in a finished study. ValueError if no run is finished."""
    points, _ = read_points(records)
    trained = pretrained(points)
    said = Report(
        "scaling_study",
        "python benchmarks/scaling_study.py: mini family, 32 px, 48,000 fractals of 200 classes, "
        "float32, CPU; x is counted FLOPs",
    )
    tuned = finetuned(points)
    wanted = counted([(cell_of(run), run) for run in trained], grid)
    wanted += counted([(cell_of(source), run) for source, run in tuned], tuning_grid)
    beside = len(points) - wanted
    others = f"; {beside} more, at other rates, are kept" if beside else ""
    said.say(f"{wanted} of the {whole} runs are finished{others}")
    for title, text in (
        ("grid: rates finished, seeds of the best", done(trained, grid)),
        ("", report(nfnets(trained))),
        ("ConvNet and ViT of like cost, equal epochs, each at its best rate", pairs(trained)),
        (
            "480 digits with SAM: errors; best is the rate of seed 0's lowest loss",
            finetuning(tuned),
        ),
        ("speed, in one thread beside other work", speeds(trained)),
    ):
        said.say()
        if title:
            said.say(f"== {title}")
        said.say(text)
    said.save()
    for file in write_figures(points, FIGURES):
        if file.suffix not in (".svg", ".csv"):
            file.unlink()
    (FIGURES / "points.csv").rename(records / "points.csv")


def cell_of(point: Point) -> tuple[str, float]:
    return point.model, point.epochs


def counted(runs: Sequence[tuple[tuple[str, float], Point]], grid: Grid) -> int:
    """Number of runs in the study: the first seed at each rate, and all seeds at the best rate."""
    total = 0
    for cell, rates in grid.items():
        tried = [run for of, run in runs if of == cell and run.peak_lr in rates]
        first = of_first_seed(tried)
        best = best_rate(first) if first else None
        total += len(first)
        total += sum(run.seed != FIRST_SEED and run.peak_lr == best for run in tried)
    return total


def of_first_seed(runs: Sequence[Point]) -> dict[float, Point]:
    """The runs of the first seed by learning rate, in ascending order."""
    first = (run for run in runs if run.seed == FIRST_SEED)
    return {run.peak_lr: run for run in sorted(first, key=lambda run: run.peak_lr)}


def best_rate(tried: Mapping[float, Point]) -> float:
    return min(tried, key=lambda rate: tried[rate].loss)


def done(trained: Sequence[Point], grid: Grid) -> str:
    epochs = sorted({number for _, number in grid})
    lines = [" " * 16 + "".join(f"{number:>10g}" for number in epochs) + "   epochs"]
    for model in dict.fromkeys(model for model, _ in grid):
        cells = []
        for number in epochs:
            runs = [p for p in trained if (p.model, p.epochs) == (model, number)]
            tried = {run.peak_lr for run in runs} & set(grid[model, number])
            seeds = max((sum(r.peak_lr == rate for r in runs) for rate in tried), default=0)
            cells.append(f"{len(tried)}/{len(grid[model, number])}, {seeds}")
        lines.append(f"{model:16}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


# ---- ConvNet and ViT --------------------------------------------------------------------------


def of_best_rate(trained: Sequence[Point], model: str, epochs: float) -> list[Point]:
    """The runs of all seeds at the best rate, ordered by seed."""
    best = [p for p in best_of_study(trained) if (p.model, p.epochs) == (model, epochs)]
    return sorted(
        (p for p in trained if best and (p.model, p.epochs, p.peak_lr) == key_of(best[0])),
        key=lambda point: point.seed,
    )


def key_of(point: Point) -> tuple[str, float, float]:
    return point.model, point.epochs, point.peak_lr


def pairs(trained: Sequence[Point]) -> str:
    lines = []
    for vit, convnet in PAIRS:
        for epochs in sorted({point.epochs for point in trained}):
            theirs, ours = (of_best_rate(trained, model, epochs) for model in (vit, convnet))
            if theirs and ours:
                ratio = theirs[0].macs / ours[0].macs
                lines.append(
                    f"{epochs:5g} epochs: {convnet} {spread(ours)}, {vit} {spread(theirs)} at "
                    f"{ratio:.2f} x the MACs; {difference(losses_of(theirs), losses_of(ours))}"
                )
    return "\n".join(lines) or "no pair is finished"


def spread(runs: Sequence[Point]) -> str:
    losses = losses_of(runs)
    return f"{statistics.fmean(losses):.3f} ({' '.join(f'{loss:.3f}' for loss in losses)})"


def losses_of(runs: Sequence[Point]) -> list[float]:
    return [run.loss for run in runs]


def difference(a: Sequence[float], b: Sequence[float], form: str = "+.3f") -> str:
    """The mean of `a` minus the mean of `b`, over seeds, with Welch's interval."""
    gap = statistics.fmean(a) - statistics.fmean(b)
    if min(len(a), len(b)) < 2:
        return f"difference {gap:{form}}, of one seed: not resolved"
    parts = [statistics.variance(x) / len(x) for x in (a, b)]
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(x) - 1) for part, x in zip(parts, (a, b), strict=True)
    )
    half = float(t.ppf(0.975, freedom)) * sum(parts) ** 0.5
    verdict = "" if abs(gap) > half else ": not resolved"
    return f"difference {gap:{form}} [{gap - half:{form}}, {gap + half:{form}}]{verdict}"


# ---- fine-tuning ------------------------------------------------------------------------------


def finetuned(points: Sequence[Point]) -> list[tuple[Point, Point]]:
    """Pairs of a pre-trained run and a run that was fine-tuned from it."""
    sources = [(source_of(point, pretrained(points)), point) for point in points]
    return [(source, point) for source, point in sources if source is not None]


def finetuning(tuned: Sequence[tuple[Point, Point]]) -> str:
    """The fine-tuned error of each pre-trained optimum, and whether a lower held-out loss goes with
    a lower error."""
    found: dict[tuple[str, float], list[tuple[Point, Point]]] = {}
    for source, point in tuned:
        found.setdefault(cell_of(source), []).append((source, point))
    if not found:
        return "no run is finished"
    names, lines, losses = [], [], []
    errors: list[list[float]] = []  # for each optimum, of each seed
    for (model, epochs), runs in sorted(found.items(), key=lambda entry: entry[1][0][0].flops):
        tried = of_first_seed([run for _, run in runs])
        rate = best_rate(tried)
        best = [(source, run) for source, run in runs if run.peak_lr == rate]
        gone = [run for source, run in best if run.diverged or source.diverged]
        lines += [f"left out: {run.run} diverged" for run in gone]
        best = [(source, run) for source, run in best if run not in gone]
        if not best:
            continue
        names.append(f"{model} at {epochs:g} epochs")
        losses.append(statistics.fmean(source.loss for source, _ in best))
        errors.append([run.error for _, run in sorted(best, key=lambda pair: pair[1].seed)])
        each = " ".join(f"{error:.1%}" for error in errors[-1])
        rates = ", ".join(f"{rate:g} ({run.error:.1%})" for rate, run in tried.items())
        lines.append(
            f"{names[-1]:30} {best[0][0].flops:9.2e} FLOPs, held-out loss {losses[-1]:.3f}: "
            f"error {statistics.fmean(errors[-1]):5.1%} ({each}), best {rate:g} of {rates}"
        )
    if not names:
        return "\n".join(lines)
    means = np.array([statistics.fmean(seeds) for seeds in errors])
    least = int(np.argmin(means))
    by_loss, by_error = names[int(np.argmin(losses))], names[least]
    verdict = "has also" if by_loss == by_error else f"has not (that is {by_error})"
    lines.append(f"the lowest held-out loss, of {by_loss}, {verdict} the lowest error")
    lines.append(f"the error of {by_error} less that of others, each by itself:")
    for name, seeds in zip(names, errors, strict=True):
        if name != by_error and not name.startswith("vit"):
            lines.append(f"{name:>30} {difference(errors[least], seeds, '+.1%')}")
    lines.append("of all, " + correlation(np.array(losses), means))
    ours = [number for number, name in enumerate(names) if not name.startswith("vit")]
    lines.append("of the NFNets, " + correlation(np.array(losses)[ours], means[ours]))
    return "\n".join(lines)


def correlation(losses: np.ndarray, errors: np.ndarray) -> str:
    if len(losses) < 4:
        return f"rank correlation of loss and error: not resolved by {len(losses)} of them"
    rng = np.random.default_rng(0)
    drawn = []
    while len(drawn) < DRAWS:
        some = rng.integers(len(losses), size=len(losses))
        if len({*losses[some]}) > 1 and len({*errors[some]}) > 1:
            drawn.append(rank_correlation(losses[some], errors[some]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = rank_correlation(losses, errors)
    verdict = ": not resolved" if low <= 0 <= high else ""
    return f"rank correlation of loss and error {value:+.2f} [{low:+.2f}, {high:+.2f}]{verdict}"


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    found: Any = spearmanr(a, b)
    return float(found.statistic)


def speeds(trained: Sequence[Point]) -> str:
    lines = []
    for model in sorted({point.model for point in trained}):
        runs = [p for p in trained if p.model == model and p.typical_seconds]
        rates = [run.rows / (run.typical_seconds or 1) for run in runs]
        hours = sum(run.all_in_seconds or 0 for run in runs) / 3600
        lines.append(
            f"{model:16} {statistics.median(rates):5.0f} images/s; {len(runs)} runs in "
            f"{hours:.2f} hours, all in"
        )
    return "\n".join(lines)
