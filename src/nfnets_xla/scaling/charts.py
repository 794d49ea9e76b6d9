"""The paper's three figures as data: the marks, their positions, axes and texts.

Figure 1: top-1 error after fine-tuning against the compute of pre-training. Figure 2: held-out loss
against compute, with the law through the frontier. Figure 3: the best learning rate against epochs.
arXiv 2310.16764 shows the same three. drawing.py draws exactly what is here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.scaling import account, published
from nfnets_xla.scaling.law import Law, fit_frontier
from nfnets_xla.scaling.plan import best_of_study
from nfnets_xla.scaling.rate import cells_of
from nfnets_xla.scaling.runs import Point, nfnets, pretrained, source_of

IMAGENET_CLASSES = 1000  # published errors are of ImageNet, and compare only with those


@dataclass(frozen=True)
class Mark:
    x: float
    y: float
    says: str  # one line for each value
    hollow: bool = False  # less reliable; the figure's notes say why


@dataclass(frozen=True)
class Curve:
    name: str
    marks: list[Mark]
    role: str  # "model", "peer" or "published": how it is drawn
    joined: bool = True


@dataclass(frozen=True)
class Band:
    """A fitted law with its interval."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    y_label: str
    curves: list[Curve]
    band: Band | None = None
    percent: bool = False  # of y
    x_ticks: list[float] = field(default_factory=list[float])  # empty: decades, or 1, 2, 5
    y_ticks: list[float] = field(default_factory=list[float])


@dataclass(frozen=True)
class Chart:
    name: str  # of its files
    title: str
    panels: list[Panel]
    notes: list[str]  # below the figure: what is left out, what hollow marks mean


# ---- compute ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compute:
    """The axis of compute: core-hours where every run has them, else counted FLOPs."""

    unit: str
    of: Callable[[Point], float]
    of_published: Callable[[float, Mapping[str, float]], float]  # FLOPs; core-hours by hardware
    notes: list[str] = field(default_factory=list[str])


def compute_axis(
    points: Sequence[Point], hardware: str = "v4", mfu: float | None = None
) -> Compute:
    """The axis for these runs. ValueError for unknown hardware, and an `mfu` outside (0, 1]."""
    account.core_hours(0.0, hardware, mfu=1.0 if mfu is None else mfu)
    points = pretrained(points) or points  # what is drawn
    elsewhere = [point for point in points if not point.is_timed(hardware)]
    if elsewhere and mfu is None:
        note = f"compute is counted: {len(elsewhere)} of {len(points)} runs were not on {hardware}"
        if any(point.cores(hardware) is not None for point in elsewhere):
            note += ", or too short for a speed"
        return Compute("FLOPs", lambda point: point.flops, lambda flops, _: flops, [note])
    notes: list[str] = []
    if elsewhere:
        notes.append(f"core-hours of {len(elsewhere)} runs elsewhere: by an MFU of {mfu:.0%}")
    if hardware != "v4":
        of = " of NFNets" if hardware == "v3" else ""  # for ViTs, v3 hours are published, too
        notes.append(f"published core-hours{of}: those of v4, converted by the peaks")

    def of_published(_: float, hours: Mapping[str, float]) -> float:
        return hours.get(hardware) or account.converted(hours["v4"], "v4", hardware)

    return Compute(
        f"TPU-{hardware} core-hours" if hardware.startswith("v") else f"{hardware} core-hours",
        lambda point: point.core_hours(hardware, mfu=mfu),
        of_published,
        notes,
    )


# ---- figure 1 ---------------------------------------------------------------------------------


def finetuned_errors(points: Sequence[Point], compute: Compute) -> Chart:
    """Every fine-tuned run at the cost of the pre-training that it started from."""
    finetuned = [point for point in points if point.is_finetuned]
    ended = [point for point in finetuned if not point.diverged]
    drawable = [point for point in ended if point.error > 0]
    pairs = [(point, source_of(point, pretrained(points))) for point in drawable]
    known = [(point, source) for point, source in pairs if source is not None]
    notes = [*compute.notes]
    for lost, why in (
        (len(pairs) - len(known), "whose pre-training is not among the runs"),
        (len(finetuned) - len(ended), "that diverged"),
        (len(ended) - len(drawable), "without an error, which the axis cannot show"),
    ):
        if lost:
            notes.append(f"left out: {lost} fine-tuned runs {why}")
    curves: list[Curve] = []
    for model in by_size(source for _, source in known):
        runs = [(point, source) for point, source in known if source.model == model]
        marks = [
            Mark(compute.of(source), point.error, says_finetuned(point, source))
            for point, source in sorted(runs, key=lambda pair: compute.of(pair[1]))
        ]
        curves.append(Curve(model, marks, role_of(model), joined=False))
    others = published_errors(compute)
    error, pre = "top-1 error, fine-tuned", f"pre-training compute ({compute.unit})"
    if not curves:
        notes.append("no fine-tuned runs: only the published points")
        panels = [Panel("published, ImageNet", pre, error, others, percent=True)]
    elif all(point.num_classes == IMAGENET_CLASSES for point, _ in known):
        panels = [Panel("", pre, error, [*curves, *others], percent=True)]
    else:
        notes.append("two panels: errors of ImageNet do not compare with those of other images")
        classes = sorted({point.num_classes for point, _ in known})
        ours = f"these runs, {' and '.join(map(str, classes))} classes"
        panels = [
            Panel(ours, pre, error, curves, percent=True),
            Panel("published, ImageNet", pre, error, others, percent=True),
        ]
    return Chart("figure1", "Error after fine-tuning against pre-training compute", panels, notes)


def published_errors(compute: Compute) -> list[Curve]:
    curves: list[Curve] = []
    for vit in published.VITS:
        flops = vit.gflops * 1e9 * account.FORWARDS_PER_STEP * (vit.rows or 0)
        hours = {"v4": vit.v4_core_hours, "v3": vit.v3_core_hours}
        curves.append(_published(vit.name, flops, hours, vit.top1, compute))
    for run in published.RUNS:
        if run.top1 is not None:
            macs = account.macs_per_image(run.model, published.TRAIN_SIZE)
            flops = account.train_flops(macs, run.epochs * published.JFT_IMAGES)
            name = "NFNet-F7+" + (", 4 views" if "views" in run.note else "")
            hours = {"v4": run.v4_core_hours}
            curves.append(_published(name, flops, hours, run.top1, compute))
    return curves


def _published(
    name: str, flops: float, hours: Mapping[str, float], top1: float, compute: Compute
) -> Curve:
    cost = ", ".join(f"{value:,.0f} {hardware}" for hardware, value in hours.items())
    says = f"{name}\n{top1:g} % ImageNet top-1\n{cost} core-hours, {flops:.3g} FLOPs"
    mark = Mark(compute.of_published(flops, hours), 1 - top1 / 100, says)
    return Curve(name, [mark], "published", joined=False)


# ---- figure 2 ---------------------------------------------------------------------------------


def losses(points: Sequence[Point], compute: Compute) -> Chart:
    """Each model's runs at its best rates; the law is fitted to the NFNets' frontier."""
    trained = pretrained(points)
    kept = of_the_same_loss(trained)
    studied = best_of_study(kept or points)
    best = [point for point in studied if point.loss > 0]
    notes = [*compute.notes]
    if lost := len(studied) - len(best):
        notes.append(f"left out: {lost} runs without a loss, which the axis cannot show")
    if others := models_without(trained, kept):
        notes.append(f"left out: {others}, whose loss is another and compares with none here")
    curves: list[Curve] = []
    for model in by_size(best):
        runs = sorted((p for p in best if p.model == model), key=lambda point: point.epochs)
        marks = [Mark(compute.of(point), point.loss, says_trained(point)) for point in runs]
        curves.append(Curve(model, marks, role_of(model)))
    band = None
    try:
        ours = nfnets(best)
        law = fit_frontier("power", [compute.of(p) for p in ours], [p.loss for p in ours])
        band = band_of(law)
        if not law.resolved("b"):
            notes.append("the law's exponent is not resolved: losses may not fall with compute")
    except ValueError as error:
        notes.append(f"no law: {error}")
    panel = Panel("", f"training compute ({compute.unit})", "held-out loss", curves, band)
    return Chart("figure2", "Held-out loss against training compute", [panel], notes)


def of_the_same_loss(points: Sequence[Point]) -> list[Point]:
    """The NFNets, and the peers trained with the same loss as they, e.g. softmax."""
    ours = {point.objective for point in nfnets(points)}
    return [point for point in points if not ours or point.objective in ours]


def models_without(points: Iterable[Point], kept: Iterable[Point]) -> str:
    return ", ".join(sorted({point.model for point in points} - {point.model for point in kept}))


def band_of(law: Law) -> Band:
    x = np.geomspace(*law.x_range, 60)
    y, low, high = law.curve(x)
    b_low, b_high = law.intervals["b"]
    name = f"frontier: $C^{{-b}}$,\nb = {law.values['b']:.3f}\n[{b_low:.3f}, {b_high:.3f}]"
    return Band(name, x.tolist(), y.tolist(), low.tolist(), high.tolist())


# ---- figure 3 ---------------------------------------------------------------------------------


def learning_rates(points: Sequence[Point]) -> Chart:
    """The best of the rates tried, for each NFNet and number of epochs."""
    trained = pretrained(points)
    runs = nfnets(trained)
    cells = [cell for cell in cells_of(runs) if cell.ended and len(cell.losses) > 1]
    notes: list[str] = []
    if not runs:
        notes.append("no NFNets among the runs")
    elif not cells:
        notes.append("one rate was tried for each model and number of epochs: nothing to compare")
    else:
        notes.append("models are drawn a little apart; rates are those of the grid")
    if any(not cell.bracketed for cell in cells):
        notes.append(
            "hollow: the best rate is the lowest or highest tried, the optimum may lie beyond"
        )
    if peers := models_without(trained, runs):
        notes.append(f"left out: {peers}, whose optimizer's rates are of another scale")
    curves: list[Curve] = []
    for model in by_size(point for point in runs if any(c.model == point.model for c in cells)):
        marks: list[Mark] = []
        for cell in sorted((c for c in cells if c.model == model), key=lambda cell: cell.epochs):
            tried = cell.tried().replace(", ", "\n")
            says = f"{model}, {cell.epochs:g} epochs, rates (losses):\n{tried}"
            marks.append(Mark(cell.epochs, cell.best, says, hollow=not cell.bracketed))
        curves.append(Curve(model, marks, role_of(model)))
    panel = Panel(
        "",
        "epochs",
        "best learning rate",
        curves,
        x_ticks=sorted({cell.epochs for cell in cells}),
        y_ticks=sorted({rate for cell in cells for rate in cell.losses}),
    )
    return Chart("figure3", "Best learning rate against epochs", [panel], notes)


# ---- words ------------------------------------------------------------------------------------


def by_size(points: Iterable[Point]) -> list[str]:
    """Models, NFNets first, each family from small to large."""
    sizes: dict[str, float] = {}
    for point in points:
        sizes.setdefault(point.model, point.macs)
    return sorted(sizes, key=lambda model: (model not in VARIANTS, sizes[model], model))


def role_of(model: str) -> str:
    return "model" if model in VARIANTS else "peer"


def says_trained(point: Point) -> str:
    of = f"seed {point.seed}" if point.seeds == 1 else f"mean of {point.seeds} seeds"
    return (
        f"{point.model}, {point.epochs:g} epochs, rate {point.peak_lr:g}, {of}\n"
        f"loss {point.loss:.4f}, top-1 {point.top1:.1%}\n"
        f"{point.flops:.3g} FLOPs, {point.macs / 1e6:.4g} MMACs an image"
    )


def says_finetuned(point: Point, source: Point) -> str:
    return (
        f"{source.model}, {source.epochs:g} epochs, held-out loss {source.loss:.4f}\n"
        f"fine-tuned: error {point.error:.2%}, loss {point.loss:.4f}, seed {point.seed}\n"
        f"{source.flops:.3g} FLOPs of pre-training, {point.flops:.3g} of fine-tuning"
    )
