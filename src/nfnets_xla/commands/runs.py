"""List the runs below a folder, with the progress and the results of each.

Reads the records that runs write, so it works on any machine that sees the folder, during the runs
and after them. `--list` prints folders instead, for another command:

    nfnets-xla finetune_sweep \\
        model.init_from=$(nfnets-xla runs RUNS --flops 2e21 --list) ...
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nfnets_xla.arguments import Parser
from nfnets_xla.display import clock
from nfnets_xla.record import Row, RunRecord, read_record
from nfnets_xla.scaling.account import train_flops
from nfnets_xla.scaling.runs import absolute_rate, ascent_share, last_evaluation

# Seconds without a new row after which a run counts as stopped: QUIET at least; STARTING before the
# first logged step, which comes after compiling and is written an interval late, or evaluation.
QUIET, STARTING = 120.0, 3600.0
WITHIN = 1.25  # of --flops, either way
DAY = 86_400  # seconds; a timer takes no more than some years


@dataclass(frozen=True)
class Overview:
    """One training run, finished or not."""

    name: str  # its folder, relative to where the search began
    folder: Path
    model: str
    epochs: float
    peak_lr: float
    step: int
    steps: int
    flops: float  # of the whole run's training
    seconds: float | None  # of all its starts
    lost_seconds: float
    starts: int
    silent: float  # seconds since its record was written to
    quiet: float  # seconds of silence after which it counts as stopped; 0: its record says so
    begun: bool  # its last start has logged a step
    ended: bool
    loss: float | None  # of the last logged step
    held_out: tuple[float | None, float] | None  # loss and top-1 of the last evaluation

    @property
    def status(self) -> str:
        if self.ended:
            return "finished"
        if self.silent < self.quiet:
            return "running" if self.begun else "starting"
        return f"stopped {clock(self.silent)} ago"


def overviews(root: Path) -> Iterator[Overview]:
    """In the order of their names. ValueError if `root` is no folder, or a record is damaged."""
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give one that holds runs")
    for folder in sorted({file.parent for file in root.rglob("run-*.jsonl")}):
        record = read_record(folder)
        if "num_steps" in record.opening:  # else an evaluation
            yield overview(record, folder, str(folder.relative_to(root)))


def overview(record: RunRecord, folder: Path, name: str) -> Overview:
    header = record.opening
    config, steps = header["config"], header["num_steps"]
    trained, evaluations = record.of_kind("train"), record.of_kind("eval")
    written = max(file.stat().st_mtime for file in folder.glob("run-*.jsonl"))
    evaluated = last_evaluation(evaluations) if evaluations else None
    return Overview(
        name=name,
        folder=folder,
        model=config["model"]["name"],
        epochs=config["optim"]["epochs"],
        peak_lr=absolute_rate(config),
        step=max((row["step"] for row in record.rows), default=0),
        steps=steps,
        flops=train_flops(
            header["macs_per_image"],
            steps * config["data"]["batch_size"],
            sam_fraction=ascent_share(header),
        ),
        seconds=record.seconds,
        lost_seconds=record.seconds_lost,
        starts=len(record.headers),
        silent=max(0.0, time.time() - written),
        quiet=quiet(record.newest),
        begun=any(row["kind"] == "train" for row in record.newest),
        ended=bool(record.of_kind("end")),
        loss=trained[-1].get("loss") if trained else None,
        held_out=None if evaluated is None else (evaluated["loss"], evaluated["top1"]),
    )


def quiet(lines: Sequence[Row]) -> float:
    """Seconds of silence after which a start, given by its rows, counts as stopped. A row may be
    late by a logging interval and a save, or by an evaluation, which takes as long as earlier ones.
    """
    if lines[-1]["kind"] == "stopped":
        return 0.0
    steps = [row for row in lines if row["kind"] == "train"]
    if not steps:
        return STARTING
    began, trainer, now = lines[0]["step"], lines[0]["config"]["trainer"], steps[-1]["step"]
    until_evaluated = trainer["eval_every"] or lines[0]["num_steps"]
    is_due = (now + 2 * trainer["log_every"]) // until_evaluated > began // until_evaluated
    if is_due and not any(row["kind"] == "eval" for row in lines):
        return STARTING
    seconds = [row.get("seconds", 0.0) for row in lines[lines.index(steps[0]) :]]
    longest = max((later - earlier for earlier, later in pairwise(seconds)), default=0.0)
    interval = trainer["log_every"] * steps[-1].get("step_ms", 0) / 1000
    return max(QUIET, 3 * interval, 2 * longest)


SHORTEST_NAME = 12  # of a run, where a terminal is narrow
# Left out one after the other where there is no room for whole numbers.
SPARED = ("starts", "lost", "peak lr", "epochs", "FLOPs", "loss", "time")


def table(found: Sequence[Overview], width: int) -> Any:
    """A table of at most `width`, if leaving out SPARED columns is enough; no cell is cut."""
    from rich.table import Table

    rows = [cells(run) for run in found]
    widths = {key: 2 + max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    widths["run"] = SHORTEST_NAME  # a longer one is folded
    for key in SPARED:
        if sum(widths.values()) > width:
            del widths[key]
    made = Table(box=None, header_style="bold", pad_edge=False)
    made.add_column("run", overflow="fold", min_width=SHORTEST_NAME)
    for key in list(widths)[1:]:
        made.add_column(key, justify="left" if key == "status" else "right", no_wrap=True)
    for row in rows:
        made.add_row(*(row[key] for key in widths))
    return made


def cells(run: Overview) -> dict[str, str]:
    """The cells of a run's row, by column."""
    held_out, top1 = run.held_out or (None, None)
    return {
        "run": run.name,
        "status": run.status,
        "step": f"{run.step}/{run.steps}",
        "epochs": f"{run.epochs:g}",
        "peak lr": f"{run.peak_lr:.4g}",
        "FLOPs": f"{run.flops:.2e}",
        "time": "?" if run.seconds is None else clock(run.seconds),
        "lost": clock(run.lost_seconds),
        "starts": str(run.starts),
        "loss": "" if run.loss is None else f"{run.loss:.4f}",
        "held out": "" if held_out is None else f"{held_out:.4f}",
        "top-1": "" if top1 is None else f"{top1:.1%}",
    }


def main(arguments: Sequence[str]) -> None:
    given = parser().parse_args(arguments)
    if given.flops is not None and not given.flops > 0:
        raise ValueError(f"--flops is {given.flops:g}; it must be greater than 0")
    if not 0 < given.every <= DAY:
        raise ValueError(f"--every is {given.every:g}; it must be in (0, {DAY:,}] seconds")
    if given.watch and (given.list or given.finished):
        raise ValueError("--watch follows unfinished runs; leave out --finished and --list")
    if given.watch:
        watch(given)
        return
    found = chosen(given)
    if given.list:
        print(",".join(str(run.folder) for run in found))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:  # nothing is left out: a line is as long as it is
        console.width = 200 + max(len(run.name) for run in found)
    console.print(table(found, console.width))


def chosen(given: Any) -> list[Overview]:
    """ValueError if nothing is left: an empty --list would make of a command another one."""
    every = list(overviews(given.folder))
    if not every:
        raise ValueError(f"{given.folder} holds no training run: each leaves a run-1.jsonl")
    asked = [run for run in every if run.ended or not (given.finished or given.list)]
    if not asked:
        raise ValueError(f"none of the {len(every)} training runs below {given.folder} is finished")
    found = [
        run
        for run in asked
        if given.flops is None or given.flops / WITHIN <= run.flops <= given.flops * WITHIN
    ]
    if not found:
        costs = dict.fromkeys(f"{flops:.2e}" for flops in sorted(run.flops for run in asked))
        kind = "training runs" if len(asked) == len(every) else "finished runs"
        raise ValueError(
            f"none of the {len(asked)} {kind} below {given.folder} fits: they cost "
            f"{', '.join(costs)} FLOPs"
        )
    return found


def watch(given: Any) -> None:
    """Redraw until interrupted, or until no run is still running."""
    from rich.live import Live

    with Live(auto_refresh=False) as live:
        while True:
            found = chosen(given)
            live.update(table(found, live.console.width), refresh=True)
            if all(run.status not in ("running", "starting") for run in found):
                return
            time.sleep(given.every)


def parser() -> Parser:
    made = Parser(prog="nfnets-xla runs", description=__doc__)
    made.add_argument("folder", type=Path, help="folder that holds runs, at any depth")
    made.add_argument("--finished", action="store_true", help="only finished runs")
    made.add_argument(
        "--flops", type=float, help=f"only runs that cost this, within a factor of {WITHIN}"
    )
    made.add_argument(
        "--list", action="store_true", help="print finished runs' folders, comma-separated"
    )
    made.add_argument("--watch", action="store_true", help="follow the runs until all have stopped")
    made.add_argument(
        "--every", type=float, default=5.0, help="with --watch: seconds between updates"
    )
    return made
