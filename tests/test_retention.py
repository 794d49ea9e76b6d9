"""Which checkpoints stay, and which make room."""

from pathlib import Path

import pytest

from nfnets_xla import checkpoint
from nfnets_xla.data.storage import Folder
from nfnets_xla.retention import prune
from tests.test_checkpoint import flipped_bit, no_manifest, save


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    no_manifest(tmp_path / "step-00000003")
    prune(tmp_path, start=0, written=[1, 2, 3, 4], keep=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["step-00000002", "step-00000004"]
    prune(tmp_path, start=0, written=[1, 2, 3, 4], keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_what_is_left_of_old_ones_goes_where_there_are_just_enough(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    no_manifest(tmp_path / "step-00000001")
    prune(tmp_path, start=0, written=[1, 2, 3], keep=2)
    assert checkpoint.steps(tmp_path) == [3, 2]


def test_what_a_kill_left_of_a_file_goes_with_its_checkpoint(tmp_path: Path) -> None:
    """But not other programs' files, such as .nfs files of a file that is open elsewhere."""
    for step in (1, 2, 3):
        save(tmp_path, step)
    (tmp_path / "step-00000001" / f".manifest.json.{'0a' * 16}").touch()
    (tmp_path / "step-00000002" / ".nfs0000000000000a").touch()
    prune(tmp_path, start=0, written=[1, 2, 3], keep=1)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]
    assert len([*(tmp_path / "step-00000002").iterdir()]) == 1


def test_the_manifest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a deletion is interrupted, half a checkpoint never looks whole."""
    gone, remove = [], Folder.remove

    def noted(folder: Folder, name: str) -> None:
        gone.append(name)
        remove(folder, name)

    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(Folder, "remove", noted)
    prune(tmp_path, start=0, written=[1, 2], keep=1)
    assert gone[0] == "step-00000001/manifest.json"
    assert len(gone) == 3


def test_the_best_and_one_of_every_few_hours_stay(tmp_path: Path) -> None:
    """A checkpoint every 40 minutes of the run's time; one of every two hours is kept."""
    for step in range(1, 10):
        save(tmp_path, step, seconds=2400.0 * step)
    prune(tmp_path, start=8, written=[9], keep=2, every_hours=2, best=[5, None])
    assert checkpoint.steps(tmp_path) == [9, 8, 6, 5, 3]  # 2 h are over at step 3, 4 h at 6
    prune(tmp_path, start=8, written=[9], keep=1, best=[6])
    assert checkpoint.steps(tmp_path) == [9, 6]


def test_a_state_that_cannot_be_read_now_costs_no_checkpoint(tmp_path: Path) -> None:
    """Here a folder in its place gives an OSError, as a failing disk does."""
    for step in range(1, 7):
        save(tmp_path, step, seconds=3600.0 * step)
    (tmp_path / "step-00000005" / "state.json").unlink()  # it is no checkpoint
    state = (tmp_path / "step-00000002" / "state.json").rename(tmp_path / "aside")
    (tmp_path / "step-00000002" / "state.json").mkdir()
    prune(tmp_path, start=5, written=[6], keep=1, every_hours=2)
    assert checkpoint.steps(tmp_path) == [6, 4, 3, 2]  # 3 in place of 2
    (tmp_path / "step-00000002" / "state.json").rmdir()
    state.rename(tmp_path / "step-00000002" / "state.json")
    prune(tmp_path, start=5, written=[6], keep=1, every_hours=2)
    assert checkpoint.steps(tmp_path) == [6, 4, 2]


def test_what_does_not_verify_takes_nobodys_place(tmp_path: Path) -> None:
    """A start resumed from step 4, because 9 was damaged; the one before has a torn state, too."""
    for step in (1, 2, 3, 4, 9):
        save(tmp_path, step, seconds=3600.0 * step)
    flipped_bit(tmp_path / "step-00000009")
    (tmp_path / "step-00000003" / "state.json").write_text('{"step": ')
    save(tmp_path, 6, seconds=21600.0)
    prune(tmp_path, start=4, written=[6], keep=1, every_hours=2)
    assert checkpoint.steps(tmp_path) == [9, 6, 4, 2]
    found, skipped = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.step, len(skipped)) == (6, 1)
    save(tmp_path, 10)  # past the damaged one, which is still not a checkpoint
    prune(tmp_path, start=4, written=[6, 10], keep=2)
    assert checkpoint.steps(tmp_path) == [10, 6]
