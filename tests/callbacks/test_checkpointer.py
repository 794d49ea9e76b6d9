"""What a run saves after a step and after an evaluation, and what it says of it."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfnets_xla.exits import Failed
from nfnets_xla.record import read_record
from tests.callbacks.training import Training, opened


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Training]:
    with opened(tmp_path) as made:
        yield made


def test_an_evaluation_is_saved_if_it_is_better_than_the_best(training: Training) -> None:
    """By the average's loss, if there is one; one that is not finite, or equal, is not better."""
    saved = []
    for loss in (math.inf, math.nan, 0.5, 0.5, 0.7, 0.2):
        training.step()
        saved.append(training.evaluate(loss))
    assert saved == [[], [], [3], [3], [3], [6, 3]]
    best = {step: training.state(step)["best"] for step in (3, 6)}
    assert best == {3: {"step": 3, "loss": 0.5}, 6: {"step": 6, "loss": 0.2}}


def test_the_best_is_not_kept_unless_that_is_asked_for(training: Training) -> None:
    training.keeper.keep_best = False
    training.step()
    assert training.evaluate(0.5) == []
    training.keeper.save(training.task, 1)
    training.keeper.finish()
    assert "best" not in training.state(1)


def test_a_state_counts_what_was_missed_up_to_its_step(training: Training) -> None:
    """A later batch, which has come already, is counted by the start that resumes from there."""
    training.step()
    training.missed.trained += 5
    training.missed._by_step[2] = 5
    training.keeper.save(training.task, 1)
    training.keeper.finish()
    assert training.state(1)["missed"] == 0
    assert training.state(1)["of"] == 1


def test_a_checkpoint_that_fails_is_told_after_the_next_step(training: Training) -> None:
    """Once, and recorded; the run goes on, and ends with an error if its last one fails."""
    training.folder.mkdir()
    (training.folder / "step-00000001").write_text("in the way")
    training.step()
    training.keeper.save(training.task, 1)
    training.keeper.saves.wait()
    assert training.said == []
    training.step()
    (line,) = training.said
    assert line.startswith("warning: step 1 could not be saved (")
    (row,) = read_record(training.folder.parent).of_kind("checkpoint_failed")
    assert row["step"] == 1
    training.keeper.save(training.task, 2)
    training.keeper.finish()
    (training.folder / "step-00000003").write_text("in the way")
    training.step()
    training.keeper.save(training.task, 3)
    with pytest.raises(Failed, match="step 3 could not be saved in "):
        training.keeper.finish()
