"""Ends training, after saving, when asked to: see preempt.py.

It does not use Lightning's `should_stop`, which evaluates before it stops (2.6), nor Lightning's
handler of SIGTERM, which uses the device inside a signal handler and ends with exit code 0.
"""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nfnets_xla.callbacks.checkpointer import Checkpointer
from nfnets_xla.exits import Failed, Interrupted
from nfnets_xla.hosts import Hosts
from nfnets_xla.preempt import Preemption
from nfnets_xla.task import Classification


class NoSignals:
    """Replaces Lightning's signal connector, which turns SIGTERM into a clean-looking exit 0."""

    received_sigterm = False

    def register_signal_handlers(self) -> None: ...

    def teardown(self) -> None: ...


class Stop(Callback):
    """Runs after the `Checkpointer`, which may have saved the step already. All hosts stop after
    the same step, whichever of them was asked to."""

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
        """Stopping here is safe: evaluation does not swap weights, so they are the last step's."""
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
        except Failed as error:  # still Interrupted below: the same command may succeed
            fault = error
        self.hosts.total(0)  # no host may end, and be restarted, while host 0 still writes
        self.preemption.unsaved = False
        self.keeper.monitor.record.write("stopped", step, reason=asked[0])
        if fault is not None:
            raise Interrupted(f"stopped after step {step} ({asked[0]}): {fault}") from fault
        raise Interrupted(f"stopped after step {step}, which is saved ({asked[0]})")

    def _reasons(self) -> list[str | None]:
        """The reasons of all hosts; if no host was asked, only one number is exchanged."""
        own = self.preemption.reason
        return self.hosts.gather(own) if self.hosts.total(own is not None) else []
