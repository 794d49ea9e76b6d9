"""What a folder of runs says about scaling, in words: `nfnets-xla scaling fit`."""

from collections.abc import Callable, Sequence

from nfnets_xla.scaling.allocation import frontier_sizes, isoflop, parametric
from nfnets_xla.scaling.law import fit_frontier
from nfnets_xla.scaling.plan import best_of_study, on_frontier
from nfnets_xla.scaling.rate import cells_of, fit_rule
from nfnets_xla.scaling.runs import Point, fitted_to


def report(points: Sequence[Point]) -> str:
    """Points, laws, division of compute, learning rates; says what the runs do not resolve.

    Only pre-training runs of NFNets count. ValueError if there are none."""
    points = fitted_to(points)
    best = best_of_study(points)
    lost = [
        f"  {cell}: left out, diverged at {', '.join(f'{rate:g}' for rate in cell.losses)}"
        for cell in cells_of(points)
        if not cell.ended
    ]
    parts = {
        "runs": "\n".join([table(best), *lost]),
        "loss against compute, on the frontier": laws(best),
        "size against epochs": divisions(best),
        "learning rate": rates(points),
    }
    return "\n\n".join(f"== {title}\n{text}" for title, text in parts.items())


def table(best: Sequence[Point]) -> str:
    """For each model and number of epochs, the run at the best rate; * is on the frontier."""
    kept = {point.run for point in on_frontier(best)}
    header = "  model                 epochs  peak_lr      FLOPs    loss   top-1  restarts"
    in_order = sorted(best, key=lambda point: (point.macs, point.epochs))
    return "\n".join([header, *(row(point, point.run in kept) for point in in_order)])


def row(point: Point, on_the_frontier: bool) -> str:
    return (
        f"{'*' if on_the_frontier else ' '} {point.model:20} {point.epochs:7g} "
        f"{point.peak_lr:8g} {point.flops:10.3g} {point.loss:7.4f} {point.top1:7.1%} "
        f"{point.restarts:9}"
    )


def laws(best: Sequence[Point]) -> str:
    flops, losses = [point.flops for point in best], [point.loss for point in best]

    def of(form: str) -> str:
        law = fit_frontier(form, flops, losses)
        parameters = ", ".join(law.says(name) for name in law.values if name != "a")
        return f"{law.form.formula}: {parameters}; R2 {law.r2:.3f} of {law.points} runs"

    return "\n".join(_or_why_not(form, lambda form=form: of(form)) for form in ("power", "floor"))


def divisions(best: Sequence[Point]) -> str:
    macs, rows, loss = zip(*[(point.macs, point.rows, point.loss) for point in best], strict=True)
    ways = {
        "L(M, D)": lambda: parametric(macs, rows, loss).allocation(),
        "isoFLOP": lambda: isoflop(macs, rows, loss),
        "frontier": lambda: frontier_sizes(macs, rows, loss),
    }
    return "\n".join(
        _or_why_not(name, lambda way=way, name=name: f"{name}: {way().same_rate()}")
        for name, way in ways.items()
    )


def rates(points: Sequence[Point]) -> str:
    cells = [cell for cell in cells_of(points) if cell.ended]
    if all(len(cell.losses) == 1 for cell in cells):
        return "one rate was tried for each model and number of epochs: nothing to compare"
    tried = [cell for cell in cells if len(cell.losses) > 1]
    edge = sum(not cell.bracketed for cell in tried)
    lines = [
        f"{cell.model:20} {cell.epochs:5g} epochs: best {cell.best:g} of {cell.tried()}"
        for cell in tried
    ]
    lines.append(_or_why_not("rule", lambda: str(fit_rule(tried))))
    if edge:
        lines.append(
            f"in {edge} of {len(tried)} cells the best rate is the lowest or highest tried"
        )
    return "\n".join(lines)


def _or_why_not(name: str, text: Callable[[], str]) -> str:
    try:
        return text()
    except ValueError as error:
        return f"{name}: {error}"
