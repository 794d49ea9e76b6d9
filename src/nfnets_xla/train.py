"""A training run, top to bottom: shards, order, folder, device, model, task, trainer, fit.

Everything that a run is made of is built here, once, in the order in which it is needed; all that
can be refused is refused before anything is written.
"""

import json
import logging
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, Trainer

from nfnets_xla.backend import Backend, open_backend
from nfnets_xla.config import Run
from nfnets_xla.curves import Curves, NoCurves
from nfnets_xla.data.batches import TrainBatches
from nfnets_xla.data.loader import Batches
from nfnets_xla.data.order import Order
from nfnets_xla.display import Display, Lines, summary
from nfnets_xla.hooks import Checkpointer
from nfnets_xla.hosts import Hosts
from nfnets_xla.inputs import (
    check_cache,
    count_classes,
    make_eval_loader,
    make_order,
    make_train_batches,
    open_shards,
)
from nfnets_xla.ledger import Ledger, head_of
from nfnets_xla.missed import Missed, missed_before
from nfnets_xla.models.registry import Network, count_parameters
from nfnets_xla.models.stacked import is_stacked
from nfnets_xla.monitor import Monitor, Peaks
from nfnets_xla.network import choose_form, make_model, restore
from nfnets_xla.preempt import Preemption
from nfnets_xla.record import Discard, RecordWriter, has_record, read_record
from nfnets_xla.resume import (
    RunState,
    ended,
    evaluations,
    find_resume,
    history,
    installed,
    take_history,
)
from nfnets_xla.saves import Saves
from nfnets_xla.skips import Skips
from nfnets_xla.steps import describe_ascent, make_passes, make_schedule, train_flops
from nfnets_xla.stop import NoSignals, Stop
from nfnets_xla.task import Batch, Classification


def train(
    run: Run, display: Display | None = None, preemption: Preemption | None = None
) -> dict[str, Any]:
    """Train, or go on training, in `run.run_dir`; returns the record's closing line.

    `display`, entered by the caller, shows it; there are plain lines without one. A folder that
    holds checkpoints of the same run is resumed from the newest that verifies; of a finished one
    the closing line is returned. A folder of another run is a ValueError. `preemption`, started,
    may ask to stop: then Interrupted is raised once the last step is saved.
    """
    display = display or Lines()
    say = display.say
    if run.run_dir is None:
        raise ValueError("run_dir is not set; it must name the folder the run is to be kept in")
    check_cache(run)
    index, held_out = open_shards(run)
    num_classes = count_classes(run, index, held_out)
    order = make_order(run, index)
    schedule = make_schedule(run, order)  # refuses a warm-up that does not fit
    passes = make_passes(run, order)
    identity = {**run.identity(), "shards": index.fingerprint, "num_classes": num_classes}
    folder = Path(run.run_dir)
    root, versions = run.trainer.checkpoint_dir or str(folder / "checkpoints"), installed()
    resume = find_resume(run.resume, root, folder, identity, order, versions, say)
    if resume is not None and resume.step == order.num_steps and (end := ended(folder)):
        say(f"{folder} holds this run, finished")
        return end
    torch.manual_seed(run.seed)  # of the initial weights; nothing in the step draws from it
    net = make_model(run, num_classes, say)
    backend = open_backend(run.trainer, parameter_bytes=4 * count_parameters(net))
    hosts = backend.hosts
    check_division(run, backend)
    dataset = make_train_batches(
        run,
        index,
        order,
        num_classes,
        drop_path_rates=net.stochastic_depth_rates,
        num_features=net.num_features,
        hosts=hosts,
    )
    choose_form(net, run, backend)
    start_step, restored = (0, None) if resume is None else (resume.step, restore(net, resume, run))
    # Nothing is written before all hosts have seen the folder as it was.
    hosts.agree("what they are to run", [identity, start_step])
    if run.trainer.compile_cache and not backend.cache_compilations(folder / "compiled"):
        say(f"compile cache: off, {backend.device_kind} could not read it back")
    if not hosts.writes:
        display = Lines(lambda _: None)
        say = display.say
    say(
        f"{run.model.name}: {count_parameters(net):,} parameters; {index.num_samples:,} images in "
        f"{index.num_shards} shards; {order.num_steps} steps of {run.data.batch_size} rows "
        f"({run.optim.epochs:g} epochs) on {backend.num_devices} x {backend.device_kind}"
    )
    if run.optim.sam_rho is not None:
        say(f"SAM ascends on {describe_ascent(passes)}")
    task = Classification(
        net,
        run.optim,
        schedule=schedule,
        passes=passes,
        compute_dtype=getattr(torch, run.model.compute_dtype),
        fetch=backend.fetch,
        add_up=backend.add_up,
        compile=backend.compile,
        restored=restored,
        remembered_steps=run.trainer.log_every,  # as often they are read
    )
    loader = Batches(
        dataset,
        start_step=start_step,
        stop_step=order.num_steps,
        workers=run.data.workers,
        pin_memory=backend.accelerator == "cuda",
    )
    eval_loader = None if held_out is None else make_eval_loader(run, held_out, num_classes, hosts)
    opening = header(run, identity, order, net, backend, start_step)
    past = folder if resume is None else history(resume, folder)
    before = missed_before(past, start_step)
    lost_seconds = read_record(past).seconds_lost if start_step and has_record(past) else 0.0
    evaluated = evaluations(past, start_step)
    if resume is not None and hosts.writes:
        take_history(resume, folder)
    state = RunState(identity, order, versions, resume.state["seconds"] if resume else 0.0)
    with (
        RecordWriter(folder, opening) if hosts.writes else Discard() as record,
        Saves(
            root,
            keep=run.trainer.keep_checkpoints,
            every_hours=run.trainer.keep_every_hours,
            writes=hosts.writes,
        ) as saves,
        closing(loader),
        closing(eval_loader) if eval_loader else nullcontext(),
        closing(make_curves(run, folder, record, start_step)) as curves,
        ExitStack() as open_files,
    ):
        if hosts.writes:
            (folder / "config.json").write_text(json.dumps(asdict(run), indent=1))
        skips = Skips(
            record,
            ceiling=run.optim.max_skipped,
            before=0 if restored is None else restored.skipped,
            start_step=start_step,
            ids=dataset.ids,
            say=say,
        )
        monitor = Monitor(
            record,
            curves,
            display,
            skips=skips,
            total_steps=order.num_steps,
            epochs=run.optim.epochs,
            log_every=run.trainer.log_every,
            batch_size=run.data.batch_size,
            trace=make_trace(dataset, hosts) if run.trainer.trace_samples else None,
            peaks=Peaks(backend.peak_flops, *train_flops(net, run, passes.effective_fraction)),
            totals=backend.report,
            lost_seconds=lost_seconds,
        )
        keeper = Checkpointer(
            saves,
            monitor,
            skips,
            every=run.trainer.checkpoint_every,
            total_steps=order.num_steps,
            state=state.at,
            keep_best=run.trainer.keep_best,
            evaluated=evaluated,
            say=say,
        )
        missed = Missed(
            record,
            ceiling=run.data.max_missed,
            unique_per_step=order.unique_per_step,
            train_samples=order.total_draws,
            eval_samples=0 if held_out is None else held_out.num_samples,
            before=before,
            hosts=hosts,
            say=say,
        )
        callbacks: list[Callback] = [missed, monitor, keeper]
        if run.trainer.ledger:
            ledger = Ledger(folder, record.attempt, head_of(order, start_step), hosts)
            callbacks.insert(0, open_files.enter_context(closing(ledger)))
        if preemption is not None:
            preemption.grace = run.trainer.grace
            if run.trainer.maintenance is not None:
                preemption.poll(run.trainer.maintenance)
            callbacks.append(Stop(preemption, keeper, hosts))
        trainer = make_trainer(run, backend, order.num_steps, callbacks)
        restore_progress(trainer, start_step)
        if start_step % (run.trainer.eval_every or order.num_steps) == 0 < start_step:
            monitor.evaluated_at = max(evaluated, default=0)
            if monitor.evaluated_at != start_step:  # the last start ended before it was done
                trainer.num_sanity_val_steps = sys.maxsize
        trainer.fit(task, loader, eval_loader)
        if eval_loader is not None and monitor.evaluated_at != order.num_steps:
            trainer.validate(task, eval_loader, verbose=False)
        keeper.finish()
        if preemption is not None:
            preemption.unsaved = False  # no more steps come, after which it would be set
        totals = monitor.summary() | backend.report()
        counts = {"steps": order.num_steps, "missed": missed.trained, "skipped": skips.count}
        record.write("end", order.num_steps, **(result := counts | totals))
    for line in summary(result):
        say(line)
    say(f"finished after {order.num_steps} steps; everything is in {folder}")
    return result


# ---- resuming ---------------------------------------------------------------------------------


def restore_progress(trainer: Trainer, step: int) -> None:
    """Tell Lightning's loops that `step` updates are done; the loader starts after them.

    Only totals are set: `global_step` (hence `max_steps`) counts the optimizer's steps, and
    validation by step counts batches. What is counted per epoch starts anew with the process.
    """
    loop = trainer.fit_loop.epoch_loop
    updates = loop.manual_optimization.optim_step_progress.total
    updates.ready = updates.completed = step
    batches = loop.batch_progress.total
    batches.ready = batches.completed = step


# ---- what is written --------------------------------------------------------------------------


def make_trace(dataset: TrainBatches, hosts: Hosts) -> Callable[[Batch], dict[str, list]]:
    """Of a global batch: hosts hold its streams one after the other."""

    def trace(batch: Batch) -> dict[str, list]:
        parts = hosts.gather(dataset.samples_shown(batch))
        return {name: [entry for part in parts for entry in part[name]] for name in parts[0]}

    return trace


def make_curves(
    run: Run, folder: Path, record: RecordWriter | Discard, start_step: int
) -> Curves | NoCurves:
    if isinstance(record, Discard):
        return NoCurves()
    return Curves(folder, record.attempt, start_step, run.trainer.tensorboard)


# ---- trainer ----------------------------------------------------------------------------------


def make_trainer(run: Run, backend: Backend, num_steps: int, callbacks: list[Callback]) -> Trainer:
    """Lightning's Trainer counting steps only; its epochs are not epochs of the data."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # The loader has as many workers as the recipe says, and its batches are whole by themselves.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*have no `val_dataloader`.*")
    trainer = Trainer(
        accelerator=backend.accelerator,
        strategy=backend.strategy,
        devices="auto" if backend.device_kind.startswith(("TPU", "XLA")) else 1,
        max_steps=num_steps,
        max_epochs=-1,
        val_check_interval=run.trainer.eval_every or num_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=callbacks,
        inference_mode=False,  # it would forbid the same graph as in training
        plugins=[LightningEnvironment()],  # else it would take torchrun's processes for its own
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer._signal_connector = NoSignals()  # pyright: ignore[reportAttributeAccessIssue]
    return trainer


def check_division(run: Run, backend: Backend) -> None:
    for key in ("batch_size", "eval_batch_size"):
        rows = getattr(run.data, key)
        if rows % backend.num_devices:
            raise ValueError(
                f"data.{key} is {rows}; it must be a multiple of the {backend.num_devices} devices"
            )


def header(
    run: Run,
    identity: dict[str, Any],
    order: Order,
    net: Network,
    backend: Backend,
    start_step: int,
) -> dict[str, Any]:
    """The record's first line: all that is needed to know what the numbers below it are of."""
    return {
        "resumed_from": start_step,
        "config": asdict(run),
        "fingerprint": identity["shards"],
        "num_classes": identity["num_classes"],
        "num_steps": order.num_steps,
        "parameters": count_parameters(net),
        "stacked": is_stacked(net),
        "macs_per_image": net.macs(run.data.image_size),
        "device_kind": backend.device_kind,
        "num_devices": backend.num_devices,
        "hosts": backend.hosts.count,
        "peak_flops": backend.peak_flops,
        "versions": installed(),
    }
