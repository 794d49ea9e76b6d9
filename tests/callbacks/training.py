"""A run's callbacks around a task that is stepped and evaluated without a Trainer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from nfnets_xla import checkpoint
from nfnets_xla.callbacks.checkpointer import Checkpointer
from nfnets_xla.callbacks.missed import Missed
from nfnets_xla.callbacks.skips import Skips
from nfnets_xla.hosts import Hosts
from nfnets_xla.record import RecordWriter
from nfnets_xla.saves import Saves
from tests.steps import PLAIN, batch, task


class Training:
    """The task, and the Checkpointer that saves it."""

    def __init__(self, folder: Path, record: RecordWriter, saves: Saves) -> None:
        self.folder = folder
        self.said: list[str] = []
        self.task = task(**PLAIN)
        self.trainer: Any = SimpleNamespace(global_step=0)
        monitor: Any = SimpleNamespace(record=record, write_pending=lambda _: None)
        self.missed = Missed(
            record,
            ceiling=0.5,
            unique_per_step=8,
            train_samples=8000,
            eval_samples=8,
            before=0,
            hosts=Hosts(),
            say=self.said.append,
        )
        self.keeper = Checkpointer(
            saves,
            monitor,
            Skips(record, ceiling=3, before=0, start_step=0, ids=None, say=self.said.append),
            self.missed,
            every=None,
            total_steps=100,
            state=lambda step: {"of": step},
            keep_best=True,
            best=None,
            hosts=Hosts(),
            say=self.said.append,
        )

    def step(self) -> None:
        number = self.trainer.global_step
        self.task.training_step(batch(number), number)
        self.trainer.global_step += 1
        self.keeper.on_train_batch_end(self.trainer, self.task, None, batch(number), 0)

    def evaluate(self, loss: float) -> list[int]:
        """Returns the steps that are saved then."""
        self.task.evaluation = {"raw": {"loss": loss + 1}, "ema": {"loss": loss}}
        self.keeper.on_validation_end(self.trainer, self.task)
        self.keeper.saves.wait()
        return checkpoint.steps(self.folder)

    def state(self, step: int) -> dict[str, Any]:
        return checkpoint.load(self.folder / checkpoint.folder_name(step)).state


Made = TypeVar("Made", bound=Training)


@contextmanager
def opened(folder: Path, kind: type[Made] = Training) -> Iterator[Made]:
    """One that has its record in the folder."""
    checkpoints = folder / "checkpoints"
    with (
        RecordWriter(folder, {"resumed_from": 0}) as record,
        Saves(str(checkpoints), keep=9, every_hours=None) as saves,
    ):
        yield kind(checkpoints, record, saves)
