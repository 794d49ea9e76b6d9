"""A training run, top to bottom: plan, find the checkpoint to resume from, prepare, fit.

Everything is built once, in the order in which it is needed. Whatever can be refused is refused
before anything is written.
"""

import sys
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from nfnets_xla.callbacks.stop import Stop
from nfnets_xla.config import Run
from nfnets_xla.data.loader import Batches
from nfnets_xla.display import Display, Lines, Say, plural, summary
from nfnets_xla.exits import Interrupted, Unreachable
from nfnets_xla.history import ended
from nfnets_xla.inputs import make_eval_loader
from nfnets_xla.models.registry import count_parameters
from nfnets_xla.preempt import Preemption
from nfnets_xla.prepare import Ready, make_plan, prepare
from nfnets_xla.record import has_record
from nfnets_xla.steps import describe_ascent
from nfnets_xla.trainer import make_trainer
from nfnets_xla.watch import open_watch


def train(
    run: Run, display: Display | None = None, preemption: Preemption | None = None
) -> dict[str, Any]:
    """Train, or resume training, in `run.run_dir`; returns the last row of the record.

    The caller enters `display`, by default plain lines. If the folder holds checkpoints of the same
    run, training resumes from the newest that verifies; if the run is finished, its last row is
    returned; a folder of another run is a ValueError. If `preemption`, already started, asks to
    stop, Interrupted is raised once the current step is saved. If an address does not answer,
    Interrupted is raised as well, but a ValueError before the run has begun.
    """
    try:
        return train_now(run, display or Lines(), preemption)
    except Unreachable as error:
        if run.run_dir is not None and has_record(Path(run.run_dir)):
            raise Interrupted(str(error)) from error
        raise


def train_now(run: Run, display: Display, preemption: Preemption | None) -> dict[str, Any]:
    plan = make_plan(run)
    start = plan.find_start(display.say)
    if start is not None and start.step == plan.num_steps and (end := ended(plan.folder)):
        display.say(f"{plan.folder} holds this run, finished")
        return end
    ready = prepare(plan, start, display.say)
    if not ready.hosts.writes:
        display = Lines(lambda _: None)
    introduce(ready, display.say)
    result = fit(ready, display, preemption)
    for line in summary(result):
        display.say(line)
    display.say(f"finished after {plan.num_steps} steps; everything is in {plan.folder}")
    return result


def introduce(ready: Ready, say: Say) -> None:
    plan, run, backend = ready.plan, ready.plan.run, ready.backend
    epochs = f"{run.optim.epochs:g} epoch{'' if run.optim.epochs == 1 else 's'}"
    say(
        f"{run.model.name}: {count_parameters(ready.net):,} parameters; "
        f"{plan.index.num_samples:,} images in {plural(plan.index.num_shards, 'shard')}; "
        f"{plural(plan.num_steps, 'step')} of {run.data.batch_size} rows ({epochs}) on "
        f"{backend.num_devices} x {backend.device_kind}"
    )
    if run.optim.sam_rho is not None:
        say(f"SAM ascends on {describe_ascent(plan.passes)}")


def fit(ready: Ready, display: Display, preemption: Preemption | None) -> dict[str, Any]:
    """Train from the starting step to the last; all that is kept is in the run's folder."""
    plan, past, task = ready.plan, ready.past, ready.task
    with ExitStack() as open_files:
        loader, eval_loader = open_loaders(ready, open_files)
        watch = open_watch(ready, display, open_files)
        callbacks = watch.callbacks
        if preemption is not None:
            preemption.grace = plan.run.trainer.grace
            if plan.run.trainer.maintenance is not None:
                preemption.poll(plan.run.trainer.maintenance)
            callbacks = [*callbacks, Stop(preemption, watch.keeper, ready.hosts)]
        trainer = make_trainer(
            plan.run,
            ready.backend,
            callbacks,
            num_steps=plan.num_steps,
            start_step=past.step,
        )
        every = plan.run.trainer.eval_every or plan.num_steps
        if past.step and (past.step % every == 0 or past.step == plan.num_steps):
            watch.monitor.evaluated_at = max(past.evaluated, default=0)
            # Else the last start ended before this evaluation.
            if watch.monitor.evaluated_at != past.step:
                trainer.num_sanity_val_steps = sys.maxsize
        trainer.fit(task, loader, eval_loader)
        if eval_loader is not None and watch.monitor.evaluated_at != plan.num_steps:
            trainer.validate(task, eval_loader, verbose=False)
        watch.keeper.finish()
        if preemption is not None:
            preemption.unsaved = False  # all is saved, and no step follows
        counts = {"missed": watch.missed.trained, "skipped": watch.skips.count}
        result = {"steps": plan.num_steps, **counts, **watch.monitor.summary()}
        result |= ready.backend.report()
        watch.record.write("end", plan.num_steps, **result)
    return result


def open_loaders(ready: Ready, open_files: ExitStack) -> tuple[Batches, Batches | None]:
    plan, run = ready.plan, ready.plan.run
    loader = Batches(
        ready.dataset,
        start_step=ready.past.step,
        stop_step=plan.num_steps,
        workers=run.data.workers,
        pin_memory=ready.backend.pin_memory,
    )
    open_files.enter_context(closing(loader))
    if plan.held_out is None:
        return loader, None
    eval_loader = make_eval_loader(run, plan.held_out, plan.num_classes, ready.hosts)
    return loader, open_files.enter_context(closing(eval_loader))
