"""When a training run is saved, and what is saved. Called after update n, counted from 1."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from nfnets_xla.callbacks.missed import Missed
from nfnets_xla.callbacks.monitor import Monitor, task_of
from nfnets_xla.callbacks.skips import Skips
from nfnets_xla.exits import Failed, Unreachable
from nfnets_xla.hosts import Hosts
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.stacked import per_block
from nfnets_xla.saves import Forms, Saves
from nfnets_xla.task import Classification


class Checkpointer(Callback):
    """Saves every `every` steps and after the last; with `keep_best` also at a best evaluation."""

    def __init__(
        self,
        saves: Saves,
        monitor: Monitor,
        skips: Skips,
        missed: Missed,
        *,
        every: int | None,
        total_steps: int,
        state: Callable[[int], dict[str, Any]],
        keep_best: bool,
        best: tuple[int, float] | None,
        hosts: Hosts,
        say: Callable[[str], None],
    ) -> None:
        """`state(step)` is stored with a checkpoint; `best` is earlier starts' (step, loss)."""
        self.saves = saves
        self.monitor = monitor
        self.skips = skips
        self.missed = missed
        self.every = every
        self.total_steps = total_steps
        self.state = state
        self.keep_best = keep_best
        self.hosts = hosts
        self.say = say
        self.saved_at: int | None = None  # the newest step handed to `saves`
        self.durable_at: int | None = None  # the newest step known to be written
        self._pruned = True  # False once a failure to delete was reported
        self._losses: dict[int | None, float] = {}  # {step: held-out loss}
        if keep_best and best is not None:
            self.saves.best = self.saves.better = best[0]
            self._losses[best[0]] = best[1]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.collect()
        step = batch["step"] + 1
        due = self.every is not None and step % self.every == 0
        if due or step == self.total_steps or self.skips.frozen_at is not None:
            self.save(task_of(pl_module), step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        task = task_of(pl_module)
        *_, metrics = task.evaluation.values()  # of the average, if there is one
        # The same on all hosts, although only host 0 knows if a better one could not be written.
        if self.keep_best and metrics["loss"] < self._losses.get(self.saves.better, math.inf):
            self._losses[trainer.global_step] = metrics["loss"]
            self.saves.better = trainer.global_step
            if self.saved_at != trainer.global_step and trainer.global_step < self.total_steps:
                self.save(task, trainer.global_step)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save if samples are unavailable (Unreachable): all hosts are then between the same two
        steps, see missed.py."""
        step = trainer.global_step
        if isinstance(exception, Unreachable) and step > self.saves.start:
            # Save even if the step is saved already, which only host 0 knows. Not the last step,
            # which all hosts have saved: after it the optimizer's state is no longer on the device.
            if step < self.total_steps:
                self.save(task_of(pl_module), step)
            self.saves.wait()
            self.collect()
            self.hosts.total(0)  # no host may end, and be restarted, while host 0 still writes
            self.monitor.record.write("stopped", step, reason=str(exception))
            if self.durable_at == step:
                self.say(f"stopped after step {step}, which is saved")

    def save(self, task: Classification, step: int) -> None:
        """Raises Failed if the guard has frozen; the state before that step is saved then."""
        # A start from this checkpoint does not repeat earlier steps: their rows must be written.
        self.monitor.write_pending(task)
        with task.at_rest():
            self.saves.save(lambda: self._copy(task, step))
        if self.skips.frozen_at is not None:
            self.finish()
            raise Failed(self.skips.why())

    def _copy(self, task: Classification, step: int) -> tuple[int, Forms, Mapping[str, Any]]:
        """The state of `step`, or if the guard has frozen, of the step before it did."""
        forms, numbers_G = host_copies(task)
        self.skips.read(step, numbers_G)
        if self.skips.frozen_at is not None:
            step = self.skips.frozen_at - 1
        self.saved_at = step
        counts = {"skipped": self.skips.count, "missed": self.missed.trained_up_to(step)}
        state = self.state(step) | counts
        if self.keep_best:
            state["best"] = self._best_with(step)
        return step, forms, state

    def _best_with(self, step: int) -> dict[str, Any] | None:
        """The best of the written checkpoints and of `step`, which is about to be written."""
        best = step if step == self.saves.better else self.saves.best
        return None if best is None else {"step": best, "loss": self._losses[best]}

    def collect(self) -> None:
        """Record which checkpoints have been written since the last call."""
        for done in self.saves.written():
            if done.fault is None:
                self.durable_at = done.step
                fields = {name: getattr(done, name) for name in RECORDED}
                self.monitor.record.write("checkpoint", done.step, **fields)
            else:
                if self.saved_at == done.step:
                    self.saved_at = None
                self.monitor.record.write("checkpoint_failed", done.step, reason=done.fault)
                self.say(f"warning: step {done.step} could not be saved ({done.fault})")
            if done.unpruned is not None and self._pruned:
                self._pruned = False
                self.monitor.record.write("prune_failed", done.step, reason=done.unpruned)
                self.say(
                    f"warning: checkpoints before step {done.step} that are not to be kept could "
                    f"not be deleted in {self.saves.root}, which fills ({done.unpruned})"
                )

    def finish(self) -> None:
        """Wait until nothing is being written. Raises Failed if the newest could not be saved."""
        self.saves.wait()
        newest = self.saved_at
        self.collect()
        if newest is not None and self.saved_at is None:
            raise Failed(
                f"step {newest} could not be saved in {self.saves.root}: make room there and give "
                "the same command again, which goes on from the newest checkpoint"
            )


RECORDED = ("stall_seconds", "write_seconds", "bytes")


def host_copies(task: Classification) -> tuple[dict[str, dict[str, Tensor]], list[float]]:
    """Weights, optimizer slots and average, by single blocks' names; and the guard's numbers."""
    assert task.updater is not None
    assert task.guard is not None
    weights: dict[str, Tensor] = task.net.state_dict()
    if isinstance(task.net, NFNet):  # stacked, its state dict would be slices to compile
        weights = dict(task.net.named_parameters())
    with_guard = weights | {"guard": task.guard.numbers_G}  # saves a separate transfer
    forms = {"model": with_guard, **task.updater.slots()}
    if task.ema is not None:
        forms["ema"] = dict(task.ema.shadow)
    # One at a time: if they are sharded, gathering needs memory for a whole copy of each.
    copies = {form: task.fetch(named) for form, named in forms.items()}
    numbers_G = copies["model"].pop("guard").tolist()
    return {form: per_block(named) for form, named in copies.items()}, numbers_G
