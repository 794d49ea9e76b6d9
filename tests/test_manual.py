"""`nfnets-xla RECIPE --help`: every setting, its value and its meaning, in 80 columns."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from nfnets_xla.cli import main
from nfnets_xla.compose import composed, to_run
from nfnets_xla.config import setting_names
from nfnets_xla.manual import comments, recipes


def dotted(values: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in values.items():
        found += dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]
    return found


def test_every_setting_has_a_name_and_a_comment() -> None:
    run = to_run(composed("pretrain", ["data.shards=S", "run_dir=R", "optim.epochs=1"]))
    assert set(setting_names()) == set(dotted(asdict(run)))
    said = comments()
    assert list(said) == setting_names()
    assert all(said.values())
    assert said["data.flip"] == "mirror half of the training views"


@pytest.mark.parametrize("name", recipes())
def test_help_says_what_a_recipe_is_and_all_of_its_settings(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    main([name, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: nfnets-xla {name} [key=value ...]\n\n{recipes()[name][:30]}")
    assert re.findall(
        r"^  ([a-z0-9_.]+)=", printed.partition("settings, with")[2], re.MULTILINE
    ) == (setting_names())
    assert "Hydra" not in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_help_shows_what_is_set_and_what_is_swept(capsys: pytest.CaptureFixture[str]) -> None:
    main(["pretrain", "-h", "optim.epochs=3", "model=vit"])
    printed = capsys.readouterr().out
    assert "  optim.epochs=3 " in printed
    assert "  data.shards=??? " in printed
    assert "  model.name=vit_giant_14 " in printed
    main(["help", "lr_sweep"])
    assert "one run for each of:\n  model.name=nfnet_f0,nfnet_f3" in capsys.readouterr().out


def test_a_persons_own_recipe_has_help_and_is_checked(
    tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text(
        "# Mine.\ndefaults:\n  - pretrain_demo\n  - _self_\noptim:\n  epochs: 3\n"
    )
    main(["mine", "--help", f"--config-dir={tmp_path}"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: nfnets-xla mine [key=value ...]\n\nMine.\n")
    assert "  optim.epochs=3 " in printed
    data = [f"data.shards={shards / 'train'}", "optim.warmup_steps=1"]
    main(["check", "mine", *data, "--config-dir", str(tmp_path)])
    assert "epochs       3 in views" in capsys.readouterr().out
