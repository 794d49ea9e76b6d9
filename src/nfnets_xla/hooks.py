"""The two Lightning callbacks of a training run: what is written, and when.

Both fire after update n (counted from 1). `Monitor` reads the device's numbers one interval late:
by then they have long been computed, so reading them stops nothing.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nfnets_xla import checkpoint
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.stacked import per_block
from nfnets_xla.record import RecordWriter
from nfnets_xla.task import TRAIN_METRICS, Batch, Classification


class Monitor(Callback):
    """Writes the record and prints one line per logged step and evaluation."""

    def __init__(
        self,
        record: RecordWriter,
        *,
        total_steps: int,
        steps_per_epoch: float,
        log_every: int,
        trace: Callable[[Batch], dict[str, list]] | None,
        flops_per_image: int,
        peak_flops: float | None,
        say: Callable[[str], None],
    ) -> None:
        """`trace` says which samples a batch shows, to be recorded for every step.

        `peak_flops` is the hardware's, a second, if known: MFU is what the images needed of it.
        """
        self.record = record
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.log_every = log_every
        self.trace = trace
        self.flops_per_image = flops_per_image
        self.peak_flops = peak_flops
        self.say = say
        self.evaluated_at = 0
        self._pending: tuple[int, dict[str, Any], Tensor] | None = None
        self._images = 0
        self._since = 0.0
        self._waited = 0.0
        self._batch_asked_at = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = self._batch_asked_at = time.perf_counter()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._waited += time.perf_counter() - self._batch_asked_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        task = _task(pl_module)
        step = batch["step"] + 1
        if self.trace is not None:
            self.record.write("samples", step, **self.trace(batch))
        self._images += len(batch["labels_B"])
        if step % self.log_every == 0 or step == self.total_steps:
            self.write_pending(task)
            self._pending = (step, self._rates(task, step), _required(task.step_metrics_M))
        self._batch_asked_at = time.perf_counter()

    def _rates(self, task: Classification, step: int) -> dict[str, Any]:
        now = time.perf_counter()
        seconds = now - self._since
        images_per_second = self._images / seconds
        rates = {
            "epoch": round(step / self.steps_per_epoch, 6),
            "learning_rate": task.learning_rate(step - 1),
            "images_per_second": round(images_per_second, 2),
            "mfu": None
            if self.peak_flops is None
            else round(images_per_second * self.flops_per_image / self.peak_flops, 4),
            "data_wait_share": round(self._waited / seconds, 4),
        }
        self._images, self._since, self._waited = 0, now, 0.0
        return rates

    def write_pending(self, task: Classification) -> None:
        """Write the logged step that is still held back; before a checkpoint, or it may be lost."""
        if self._pending is None:
            return
        step, rates, metrics_M = self._pending
        self._pending = None
        values = task.fetch({"metrics": metrics_M})["metrics"].tolist()
        metrics = dict(zip(TRAIN_METRICS, values, strict=True))
        self.record.write("train", step, **metrics, **rates)
        mfu = "" if rates["mfu"] is None else f"MFU {rates['mfu']:.1%}  "
        self.say(
            f"step {step}/{self.total_steps}  loss {metrics['loss']:.4f}  "
            f"top-1 {metrics['top1']:.3f}  lr {rates['learning_rate']:.4g}  "
            f"{rates['images_per_second']:.0f} images/s  {mfu}"
            f"waiting for data {rates['data_wait_share']:.0%}"
        )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        task = _task(pl_module)
        self.write_pending(task)
        self.evaluated_at = trainer.global_step
        for weights, metrics in task.evaluation.items():
            self.record.write("eval", trainer.global_step, weights=weights, **metrics)
            self.say(
                f"step {trainer.global_step}/{self.total_steps}  held out ({weights}): "
                f"loss {metrics['loss']:.4f}  top-1 {metrics['top1']:.3f}  "
                f"top-5 {metrics['top5']:.3f}"
            )
        # An evaluation is not training time.
        self._images, self._waited, self._since = 0, 0.0, time.perf_counter()
        self._batch_asked_at = self._since

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.write_pending(_task(pl_module))


class Checkpointer(Callback):
    """Saves every `every` steps and after the last, and keeps the newest `keep`."""

    def __init__(
        self,
        root: Path,
        monitor: Monitor,
        *,
        every: int | None,
        keep: int,
        total_steps: int,
        state: dict[str, Any],
    ) -> None:
        self.root = root
        self.monitor = monitor
        self.every = every
        self.keep = keep
        self.total_steps = total_steps
        self.state = state

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = batch["step"] + 1
        if step == self.total_steps or (self.every is not None and step % self.every == 0):
            self.save(_task(pl_module), step)

    def save(self, task: Classification, step: int) -> None:
        assert task.sgd is not None
        weights: dict[str, Tensor] = task.net.state_dict()
        if isinstance(task.net, NFNet):  # stacked, its state dict would be slices to compile
            weights = dict(task.net.named_parameters())
        forms = {"model": weights, "momentum": task.sgd.momentum_buffers()}
        if task.ema is not None:
            forms["ema"] = dict(task.ema.shadow)
        # One after the other: where they are cut over devices, each is a whole copy for a moment.
        on_host = {form: per_block(task.fetch(named)) for form, named in forms.items()}
        # A start from this checkpoint computes no earlier step again: their rows come first.
        self.monitor.write_pending(task)
        checkpoint.save(self.root, step, on_host, self.state)
        self.monitor.record.write("checkpoint", step)
        checkpoint.prune(self.root, self.keep)


def _task(module: LightningModule) -> Classification:
    assert isinstance(module, Classification)
    return module


def _required(metrics_M: Tensor | None) -> Tensor:
    assert metrics_M is not None
    return metrics_M
