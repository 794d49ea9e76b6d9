"""`nfnets-xla checkpoint`: what it verifies, shows and exports, with a real run."""

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nfnets_xla import checkpoint, create_model
from nfnets_xla.cli import main
from nfnets_xla.models.formats import read_metadata
from tests.runs import PLAIN_CPU, RECIPE, SMALL


def test_the_checkpoint_commands(
    tmp_path: Path,
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flushed, fsync = [], os.fsync

    def noted(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    folder, out = tmp_path / "run", tmp_path / "f0.safetensors"
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, "optim.epochs=0.2"]
    main([*arguments, "optim.warmup_steps=1", "trainer.checkpoint_every=1", f"run_dir={folder}"])
    # If a machine stops, a checkpoint must not survive without the steps before it.
    saved = flushed.index(folder / "checkpoints" / "step-00000001")
    assert {folder / "run-1.jsonl", folder / "ledger-1.bin", folder} <= set(flushed[:saved])
    capsys.readouterr()
    main(["checkpoint", "verify", str(folder)])
    assert capsys.readouterr().out.count("verified; ema, model, momentum;") == 2
    main(["checkpoint", "show", str(folder)])
    shown = capsys.readouterr().out
    assert "step               2\n" in shown
    assert "samples            20\n" in shown
    assert "NOT FINITE" not in shown
    main(["checkpoint", "export", str(folder), str(out), "--ema", "--to", "timm"])
    assert "nfnet_mini_f0, 5 classes, in timm's names" in capsys.readouterr().out
    assert not stat.S_IMODE(out.stat().st_mode) & stat.S_IWOTH

    newest = folder / "checkpoints" / "step-00000002"
    (newest / "state.json").unlink()
    for damaged in (folder, newest):
        with pytest.raises(SystemExit) as stopped:
            main(["checkpoint", "verify", str(damaged)])
        assert stopped.value.code == 1
        assert "step-00000002 is not a complete checkpoint: state.json is missing" in (
            capsys.readouterr().out
        )
    with monkeypatch.context() as older:
        older.setattr(checkpoint, "FORMAT", 0)
        with pytest.raises(SystemExit) as stopped:
            main(["checkpoint", "verify", str(folder)])
    assert stopped.value.code == 1
    told = capsys.readouterr().out
    assert "step-00000002 is not a complete checkpoint" in told
    assert "step-00000001 has format 1, of a newer release" in told
    for command in ("show", "verify"):
        with pytest.raises(SystemExit) as stopped:
            main(["checkpoint", command, str(tmp_path / "nothing")])
        assert stopped.value.code == 2
        assert "holds no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "size"), [("vit_mini_d3_4", 16), ("timm/convnext_atto", 32)])
def test_a_peers_weights_are_exported_as_they_are(
    name: str, size: int, tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, out, sizes = tmp_path / "run", tmp_path / "out.safetensors", [f"model.name={name}"]
    sizes += [f"data.image_size={size}", f"data.eval_image_size={size}"]
    given = ["vit_baseline", *data, *SMALL, *PLAIN_CPU, *sizes, f"run_dir={run_dir}"]
    main([*given, "optim.epochs=0.2", "optim.warmup_steps=1", "optim.cooldown_steps=0"])
    for words, said in (
        (["--to", "timm"], f"is of {name}: timm's names exist only for NFNets; leave out --to"),
        (["--to", "haiku"], f"is of {name}: haiku's names exist only for NFNets; leave out --to"),
        (["--ema"], "holds no moving average: leave out --ema"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["checkpoint", "export", str(run_dir), str(out), *words])
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
    assert not out.exists()
    main(["checkpoint", "export", str(run_dir), str(out)])
    assert f"{out}: {name}, as it was saved, from {run_dir}" in capsys.readouterr().out
    assert read_metadata(out) == {
        "model": name,
        "names": "ours",
        "provenance": f"{name}, update 2",
    }
    net = create_model(name, checkpoint_path=out, num_classes=5, image_size=size)
    (newest, *_) = sorted((run_dir / "checkpoints").iterdir(), reverse=True)
    saved = load_file(newest / "model.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in net.state_dict().items())
    with pytest.raises(SystemExit) as stopped:
        main(["checkpoint", "export", str(run_dir), str(out)])
    assert stopped.value.code == 2
    assert "give --force to overwrite it" in capsys.readouterr().err
    evaluate = ["evaluate_demo", data[1], *SMALL, *PLAIN_CPU, *sizes, f"model.init_from={out}"]
    main([*evaluate, f"run_dir={tmp_path / 'evaluated'}"])
    assert f"{out}: loss" in capsys.readouterr().out
