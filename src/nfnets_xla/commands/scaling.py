"""`nfnets-xla scaling ...`: plan, fit and figures, one subcommand each. Loads no torch."""

import math
import shutil
import sys
import textwrap
import warnings
from argparse import ArgumentTypeError
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from nfnets_xla.arguments import Parser
from nfnets_xla.devices import HARDWARE
from nfnets_xla.display import plural
from nfnets_xla.scaling import published
from nfnets_xla.scaling.law import Extrapolation
from nfnets_xla.scaling.plan import Job, describe, make_plan
from nfnets_xla.scaling.report import report
from nfnets_xla.scaling.runs import Point, nfnets, pretrained, read_points, without_restarts

INDENT = 12  # of what a line of a table has no room for


def main(arguments: Sequence[str]) -> None:
    given = parser().parse_args(arguments)
    given.run(given)


def parser() -> Parser:
    top = Parser(
        prog="nfnets-xla scaling",
        description="Plan runs, fit scaling laws to them, and draw figures (docs/scaling.md).",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, run: Callable[[Any], None], purpose: str) -> Any:
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.set_defaults(run=run)
        return command

    def add_hardware(command: Any, purpose: str) -> None:
        command.add_argument(
            "--hardware",
            choices=HARDWARE,
            metavar="NAME",
            default=defaults.hardware,
            help=f"{purpose}: {', '.join(HARDWARE)}",
        )

    defaults = Job()
    plan = add("plan", run_plan, "plan what to train within a budget, or what a model costs")
    plan.add_argument("--core-hours", type=float, help="budget of one trial; two rates cost twice")
    plan.add_argument("--model", help="model to train; also give --core-hours or --epochs")
    plan.add_argument("--epochs", type=float, help="epochs to train --model; prints their cost")
    add_hardware(plan, "to train on")
    plan.add_argument("--cores", type=int, default=defaults.cores, help="for the wall-clock time")
    plan.add_argument(
        "--mfu",
        type=float,
        help="share of peak FLOPs, as measured by `nfnets-xla throughput`; default: the runs' or "
        f"{published.PAPER_MFU}",
    )
    plan.add_argument("--price", type=float, help="price of a chip-hour")
    plan.add_argument("--images", type=whole, help="training images; default: the runs' or 4e9")
    plan.add_argument("--image-size", type=int, help="in pixels; default: the runs' or 224")
    plan.add_argument("--batch-size", type=int, help="default: the runs' or 4096")
    plan.add_argument("--runs", type=Path, help="folder of runs to fit; default: the paper's rules")
    fit = add("fit", run_fit, "fit laws to a folder of runs")
    fit.add_argument("runs", type=Path, help="folder of runs")
    figures = add("figures", run_figures, "draw the paper's three figures from a folder of runs")
    figures.add_argument("runs", type=Path, help="folder of runs")
    figures.add_argument("--out", type=Path, required=True, help="folder to write to")
    add_hardware(figures, "for the core-hours")
    figures.add_argument("--mfu", type=float, help="assumed MFU of runs on other hardware")
    for command in (plan, fit, figures):
        command.add_argument(
            "--without-restarts", action="store_true", help="leave out runs that were restarted"
        )
    return top


def whole(text: str) -> int:
    """A number as people write it: 4e9, 1281167."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not number.is_integer():
        raise ArgumentTypeError(f"{text} is not a whole number")
    return int(number)


def run_plan(given: Any) -> None:
    points = [] if given.runs is None else chosen(given)
    named = {field.name: getattr(given, field.name, None) for field in fields(Job)}
    job = Job(**{name: value for name, value in named.items() if value is not None})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Extrapolation)
        show(describe(make_plan(job, points), given.price))
    for warning in caught:
        remark(f"warning: {warning.message}")


def run_fit(given: Any) -> None:
    show(report(chosen(given)))


def run_figures(given: Any) -> None:
    from nfnets_xla.scaling.figures import write_figures

    for file in write_figures(finished(given), given.out, hardware=given.hardware, mfu=given.mfu):
        print(file)


def chosen(given: Any) -> list[Point]:
    """The finished pre-training runs of NFNets in the folder; prints what is left out."""
    trained = pretrained(finished(given))
    points = nfnets(trained)
    if peers := sorted({point.model for point in trained} - {point.model for point in points}):
        remark(f"left out: {', '.join(peers)}: laws and plans are only for NFNets")
    if not points:
        raise ValueError(f"{given.runs} holds no finished pre-training run of an NFNet")
    return points


def finished(given: Any) -> list[Point]:
    points, left_out = read_points(given.runs)
    for line in left_out:
        remark(f"left out: {line}")
    if not given.without_restarts:
        return points
    kept = without_restarts(points)
    if len(kept) < len(points):
        remark(f"left out: {plural(len(points) - len(kept), 'restarted run')}")
    if all(point.diverged for point in kept):
        raise ValueError(f"{given.runs} holds no finished run that was never restarted")
    return kept


def show(text: str) -> None:
    """Print; lines are wrapped to the width of a terminal, but not in a pipe."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else math.inf
    for line in text.splitlines():
        if len(line) > width:
            line = textwrap.fill(line, int(width), subsequent_indent=" " * INDENT)
        print(line)


def remark(text: str) -> None:
    """A remark, on standard error, since the answer may be piped."""
    print(text, file=sys.stderr)
