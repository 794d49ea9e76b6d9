"""Runs as points: the cost and result of each run, from its record.

A point has two costs. `typical_seconds` is the time for all rows at the run's median speed, that is
without interruptions; arXiv 2310.16764 has it on its axes ("estimated by eye from the typical steps
per second"). `all_in_seconds` is the time of all starts, each from opening the record to its last
line: with compilation, evaluations, checkpoints and repeated steps, but without the time between
starts. Both are for the whole machine, of `devices` devices.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nfnets_xla.config import flat, identity_of
from nfnets_xla.devices import find_device
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.record import CHECKPOINTS, Row, RunRecord, read_record
from nfnets_xla.scaling.account import core_hours, device, train_flops, utilisation

HELD_OUT = "the held-out shards"  # among the settings of a run


@dataclass(frozen=True)
class Point:
    """One run that has finished or diverged."""

    run: str  # its folder, relative to where the search began
    model: str
    epochs: float
    peak_lr: float  # as used, for the whole batch
    seed: int
    loss: float  # held out; infinite if the run diverged
    top1: float  # held out, in [0, 1]; NaN if it diverged
    objective: str  # the loss function: softmax or sigmoid
    optimizer: str
    macs: float  # of a forward pass on one training image
    parameters: int
    image_size: int
    num_classes: int
    batch_size: int
    repeats: int
    rows: int  # steps x batch, not counting repeated steps
    flops: float  # of training on these rows
    device_kind: str
    devices: int
    typical_seconds: float | None
    all_in_seconds: float | None
    restarts: int
    steps_lost: int
    data: str  # fingerprint of the training shards
    init_from: str | None  # the run, file or public weights that it started from
    seeds: int = 1  # number of seeds that loss and top-1 are means over
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any], repr=False, hash=False)

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.loss)

    @property
    def is_finetuned(self) -> bool:
        return self.init_from is not None

    @property
    def error(self) -> float:
        """Top-1 error on held-out images, in [0, 1]."""
        return 1 - self.top1

    @property
    def passes(self) -> float:
        """Gradient passes over each image: 1, or with SAM up to 2."""
        return round(self.flops / train_flops(self.macs, self.rows), 6)

    def cores(self, hardware: str) -> int | None:
        """The number of cores, if it ran on `hardware`; else None."""
        if find_device(self.device_kind) is not device(hardware):
            return None
        return self.devices * device(hardware).cores

    def is_timed(self, hardware: str) -> bool:
        """Whether its core-hours on `hardware` were measured."""
        return self.cores(hardware) is not None and self.typical_seconds is not None

    def core_hours(self, hardware: str = "v4", *, mfu: float | None = None) -> float:
        """Typical core-hours on `hardware`: measured if it ran there, else by the assumed `mfu`.

        ValueError if it ran elsewhere and no `mfu` is given.
        """
        cores = self.cores(hardware)
        if cores is not None and self.typical_seconds is not None:
            return self.typical_seconds * cores / 3600
        if mfu is None:
            why = f"ran on {self.device_kind}, not on {hardware}"
            if cores is not None:
                why = "was too short for its record to have a speed"
            raise ValueError(
                f"{self.run} {why}: give the MFU to assume there (the paper's largest run reached "
                "0.36)"
            )
        return core_hours(self.flops, hardware, mfu=mfu)

    def mfu(self, hardware: str) -> float | None:
        """The share of the peak that it reached; None if it did not run on `hardware`."""
        cores = self.cores(hardware)
        if cores is None or not self.typical_seconds:
            return None
        return utilisation(self.flops, self.typical_seconds * cores / 3600, hardware)


def read_points(root: Path | str) -> tuple[list[Point], list[str]]:
    """What `find_points` finds. ValueError if there is no finished run at all."""
    points, left_out = find_points(root)
    if all(point.diverged for point in points):
        remark = f" ({left_out[0]})" if left_out else ""
        remark = f" ({points[0].run} diverged)" if points else remark
        raise ValueError(
            f"{root} holds no finished training run{remark}: each leaves a run-1.jsonl"
        )
    return points, left_out


def find_points(root: Path | str) -> tuple[list[Point], list[str]]:
    """Every training run below `root`, in the order of their names, and what was left out.

    Evaluations are no training runs and are passed over. The second list has a line for each run
    without an end or without a held-out evaluation. ValueError if a record is damaged.
    """
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give one that holds runs")
    points: list[Point] = []
    left_out: list[str] = []
    for folder in sorted({path.parent for path in root.rglob("run-*.jsonl")}):
        record = read_record(folder)
        name = str(folder.relative_to(root))
        if "num_steps" not in record.opening:
            continue
        missing = _missing(record)
        if missing:
            left_out.append(f"{name}: {missing}")
        else:
            points.append(read_point(record, name))
    return points, left_out


def _missing(record: RunRecord) -> str:
    if diverged(record):
        return ""
    if not record.of_kind("end"):
        return "not finished"
    return "" if record.of_kind("eval") else "without a held-out evaluation"


def diverged(record: RunRecord) -> bool:
    """Whether the run ended because of too many non-finite updates, or in a non-finite loss."""
    if any(row["stopped"] for row in record.of_kind("nonfinite")):
        return True
    evaluations = record.of_kind("eval") if record.of_kind("end") else []
    return bool(evaluations) and last_evaluation(evaluations)["loss"] is None


def read_point(record: RunRecord, name: str) -> Point:
    header, last = record.opening, record.headers[-1]
    config = header["config"]
    data, optim = config["data"], config["optim"]
    rows = header["num_steps"] * data["batch_size"]
    held_out: Row = {"loss": math.inf, "top1": math.nan}
    if not diverged(record):
        held_out = last_evaluation(record.of_kind("eval"))
    # A run that moved to other devices is timed as if all of it had run on those of the last start.
    own = {(start["device_kind"], start["num_devices"]) for start in record.headers}
    timed = record.of_kind("train")
    if len(own) > 1:
        timed = [row for row in record.newest if row["kind"] == "train"]
    speeds = [row["images_per_second"] for row in timed]
    macs = header["macs_per_image"]
    return Point(
        run=name,
        model=config["model"]["name"],
        epochs=optim["epochs"],
        peak_lr=absolute_rate(config),
        seed=config["seed"],
        loss=held_out["loss"],
        top1=held_out["top1"],
        objective=optim.get("loss", "softmax"),
        optimizer=optim.get("optimizer", "sgd"),
        macs=macs,
        parameters=header["parameters"],
        image_size=data["image_size"],
        num_classes=header["num_classes"],
        batch_size=data["batch_size"],
        repeats=data["repeats"],
        rows=rows,
        flops=train_flops(macs, rows, sam_fraction=ascent_share(header)),
        device_kind=last["device_kind"],
        devices=last["num_devices"],
        typical_seconds=rows / statistics.median(speeds) if speeds else None,
        all_in_seconds=record.seconds if len(own) == 1 else None,
        restarts=len(record.headers) - 1,
        steps_lost=record.steps_lost,
        data=header["fingerprint"],
        init_from=config["model"]["init_from"] or config["model"].get("pretrained"),
        settings=settings_of(header),
    )


def settings_of(header: Row) -> dict[str, Any]:
    """The settings that all rates and seeds of a cell must share, by dotted name. Streams and
    windows may differ; the number of classes is a field of Point."""
    others = {"seed", "model.name", "optim.peak_lr", "optim.lr_batch", "data.num_classes"}
    others |= {"data.num_streams", "data.window_shards"}
    found: dict[str, Any] = {}
    if "held_out" in header:
        found[HELD_OUT] = str(header["held_out"])[:12]  # of their fingerprint
    found |= flat(identity_of(header["config"]))
    return {name: value for name, value in found.items() if name not in others}


def absolute_rate(config: Row) -> float:
    """The peak rate actually used, by a record's configuration: `lr_batch` scales `peak_lr`."""
    optim, batch_size = config["optim"], config["data"]["batch_size"]
    reference = optim.get("lr_batch")
    return optim["peak_lr"] * (batch_size / reference if reference else 1.0)


def ascent_share(header: Row) -> float:
    """The share of each batch that SAM computes twice; 0 without SAM.

    In whole images, as recorded; records of older releases have only the requested share."""
    if "ascent_share" in header:
        return header["ascent_share"]
    optim = header["config"]["optim"]
    return 0.0 if optim["sam_rho"] is None else optim.get("sam_ascent_fraction", 1.0)


def last_evaluation(rows: Sequence[Row]) -> Row:
    """The evaluation at the last step: of the moving average, if it was evaluated."""
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return next((row for row in last if row["weights"] == "ema"), last[-1])


# ---- choosing points --------------------------------------------------------------------------


def pretrained(points: Iterable[Point]) -> list[Point]:
    return [point for point in points if not point.is_finetuned]


def nfnets(points: Iterable[Point]) -> list[Point]:
    """Without peers: a law holds for one family, whose members differ only in size."""
    return [point for point in points if point.model in VARIANTS]


def fitted_to(points: Iterable[Point]) -> list[Point]:
    """The runs for laws and plans: pre-training of NFNets. ValueError if there are none."""
    points = list(points)
    kept = nfnets(pretrained(points))
    if not kept:
        models = ", ".join(sorted({point.model for point in points}))
        raise ValueError(
            f"none of these {len(points)} runs ({models}) is of an NFNet in pre-training; laws and "
            "plans need such runs"
        )
    return kept


def without_restarts(points: Iterable[Point]) -> list[Point]:
    """Runs that were never restarted. The paper attributes the roughness of its largest curve to
    restarts (CM section 2); runs of this library do not depend on restarts."""
    return [point for point in points if point.restarts == 0]


def source_of(point: Point, points: Iterable[Point]) -> Point | None:
    """The pre-trained run that a fine-tuned one started from, if it is among `points`.

    Since folders may have been moved, it is enough that the path ends in the run's name; or that
    exactly one run's name ends in the path, which may be relative to a folder further down.
    """
    if point.init_from is None:
        return None
    path = _run_folder(Path(point.init_from))
    names = {other.run: Path(other.run).parts for other in points}
    named = [other for other in points if _ends_in(path.parts, names[other.run])]
    if named:
        return max(named, key=lambda other: len(other.run))
    below = [other for other in points if _ends_in(names[other.run], path.parts)]
    return below[0] if len({other.run for other in below}) == 1 else None


def _run_folder(path: Path) -> Path:
    """The run's folder, for a path of it, its checkpoints, one of them, or weights in one."""
    if path.suffix == ".safetensors":
        path = path.parent
    if path.parent.name == CHECKPOINTS:
        path = path.parent
    return path.parent if path.name == CHECKPOINTS else path


def _ends_in(whole: tuple[str, ...], end: tuple[str, ...]) -> bool:
    return len(end) > 0 and whole[-len(end) :] == end


def check_cells(points: Iterable[Point]) -> None:
    """ValueError if runs of one cell differ in anything but rate and seed.

    Settings that a record lacks, being of another release, are not compared.
    """
    known: dict[tuple[str, float, str], dict[str, tuple[Any, str]]] = {}  # name: (value, whose)
    for point in points:
        cell = known.setdefault((point.model, point.epochs, point.data), {})
        for name, value in sorted(point.settings.items()):
            first, whose = cell.setdefault(name, (value, point.run))
            if first != value:
                raise ValueError(
                    f"{whose} and {point.run} have the same model and epochs, and differ in {name} "
                    f"({first}, {value}), so that they are no rates or seeds of one cell: give the "
                    "folder of one study"
                )


def runs_of_cells(points: Iterable[Point]) -> list[dict[float, list[Point]]]:
    """For each cell (model, epochs, data), {rate: runs by seed}, the lowest rate first. ValueError
    as `check_cells`, and for a run that appears twice."""
    points = sorted(points, key=lambda point: (point.peak_lr, point.seed))
    check_cells(points)
    cells: dict[tuple[str, float, str], dict[float, list[Point]]] = {}
    for point in points:
        rates = cells.setdefault((point.model, point.epochs, point.data), {})
        runs = rates.setdefault(point.peak_lr, [])
        if runs and (runs[-1].seed, runs[-1].loss) == (point.seed, point.loss):
            raise ValueError(
                f"{runs[-1].run} and {point.run} are one run, of the same seed and loss: take the "
                "copy out of the folder"
            )
        runs.append(point)
    return list(cells.values())


def mean_loss(runs: Iterable[Point]) -> float:
    """The mean loss over the seeds of a rate; infinite if one diverged."""
    return statistics.fmean(run.loss for run in runs)


def best_per_cell(points: Iterable[Point]) -> list[Point]:
    """For each (model, epochs, data), the run at the learning rate with the lowest loss.

    With several seeds, loss and top-1 are means, and the other fields are those of the run nearest
    to the mean loss. Rates at which a seed diverged do not count; cells with no other rate are left
    out. ValueError as `check_cells`.
    """
    best: list[Point] = []
    for rates in runs_of_cells(points):
        runs = min(rates.values(), key=mean_loss)
        if math.isfinite(mean := mean_loss(runs)):
            nearest = min(runs, key=lambda run: abs(run.loss - mean))
            top1 = statistics.fmean(run.top1 for run in runs)
            best.append(replace(nearest, loss=mean, top1=top1, seeds=len(runs)))
    return best
