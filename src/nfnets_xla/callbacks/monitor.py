"""Measures a running training, and writes to the record, the curves and the screen.

Called after update n (counted from 1). The device's numbers are read one interval late: by then
they have long been computed, so reading them does not stall the device.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nfnets_xla.callbacks.skips import Skips
from nfnets_xla.curves import Curves, NoCurves
from nfnets_xla.display import Display, results
from nfnets_xla.optim.by_role import ByRole
from nfnets_xla.record import Discard, RecordWriter
from nfnets_xla.task import TRAIN_METRICS, Batch, Classification

Trace = Callable[[Batch], dict[str, list]]  # the samples that a batch shows
KEPT = 1000  # logged steps over which the final medians are taken


class Monitor(Callback):
    """Writes the record and the curves, and shows every logged step and evaluation."""

    def __init__(
        self,
        record: RecordWriter | Discard,
        curves: Curves | NoCurves,
        display: Display,
        *,
        skips: Skips | None,
        total_steps: int,
        epochs: float,
        log_every: int,
        batch_size: int,
        trace: Trace | None,
        peaks: "Peaks",
        totals: Callable[[], dict[str, Any]],
        lost_seconds: float,
    ) -> None:
        """`skips` gets the guard's numbers; `trace` returns the samples that a batch shows, which
        are then recorded for every step; `totals` returns the runtime's counters; `lost_seconds` is
        the time lost to interruptions before this start."""
        self.record = record
        self.curves = curves
        self.display = display
        self.skips = skips
        self.total_steps = total_steps
        self.epochs = epochs
        self.log_every = log_every
        self.batch_size = batch_size
        self.trace = trace
        self.peaks = peaks
        self.totals = totals
        self.lost_seconds = lost_seconds
        self.evaluated_at = 0
        self._pending: tuple[int, dict[str, Any], Tensor] | None = None
        self._interval = _Interval(totals())
        self._logged: deque[dict[str, Any]] = deque(maxlen=KEPT)  # bounds the memory of a long run

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._interval = _Interval(self.totals())

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._interval.batch_came()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        task = task_of(pl_module)
        step = batch["step"] + 1
        if self.trace is not None:
            self.record.write("samples", step, **self.trace(batch))
        self._interval.step_went(self.batch_size)
        self.display.step(step, self.total_steps)
        if step % self.log_every == 0 or step == self.total_steps:
            self.write_pending(task)
            totals = self.totals()
            rates = {
                "epoch": round(self.epochs * step / self.total_steps, 6),
                "learning_rate": task.learning_rate(step - 1),
                **self._interval.rates(self.peaks, totals),
            }
            self._interval = _Interval(totals)
            self._logged.append(rates)
            assert task.step_metrics_M is not None
            self._pending = (step, rates, task.step_metrics_M)

    def write_pending(self, task: Classification) -> None:
        """Write the logged step held back so far; also before a checkpoint, or it may be lost."""
        if self._pending is None:
            return
        step, rates, metrics_M = self._pending
        self._pending = None
        assert task.guard is not None
        values = task.fetch({"metrics": metrics_M})["metrics"].tolist()
        guarded = len(TRAIN_METRICS) + task.guard.numbers_G.numel()
        if self.skips is not None:
            self.skips.read(step, values[len(TRAIN_METRICS) : guarded])
        shares = values[guarded:]
        row = dict(zip(TRAIN_METRICS, values, strict=False)) | rates
        self.record.write("train", step, **row)
        if shares:
            self.record.write("clipping", step, **clipped_by_block(task.updater, shares))
        self.curves.add("train", step, row)
        of_run = {"steps": self.total_steps, "epochs": self.epochs}
        self.display.numbers(row | of_run | {"step": step, "lost_seconds": self.lost_seconds})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        task = task_of(pl_module)
        self.write_pending(task)
        self.evaluated_at = trainer.global_step
        for weights, metrics in task.evaluation.items():
            self.record.write("eval", trainer.global_step, weights=weights, **metrics)
        for weights, metrics in task.evaluation.items():
            self.curves.add(f"eval-{weights}", trainer.global_step, metrics)
            self.display.say(
                f"step {trainer.global_step}/{self.total_steps}  held out ({weights}): "
                f"{results(metrics)}"
            )
        self._interval = _Interval(self.totals())  # an evaluation is not training time

    def batch_asked(self) -> None:
        self._interval.batch_asked()

    def summary(self) -> dict[str, Any]:
        """Medians over this start's latest logged steps, without the first, which includes
        compilation, if there are others."""
        steady = [*self._logged][1:] or self._logged
        typical = {
            name: None if None in values else median(values)
            for name in ("images_per_second", "step_ms", "mfu", "hfu", "data_wait_share")
            if (values := [row[name] for row in steady])
        }
        return typical | {"lost_seconds": round(self.lost_seconds, 3)}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write_pending(task_of(pl_module))


class Waits(Callback):
    """The last callback to run: the time from here to the next batch is waiting for data."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor = monitor

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.monitor.batch_asked()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.monitor.batch_asked()


@dataclass(frozen=True)
class Peaks:
    """The hardware's peak, and the operations that an image needs."""

    flops: float | None  # FLOP/s of all devices together; None: unknown
    needed_per_image: float  # FLOPs needed to train on a view: those that MFU counts
    computed_per_image: float  # including recomputation to save memory: those HFU counts

    def shares(self, images_per_second: float) -> dict[str, float | None]:
        if self.flops is None:
            return {"mfu": None, "hfu": None}
        needed, computed = self.needed_per_image, self.computed_per_image
        return {
            "mfu": round(images_per_second * needed / self.flops, 4),
            "hfu": round(images_per_second * computed / self.flops, 4),
        }


class _Interval:
    """Consecutive training steps: their duration, and the time waiting for data."""

    def __init__(self, totals: dict[str, Any]) -> None:
        self._totals = totals
        self._since = self._asked_at = time.perf_counter()
        self._steps = self._images = 0
        self._waited = 0.0

    def batch_asked(self) -> None:
        self._asked_at = time.perf_counter()

    def batch_came(self) -> None:
        self._waited += time.perf_counter() - self._asked_at

    def step_went(self, images: int) -> None:
        self._steps += 1
        self._images += images

    def rates(self, peaks: "Peaks", totals: dict[str, Any]) -> dict[str, Any]:
        seconds = time.perf_counter() - self._since
        images_per_second = self._images / seconds
        rates: dict[str, Any] = {
            "images_per_second": round(images_per_second, 2),
            "step_ms": round(1000 * seconds / self._steps, 2),
            **peaks.shares(images_per_second),
            "data_wait_share": round(self._waited / seconds, 4),
        }
        for name, total in totals.items():
            if isinstance(total, int | float):
                since = total - self._totals[name]
                if name.endswith("_seconds"):  # mean per step
                    name, since = name.replace("_seconds", "_ms"), 1000 * since / self._steps
                rates[name] = round(since, 2)
        return rates


def clipped_by_block(updater: ByRole | None, shares: list[float]) -> dict[str, Any]:
    """The share of clipped units: of all units, and of each block with clipped ones."""
    assert updater is not None
    units = updater.units()
    clipped: dict[str, float] = defaultdict(float)
    of_block: dict[str, int] = defaultdict(int)
    for name, share in zip(updater.clipped_names, shares, strict=True):
        *path, _ = name.split(".")
        block = ".".join(path[:3] if len(path) > 3 else path)
        clipped[block] += share * units[name]
        of_block[block] += units[name]
    blocks = {block: round(clipped[block] / of_block[block], 4) for block in of_block}
    total = sum(clipped.values()) / sum(of_block.values())
    return {"share": round(total, 6), "blocks": {b: share for b, share in blocks.items() if share}}


def task_of(module: LightningModule) -> Classification:
    assert isinstance(module, Classification)
    return module
