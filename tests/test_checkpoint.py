"""A checkpoint exists if and only if its manifest verifies."""

import gc
import itertools
import json
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec import filesystem
from fsspec.config import conf

from nfnets_xla import checkpoint, claims, sources
from nfnets_xla.commands.checkpoint import main as checkpoints
from nfnets_xla.data.storage import Folder
from nfnets_xla.retention import prune
from tests.data.object_store import GCS, S3, storing

FORMS = {"model": {"w": torch.arange(6.0).reshape(2, 3), "gain": torch.tensor(0.5)}}


def save(root: Path, step: int, **state: float) -> Path:
    size = checkpoint.save(root, step, FORMS, {"identity": {"seed": 1}, **state})
    folder = root / f"step-{step:08d}"
    assert size == sum(path.stat().st_size for path in folder.iterdir() if path.name[:3] != "man")
    return folder


def test_round_trip_is_bit_equal(tmp_path: Path) -> None:
    loaded = checkpoint.load(save(tmp_path, 7))
    assert (loaded.step, loaded.state["identity"]) == (7, {"seed": 1})
    tensors = loaded.tensors("model")
    assert tensors.keys() == FORMS["model"].keys()
    assert all(torch.equal(tensors[name], value) for name, value in FORMS["model"].items())
    with pytest.raises(ValueError, match="holds no 'ema' weights; it holds model"):
        loaded.tensors("ema")


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def torn_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text[:-5])


def missing_file(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def short_file(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1])


def flipped_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def changed_state(folder: Path) -> None:
    (folder / "state.json").write_text(json.dumps({"step": 9999}))


def unreadable_manifest(folder: Path) -> None:
    """At address 0 nothing is mapped, so reading the process's memory fails with EIO."""
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to("/proc/self/mem")


def unreadable_file(folder: Path) -> None:
    file, manifest = folder / "model.safetensors", folder / "manifest.json"
    file.unlink()
    file.symlink_to("/proc/self/mem")
    entries = json.loads(manifest.read_text())
    entries[file.name]["bytes"] = file.stat().st_size
    manifest.write_text(json.dumps(entries))


DAMAGE = [no_manifest, torn_manifest, missing_file, short_file, flipped_bit, changed_state]
DAMAGE += [unreadable_manifest, unreadable_file]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_does_not_exist(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    save(tmp_path, 1)
    damaged = save(tmp_path, 2)
    damage(damaged)
    with pytest.raises(ValueError, match="is not a complete checkpoint"):
        checkpoint.load(damaged)
    found, skipped = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(skipped) == 1
    assert "step-00000002" in skipped[0]
    assert checkpoint.load(save(tmp_path, 2)).step == 2  # written anew over the remains


def test_every_flipped_bit_of_a_manifest_is_a_fault(tmp_path: Path) -> None:
    """Or it has no effect: then the checkpoint is the same."""
    folder = save(tmp_path, 1)
    whole, state = (folder / "manifest.json").read_bytes(), checkpoint.load(folder).state
    faults = 0
    for place, bit in itertools.product(range(len(whole)), range(8)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << bit
        (folder / "manifest.json").write_bytes(damaged)
        found = checkpoint.verify_one(folder)
        if isinstance(found, str):
            faults += 1
        else:
            assert (found.state, found.forms) == (state, ["model"]), (place, bit)
    assert faults > 7.5 * len(whole)


def test_a_failure_that_may_pass_names_its_file(tmp_path: Path) -> None:
    """It is not damage: no run may skip that checkpoint."""
    folder = save(tmp_path, 1)
    no_manifest(folder)
    (folder / "manifest.json").mkdir()
    with pytest.raises(IsADirectoryError, match=str(folder / "manifest.json")):
        checkpoint.verify_one(folder)


def test_a_manifest_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    secret = tmp_path / "secret"
    secret.write_text("x")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"../secret": {"bytes": 1}}))
    with pytest.raises(ValueError, match=r"names '\.\./secret', which is no file of this folder"):
        checkpoint.load(folder)


def test_a_newer_format_is_not_misread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "FORMAT", 2)
        folder = save(tmp_path, 2)
    save(tmp_path, 1)
    attempts: list[Callable[[], object]] = [
        lambda: checkpoint.load(folder),
        lambda: checkpoint.latest(tmp_path),  # otherwise a run would continue from an earlier one
        lambda: save(tmp_path, 2),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="step-00000002 has format 2, of a newer release; "):
            attempt()
    assert json.loads((folder / "state.json").read_text())["format"] == 2


def test_a_complete_one_is_left_as_it_is(tmp_path: Path) -> None:
    size = checkpoint.save(tmp_path, 1, FORMS, {})
    assert checkpoint.save(tmp_path, 1, {"model": {"w": torch.zeros(99)}}, {}) == size
    left = checkpoint.load(tmp_path / "step-00000001").tensors("model")
    assert torch.equal(left["w"], FORMS["model"]["w"])


def test_two_runs_do_not_save_in_one_folder(tmp_path: Path) -> None:
    """Whichever step the other run has saved; also if only the initial weights differ."""
    ours: dict[str, Any] = {"identity": {"seed": 1}, "begun_with": {"given": {}, "which": "a"}}
    checkpoint.save(tmp_path, 5, FORMS, ours)
    others = [{**ours, "identity": {"seed": 0}}, {**ours, "begun_with": {"which": "b"}}]
    for step, state in itertools.product((3, 5, 7), others):
        with pytest.raises(claims.OtherRun, match=r"-00000005 is of another run .*: choose ano"):
            checkpoint.save(tmp_path, step, FORMS, state)
    checkpoint.save(tmp_path, 7, FORMS, {**ours, "begun_with": None})  # of an older release
    checkpoint.save(tmp_path, 7, FORMS, ours)  # it is left as it is
    assert checkpoint.steps(tmp_path) == [7, 5]


def test_two_starts_of_a_run_do_not_save_in_turns(tmp_path: Path) -> None:
    """The start that another has overtaken ends; what was there when it began does not count."""
    identity: dict[str, Any] = {"identity": {"seed": 1}}
    first = {**identity, "start": "a", "resumed_from": 0}
    second = {**identity, "start": "b", "resumed_from": 5}
    checkpoint.save(tmp_path, 5, FORMS, first)
    checkpoint.save(tmp_path, 7, FORMS, second)
    for step in (6, 7, 8):
        with pytest.raises(
            claims.OtherStart, match=r"-00000007 was saved by another start of this run"
        ):
            checkpoint.save(tmp_path, step, FORMS, first)
    assert checkpoint.steps(tmp_path) == [7, 5]
    checkpoint.save(tmp_path, 8, FORMS, second)
    checkpoint.save(tmp_path, 9, FORMS, identity)  # from an older release, without names
    checkpoint.save(tmp_path, 10, FORMS, second)
    (tmp_path / "step-00000010" / "model.safetensors").unlink()  # it hides no whole checkpoint
    with pytest.raises(claims.OtherStart, match="-00000008 was saved by another"):
        checkpoint.save(tmp_path, 9, FORMS, first)
    third = {**identity, "start": "c", "resumed_from": 8}
    checkpoint.save(tmp_path, 11, FORMS, third)
    assert checkpoint.steps(tmp_path) == [11, 10, 9, 8, 7, 5]


def test_two_starts_do_not_mix_one_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second saves while the first does, whose late file comes between; the first ends."""
    first: dict[str, Any] = {"start": "a", "resumed_from": 0}
    second = {**first, "start": "b"}
    others = {"model": {"w": torch.full((6,), 3.0)}, "ema": FORMS["model"]}
    real = Folder.writing
    late = threading.Event()

    @contextmanager
    def writing(folder: Folder, name: str) -> Iterator[Path]:
        with real(folder, name) as path:
            yield path
            if threading.current_thread() is thread and name.endswith("model.safetensors"):
                whole = path.read_bytes()
                late.set()
                done.wait()
                path.write_bytes(whole)

    def save_first() -> None:
        with pytest.raises(claims.OtherStart, match="-00000001 is being saved by another"):
            checkpoint.save(tmp_path, 1, others, first)
        ended.set()

    done, ended = threading.Event(), threading.Event()
    thread = threading.Thread(target=save_first)
    monkeypatch.setattr(Folder, "writing", writing)
    thread.start()
    late.wait()
    checked = checkpoint.verify_one

    def once(where: str) -> Any:  # after its manifest the second checks its files
        done.set()
        thread.join()
        monkeypatch.setattr(checkpoint, "verify_one", checked)
        return checked(where)

    monkeypatch.setattr(checkpoint, "verify_one", once)
    checkpoint.save(tmp_path, 1, {"model": FORMS["model"], "ema": FORMS["model"]}, second)
    assert ended.is_set()
    found = checkpoint.load(tmp_path / "step-00000001")
    assert found.state["start"] == "b"
    assert torch.equal(found.tensors("model")["w"], FORMS["model"]["w"])


def test_a_save_that_fails_leaves_what_another_start_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[str, Any] = {"start": "a", "resumed_from": 0}
    real = checkpoint.save_file

    def overtaken(tensors: Any, path: Path) -> None:
        monkeypatch.setattr(checkpoint, "save_file", real)
        checkpoint.save(tmp_path, 1, FORMS, {**first, "start": "b"})
        raise OSError("no space")

    monkeypatch.setattr(checkpoint, "save_file", overtaken)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, 1, FORMS, first)
    assert checkpoint.load(tmp_path / "step-00000001").state["start"] == "b"


@pytest.mark.parametrize("left", [None, b"", b"[]"], ids=["deleted", "torn", "no state"])
def test_a_save_whose_claim_is_gone_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bytes | None
) -> None:
    """Another start has deleted the state, or is writing its own."""
    claim, real = tmp_path / "step-00000001" / "state.json", checkpoint.save_file

    def overtaken(tensors: Any, path: Path) -> None:
        real(tensors, path)
        claim.unlink() if left is None else claim.write_bytes(left)

    monkeypatch.setattr(checkpoint, "save_file", overtaken)
    with pytest.raises(claims.OtherStart, match="-00000001 is being saved by another"):
        checkpoint.save(tmp_path, 1, FORMS, {"start": "a", "resumed_from": 0})
    assert not claim.with_name("manifest.json").exists()


def test_a_damaged_newest_is_of_no_other_run(tmp_path: Path) -> None:
    newest = save(tmp_path, 9)
    state = json.loads((newest / "state.json").read_text())
    changed = ({"identity": {"seed": 3}}, {"start": 2, "step": "9"})
    texts = [json.dumps({**state, **change}) for change in changed]
    for damaged in ("[]", "{", '{"start": 2, "identity": {"seed": 1}}', *texts):
        (newest / "state.json").write_text(damaged)
        save(tmp_path, 7, start=1, resumed_from=0)
    (newest / "state.json").unlink()
    (newest / "state.json").symlink_to("/proc/self/mem")
    save(tmp_path, 6)
    assert checkpoint.steps(tmp_path) == [9, 7, 6]


def test_a_manifest_without_the_state_is_none(tmp_path: Path) -> None:
    manifest = save(tmp_path, 1) / "manifest.json"
    files = json.loads(manifest.read_text())
    del files["state.json"]
    manifest.write_text(json.dumps(files))
    with pytest.raises(ValueError, match=r"does not name state\.json"):
        checkpoint.load(manifest.parent)


def test_files_are_the_users_own(tmp_path: Path) -> None:
    """Files have exactly the permissions that the user's umask gives."""
    old = os.umask(0o077)
    try:
        folder = save(tmp_path / "checkpoints", 1)
    finally:
        os.umask(old)
    assert all(path.stat().st_mode & 0o077 == 0 for path in [folder, *folder.iterdir()])


# ---- at an address ------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["s3", "gs"])
def test_an_object_store_keeps_checkpoints_as_a_disk_does(
    tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Saved, damaged, replaced, pruned and read through s3fs and gcsfs."""
    bucket = tmp_path / "bucket" / "run"
    with storing(tmp_path, {"s3": S3, "gs": GCS}[protocol]) as endpoint:
        options = {"s3": {"anon": True}, "gs": {"token": "anon"}}[protocol]
        monkeypatch.setitem(conf, protocol, {"endpoint_url": endpoint, **options})
        url = f"{protocol}://bucket/run"
        assert checkpoint.latest(url) == (None, [])
        for step in (1, 2, 3):
            checkpoint.save(url, step, FORMS, {"seconds": 0.0})
        flipped_bit(bucket / "step-00000003")
        found, skipped = checkpoint.latest(url)
        assert found is not None
        assert (found.step, str(found)) == (2, f"{url}/step-00000002")
        assert torch.equal(found.tensors("model")["w"], FORMS["model"]["w"])
        assert f"{url}/step-00000003 is not a complete checkpoint: model.safetensors" in skipped[0]
        assert checkpoints(["verify", found.where]) == 0
        assert checkpoints(["verify", f"{url}/step-00000003"]) == 1
        no_manifest(bucket / "step-00000002")
        assert sources.find_weights(url, "raw").source == f"{url}/step-00000001"
        checkpoint.save(url, 3, FORMS, {})
        assert checkpoint.latest(url)[0] is not None
        prune(url, start=0, written=[1, 2, 3], keep=1)
        assert checkpoint.steps(url) == [3]


def test_a_complete_one_at_an_address_with_a_slash_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with storing(tmp_path, S3) as endpoint:
        monkeypatch.setitem(conf, "s3", {"endpoint_url": endpoint, "anon": True})
        for value in (1.0, 2.0):
            checkpoint.save("s3://bucket/run/", 1, {"model": {"w": torch.tensor(value)}}, {})
        found, _ = checkpoint.latest("s3://bucket/run")
        assert found is not None
        assert found.tensors("model")["w"] == 1.0


def test_copies_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of damaged checkpoints go at once, the others when they are read or dropped."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = "memory://copies/run"
    for step in (1, 2):
        checkpoint.save(url, step, FORMS, {})
    filesystem("memory").pipe_file(f"{url}/step-00000002/state.json", b"{}")
    found, skipped = checkpoint.latest(url)
    assert found is not None
    assert (found.step, len(skipped), len(list(tmp_path.iterdir()))) == (1, 1, 1)
    found.release()
    assert (found.step, list(tmp_path.iterdir())) == (1, [])
    found, _ = checkpoint.latest(url)
    assert len(list(tmp_path.iterdir())) == 1
    del found
    gc.collect()
    assert not list(tmp_path.iterdir())
