"""`nfnets-xla scaling figures`: the paper's figures of a folder of runs, as files.

Writes figure1, 2 and 3 as PNG and SVG, all three in figures.html, and points.csv with every run,
drawn or not, so that the figures can be checked or redrawn from that table alone.
"""

# pyright: reportUnknownMemberType=false
# matplotlib types its own signatures in part.

import csv
from collections.abc import Sequence
from pathlib import Path

from nfnets_xla.scaling.charts import (
    Chart,
    Compute,
    compute_axis,
    finetuned_errors,
    learning_rates,
    losses,
    of_the_same_loss,
)
from nfnets_xla.scaling.drawing import DPI, draw
from nfnets_xla.scaling.page import page, svg
from nfnets_xla.scaling.plan import on_frontier
from nfnets_xla.scaling.runs import Point, best_per_cell, nfnets, pretrained, source_of


def write_figures(
    points: Sequence[Point], out: Path, *, hardware: str = "v4", mfu: float | None = None
) -> list[Path]:
    """The files written, in `out`, which is made. ValueError for runs of more than one study."""
    compute = compute_axis(points, hardware, mfu)
    charts = [
        finetuned_errors(points, compute),
        losses(points, compute),
        learning_rates(points),
    ]
    drawn = [(chart, draw(chart)) for chart in charts]
    rows = table(points, compute)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; --out must name a folder, which is made if need be")
    out.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    shown: list[tuple[Chart, str]] = []
    for chart, figure in drawn:
        files += [out / f"{chart.name}.png", out / f"{chart.name}.svg"]
        figure.savefig(files[-2], dpi=DPI, metadata={"Software": None})
        shown.append((chart, svg(figure, chart.name)))
        files[-1].write_text(shown[-1][1], encoding="utf-8")
    files += [out / "figures.html", out / "points.csv"]
    title = f"{len(points)} runs"
    files[-2].write_text(page(title, shown, rows), encoding="utf-8")
    with files[-1].open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return files


def table(points: Sequence[Point], compute: Compute) -> list[dict[str, str]]:
    """A row for every run; floats are written so that they read back exactly. The figures draw, for
    each cell, the mean of its runs at the best rate."""
    sources = pretrained(points)
    best = best_per_cell(sources)
    ours = nfnets(of_the_same_loss(best))
    frontier = {rate_of(point) for point in on_frontier(ours, compute.of)}
    chosen = {rate_of(point) for point in best}
    rows: list[dict[str, str]] = []
    for point in points:
        source = source_of(point, sources)
        paid = source if point.is_finetuned else point
        values = {
            "run": point.run,
            "model": point.model,
            "source": "" if source is None else source.run,
            "epochs": point.epochs,
            "peak_lr": point.peak_lr,
            "seed": point.seed,
            "held_out_loss": point.loss,
            "top1_error": point.error,
            "macs_per_image": point.macs,
            "parameters": point.parameters,
            "rows": point.rows,
            "flops": point.flops,
            "pretraining_flops": None if paid is None else paid.flops,
            "typical_seconds": point.typical_seconds,
            "all_in_seconds": point.all_in_seconds,
            "device_kind": point.device_kind,
            "devices": point.devices,
            "restarts": point.restarts,
            "best_rate": rate_of(point) in chosen,
            "on_frontier": rate_of(point) in frontier,
        }
        rows.append({name: _text(value) for name, value in values.items()})
    return rows


def rate_of(point: Point) -> tuple[object, ...]:
    """What the seeds of one rate share."""
    return point.model, point.epochs, point.data, point.peak_lr, point.init_from


def _text(value: object) -> str:
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, bool) else str(value)
