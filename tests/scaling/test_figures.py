"""The figures: what is drawn equals what the runs hold, by the artists and by the table."""

import csv
import re
from collections import defaultdict
from dataclasses import replace
from itertools import combinations
from math import inf, nan
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.scaling import published
from nfnets_xla.scaling.account import core_hours, macs_per_image, train_flops
from nfnets_xla.scaling.charts import (
    Chart,
    Compute,
    compute_axis,
    finetuned_errors,
    learning_rates,
    losses,
)
from nfnets_xla.scaling.drawing import draw, marks_of, round_values, tick_label
from nfnets_xla.scaling.figures import table, write_figures
from nfnets_xla.scaling.page import svg
from nfnets_xla.scaling.plan import best_of_study, on_frontier
from nfnets_xla.scaling.runs import Point, read_points
from tests.scaling.made_runs import BATCH, IMAGES, write_run

MODELS, EPOCHS, RATES = ("nfnet_mini_f0", "nfnet_mini_f1", "nfnet_mini_f3"), (0.25, 1, 4), (1, 2, 4)
VIT = "vit_mini_d3_4"
MINIS = [name for name in VARIANTS if name.startswith("nfnet_mini_")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sizes by three lengths by three rates, the middle rate best and with two seeds; the
    best fine-tuned; and a ViT, whose runs are worse than all others."""
    root = tmp_path_factory.mktemp("runs")
    for model in MODELS:
        for epochs in EPOCHS:
            for rate in RATES:
                loss = (
                    1 + 2e3 / macs_per_image(model, 32, 200) ** 0.5 + 40 / (epochs * IMAGES) ** 0.4
                )
                for seed in (0, 1) if rate == 2 else (0,):
                    name = f"{model}-{epochs:g}-{rate}-{seed}"
                    final = loss + 0.1 * abs(rate - 2) + 0.01 * seed
                    fields = {"model": model, "epochs": epochs, "rate": rate, "seed": seed}
                    write_run(root / name, loss=final, **fields)
                    if rate == 2:
                        fields |= {"epochs": 8, "rate": 0.1, "init_from": f"runs/{name}"}
                        tuned = {"top1": 1 - final / 30, "num_classes": 10, **fields}
                        write_run(root / f"tuned-{name}", loss=0.3, **tuned)
    for epochs in EPOCHS:
        fields = {"model": VIT, "macs_per_image": 6_645_120, "epochs": epochs, "rate": 2}
        write_run(root / f"{VIT}-{epochs:g}", loss=9 - epochs / 4, **fields)
    return root


@pytest.fixture(scope="module")
def points(folder: Path) -> list[Point]:
    return read_points(folder)[0]


@pytest.fixture(scope="module")
def written(points: list[Point], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("figures") / "new"
    files = write_figures(points, out)
    assert sorted(files) == sorted(out.iterdir())
    return out


def drawn(chart: Chart) -> list[tuple[float, float]]:
    """Data of the artists that draw marks, in the order of their numbers, which is the chart's."""
    found = {}
    for axes in draw(chart).axes:
        for line in axes.lines:
            if (line.get_gid() or "").startswith("mark-"):
                ((x, y),) = line.get_xydata().tolist()  # type: ignore[union-attr]
                found[int(line.get_gid().removeprefix("mark-"))] = (x, y)  # type: ignore[union-attr]
    assert sorted(found) == list(range(len(found)))
    return [found[number] for number in sorted(found)]


def rows_of(written: Path) -> list[dict[str, str]]:
    with (written / "points.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def of_runs(rows: list[dict[str, str]], x: str, y: str) -> list[tuple[float, float]]:
    return sorted((float(row[x]), float(row[y])) for row in rows)


def test_the_table_has_every_run(points: list[Point], written: Path) -> None:
    rows = rows_of(written)
    assert [row["run"] for row in rows] == [point.run for point in points]
    for row, point in zip(rows, points, strict=True):
        assert float(row["held_out_loss"]) == point.loss
        assert float(row["flops"]) == point.flops
    # On the axis a tuned run has the cost of the run that it started from.
    tuned = next(row for row in rows if row["run"] == "tuned-nfnet_mini_f3-4-2-1")
    assert tuned["source"] == "nfnet_mini_f3-4-2-1"
    steps = 4 * IMAGES // BATCH
    macs = macs_per_image("nfnet_mini_f3", 32, 200)
    assert float(tuned["pretraining_flops"]) == 6 * macs * steps * BATCH
    alone = [point for point in points if point.is_finetuned]
    assert {row["pretraining_flops"] for row in table(alone, compute_axis(alone))} == {""}


def test_figure_1_draws_every_fine_tuned_run(points: list[Point], written: Path) -> None:
    """In their own panel, since their error is not on ImageNet."""
    chart = finetuned_errors(points, compute_axis(points))
    ours, others = chart.panels
    tuned = [row for row in rows_of(written) if row["run"].startswith("tuned")]
    assert len(tuned) == 18
    expected = of_runs(tuned, "pretraining_flops", "top1_error")
    assert sorted(drawn(chart)[: len(tuned)]) == expected
    assert [curve.name for curve in ours.curves] == list(MODELS)
    f7_plus = 6 * macs_per_image("nfnet_f7_plus", 224) * 8 * published.JFT_IMAGES
    marks = {curve.name: (curve.marks[0].x, curve.marks[0].y) for curve in others.curves}
    assert marks["NFNet-F7+"] == (pytest.approx(f7_plus), pytest.approx(0.097))
    assert marks["ViT-g/14"] == (pytest.approx(3 * 533.1e9 * 16e9), pytest.approx(0.098))
    assert len(marks) == 5


def test_figure_2_draws_the_best_of_every_cell(points: list[Point], written: Path) -> None:
    """Its value is the mean over seeds. Peers' curves are drawn beside the NFNets'; the law is
    fitted to the NFNets' frontier alone."""
    chart = losses(points, compute_axis(points))
    rows = [row for row in rows_of(written) if row["best_rate"] == "1"]
    assert {row["peak_lr"] for row in rows} == {"2.0"}
    seeds: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for row in rows:
        seeds[row["model"], row["epochs"]].append(row)
    assert sorted(map(len, seeds.values())) == [1] * 3 + [2] * 9
    means = [
        (float(of[0]["flops"]), fmean(float(row["held_out_loss"]) for row in of))
        for of in seeds.values()
    ]
    for mark, mean in zip(sorted(drawn(chart)), sorted(means), strict=True):
        assert mark == pytest.approx(mean)
    says = [mark.says for curve in chart.panels[0].curves for mark in curve.marks]
    assert sum(", mean of 2 seeds\n" in words for words in says) == 9
    assert [curve.name for curve in chart.panels[0].curves] == [*MODELS, VIT]
    band = chart.panels[0].band
    assert band is not None
    kept = [float(row["flops"]) for row in rows if row["on_frontier"] == "1"]
    assert (min(band.x), max(band.x)) == pytest.approx((min(kept), max(kept)))
    assert all(low <= y <= high for low, y, high in zip(band.low, band.y, band.high, strict=True))
    lines = [line.get_xydata().tolist() for line in draw(chart).axes[0].lines]  # type: ignore[union-attr]
    assert [list(pair) for pair in zip(band.x, band.y, strict=True)] in lines


def test_figure_2_leaves_out_another_loss(points: list[Point]) -> None:
    """A sigmoid loss is a sum over classes, not comparable with a softmax loss."""
    mixed = [
        replace(p, objective="sigmoid") if p.model == VIT and not p.is_finetuned else p
        for p in [*points, replace(points[-1], run="tuned", model=VIT, init_from="x")]
    ]
    chart = losses(mixed, compute_axis(mixed))
    assert [curve.name for curve in chart.panels[0].curves] == list(MODELS)
    assert chart.notes[-1].startswith(f"left out: {VIT}, whose loss")


def test_the_frontier_is_that_of_the_axis(points: list[Point]) -> None:
    """A run that is cheaper in core-hours than in FLOPs beats others only on that axis."""
    best = best_of_study([point for point in points if point.model in MODELS])
    counted = on_frontier(best, compute_axis(points).of)
    slow = Compute(
        "hours",
        lambda point: point.flops * (100 if point is counted[0] else 1),
        lambda flops, _: flops,
    )
    assert counted[0] not in on_frontier(best, slow.of)


def test_what_a_logarithm_cannot_show_is_left_out_and_said(points: list[Point]) -> None:
    tuned = [point for point in points if point.is_finetuned]
    others = [point for point in points if not point.is_finetuned]
    odd = [replace(tuned[0], top1=1.0), replace(tuned[1], loss=inf, top1=nan), *tuned[2:]]
    chart = finetuned_errors([*others, *odd], compute_axis(points))
    assert len(marks_of(chart)) == len(marks_of(finetuned_errors(points, compute_axis(points)))) - 2
    assert "left out: 1 fine-tuned runs that diverged" in chart.notes
    assert "left out: 1 fine-tuned runs without an error" in " ".join(chart.notes)
    odd = [replace(point, loss=0.0) if point is others[0] else point for point in others]
    drawn = losses(odd, compute_axis(odd))
    assert all(mark.y > 0 for mark in marks_of(drawn))
    assert "left out: 1 runs without a loss, which the axis cannot show" in drawn.notes
    draw(chart)


def test_figure_3_draws_the_best_rates(points: list[Point], written: Path) -> None:
    """Checked by counting in the table by hand. Peers have another optimizer, and other rates."""
    peers = [point for point in points if point.model == VIT]
    chart = learning_rates([*points, *(replace(p, run=f"{p.run}-4", peak_lr=4) for p in peers)])
    assert chart.notes[-1].startswith(f"left out: {VIT}, whose")
    found: dict[Any, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows_of(written):
        if not row["source"] and row["model"] != VIT:
            cell = found[row["model"], float(row["epochs"])]
            cell[float(row["peak_lr"])].append(float(row["held_out_loss"]))
    expected = [
        (epochs, min(losses, key=lambda rate, of=losses: fmean(of[rate])))
        for (_, epochs), losses in found.items()
    ]
    assert sorted(drawn(chart)) == sorted(expected)
    assert not any(mark.hollow for mark in marks_of(chart))
    worst_left_out = learning_rates([point for point in points if point.peak_lr != 4])
    assert all(mark.hollow for mark in marks_of(worst_left_out))
    assert "hollow" in " ".join(worst_left_out.notes)


def test_imagenet_runs_share_a_panel_with_the_published(folder: Path, tmp_path: Path) -> None:
    """In core-hours, which are the runs' own, by their speed on a v4."""
    for name, classes, source in (("a", 18_000, None), ("b", 1000, "runs/a")):
        fields = {"num_classes": classes, "init_from": source, "device_kind": "TPU v4"}
        write_run(tmp_path / name, loss=1, top1=0.9, model="nfnet_f0", num_devices=16, **fields)
    (chart,) = (
        finetuned_errors(points, compute_axis(points)) for points in [read_points(tmp_path)[0]]
    )
    (panel,) = chart.panels
    assert panel.x_label == "pre-training compute (TPU-v4 core-hours)"
    hours = IMAGES / 100.0 * 32 / 3600  # at 100 images/s, on 16 chips with two cores
    assert (panel.curves[0].marks[0].x, panel.curves[0].marks[0].y) == pytest.approx((hours, 0.1))
    assert [curve.marks[0].x for curve in panel.curves[1:]] == [120e3, 280e3, 130e3, 110e3, 110e3]


def test_compute_is_counted_unless_an_mfu_is_assumed(points: list[Point]) -> None:
    counted, assumed = compute_axis(points), compute_axis(points, "v4", 0.36)
    point = points[0]
    assert (counted.unit, counted.of(point)) == ("FLOPs", point.flops)
    (note,) = counted.notes
    own = sum(point.init_from is None for point in points)  # fine-tuning's compute is not drawn
    assert 0 < own < len(points)
    assert f"{own} of {own} runs were not on v4" in note
    assert assumed.of(point) == pytest.approx(core_hours(point.flops, "v4", mfu=0.36))
    (note,) = assumed.notes
    assert "by an MFU of 36%" in note
    assert assumed.of_published(train_flops(1, 1), {"v4": 7.0}) == 7.0
    on_v3 = compute_axis(points, "v3", 0.36)
    assert on_v3.notes[-1] == "published core-hours of NFNets: those of v4, converted by the peaks"
    assert on_v3.of_published(0.0, {"v4": 1.0}) == pytest.approx(137.5 / 61.5)
    assert on_v3.of_published(0.0, {"v4": 1.0, "v3": 1.5}) == 1.5


def test_the_page_stands_alone_and_says_every_value(points: list[Point], written: Path) -> None:
    text = (written / "figures.html").read_text()
    for fetched in ("<script", "<link", "<img", "<iframe", "@import", "src=", 'href="http'):
        assert fetched not in text, fetched
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for pointed_at in re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text):
        assert pointed_at in ids
    titles = re.findall(r'<g id="figure2-mark-\d+"><title>([^<]*)</title>', text)
    chart = losses(points, compute_axis(points))
    assert titles == [mark.says for mark in marks_of(chart)]
    best = min(marks_of(chart), key=lambda mark: mark.y)
    assert f"loss {best.y:.4f}" in best.says
    assert text.count("<tr>") == 1 + len(points)


def test_the_same_runs_give_the_same_bytes(
    points: list[Point], written: Path, tmp_path: Path
) -> None:
    for file in write_figures(points, tmp_path):
        assert file.read_bytes() == (written / file.name).read_bytes(), file.name


@pytest.mark.parametrize("name", ["figure1", "figure2", "figure3"])
def test_nothing_lies_on_anything_else(points: list[Point], name: str) -> None:
    """Neither an axis' tick labels, nor the legend, the title and the notes beside the panels."""
    compute = compute_axis(points)
    charts = [finetuned_errors(points, compute), losses(points, compute), learning_rates(points)]
    figure = draw(next(chart for chart in charts if chart.name == name))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label for label in axis.get_ticklabels() if label.get_text()]
            assert len(labels) >= 3
            assert not overlaps([label.get_window_extent() for label in labels])
    texts = [text for text in figure.texts if text.get_text()]
    parts = [*figure.axes, *figure.legends, *texts]
    assert not overlaps([part.get_tightbbox(canvas.get_renderer()) for part in parts])


def test_marks_are_drawn_apart_and_in_view(points: list[Point], folder: Path) -> None:
    """With all sixteen models at as many numbers of epochs as in the paper, and at two."""
    some = [point for point in points if point.model in MODELS and not point.is_finetuned]
    for lengths in ((0.25, 0.5, 1, 2, 4, 8), (1, 2)):
        many = [
            replace(p, run=f"{name}-{epochs}-{p.run}", model=name, macs=number, epochs=epochs)
            for number, name in enumerate(MINIS, start=1)
            for epochs in lengths
            for p in some
            if (p.model, p.epochs) == (MODELS[0], 1)
        ]
        figure = draw(learning_rates(many))
        FigureCanvasAgg(figure).draw()
        (axes,) = figure.axes
        dots = [line for line in axes.lines if (line.get_gid() or "").startswith("mark-")]
        centres = [line.get_transform().transform(line.get_xydata())[0] for line in dots]
        assert len(centres) == len(MINIS) * len(lengths)
        assert all(axes.bbox.contains(x, y) for x, y in centres)
        assert len({round(float(x), 1) for x, _ in centres}) == len(centres)


def test_a_band_that_knows_nothing_does_not_flatten_the_runs(tmp_path: Path) -> None:
    for number, loss in enumerate((11.0, 5.3, 4.9)):
        write_run(tmp_path / f"{number}", loss=loss, epochs=2**number)
    points = read_points(tmp_path)[0]
    chart = losses(points, compute_axis(points))
    band = chart.panels[0].band
    assert band is not None
    assert max(band.high) > 50 * 11
    low, high = draw(chart).axes[0].get_ylim()
    assert 1 < low < 4.9 < 11 < high < 60


def overlaps(boxes: list[Any]) -> list[tuple[Any, Any]]:
    return [
        (one, other)
        for one, other in combinations(boxes, 2)
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 1
        and min(one.y1, other.y1) - max(one.y0, other.y0) > 1
    ]


def test_an_empty_panel_says_so(points: list[Point]) -> None:
    one_rate = learning_rates([point for point in points if point.peak_lr == 2])
    (axes,) = draw(one_rate).axes
    assert [text.get_text() for text in axes.texts] == ["nothing to draw"]
    assert len(axes.get_xticks()) == 0
    assert "one rate was tried" in " ".join(one_rate.notes)
    peers = learning_rates([replace(point, model="vit_mini_d3_4") for point in points])
    assert peers.notes[0] == "no NFNets among the runs"


def test_a_run_without_its_source_is_left_out_and_said(points: list[Point]) -> None:
    some = [point for point in points if point.run != "nfnet_mini_f0-1-2-0"]
    chart = finetuned_errors(some, compute_axis(some))
    assert "left out: 1 fine-tuned runs" in " ".join(chart.notes)
    none = finetuned_errors([p for p in points if not p.is_finetuned], compute_axis(points))
    assert [panel.title for panel in none.panels] == ["published, ImageNet"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.9, 60, [1, 2, 5, 10, 20, 50]),
        (9.53, 9.83, [9.6, 9.7, 9.8]),
        (95, 98, [95, 96, 97, 98]),
        (3e11, 1.2e12, [4e11, 6e11, 8e11, 1e12, 1.2e12]),
        (1.0, 99.0, [1, 2, 5, 10, 20, 50]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert round_values(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "percent", "label"),
    [(0.0955, True, "9.55 %"), (0.25, False, "0.25"), (1e12, False, "$10^{12}$"),
     (2e-5, False, r"$2 \cdot 10^{-5}$")],
)  # fmt: skip
def test_tick_labels(value: float, percent: bool, label: str) -> None:
    assert tick_label(value, percent) == label


def test_svg_has_a_group_for_every_mark(points: list[Point]) -> None:
    chart = learning_rates(points)
    text = svg(draw(chart), chart.name)
    assert len(re.findall(r'<g id="mark-\d+">', text)) == len(marks_of(chart)) == 9


def test_mistakes_are_named(points: list[Point], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="file is a file; --out must name a folder"):
        write_figures(points, file)
    with pytest.raises(ValueError, match=r"mfu is 36; it must be in \(0, 1\]: 36 % is 0.36"):
        write_figures(points, tmp_path, mfu=36)
    write_run(tmp_path / "other", loss=1, fingerprint="e" * 64)
    mixed = [*points, *read_points(tmp_path)[0]]
    with pytest.raises(ValueError, match="the runs have 2 different values of data"):
        write_figures(mixed, tmp_path / "out")
    assert not (tmp_path / "out").exists()
