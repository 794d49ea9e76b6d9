"""Mistakes at the command line: one line that names the fault and the fix, exit code 2."""

import configparser
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from nfnets_xla import commands, create_model
from nfnets_xla.cli import COMMANDS, EXTRAS, main, recipes, usage
from nfnets_xla.commands.shards import ELSEWHERE
from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.version import __version__
from tests.data.images import packed, samples
from tests.runs import PLAIN_CPU, RECIPE, SMALL
from tests.runs import samples as run_samples


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == code
    error = capsys.readouterr().err.strip()
    assert error.startswith("nfnets-xla: ")
    assert "\n" not in error
    assert "Traceback" not in error
    return error


def levels(command: list[str], capsys: pytest.CaptureFixture[str]) -> int:
    """Asks for help at this level and all below; returns the number of levels."""
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0
    assert printed.startswith(f"usage: nfnets-xla {' '.join(command)} ")
    assert max(map(len, printed.splitlines())) <= 80, command
    wordless = re.findall(r"^  (-\S.*|\w+)\n(?!    )", printed, re.MULTILINE)
    assert [line for line in wordless if "  " not in line] == [], command
    below = "COMMAND" in printed or "KIND" in printed
    names = re.findall(r"^    (\w+) ", printed, re.MULTILINE) if below else []
    return 1 + sum(levels([*command, name], capsys) for name in names)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_at_every_level(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    expected = {"shards": 13, "checkpoint": 5, "scaling": 4, "launch": 12}
    assert levels([command], capsys) == expected.get(command, 1)


def test_every_module_with_words_of_its_own_is_a_command() -> None:
    folder = Path(commands.__file__).parent
    found = {path.stem for path in folder.glob("*.py") if "\ndef main(" in path.read_text()}
    assert found == {*COMMANDS, *ELSEWHERE}


def test_examples_in_help_keep_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["shards", "dedup", "--help"])
    assert "\n    nfnets-xla shards dedup JFT --within --out dedup\n" in capsys.readouterr().out


def test_help_and_version_are_there_without_torch_or_extras() -> None:
    """After `pip install nfnets_xla` models can be listed; other commands name what they need."""
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({[*EXTRAS]!r}))\n"
        "from nfnets_xla.cli import main\n"
        "main(['--help']); main(['--version']); main(['help'])\n"
        "assert 'torch' not in sys.modules\n"
        "main(['models', 'nfnet_f0'])\n"
        "main(['pretrain', 'data.shards=S'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"nfnets_xla {__version__}" in done.stdout
    assert "71,489,284" in done.stdout
    needed = "pretrain needs hydra, which is not installed: pip install 'nfnets_xla[train]'"
    assert done.stderr == f"nfnets-xla: {needed}\n"


def test_every_package_of_the_extras_is_named_by_its_extra() -> None:
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    imported = {"hydra-core": "hydra", "pillow": "PIL", "faiss-cpu": "faiss"}
    for extra in ("train", "remote", "dedup", "scaling"):
        for line in setup["options.extras_require"][extra].split():
            package = re.split(r"[\[<>=]", line)[0]
            name = imported.get(package, package)
            if name not in ("nfnets_xla", "hydra"):  # Hydra is in two
                assert EXTRAS[name] == extra


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_is_one_line_and_nothing_stays(tmp_path: Path, number: int, code: int) -> None:
    words = ["shards", "pack", "fractals", str(tmp_path / "out"), "--per-class=100000"]
    # Jobs that a shell starts with & ignore SIGINT, and so do all their children.
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{hears}; from nfnets_xla.cli import main; main()"
    command = [sys.executable, "-c", program, *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not any(tmp_path.iterdir()):  # until it packs
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        _, error = process.communicate()
    assert (process.returncode, error) == (code, "nfnets-xla: interrupted\n")
    assert not any(tmp_path.iterdir())


def test_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-m", "nfnets_xla", "scaling", "plan", "--core-hours=9"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    advice = "free some, and give the same command again"
    assert done.stderr == f"nfnets-xla: No space left on device; {advice}\n"
    assert done.returncode == 1


def test_help_lists_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    printed = capsys.readouterr().out
    assert printed.strip() == usage().strip()
    for name in ("pretrain", "finetune_sam", "evaluate", "pretrain_demo"):
        assert name in recipes()
        assert f"  {name} " in printed


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["models", "nfnet_f7*"])
    assert "829.55M" in capsys.readouterr().out
    main(["models", "nfnet_f3"])
    assert "trained at 320 px, evaluated at 416 px" in capsys.readouterr().out
    assert "there is no model 'swin*'" in refused(["models", "swin*"], capsys)
    near = "no model matches 'net_f7': there are nfnet_f7, "
    assert near in refused(["models", "net_f7"], capsys)


def test_a_reader_that_has_seen_enough_is_no_fault() -> None:
    command = [sys.executable, "-m", "nfnets_xla", "models"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()  # before the first line
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_wrong_path_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "absent")
    for command in (
        ["shards", "index", absent],
        ["shards", "lint", absent],
        ["shards", "pack", "table", f"{absent}.csv", str(tmp_path / "out")],
        ["shards", "show", absent],
        ["audit", absent],
        ["checkpoint", "show", absent],
        ["scaling", "fit", absent],
        ["launch", "create", f"{absent}.yaml"],
        ["convert", f"{absent}.npz", str(tmp_path / "out"), "--model", "nfnet_f0"],
        ["pretrain_demo", f"data.shards={absent}", f"run_dir={tmp_path / 'run'}"],
        ["shards", "pack", "fractals", "/proc/none", "--classes=1", "--per-class=1", "--size=8"],
        ["shards", "pack", "fractals", __file__, "--classes=1", "--per-class=1", "--size=8"],
        ["shards", "index", "x" * 256],
    ):
        refused(command, capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["model.name=nfnet_f9"], "no model 'nfnet_f9'; did you mean"),
        (["model.name=timm/vit_x", "model.drop_path_rate=0"], "timm has no model 'vit_x'"),
        (["model.name=timm/test_vit"], "timm's layers draw their own randomness"),
        (["model.width=3"], "width"),
        (["data.batch_size=many"], "many"),
        (["data.batch_size=18"], "do not divide among 4 streams"),
        (["data.repeats=3"], "it must be a multiple of data.repeats (3)"),
        (["data.randaugment_magnitude=25"], "randaugment_magnitude is 25; it must be in [1, 20]"),
        (["data.mix=all"], "data.mix is 'all'; it must be one of none, mixup_cutmix"),
        (["data.num_streams=16"], "mixing needs 2 and an even number of streams"),
        (["data.num_classes=4"], "holds label 4: labels must be below it; raise data.num_classes"),
        (["optim.epochs=0"], "optim.epochs is 0.0; it must be greater than 0"),
        (["optim.epochs=inf"], "optim.epochs is inf; it must be greater than 0 and at most 1e6"),
        (["optim.epochs=1e300"], "optim.epochs is 1e+300; it must be greater than 0 and at most"),
        (["optim.peak_lr=inf"], "optim.peak_lr is inf; it must be greater than 0 and finite"),
        (["optim.sam_rho=inf"], "optim.sam_rho is inf; it must be greater than 0 and finite"),
        (["model.head_bias=nan"], "model.head_bias is nan; it must be finite"),
        (["optim.warmup_steps=500"], "warmup_steps is 500"),
        (["optim.warmup_epochs=1"], "given as warmup_steps=2, warmup_epochs=1.0; give exactly one"),
        (["optim.cooldown_steps=2"], "cooldown_steps is 2 with the cosine schedule, which ends"),
        (["optim.schedule=step"], "optim.schedule is 'step'; it must be one of cosine, constant"),
        (["optim.optimizer=abacus"], "optim.optimizer is 'abacus'; it must be one of sgd, adamw"),
        (["optim.optimizer=adamw"], "beta2 is None with optim.optimizer=adamw; it is a setting of"),
        (["optim.beta2=0.9"], "beta2 is 0.9 with optim.optimizer=sgd; it is a setting of adamw"),
        (["optim.loss=hinge"], "optim.loss is 'hinge'; it must be one of softmax, sigmoid"),
        (["optim.accumulation=3"], "a batch has 4 images of each stream, which 3 parts"),
        (["optim.sam_ascent_fraction=0"], "sam_ascent_fraction is 0.0; it must be in (0, 1]"),
        (["optim.sam_rho=null", "optim.sam_microbatches=2"], "it is an option of SAM"),
        (["model.drop_rate=1"], "model.drop_rate is 1.0; it must be in [0, 1)"),
        (["model.compute_dtype=float8"], "must be one of float32, bfloat16"),
        (["model.init_from=nowhere"], "'nowhere' holds no weights"),
        (["trainer.device=abacus"], "must be one of auto, xla, cuda, cpu"),
        (["trainer.virtual_devices=4"], "virtual devices exist only with trainer.device=xla"),
        (["data.shards=nowhere"], "nowhere is not a folder: give one"),
        (
            ["data.shards=gs://bucket/x"],
            "gs://bucket/x is read through a cache, and data.cache_dir",
        ),
        (["data.cache_dir=gs://bucket/x"], "gs://bucket/x is an address: give a local folder here"),
        (["data.cache_dir=/proc/cache"], "data.cache_dir is /proc/cache, which cannot be made"),
        (["data.cache_bytes=0"], "data.cache_bytes is 0.0; it must be greater than 0"),
        (["run_dir=null"], "run_dir is not set"),
        (["data.shards=null"], "data.shards is not set"),
        (["seed=-1"], "seed is -1"),
    ],
)
def test_a_value_that_cannot_work_is_refused_before_anything_is_written(
    tmp_path: Path,
    data: list[str],
    capsys: pytest.CaptureFixture[str],
    change: list[str],
    message: str,
) -> None:
    run_dir = tmp_path / "run"
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, f"run_dir={run_dir}", *change]
    assert message in refused(arguments, capsys)
    assert not run_dir.exists()


@pytest.mark.parametrize("more", [[], ["data.num_classes=7"]])
def test_weights_that_know_fewer_classes_than_the_shards_are_refused(
    more: list[str], tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the command line's settings in the message, however they are set."""
    file = tmp_path / "weights.safetensors"
    save_file(create_model("nfnet_mini_f0", num_classes=4).state_dict(), file)
    small = [option for option in SMALL if option.startswith("data.")]
    command = ["evaluate_demo", data[1], *small, *PLAIN_CPU, f"run_dir={tmp_path / 'run'}"]
    said = refused([*command, f"model.init_from={file}", *more], capsys)
    assert said.endswith("evaluate it on shards of its own classes")
    assert f"{file} knows 4 classes, and the shards' labels, or data.num_classes, have" in said


def test_a_recipe_that_does_not_exist_or_is_not_complete(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "recipe or command 'pretrian'; did you mean pretrain or" in refused(["pretrian"], capsys)
    assert "no recipe 'pretrian'; did you mean pretrain or" in refused(
        ["check", "pretrian"], capsys
    )
    assert "there is no recipe 'abacus'; there are eval" in refused(["check", "abacus"], capsys)
    assert "not set: give data.shards=VALUE" in refused(["pretrain_demo"], capsys)
    vit = ["imagenet", "data.shards=S", "run_dir=R", "model.name=vit_giant_14"]
    assert refused(vit, capsys).startswith("nfnets-xla: vit_giant_14 has no drop_rate: the recipe")


def no_shards(folder: Path) -> None:
    folder.mkdir()


def empty_shard(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.tar").write_bytes(bytes(10240))


def no_index(folder: Path) -> None:
    pack_samples(samples(20), folder, samples_per_shard=10)


def changed_shard(folder: Path) -> None:
    packed(folder, 20, 10)
    data = bytearray((folder / "shard-000001.tar").read_bytes())
    data[1600] ^= 1  # in the first image
    (folder / "shard-000001.tar").write_bytes(data)


def grown_shard(folder: Path) -> None:
    packed(folder, 20, 10)
    with (folder / "shard-000001.tar").open("ab") as file:
        file.write(bytes(512))


def undecodable(folder: Path) -> None:
    good = list(samples(20))
    pack_samples([*good[:-1], ("torn", good[-1][1][:60], "png", 0)], folder, samples_per_shard=10)
    build_index(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_shards, "run `nfnets-xla shards index"),
        (no_index, "run `nfnets-xla shards index"),
        (grown_shard, "no longer matches its shards"),
        (changed_shard, "no longer matches its shards"),
        (undecodable, "shard-000001/torn"),
    ],
)
def test_faulty_shards_stop_a_run_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "shards")
    arguments = [*RECIPE, *SMALL, *PLAIN_CPU, f"data.shards={tmp_path / 'shards'}"]
    arguments += [f"run_dir={tmp_path / 'run'}", "optim.epochs=1", "optim.warmup_steps=1"]
    code = 1 if make is undecodable else 2  # found during the run
    assert message in refused([*arguments, "data.workers=0"], capsys, code)


@pytest.mark.parametrize(
    ("make", "message"), [(no_shards, "no shards"), (empty_shard, "holds no samples")]
)
def test_indexing_nothing_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], message: str
) -> None:
    make(tmp_path / "shards")
    assert message in refused(["shards", "index", str(tmp_path / "shards")], capsys)
    assert "invalid choice: 'shuffle'" in refused(["shards", "shuffle"], capsys)


def test_packing_and_indexing_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for key, image, suffix, _ in samples(3):
            (tmp_path / "images" / name / f"{key}.{suffix}").write_bytes(image)
    main(["shards", "pack", "folder", str(tmp_path / "images"), str(tmp_path / "shards")])
    assert "6 samples in 1 shard, 2 classes" in capsys.readouterr().out


def test_lint_stats_holdout_and_exclude_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, held_out, rows = tmp_path / "shards", tmp_path / "held-out", tmp_path / "rows.npz"
    index = packed(shards, 30, 10)
    one = ["--jobs", "1"]
    main(["shards", "lint", str(shards), *one])
    assert capsys.readouterr().out.endswith(f"{shards}: 0 faults\n")
    main(["shards", "stats", str(shards), *one])
    assert index.fingerprint in capsys.readouterr().out
    main(["shards", "holdout", str(shards), str(held_out), "--samples", "6", *one])
    advice = f"data.exclude={held_out / 'held_out.txt'} data.eval_shards={held_out}"
    assert advice in capsys.readouterr().out
    main(["shards", "exclude", str(shards), str(held_out / "held_out.txt"), str(rows)])
    assert "6 of 30 samples" in capsys.readouterr().out
    run = [*RECIPE, *SMALL, *PLAIN_CPU, f"data.shards={shards}", f"data.eval_shards={held_out}"]
    run += ["optim.epochs=1", "optim.warmup_steps=1", "data.workers=0", f"data.exclude={rows}"]
    main([*run, f"run_dir={tmp_path / 'run'}"])
    assert "24 images in 3 shards; 2 steps" in capsys.readouterr().out
    shown = {name for step in run_samples(tmp_path / "run") for _, name in step}
    ids = set((held_out / "held_out.txt").read_text().split())
    assert len(shown) == 24
    assert not shown & ids

    (shards / "shard-000001.tar").write_bytes(b"x" * 700)
    with pytest.raises(SystemExit) as stopped:
        main(["shards", "lint", str(shards), *one])
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "shard-000001.tar, offset 0: damaged header" in printed
    assert printed.endswith("2 faults\n")


def test_a_folder_of_another_run_is_refused_and_a_finished_one_stays(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["optim.epochs=0.2", "optim.warmup_steps=1", "data.workers=0"]
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, *short, f"run_dir={tmp_path}"]
    main(arguments)
    main(arguments)
    assert capsys.readouterr().out.endswith(f"{tmp_path} holds this run, finished\n")
    other = refused([*arguments, "optim.peak_lr=0.5"], capsys)
    assert "holds another run (optim.peak_lr: 0.05 -> 0.5)" in other
    weights = [f"model.init_from={tmp_path}", "model.name=nfnet_mini_f1", f"run_dir={tmp_path}/2"]
    assert "is of another model" in refused([*arguments, *weights], capsys)
    assert "holds a run, and resume is never" in refused([*arguments, "resume=never"], capsys)
    nowhere = [*arguments, "resume=nowhere", f"run_dir={tmp_path}/2"]
    assert "resume is 'nowhere', where there is no checkpoint" in refused(nowhere, capsys)
    assert not (tmp_path / "2").exists()
