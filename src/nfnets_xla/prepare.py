"""Before the first step: the plan of a run, then its objects on this machine."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from nfnets_xla import checkpoint
from nfnets_xla.backend import Backend
from nfnets_xla.checkpoint import Checkpoint
from nfnets_xla.config import Run
from nfnets_xla.data.batches import TrainBatches
from nfnets_xla.data.order import Order
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.display import Say
from nfnets_xla.exits import Interrupted
from nfnets_xla.history import Past, past_of, record_before
from nfnets_xla.hosts import Hosts
from nfnets_xla.inputs import (
    check_cache,
    count_classes,
    make_order,
    make_train_batches,
    open_shards,
)
from nfnets_xla.models.registry import Network
from nfnets_xla.network import initial_weights, make_model, make_task, put_on_device, restore
from nfnets_xla.optim.passes import Passes
from nfnets_xla.optim.schedule import Schedule
from nfnets_xla.record import CHECKPOINTS, Row, RunRecord, has_record, read_record
from nfnets_xla.resume import Beginning, find_resume, installed
from nfnets_xla.saves import try_to_write
from nfnets_xla.sources import Weights
from nfnets_xla.steps import make_passes, make_schedule
from nfnets_xla.task import Classification

# ---- what the run is, whatever it runs on -----------------------------------------------------


@dataclass(frozen=True)
class Plan:
    run: Run
    folder: Path
    index: ShardIndex
    held_out: ShardIndex | None
    num_classes: int
    order: Order
    schedule: Schedule
    passes: Passes

    @property
    def num_steps(self) -> int:
        return self.order.num_steps

    @cached_property
    def identity(self) -> dict[str, Any]:
        """A checkpoint belongs to this run if its identity is equal; see resume.py."""
        shards = {"shards": self.index.fingerprint, "num_classes": self.num_classes}
        return {**self.run.identity(), **shards}

    @property
    def beginning(self) -> Beginning:
        model = self.run.model
        names = ("init_from", "init_weights", "pretrained")
        given = {name: getattr(model, name) for name in names}
        return Beginning(given, lambda: which(self.run, initial_weights(self.run)))

    @cached_property
    def checkpoints(self) -> str:
        return self.run.trainer.checkpoint_dir or str(self.folder / CHECKPOINTS)

    def find_start(self, say: Say) -> Checkpoint | None:
        given, versions = self.run.resume, installed()
        known = self.identity, self.beginning, self.order, versions
        return find_resume(given, self.checkpoints, self.folder, *known, say)


def make_plan(run: Run) -> Plan:
    """ValueError for settings that do not fit together, before any device is opened."""
    if run.run_dir is None:
        raise ValueError("run_dir is not set; it must name the folder the run is to be kept in")
    check_cache(run)
    index, held_out = open_shards(run)
    num_classes = count_classes(run, index, held_out)
    order = make_order(run, index)
    schedule, passes = make_schedule(run, order), make_passes(run, order)
    return Plan(run, Path(run.run_dir), index, held_out, num_classes, order, schedule, passes)


def which(run: Run, initial: Weights | None) -> str | None:
    """The initial weights: their SHA-256, the tag of public ones, or None if random."""
    return run.model.pretrained if initial is None else initial.sha256


# ---- what it is made of, on this machine ------------------------------------------------------


@dataclass(frozen=True)
class Ready:
    plan: Plan
    start: Checkpoint | None
    start_id: str  # unique to this start, and stored in its checkpoints
    past: Past
    saved_to: int  # the newest step known to have been saved, even if that is gone now
    begun_with: dict[str, Any] | None
    backend: Backend
    net: Network  # on the host, with the weights of `start`
    dataset: TrainBatches
    task: Classification

    @property
    def hosts(self) -> Hosts:
        return self.backend.hosts


def prepare(plan: Plan, start: Checkpoint | None, say: Say) -> Ready:
    """Writes nothing until all hosts have read the folder as it was, and agree."""
    run = plan.run
    torch.manual_seed(run.seed)  # for the initial weights only; no step draws from it
    if start is None:
        initial = initial_weights(run)
        begun_with = replace(plan.beginning, which=lambda: which(run, initial)).state()
        tell_of_other_weights(plan, begun_with, say)
    else:  # the initial weights are not needed again, and may be gone
        begun_with, initial = start.state.get("begun_with"), None
    net = make_model(run, plan.num_classes, initial, say)
    backend = put_on_device(net, run)
    record = record_before(start, plan.folder)
    past = find_past(plan, start, record, say)
    saved_to = max(newest_saved(plan, record), past.step)
    task = make_task(
        net,
        run,
        backend,
        getattr(torch, run.model.compute_dtype),
        schedule=plan.schedule,
        passes=plan.passes,
        restored=None if start is None else restore(net, start, run),
    )
    dataset = make_train_batches(
        run,
        plan.index,
        plan.order,
        plan.num_classes,
        drop_path_rates=net.stochastic_depth_rates,
        num_features=net.num_features,
        hosts=backend.hosts,
    )
    agree(plan, backend.hosts, past, begun_with)
    backend.hosts.by_writer(lambda: try_to_write(plan.checkpoints))  # before any other write
    if run.trainer.compile_cache and not backend.cache_compilations(plan.folder / "compiled"):
        say(f"compile cache: off, {backend.device_kind} could not read it back")
    start_id = uuid.uuid4().hex
    return Ready(plan, start, start_id, past, saved_to, begun_with, backend, net, dataset, task)


def tell_of_other_weights(plan: Plan, begun_with: dict[str, Any], say: Say) -> None:
    """Warn if the initial weights have changed since the run was first started. If it ended before
    its first checkpoint, it can only begin again, with the current weights."""
    if not has_record(plan.folder):
        return
    before = read_record(plan.folder).opening.get("begun_with") or begun_with
    if before["given"] == begun_with["given"] and before["which"] != begun_with["which"]:
        say(
            f"warning: {plan.run.model.init_from} holds other weights ({begun_with['which']}) than "
            f"when {plan.folder} was begun ({before['which']}), and nothing was saved since: the "
            "run starts again, with the present weights"
        )


def newest_saved(plan: Plan, record: RunRecord | None) -> int:
    """The newest step that has, or once had, a checkpoint; 0: none."""
    return max([*checkpoint.complete(plan.checkpoints), 0 if record is None else record.saved])


def find_past(plan: Plan, start: Checkpoint | None, record: RunRecord | None, say: Say) -> Past:
    """What earlier starts recorded. `best` is dropped if it was on other held-out samples."""
    saved = [] if start is None else [start.step, *checkpoint.steps(plan.checkpoints)]
    past = past_of(start, record, saved)
    if start is None or record is None or plan.held_out is None:
        return past
    other = other_held_out(record.line, start.step, plan.held_out.fingerprint)
    if other == start.step:
        say(
            f"warning: data.eval_shards holds other samples than up to step {other}: held-out "
            "losses before and after do not compare, and the best checkpoint is chosen anew"
        )
    if past.best is not None and past.best[0] <= other:
        return replace(past, best=None)
    return past


def other_held_out(headers: Sequence[Row], step: int, now: str) -> int:
    """The last step up to `step` that was evaluated on samples with another fingerprint than `now`.

    0: none. Only steps that no later start replaced count. Records of older releases do not name
    their held-out samples, and are ignored.
    """
    found = 0
    for place, header in enumerate(headers):
        begun = header["resumed_from"]
        last = min([step, *(later["resumed_from"] for later in headers[place + 1 :])])
        if last > begun and header.get("held_out") not in (now, None):
            found = max(found, last)
    return found


def agree(plan: Plan, hosts: Hosts, past: Past, begun_with: dict[str, Any] | None) -> None:
    """Raises ValueError on every host if they do not run the same run in the same folder. Raises
    Interrupted if they would resume from different steps: a host may have listed the folder while
    the last start still wrote, or a network share may have shown it an outdated listing."""
    held_out = None if plan.held_out is None else plan.held_out.fingerprint
    read = {"the training samples": plan.index.fingerprint, "the held-out samples": held_out}
    hosts.agree({**plan.run.shared(), **read, "the number of classes": plan.num_classes})
    begun_at = hosts.gather(past.step)
    if len({*begun_at}) > 1 or len({*map(str, hosts.gather(past.best))}) > 1:
        seen = checkpoint.steps(plan.checkpoints)
        if not set.intersection(*map(set, hosts.gather(seen))):  # each has its own folder
            hosts.agree({"the checkpoints that they see": seen})
        raise Interrupted(
            f"hosts would go on from different steps ({', '.join(map(str, begun_at))}), since a "
            "checkpoint was still being written: start all of them again"
        )
    hosts.agree({"the weights that they began with": begun_with})
