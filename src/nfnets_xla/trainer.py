"""Lightning's Trainer, which here only counts steps; and the monitor that reports on it."""

import logging
import warnings

from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, Trainer

from nfnets_xla.backend import Backend
from nfnets_xla.callbacks.monitor import Monitor, Peaks, Trace, Waits
from nfnets_xla.callbacks.skips import Skips
from nfnets_xla.callbacks.stop import NoSignals
from nfnets_xla.config import Run
from nfnets_xla.curves import Curves, NoCurves
from nfnets_xla.display import Display
from nfnets_xla.models.registry import Network
from nfnets_xla.optim.passes import Passes
from nfnets_xla.record import Discard, RecordWriter
from nfnets_xla.steps import train_flops


def make_trainer(
    run: Run,
    backend: Backend,
    callbacks: list[Callback],
    *,
    num_steps: int = 0,
    start_step: int = 0,
) -> Trainer:
    """A Lightning Trainer that counts only steps; its epochs are not epochs of the data."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # The loader has as many workers as the recipe says, and its batches are whole by themselves.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
    trainer = Trainer(
        accelerator=backend.accelerator,
        strategy=backend.strategy,
        devices=1 if isinstance(backend.accelerator, str) else "auto",  # XLA: the whole mesh
        max_steps=num_steps,
        max_epochs=-1,
        val_check_interval=run.trainer.eval_every or num_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[*callbacks, *(Waits(each) for each in callbacks if isinstance(each, Monitor))],
        inference_mode=False,  # else evaluation would be another graph than in training
        plugins=[LightningEnvironment()],  # else it would manage torchrun's processes
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer._signal_connector = NoSignals()  # pyright: ignore[reportAttributeAccessIssue]
    restore_progress(trainer, start_step)
    return trainer


def restore_progress(trainer: Trainer, step: int) -> None:
    """Tell Lightning's loops that `step` updates are done; the loader starts after them.

    Only totals are set: `global_step` (and so `max_steps`) counts optimizer steps, and validation
    every n steps counts batches. Counts per epoch start at 0 in each process.
    """
    loop = trainer.fit_loop.epoch_loop
    updates = loop.manual_optimization.optim_step_progress.total
    updates.ready = updates.completed = step
    batches = loop.batch_progress.total
    batches.ready = batches.completed = step


def make_monitor(
    run: Run,
    net: Network,
    backend: Backend,
    passes: Passes,
    num_steps: int,
    record: RecordWriter | Discard,
    display: Display,
    *,
    curves: Curves | NoCurves | None = None,
    skips: Skips | None = None,
    trace: Trace | None = None,
    lost_seconds: float = 0.0,
) -> Monitor:
    return Monitor(
        record,
        curves or NoCurves(),
        display,
        skips=skips,
        total_steps=num_steps,
        epochs=run.optim.epochs,
        log_every=run.trainer.log_every,
        batch_size=run.data.batch_size,
        trace=trace,
        peaks=Peaks(backend.peak_flops, *train_flops(net, run, passes)),
        totals=backend.report,
        lost_seconds=lost_seconds,
    )
