"""The callbacks that write what is kept of a training: record, curves, ledger, checkpoints."""

from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from lightning.pytorch import Callback

from nfnets_xla.callbacks.checkpointer import Checkpointer
from nfnets_xla.callbacks.missed import Missed
from nfnets_xla.callbacks.monitor import Monitor, Trace
from nfnets_xla.callbacks.skips import Skips
from nfnets_xla.curves import Curves, NoCurves
from nfnets_xla.data.batches import TrainBatches
from nfnets_xla.display import Display, Say
from nfnets_xla.exits import Interrupted
from nfnets_xla.history import (
    continuation,
    flush_history,
    past_of,
    record_before,
    refuse_half_a_history,
    take_history,
)
from nfnets_xla.hosts import Hosts
from nfnets_xla.ledger import Ledger, head_of
from nfnets_xla.models.registry import count_parameters
from nfnets_xla.models.stacked import is_stacked
from nfnets_xla.prepare import Ready
from nfnets_xla.record import Discard, RecordWriter, has_record
from nfnets_xla.resume import RunState, adopt, installed, is_in
from nfnets_xla.saves import Saves
from nfnets_xla.steps import ascent_share
from nfnets_xla.task import Batch
from nfnets_xla.trainer import make_monitor


@dataclass(frozen=True)
class Watch:
    record: RecordWriter | Discard
    skips: Skips
    monitor: Monitor
    keeper: Checkpointer
    missed: Missed
    callbacks: list[Callback]  # in the order in which they are called


def open_watch(ready: Ready, display: Display, open_files: ExitStack) -> Watch:
    """Opens the files that a start writes; nothing was written before, except a trial file."""
    plan, run, past, hosts = ready.plan, ready.plan.run, ready.past, ready.hosts
    record = open_record(ready, open_files)
    curves = NoCurves()
    if isinstance(record, RecordWriter):
        curves = Curves(plan.folder, record.attempt, past.step, run.trainer.tensorboard)
    open_files.enter_context(closing(curves))
    skips = Skips(
        record,
        ceiling=run.optim.max_skipped,
        before=past.skipped,
        start_step=past.step,
        ids=ready.dataset.ids if hosts.writes else None,
        say=display.say,
    )
    monitor = make_monitor(
        run,
        ready.net,
        ready.backend,
        plan.passes,
        plan.num_steps,
        record,
        display,
        curves=curves,
        skips=skips,
        trace=make_trace(ready.dataset, hosts) if run.trainer.trace_samples else None,
        lost_seconds=past.lost_seconds,
    )
    missed = Missed(
        record,
        ceiling=run.data.max_missed,
        unique_per_step=plan.order.unique_per_step,
        train_samples=plan.order.total_draws,
        eval_samples=0 if plan.held_out is None else plan.held_out.num_samples,
        before=past.missed,
        hosts=hosts,
        say=display.say,
    )
    keeper = open_keeper(ready, monitor, skips, missed, display.say, open_files)
    # The monitor comes first: it measures a batch's arrival before the hosts communicate.
    callbacks: list[Callback] = [monitor, missed, keeper]
    if run.trainer.ledger:
        ledger = Ledger(plan.folder, record.attempt, head_of(plan.order, past.step), hosts)
        callbacks.insert(0, open_files.enter_context(closing(ledger)))
    return Watch(record, skips, monitor, keeper, missed, callbacks)


def open_record(ready: Ready, open_files: ExitStack) -> RecordWriter | Discard:
    """Raises ValueError, on every host, if another start is writing into the folder."""

    def opened() -> RecordWriter:
        writer = RecordWriter(ready.plan.folder, header(ready), partial(take_over, ready))
        return open_files.enter_context(writer)

    return ready.hosts.by_writer(opened) or Discard()


def take_over(ready: Ready) -> None:
    """Copy the history and checkpoint that this start resumes from. Raises Interrupted if another
    start has written into the folder meanwhile."""
    folder, start, root = ready.plan.folder, ready.start, ready.plan.checkpoints
    # Without a record here the past is another folder's, whose run may still be training.
    # `best` is not compared: prepare.find_past drops it if it is of other held-out samples.
    found = past_of(start, record_before(start, folder), ())
    now, then = (replace(past, best=None) for past in (found, ready.past))
    if has_record(folder) and now != then:
        raise Interrupted(
            f"another start has written into {folder} while this one was preparing: start again, "
            "to go on from what is there now"
        )
    if start is None:
        refuse_half_a_history(folder)
    else:
        take_history(start, folder)
    flush_history(folder)  # all of it once; later checkpoints flush only this start's files
    if start is not None and not is_in(root, start):
        adopt(root, start)  # the run then no longer depends on the other folder


def open_keeper(
    ready: Ready,
    monitor: Monitor,
    skips: Skips,
    missed: Missed,
    say: Say,
    open_files: ExitStack,
) -> Checkpointer:
    plan, trainer = ready.plan, ready.plan.run.trainer
    saves = Saves(
        plan.checkpoints,
        keep=trainer.keep_checkpoints,
        every_hours=trainer.keep_every_hours,
        start=ready.past.step,
        writes=ready.hosts.writes,
        before=partial(flush_history, plan.folder, monitor.record.attempt),
    )
    state = RunState(
        plan.identity,
        plan.order,
        installed(),
        seconds_before=ready.past.seconds,
        begun_with=ready.begun_with,
        start=ready.start_id,
        resumed_from=ready.past.step,
    )
    return Checkpointer(
        open_files.enter_context(saves),
        monitor,
        skips,
        missed,
        every=trainer.checkpoint_every,
        total_steps=plan.num_steps,
        state=state.at,
        keep_best=trainer.keep_best,
        best=ready.past.best,
        hosts=ready.hosts,
        say=say,
    )


def make_trace(dataset: TrainBatches, hosts: Hosts) -> Trace:
    """Joins the hosts' samples of a global batch, in the order of its streams."""

    def trace(batch: Batch) -> dict[str, list]:
        parts = hosts.gather(dataset.samples_shown(batch))
        return {name: [entry for part in parts for entry in part[name]] for name in parts[0]}

    return trace


def header(ready: Ready) -> dict[str, Any]:
    """The record's first row: everything needed to know which run its numbers are from."""
    plan, run, net, backend = ready.plan, ready.plan.run, ready.net, ready.backend
    return {
        "start": ready.start_id,
        **continuation(ready.start),
        "saved_to": ready.saved_to,
        "config": asdict(run),
        "begun_with": ready.begun_with,
        "fingerprint": plan.index.fingerprint,
        "held_out": None if plan.held_out is None else plan.held_out.fingerprint,
        "num_classes": plan.num_classes,
        "num_steps": plan.num_steps,
        "parameters": count_parameters(net),
        "stacked": is_stacked(net),
        "macs_per_image": net.macs(run.data.image_size),
        "ascent_share": ascent_share(run, plan.passes),
        "device_kind": backend.device_kind,
        "num_devices": backend.num_devices,
        "hosts": backend.hosts.count,
        "peak_flops": backend.peak_flops,
        "versions": installed(),
    }
