"""A run that is asked to stop: what is saved and recorded first, and on which host."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nfnets_xla import checkpoint
from nfnets_xla.callbacks.stop import Stop
from nfnets_xla.exits import Interrupted
from nfnets_xla.hosts import Hosts
from nfnets_xla.preempt import Preemption
from nfnets_xla.record import read_record
from tests.callbacks.training import Training, opened
from tests.steps import batch


class Asked(Training):
    """With a Stop, which runs after the Checkpointer."""

    preemption: Preemption
    stop: Stop

    def after_step(self) -> None:
        self.step()
        number = self.trainer.global_step - 1
        self.stop.on_train_batch_end(self.trainer, self.task, None, batch(number), 0)

    @property
    def stopped(self) -> list[tuple[int, str]]:
        rows = read_record(self.folder.parent).of_kind("stopped")
        return [(row["step"], row["reason"]) for row in rows]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Asked]:
    with opened(tmp_path, Asked) as made:
        made.preemption = Preemption(25)
        made.stop = Stop(made.preemption, made.keeper, Hosts())
        yield made


def test_a_run_that_is_not_asked_goes_on(run: Asked) -> None:
    """It knows whether anything is unsaved: if not, a signal ends the process at once."""
    run.after_step()
    assert run.preemption.unsaved
    run.keeper.every = 2
    run.after_step()
    assert run.preemption.unsaved  # it is being written, or nobody has looked yet
    run.keeper.saves.wait()
    run.keeper.collect()
    run.stop.on_train_batch_end(run.trainer, run.task, None, batch(1), 0)
    assert not run.preemption.unsaved
    assert run.stopped == []


def test_a_step_is_saved_before_the_run_stops_after_it(run: Asked) -> None:
    run.preemption.reason = "SIGTERM"
    with pytest.raises(Interrupted, match=r"stopped after step 1, which is saved \(SIGTERM\)"):
        run.after_step()
    assert checkpoint.steps(run.folder) == [1]
    assert run.stopped == [(1, "SIGTERM")]
    assert not run.preemption.unsaved


def test_a_step_that_was_saved_anyway_is_saved_once(run: Asked) -> None:
    run.keeper.every = 1
    run.preemption.reason = "SIGTERM"
    with pytest.raises(Interrupted):
        run.after_step()
    record = read_record(run.folder.parent)
    assert [row["step"] for row in record.of_kind("checkpoint")] == [1]


def test_a_run_stops_inside_an_evaluation(run: Asked) -> None:
    run.after_step()
    run.preemption.reason = "SIGINT"
    with pytest.raises(Interrupted, match="stopped after step 1, "):
        run.stop.on_validation_batch_start(run.trainer, run.task, batch(0), 0)
    assert checkpoint.steps(run.folder) == [1]


def test_a_run_that_cannot_save_stops_and_says_so(run: Asked) -> None:
    """The same command may succeed: it is no error of the run."""
    run.folder.mkdir()
    (run.folder / "step-00000001").write_text("in the way")
    run.preemption.reason = "SIGTERM"
    with pytest.raises(Interrupted, match=r"step 1 \(SIGTERM\): step 1 could not be saved in "):
        run.after_step()
    assert run.stopped == [(1, "SIGTERM")]
    assert not run.preemption.unsaved  # or a second signal would wait for a save


class Another(Hosts):
    """One of two hosts, of which the other was asked; notes what is exchanged, and when."""

    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked
        self.exchanged: list[Any] = []

    def total(self, number: int) -> int:
        self.exchanged.append((number, checkpoint.steps(self.asked.folder)))
        return number + 1

    def gather(self, value: Any) -> list[Any]:
        return [value, "maintenance"]


def test_all_hosts_stop_if_one_is_asked_and_end_when_the_step_is_written(run: Asked) -> None:
    """A host that ended before could be restarted while host 0 still writes."""
    run.stop.hosts = hosts = Another(run)
    with pytest.raises(Interrupted, match="maintenance"):
        run.after_step()
    assert hosts.exchanged == [(0, []), (0, [1])]
