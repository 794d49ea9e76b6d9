"""What a run leaves behind, however it ends: in which order, for how long, and whose."""

import errno
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem as Memory

from nfnets_xla import checkpoint
from nfnets_xla.callbacks.checkpointer import Checkpointer
from nfnets_xla.callbacks.missed import Missed
from nfnets_xla.callbacks.monitor import Monitor
from nfnets_xla.data import storage
from nfnets_xla.data.remote import Patience, RemoteFolder
from nfnets_xla.data.shards import Exclusions, ShardIndex
from nfnets_xla.display import Lines
from nfnets_xla.exits import Unreachable
from nfnets_xla.history import flush_history, take_history
from nfnets_xla.hosts import Hosts
from nfnets_xla.ledger import Ledger, audit
from nfnets_xla.record import RecordWriter, read_record
from nfnets_xla.resume import find_resume
from nfnets_xla.saves import Saves
from nfnets_xla.watch import open_watch
from tests.test_ledger import ANY, batch
from tests.test_ledger import ORDER as LEDGER_ORDER
from tests.test_resume import FORMS, IDENTITY, ORDER, RANDOM
from tests.test_watch import made_ready


def test_what_is_to_stay_stays_from_save_to_save(tmp_path: Path) -> None:
    """The newest two, and one of every two hours, with a checkpoint every 40 minutes of the run."""
    with Saves(str(tmp_path), keep=2, every_hours=2) as saves:
        for step in range(1, 10):
            saves.save(lambda: (step, FORMS, {"seconds": 2400.0 * step}))  # noqa: B023
            saves.wait()
    assert checkpoint.steps(tmp_path) == [9, 8, 6, 3]


def test_what_was_written_of_an_unfinished_checkpoint_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second file; safetensors has its own class of error for that."""
    save, saved = checkpoint.save_file, []

    def full(tensors: Any, path: Path) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise SafetensorError("Error while serializing: No space left on device")
        save(tensors, path)

    class SafetensorError(Exception):
        pass

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(SafetensorError):
        checkpoint.save(tmp_path, 1, {**FORMS, "ema": FORMS["model"]}, {})
    assert list(tmp_path.iterdir()) == []


def test_an_address_that_does_not_answer_is_waited_for_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not a second time to delete the parts that arrived: the next save deletes them."""
    down, asked = threading.Event(), Counter[str]()

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*given: Any, **options: Any) -> Any:
            asked[name] += 1
            if name == "put_file" and asked[name] == 2:
                down.set()
            if down.is_set():
                raise OSError("no route to host")
            return real(*given, **options)

        return answer

    # fsspec's own address for tests, which disappears between two files of one checkpoint.
    for name in ("put_file", "find", "pipe_file", "rm_file", "cat_file"):
        monkeypatch.setattr(Memory, name, watched(name, getattr(Memory, name)))
    patience = Patience(total=0.5, first_wait=0.1, timeout=10)
    monkeypatch.setattr(RemoteFolder.__init__, "__defaults__", (None, patience))
    forms = {"model": FORMS["model"], "momentum": FORMS["model"]}
    with pytest.raises(Unreachable, match=r"could not be had in 0\.5 s"):
        checkpoint.save("memory://kept", 5, forms, {})
    assert (asked["find"], asked["rm_file"]) == (2, 0)  # what is there; this step's files
    down.clear()
    checkpoint.save("memory://kept", 5, forms, {})
    assert checkpoint.steps("memory://kept") == [5]


def test_all_of_a_checkpoint_is_on_the_disk_before_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a machine stops, it must not leave a manifest whose files are missing; nor a manifest's
    name without its file."""
    flushed: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        flushed.append("a part" if path.name.startswith(".") else path.name)
        fsync(descriptor)

    def renamed(part: Path, name: Path) -> Path:
        flushed.append(f"as {name.name}")
        return replace(part, name)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", renamed)
    root = tmp_path / "checkpoints"
    checkpoint.save(root, 1, {"model": FORMS["model"], "ema": FORMS["model"]}, {})
    step = "step-00000001"
    assert flushed == [
        *("checkpoints", "state.json", "model.safetensors", "ema.safetensors"),
        *("a part", "as manifest.json", step),
    ]


def test_what_a_checkpoint_builds_on_is_brought_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the beginning all that a start builds on, then what it writes; and the folder with the
    names."""
    names = ["ledger-1.bin", "ledger-2.bin", "missed-2.jsonl", "run-1.jsonl", "run-2.jsonl"]
    for name in (*names, "curves.txt"):
        (tmp_path / name).touch()
    flushed: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    flush_history(tmp_path)
    assert sorted(flushed) == [*names, tmp_path.name]
    flushed.clear()
    flush_history(tmp_path, 2)
    assert sorted(flushed) == ["ledger-2.bin", "missed-2.jsonl", "run-2.jsonl", tmp_path.name]


def test_a_start_that_went_on_from_a_step_tells_of_it(tmp_path: Path) -> None:
    """The start that saved step 2 was killed before its record said so."""
    root, known = str(tmp_path / "checkpoints"), (IDENTITY, RANDOM, ORDER, {"torch": "1"})
    for resumed_from in (0, 2):
        with RecordWriter(tmp_path, {"resumed_from": resumed_from}) as record:
            record.write("train", resumed_from + 1, loss=1.0)
    with pytest.raises(ValueError, match=f"was saved up to step 2, and {root} lacks it"):
        find_resume("auto", root, tmp_path, *known, print)


def test_a_history_that_was_half_taken_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be killed at any time: files that are there are whole, and the next start takes the
    rest."""
    source, copy = tmp_path / "source", shutil.copyfile
    checkpoint.save(source / "checkpoints", 2, FORMS, {})
    (start,) = checkpoint.verify(source / "checkpoints")
    assert not isinstance(start, str)
    names = ["ledger-1.bin", "ledger-2.bin", "missed-1.jsonl", "run-1.jsonl", "run-2.jsonl"]
    for name in names:
        (source / name).write_text(f"all of {name}")

    for number in range(len(names)):
        branch, copied = tmp_path / f"branch-{number}", []

        def killed(file: Path, to: Path, number: int = number, copied: list = copied) -> None:
            if len(copied) == number:
                Path(to).write_text("half of")
                raise KeyboardInterrupt
            copied.append(copy(file, to))

        monkeypatch.setattr(shutil, "copyfile", killed)
        with pytest.raises(KeyboardInterrupt):
            take_history(start, branch)
        assert all(path.read_text() == f"all of {path.name}" for path in there(branch))
        monkeypatch.setattr(shutil, "copyfile", copy)
        take_history(start, branch)
        assert [path.name for path in there(branch)] == names
        assert all(path.read_text() == f"all of {path.name}" for path in there(branch))
    branch = tmp_path / "branch-0"
    (source / "run-2.jsonl").write_text("it has gone on")  # this run must ignore it
    take_history(start, branch)
    assert (branch / "run-2.jsonl").read_text() == "all of run-2.jsonl"


def there(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix != ".part")


def test_a_file_that_cannot_be_finished_leaves_the_one_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    folder = storage.Folder(tmp_path)
    folder.write("index.npz", b"before")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        folder.write("index.npz", b"after")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"index.npz": b"before"}


def test_what_is_looked_at_first_is_looked_at_with_the_folder_locked(tmp_path: Path) -> None:
    looked: list[bool] = []

    def first() -> None:
        with pytest.raises(ValueError, match="a run is going on on this machine"):
            RecordWriter(tmp_path, {"resumed_from": 0})
        looked.append((tmp_path / "run-1.jsonl").exists())

    with RecordWriter(tmp_path, {"resumed_from": 0}, first) as record:
        assert record.attempt == 1
    assert looked == [False]


def test_a_header_that_does_not_fit_leaves_the_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full; a later start ignores the partial file."""

    def full(*_: object, **fields: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(RecordWriter, "write", full)
        with pytest.raises(OSError, match="No space left on device"):
            RecordWriter(tmp_path, {"resumed_from": 0})
    with RecordWriter(tmp_path, {"resumed_from": 0}) as record:
        assert record.attempt == 2
    assert len(read_record(tmp_path).headers) == 1


class Two(Hosts):
    """Host 0 of two; the other host has shown the other half of each batch."""

    other: list[list[int]]

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]


def test_the_ledger_has_the_samples_of_all_hosts(tmp_path: Path) -> None:
    hosts = Two(0, 2)
    head = {"resumed_from": 0, "samples": 100, "draws": LEDGER_ORDER.total_draws}
    ledger = Ledger(tmp_path, 1, {**head, "steps": LEDGER_ORDER.num_steps}, hosts)
    for step in range(LEDGER_ORDER.num_steps):
        whole = batch(step)
        ours = {name: whole[name][:8] for name in ("sample_U", "epoch_U", "weight_U")}
        real = whole["weight_U"][8:] > 0
        theirs = np.stack([whole["epoch_U"][8:][real], whole["sample_U"][8:][real]], axis=1)
        object.__setattr__(hosts, "other", theirs.tolist())
        ledger.on_train_batch_end(ANY, ANY, None, {**whole, **ours}, step)
    ledger.close()
    found = audit(tmp_path)
    assert (found.faults, found.shown) == ([], {0: 100, 1: 100, 2: 50})


def test_what_is_saved_goes_on_from_what_was(tmp_path: Path, data: list[str]) -> None:
    keeping = ["trainer.keep_every_hours=6", "trainer.keep_checkpoints=4", "trainer.ledger=true"]
    ready = made_ready(tmp_path, [*data, *keeping])
    past, begun_with = replace(ready.past, step=3, seconds=100.0), {"given": {}, "which": "a"}
    with ExitStack() as open_files:
        watch = open_watch(replace(ready, past=past, begun_with=begun_with), Lines(), open_files)
        state, saves = watch.keeper.state(4), watch.keeper.saves
        assert state["seconds"] >= 100
        assert state["begun_with"] == begun_with
        assert (saves.keep, saves.every_hours, saves.start) == (4, 6, 3)
        # What a checkpoint builds on is written before it.
        assert [type(each) for each in watch.callbacks] == [Ledger, Monitor, Missed, Checkpointer]


def test_the_fingerprint_knows_of_which_shard_a_row_is_excluded(shards: Path) -> None:
    index = ShardIndex.load(shards / "train")
    one, other = (
        replace(index, exclusions=Exclusions(np.array([s]), np.array([1]), np.array([2], "<u4")))
        for s in (0, 1)
    )
    assert len({index.fingerprint, one.fingerprint, other.fingerprint}) == 3
