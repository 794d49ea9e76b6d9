"""What Hydra and OmegaConf refuse becomes one line of ours, which names the fix."""

import shlex
from pathlib import Path

import pytest

from nfnets_xla.cli import main
from tests.test_cli import refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("data.shard=S", "no setting data.shard; did you mean data.shards or"),
        ("batch_size=3", "no setting batch_size; did you mean data.batch_size?"),
        ("trainer.epochs=3", "no setting trainer.epochs; did you mean optim.epochs?"),
        ("qqq=3", "no setting qqq; nfnets-xla RECIPE --help lists them"),
        ("+data.shard=S", "no setting data.shard; did you mean data.shards or"),
        ("--data.shards=S", "no option --data.shards=S: settings have no dashes, data.shards=S"),
        ("--bogus", "no option --bogus (see nfnets-xla pretrain --help)"),
        ("--cfg", "argument --cfg/-c: expected one argument"),
        ("data.shards S", "'data.shards' is no setting: give key=value"),
        ("data.shards=~/x", "no shell expanded the ~; write data.shards=$HOME/x"),
        ("data.shards=/a=b", "cannot be read: quote the value twice, 'data.shards=\"/a=b\"'"),
        (
            "data.shards=a,b",
            "'data.shards=\"a,b\"'; several runs are nfnets-xla RECIPE ... --multirun",
        ),
        ("data.shards=", "data.shards is empty; give a value, or null"),
        ("optim.epochs=one", "optim.epochs is one; it must be a number"),
        ("data.batch_size=1.5", "data.batch_size is 1.5; it must be a whole number"),
        ("model.name=null", "model.name is null; it must have a value: give model.name=VALUE"),
        ("optim=adam", "there is no optim 'adam'; there are demo_finetune_sam, demo_pretrain"),
        ("model.drop_rate='${variant:nope,x}'", "nfnets-xla: there is no model 'nope'; see"),
    ],
)
def test_a_mistake_in_a_setting(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["data.shards=S", "optim.epochs=1", "run_dir=R"]
    assert message in refused(["pretrain", *given, *shlex.split(words)], capsys)


@pytest.mark.parametrize("place", [0, 1, 3])
def test_options_stand_anywhere_among_settings(
    place: int, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["data.shards=S", "optim.epochs=7", "run_dir=R"]
    words[place:place] = ["--cfg", "job", "-p", "optim"]
    main(["pretrain", *words])
    assert "\nepochs: 7" in capsys.readouterr().out


def test_what_a_shell_leaves_to_be_quoted_twice_is_read(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "a=b, (c)"
    odd.symlink_to(shards / "train")
    given = [f'data.shards="{odd}"', "optim.warmup_steps=1"]
    main(["check", "pretrain_demo", *given])
    assert f"100 images in 7 of {odd}" in capsys.readouterr().out
    main(["shards", "show", str(odd), "--out", str(tmp_path / "x.png"), "--rows=1"])
    assert "8 views" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "this is no YAML: "),
        ("- a\n", "the file: "),
        ("nam: x\n", "there is no setting nam; did you mean name?"),
        ("spot: maybe\n", "spot is maybe; it must be true or false"),
        ("", "not set: fill in the file"),
    ],
)
def test_a_mistake_in_a_file_of_settings(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    assert message in refused(["launch", "watch", str(file)], capsys)


def test_a_recipe_that_is_nowhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(["mine", "--config-dir", str(tmp_path)], capsys)
    assert "there is no recipe 'mine', neither in the folder of --config-dir nor here" in message
    absent = refused(["mine", "--config-dir", str(tmp_path / "absent")], capsys)
    assert "config directory" in absent


@pytest.mark.parametrize("recipe", ["pretrain", "evaluate", "throughput", "lr_sweep", "smoke"])
@pytest.mark.parametrize("address", ["s3://b/r/", "gs:/b/r"])
def test_a_run_has_a_folder_and_no_address(
    recipe: str,
    address: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only checkpoints may be at an address. The second value is what Path makes of gs://b/r."""
    monkeypatch.chdir(tmp_path)
    given = ["data.shards=S", "data.eval_shards=E", "model.name=nfnet_f0", "optim.epochs=1"]
    given += [f"run_dir={address}"] + ["model.init_from=W"] * (recipe == "evaluate")
    assert refused([recipe, *given], capsys) == (
        f"nfnets-xla: run_dir is {address}, an address: give a folder that all hosts see, and "
        f"trainer.checkpoint_dir={address.rstrip('/')}/checkpoints"
    )
    assert not list(tmp_path.iterdir())
