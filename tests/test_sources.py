"""Where weights are found: in a file, a checkpoint, a folder of checkpoints, a run."""

import shutil
from pathlib import Path

import pytest
import torch

from nfnets_xla import checkpoint, sources
from nfnets_xla.commands.checkpoint import main as checkpoints
from nfnets_xla.ledger import audit
from nfnets_xla.models.registry import create_network
from nfnets_xla.record import RecordWriter, read_record
from nfnets_xla.sweep import model_of
from tests.runs import PLAIN_CPU, RECIPE, SMALL, run
from tests.test_checkpoint import FORMS, save, short_file


def test_weights_are_found_from_a_file_a_checkpoint_or_a_run(tmp_path: Path) -> None:
    folder = save(tmp_path / "checkpoints", 3)
    file = folder / "model.safetensors"
    for given in (file, folder, folder.parent, tmp_path):
        found = sources.find_weights(str(given), "raw")
        assert found.source == str(file if given == file else folder)
        assert torch.equal(found.tensors()["w"], FORMS["model"]["w"])
    with pytest.raises(ValueError, match="holds no ema weights"):
        sources.find_weights(str(tmp_path), "ema")
    with pytest.raises(ValueError, match="holds no weights: give"):
        sources.find_weights(str(tmp_path / "nothing"), "raw")


def test_a_damaged_newest_is_not_passed_over_without_a_word(
    tmp_path: Path, data: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """For every caller; in a run's own process, where Hydra configures logging, on its stderr."""
    net = create_network("nfnet_mini_f0", num_classes=5)
    identity = {"model": {"name": "nfnet_mini_f0"}, "num_classes": 5, "seed": 0, "shards": "f"}
    for step in (1, 2):
        forms = {"model": dict(net.state_dict())}
        checkpoint.save(tmp_path / "checkpoints", step, forms, {"identity": identity})
    short_file(tmp_path / "checkpoints" / "step-00000002")
    said = f"warning: {tmp_path}/checkpoints/step-00000002 is not a complete checkpoint: "
    for given in (tmp_path, tmp_path / "checkpoints"):
        checkpoints(["show", str(given)])
        assert caplog.messages[-1].startswith(f"{said}model.safetensors has ")
    log, command = tmp_path / "log.txt", ["evaluate_demo", *data, *PLAIN_CPU, "data.workers=0"]
    run([*command, f"model.init_from={tmp_path}", "data.shards=null"], log)
    assert log.read_text().count(said) == 1


def test_a_run_that_keeps_its_checkpoints_elsewhere_is_a_run(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """For every command; and where it resumes, its record comes along."""
    log, folder, kept = tmp_path / "log.txt", tmp_path / "run", tmp_path / "kept"
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, "optim.epochs=0.5", "optim.warmup_steps=1"]
    arguments += ["trainer.checkpoint_every=1", "trainer.ledger=true"]
    run([*arguments, f"run_dir={folder}", f"trainer.checkpoint_dir={kept}"], log)
    newest = kept / "step-00000004"
    assert not checkpoints(["verify", str(folder)])
    assert f"{newest}: verified" in capsys.readouterr().out
    checkpoints(["show", str(folder)])
    assert f"{newest}: verified" in capsys.readouterr().out
    checkpoints(["export", str(folder), str(tmp_path / "weights.safetensors")])
    checkpoints(["card", str(folder), str(tmp_path / "card")])
    assert "| held out | top-1" in (tmp_path / "card" / "card.md").read_text()
    assert sources.find_weights(str(folder), "ema").source == str(newest)
    assert model_of(str(folder)) == "nfnet_mini_f0"

    shutil.rmtree(newest)
    for given, branch, told in ((folder, tmp_path / "a", 4), (kept, tmp_path / "b", 1)):
        run([*arguments, f"run_dir={branch}", f"resume={given}"], log)
        assert [row["step"] for row in read_record(branch).of_kind("train")] == [1, 2, 3, 4][-told:]
        assert bool(audit(branch).faults) == (told < 4)
        lacks = f"warning: {branch} will lack the record of the steps up to 3, which is not beside"
        assert (lacks in log.read_text()) == (told < 4)


def test_what_a_record_says_of_checkpoints_is_held_against_them(tmp_path: Path) -> None:
    folder, kept = tmp_path / "run", tmp_path / "kept"
    for number, where in ((1, None), (2, str(kept))):
        head = {"resumed_from": 0, "config": {"seed": 1, "trainer": {"checkpoint_dir": where}}}
        with RecordWriter(folder, head) as record:
            assert record.attempt == number
    (folder / "run-10.jsonl").write_text('{"kind": "header", "conf')  # killed
    with pytest.raises(ValueError, match=f"keeps its checkpoints in {kept}, and there are none"):
        sources.find(folder)
    save(folder / "checkpoints", 1)  # a copy: the folder is another machine's
    assert str(sources.find(folder)) == str(folder / "checkpoints" / "step-00000001")
    save(kept, 2)
    assert str(sources.find(folder)) == str(kept / "step-00000002")
    with RecordWriter(folder, {"resumed_from": 2, "config": {"trainer": {}}}):
        pass  # moved back, and killed before it saved
    shutil.rmtree(folder / "checkpoints")
    assert str(sources.find(folder)) == str(kept / "step-00000002")
    (folder / "run-11.jsonl").unlink()
    save(folder / "checkpoints", 1)
    shutil.rmtree(kept)
    checkpoint.save(kept, 3, FORMS, {"identity": {"seed": 2}})
    with pytest.raises(
        ValueError, match=r"00000003 is of another \(seed: 1 -> 2\): give the folder"
    ):
        sources.find(folder)


def test_an_older_checkpoint_does_not_stand_for_one_on_a_disk_that_is_not_there(
    tmp_path: Path,
) -> None:
    folder, kept = tmp_path / "run", tmp_path / "kept"
    head = {"resumed_from": 1, "num_steps": 9, "config": {"trainer": {"checkpoint_dir": str(kept)}}}
    with RecordWriter(folder, head) as record:
        record.write("checkpoint", 9)
    save(folder / "checkpoints", 1)  # from before it moved
    with pytest.raises(ValueError, match=f"saved step 9 in {kept}, where there is none now, and"):
        sources.find(folder)
    save(folder / "checkpoints", 9)  # a copy of everything
    assert str(sources.find(folder)) == str(folder / "checkpoints" / "step-00000009")
