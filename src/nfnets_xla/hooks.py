"""When a training run is saved, and what of it. Fires after update n, counted from 1."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nfnets_xla import checkpoint
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.stacked import per_block
from nfnets_xla.monitor import Monitor, task_of
from nfnets_xla.task import Classification


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
        writes: bool,
    ) -> None:
        """All hosts make one, and the one that `writes` saves: parameters cut over the devices are
        brought together by all of them."""
        self.root = root
        self.monitor = monitor
        self.every = every
        self.keep = keep
        self.total_steps = total_steps
        self.state = state
        self.writes = writes

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = batch["step"] + 1
        if step == self.total_steps or (self.every is not None and step % self.every == 0):
            self.save(task_of(pl_module), step)

    def save(self, task: Classification, step: int) -> None:
        with task.at_rest():  # a signal handler may save in the midst of a step
            self._save(task, step)

    def _save(self, task: Classification, step: int) -> None:
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
        if not self.writes:
            return
        checkpoint.save(self.root, step, on_host, self.state)
        self.monitor.record.write("checkpoint", step)
        checkpoint.prune(self.root, keep=self.keep)
