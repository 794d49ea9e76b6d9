"""Rates over an interval, computed from clocks and counts that the test sets."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from nfnets_xla import create_model
from nfnets_xla.backend import open_backend
from nfnets_xla.callbacks import monitor
from nfnets_xla.callbacks.monitor import Monitor, Peaks, _Interval, clipped_by_block
from nfnets_xla.compose import composed, to_run
from nfnets_xla.curves import NoCurves
from nfnets_xla.display import Lines, summary
from nfnets_xla.models.registry import create_network
from nfnets_xla.optim import SGD_AGC, parameter_roles
from nfnets_xla.optim.passes import Passes
from nfnets_xla.record import Discard
from nfnets_xla.task import Classification
from nfnets_xla.trainer import make_monitor, make_trainer
from tests.runs import PLAIN_CPU
from tests.steps import PLAIN, batch, task


def test_rates_are_of_the_interval_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now)
    interval = _Interval({"executions": 7, "execute_seconds": 3.0, "fallbacks": {"aten::x": 1}})
    for _ in range(4):
        interval.batch_asked()
        now += 0.5
        interval.batch_came()
        now += 1.5
        interval.step_went(images=10)
    counts = {"executions": 11, "execute_seconds": 5.0, "fallbacks": {"aten::x": 1}}
    assert interval.rates(Peaks(1000.0, 30.0, 40.0), counts) == {
        "images_per_second": 5.0,  # 40 in 8 s
        "step_ms": 2000.0,
        "mfu": 0.15,
        "hfu": 0.2,
        "data_wait_share": 0.25,
        "executions": 4,
        "execute_ms": 500.0,  # per step
    }


def test_waiting_for_data_is_not_what_other_callbacks_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    class Others(Callback):
        """Stands for hosts that decide about a batch, and for checkpoints."""

        def on_train_batch_start(self, *_: Any, **__: Any) -> None:
            nonlocal now
            now += 2

        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            nonlocal now
            now += 8

    run = to_run(composed("pretrain_demo", ["data.shards=S", "run_dir=R", *PLAIN_CPU]))
    backend = open_backend(run.trainer)
    net = create_network("nfnet_mini_f0", num_classes=3)
    task = Classification(net, run.optim, compute_dtype=torch.float32, fetch=backend.fetch)
    passes = Passes(images=8, views=1)
    watched = make_monitor(run, net, backend, passes, 100, Discard(), Lines())
    trainer = make_trainer(run, backend, [watched, Others()], num_steps=100)
    callbacks: Any = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now)
    for callback in callbacks:
        callback.on_train_start(trainer, task)
    for step in range(4):
        now += 1  # waiting for data
        for callback in callbacks:
            callback.on_train_batch_start(trainer, task, {}, step)
        now += 9
        for callback in callbacks:
            callback.on_train_batch_end(trainer, task, None, {"step": step}, step)
    assert watched._interval.rates(Peaks(None, 1.0, 1.0), {})["data_wait_share"] == 4 / 80


def test_a_peak_that_is_not_known_gives_no_share() -> None:
    assert Peaks(None, 30.0, 40.0).shares(5.0) == {"mfu": None, "hfu": None}


def test_the_account_of_a_run_for_a_person() -> None:
    row: dict[str, Any] = {"images_per_second": 812.3, "step_ms": 39.4, "mfu": 0.4, "hfu": 0.5}
    row |= {"data_wait_share": 0.02, "lost_seconds": 75.0, "compilations": 2, "executions": 44}
    row |= {"compile_seconds": 46.2, "tensors_to_host": 9, "fallbacks": {"aten::nonzero": 3}}
    assert summary(row) == [
        "typical step: 39 ms, 812 images/s, MFU 40.0%, HFU 50.0%, waiting for data 2%",
        "compiled 2 graphs in 46 s; 44 executions, 9 reads from the device; operations that ran on "
        "the host: aten::nonzero",
        "lost to restarts: 0:01:15",
    ]
    assert summary({"lost_seconds": 0.0}) == []  # resumed at its last step, on a CPU


def test_clipping_is_told_by_block_and_weighed_by_units() -> None:
    net = create_model("nfnet_mini_f0", num_classes=3)
    sgd = SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=0.1)
    for parameter in net.parameters():
        parameter.grad = torch.zeros(parameter.shape)
    net.get_parameter("stages.2.1.conv1.weight").grad[:7] = 1e3  # pyright: ignore[reportOptionalSubscript]
    net.get_parameter("stem.0.gain").grad.fill_(1e3)  # pyright: ignore[reportOptionalMemberAccess]
    sgd.step()
    assert sgd.clipped_P is not None
    row = clipped_by_block(sgd, sgd.clipped_P.tolist())
    units = {n: count for n, count in sgd.units().items() if n in sgd.clipped_names}
    of_block = sum(count for name, count in units.items() if name.startswith("stages.2.1."))
    of_stem = sum(count for name, count in units.items() if name.startswith("stem.0."))
    assert row["blocks"] == {
        "stem.0": round(1 / of_stem, 4),
        "stages.2.1": round(7 / of_block, 4),
    }
    assert row["share"] == round(8 / sum(units.values()), 6)


def test_an_evaluation_is_no_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of a minute lies between two steps of a second each."""
    now = 0.0
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: now)
    rows: list[dict[str, Any]] = []
    record = Discard()
    record.write = lambda kind, step, **row: rows.append({"kind": kind, **row})  # type: ignore[method-assign]
    of = task(**PLAIN)
    watched = Monitor(
        record, NoCurves(), Lines(lambda _: None), skips=None, total_steps=2, epochs=1.0,
        log_every=1, batch_size=16, trace=None, peaks=Peaks(None, 1.0, 1.0), totals=dict,
        lost_seconds=0.0,
    )  # fmt: skip
    trainer: Any = SimpleNamespace(global_step=1)
    for step in range(2):
        watched.on_train_batch_start(trainer, of, {}, step)
        of.training_step(batch(step), step)
        now += 1
        watched.on_train_batch_end(trainer, of, None, {"step": step}, step)
        if step == 0:
            now += 60
            watched.on_validation_end(trainer, of)
            watched.batch_asked()
    watched.on_train_end(trainer, of)
    assert [row["images_per_second"] for row in rows if row["kind"] == "train"] == [16, 16]
    rates = [row["learning_rate"] for row in rows if row["kind"] == "train"]
    assert rates == [of.learning_rate(0), of.learning_rate(1)]
