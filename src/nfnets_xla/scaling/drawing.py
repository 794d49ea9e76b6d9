"""Draws charts with matplotlib: every mark is a separate artist, at its exact values.

In the SVG a mark's group is `mark-<number>`, in the order of the chart's curves, so that a page can
add the mark's text (page.py).
"""

# pyright: reportUnknownMemberType=false
# matplotlib types its own signatures in part.

import math
from collections.abc import Iterator
from itertools import count
from typing import TYPE_CHECKING, Any

from nfnets_xla.scaling.charts import Chart, Curve, Mark, Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODEL_MARKERS, PEER_MARKERS, PUBLISHED_MARKERS = "osD^vP", "X*h", "<>dp8"
PEER_COLOURS = ("#e08214", "#b2182b", "#7b3294")
PUBLISHED_COLOURS = ("#525252", "#8c6d31", "#843c39", "#3182bd", "#08519c")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib's own: the same on every machine
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "path",
}
DPI = 160
PANEL_INCHES, LEGEND_INCHES, HEIGHT_INCHES = 4.6, 2.0, 3.6
MARGIN, LEAST_ROOM = 0.1, 1.005  # around the data: a share of the axis; at least this factor
LEAST_SPAN = 1.2  # as a factor; a band may widen the axis of losses by the runs' own, or by this
# Models at the same number of epochs are shifted apart: by DODGE_POINTS each, but in total at most
# by MOST_DODGED, and by this share of the distance to the next number of epochs.
DODGE_POINTS, MOST_DODGED, DODGED_SHARE = 5.0, 40.0, 0.6


def draw(chart: Chart) -> "Figure":
    """ValueError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("figures need matplotlib: pip install 'nfnets_xla[scaling]'") from error
    with matplotlib.rc_context(STYLE):
        width = PANEL_INCHES * len(chart.panels) + LEGEND_INCHES
        figure = Figure(figsize=(width, HEIGHT_INCHES), layout="constrained")
        figure.suptitle(chart.title, fontsize=11, x=0.01, ha="left")
        numbers = count()
        handles: list[Any] = []
        panels = figure.subplots(1, len(chart.panels), squeeze=False)[0]
        for panel, axes in zip(chart.panels, panels, strict=True):
            handles += draw_panel(panel, axes, numbers)
        if handles:
            figure.legend(handles=handles, loc="outside right center", fontsize=8)
        if chart.notes:
            figure.supxlabel("\n".join(chart.notes), fontsize=7, color="0.35", x=0.01, ha="left")
    return figure


def draw_panel(panel: Panel, axes: Any, numbers: Iterator[int]) -> list[Any]:
    """Draw a panel; returns the handles for the legend."""
    handles: list[Any] = []
    axes.set_title(panel.title, fontsize=9)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if not panel.curves:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing to draw", transform=axes.transAxes, ha="center", color="0.35")
        return handles
    axes.set_xscale("log")
    axes.set_yscale("log")
    set_limits(panel, axes)
    if panel.band is not None:
        band = panel.band
        axes.fill_between(band.x, band.low, band.high, color="0.85", lw=0, zorder=1)
        law = {"color": "0.35", "lw": 1.2, "ls": "--", "label": band.name}
        handles += axes.plot(band.x, band.y, zorder=2, **law)
    step = dodge(panel)
    for number, (curve, look) in enumerate(looks(panel.curves)):
        shift = (number - (len(panel.curves) - 1) / 2) * step
        handles.append(draw_curve(curve, look, axes, numbers, shift))
    for axis, ticks, percent in (
        (axes.xaxis, panel.x_ticks, False),
        (axes.yaxis, panel.y_ticks, panel.percent),
    ):
        set_ticks(axis, ticks, percent)
    return handles


def dodge(panel: Panel) -> float:
    """Points between two curves; 0 where their marks need not be drawn apart."""
    if not panel.x_ticks or len(panel.curves) < 2:
        return 0.0
    width = 72 * PANEL_INCHES * 0.75 / (1 + 2 * MARGIN)  # what the axis' labels leave
    way = width / max(len(panel.x_ticks) - 1, 1)
    return min(DODGE_POINTS, min(MOST_DODGED, DODGED_SHARE * way) / (len(panel.curves) - 1))


def set_limits(panel: Panel, axes: Any) -> None:
    """Limits that show all marks, as matplotlib would not count shifted ones; and of a band that is
    far wider than the runs' losses, its middle."""
    marks = [mark for curve in panel.curves for mark in curve.marks]
    xs, ys = [mark.x for mark in marks], [mark.y for mark in marks]
    if panel.band is not None:
        span = max(max(ys) / min(ys), LEAST_SPAN)
        lowest, highest = min(ys) / span, max(ys) * span
        xs += panel.band.x
        ys += [min(max(y, lowest), highest) for y in panel.band.low + panel.band.high]
    for values, ticks, set_limit in (
        (xs, panel.x_ticks, axes.set_xlim),
        (ys, panel.y_ticks, axes.set_ylim),
    ):
        if values:
            low, high = min([*values, *ticks]), max([*values, *ticks])
            room = max((high / low) ** MARGIN, LEAST_ROOM)
            set_limit(low / room, high * room)


def looks(curves: list[Curve]) -> Iterator[tuple[Curve, dict[str, Any]]]:
    """Colours and markers: larger NFNets are darker, and each role has its own markers."""
    from matplotlib import colormaps

    counts = {"model": 0, "peer": 0, "published": 0}
    models = sum(curve.role == "model" for curve in curves)
    for curve in curves:
        place = counts[curve.role]
        counts[curve.role] += 1
        if curve.role == "model":
            share = 0.1 + 0.85 * place / max(models - 1, 1)
            colour, markers = colormaps["viridis_r"](share), MODEL_MARKERS
        elif curve.role == "peer":
            colour, markers = PEER_COLOURS[place % len(PEER_COLOURS)], PEER_MARKERS
        else:
            colour, markers = PUBLISHED_COLOURS[place % len(PUBLISHED_COLOURS)], PUBLISHED_MARKERS
        yield curve, {"color": colour, "marker": markers[place % len(markers)]}


def draw_curve(
    curve: Curve, look: dict[str, Any], axes: Any, numbers: Iterator[int], shift: float
) -> Any:
    """`shift`, in points, moves the drawing, not the data, so that models can be told apart.

    Returns an entry for the legend, whose marker is never hollow."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    away = ScaledTranslation(shift / 72, -shift / 144, axes.figure.dpi_scale_trans)
    dashes = ("--" if curve.role == "peer" else "-") if curve.joined else "none"
    line: dict[str, Any] = {"color": look["color"], "lw": 1.3, "ls": dashes}
    full: dict[str, Any] = {"marker": look["marker"], "mfc": look["color"]}
    full |= {"ms": 5.5, "mec": "0.25", "mew": 0.5}
    hollow = full | {"mec": look["color"], "mew": 1.2, "mfc": "white"}
    placed = {"transform": axes.transData + away, "zorder": 3}
    if curve.joined:
        axes.plot([m.x for m in curve.marks], [m.y for m in curve.marks], **line, **placed)
    for mark in curve.marks:
        style = hollow if mark.hollow else full
        (artist,) = axes.plot([mark.x], [mark.y], **line, **style, **placed | {"zorder": 4})
        artist.set_gid(f"mark-{next(numbers)}")
    return Line2D([], [], label=curve.name, **line, **full)


def marks_of(chart: Chart) -> list[Mark]:
    """All marks, in the order of their numbers."""
    return [mark for panel in chart.panels for curve in panel.curves for mark in curve.marks]


def set_ticks(axis: Any, ticks: list[float], percent: bool) -> None:
    """The ticks given; else decades, or fewer and rounder ones where the axis has no decade."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    if ticks:
        axis.set_major_locator(FixedLocator(ticks))
    elif math.log10(high / low) < 2:
        axis.set_major_locator(FixedLocator(round_values(low, high)))
    else:
        every = max(1, math.ceil(math.log10(high / low) / 6))
        axis.set_major_locator(LogLocator(base=10.0**every))
    axis.set_minor_locator(NullLocator())

    def label(value: float, _place: int | None) -> str:
        return tick_label(value, percent)

    axis.set_major_formatter(FuncFormatter(label))


def round_values(low: float, high: float) -> list[float]:
    """3 to 7 values of [low, high]: 1, 2, 5 of each decade, or steps of 1, 2 or 5."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [digit * 10.0**power for power in decades for digit in (1, 2, 5)]
    inside = [value for value in values if low <= value <= high]
    if len(inside) >= 3:
        return inside
    step = 10.0 ** math.floor(math.log10(high - low))
    for parts in (0.2, 0.5, 1, 2, 5, 10):
        multiples = range(math.ceil(low * parts / step), math.floor(high * parts / step) + 1)
        if len(multiples) >= 3:
            return [number * step / parts for number in multiples]
    raise AssertionError(f"no round values in [{low}, {high}]")


def tick_label(value: float, percent: bool) -> str:
    if percent:
        return f"{100 * value:.3g} %"
    if 1e-3 <= value < 1e4:
        return f"{value:.4g}"
    power = math.floor(math.log10(value) + 1e-9)
    digits = value / 10.0**power
    times = "" if math.isclose(digits, 1) else rf"{digits:.3g} \cdot "
    return rf"${times}10^{{{power}}}$"
