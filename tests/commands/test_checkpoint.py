"""`nfnets-xla checkpoint`: what it verifies, shows and exports of a real run."""

import os
import stat
from pathlib import Path

import pytest

from nfnets_xla import checkpoint
from nfnets_xla.cli import main
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
    # A machine that stops must not leave a checkpoint without the steps before it.
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
