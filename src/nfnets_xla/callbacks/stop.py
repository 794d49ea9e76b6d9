"""Ends the training where it was asked to, after saving: see preempt.py.

Not through Lightning's `should_stop`, which evaluates before it stops (2.6), nor by its own handler
of SIGTERM, which talks to the device inside a signal and ends with exit code 0.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nfnets_xla.callbacks.checkpointer import Checkpointer
from nfnets_xla.exits import Failed, Interrupted
from nfnets_xla.hosts import Hosts
from nfnets_xla.preempt import Preemption
from nfnets_xla.task import Classification


class NoSignals:
    """In place of Lightning's signal connector, which turns SIGTERM into a clean-looking exit 0."""

    received_sigterm = False

    def register_signal_handlers(self) -> None: ...

    def teardown(self) -> None: ...


class Stop(Callback):
    """Comes after the `Checkpointer`, which may have saved the step already. All hosts stop after
    the same step, whichever of them was asked."""

    def __init__(self, preemption: Preemption, keeper: Checkpointer, hosts: Hosts) -> None:
        self.preemption = preemption
        self.keeper = keeper
        self.hosts = hosts

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = batch["step"] + 1
        self.preemption.unsaved = self.keeper.durable_at != step
        self._stop_if_asked(pl_module, step)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The weights are those of the last step: the average is evaluated without a swap."""
        self._stop_if_asked(pl_module, trainer.global_step)

    def _stop_if_asked(self, module: LightningModule, step: int) -> None:
        asked = [reason for reason in self._reasons() if reason is not None]
        if not asked:
            return
        assert isinstance(module, Classification)
        if self.keeper.saved_at != step:
            self.keeper.save(module, step)
        fault = None
        try:
            self.keeper.finish()
        except Failed as error:  # the run could go on, but for the one who asks
            fault = error
        self.hosts.total(0)  # none may be started again while host 0 still writes
        self.preemption.unsaved = False
        self.keeper.monitor.record.write("stopped", step, reason=asked[0])
        if fault is not None:
            raise Interrupted(f"stopped after step {step} ({asked[0]}): {fault}") from fault
        raise Interrupted(f"stopped after step {step}, which is saved ({asked[0]})")

    def _reasons(self) -> list[str | None]:
        """Of every host; one number is exchanged as long as nothing is asked of any."""
        own = self.preemption.reason
        return self.hosts.gather(own) if self.hosts.total(own is not None) else []
