"""Sweeps: real runs in real processes, of which some fail, are killed, or had finished before."""

import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from nfnets_xla import checkpoint
from nfnets_xla.arguments import quoted
from nfnets_xla.cli import main
from nfnets_xla.compose import composed, to_run
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.record import RecordWriter, read_record
from nfnets_xla.scaling.runs import read_points
from nfnets_xla.sweep import Cell, model_of
from nfnets_xla.trials import next_pair, size
from tests.runs import SMALL, start
from tests.scaling.made_runs import header, write_diverged, write_run
from tests.warm import Warm


@pytest.fixture
def sweep(shards: Path, tmp_path: Path) -> list[str]:
    """A batch of 16 rows: `lr_batch: 256` scales every rate by 1/16."""
    data = [f"data.shards={shards / 'train'}", f"data.eval_shards={shards / 'held-out'}"]
    small = [word for word in SMALL if not word.startswith("optim.")]
    optim = ["optim.warmup_steps=null", "optim.warmup_fraction=0.2"]
    mini = ["model.compute_dtype=float32", "trainer.tensorboard=false", "data.min_crop_area=0.5"]
    run = [f"run_dir={tmp_path / 'runs'}", "trainer.device=cpu", "trainer.checkpoint_every=2"]
    return [*data, *small, *optim, *mini, *run]


def headers(folder: Path) -> dict[str, int]:
    """{cell: number of starts}."""
    return {
        file.parent.name: len(read_record(file.parent).headers)
        for file in folder.glob("*/run-1.jsonl")
    }


def test_a_cell_is_named_after_what_is_swept() -> None:
    run = to_run(composed("pretrain", ["data.shards=S", "run_dir=R", "optim.epochs=0.25"]))
    keys = ["model.name", "optim.epochs", "optim.peak_lr", "seed"]
    cell = Cell(run, keys, "pretrain", [])
    assert cell.folder == Path("R/nfnet_f0-epochs_0.25-peak_lr_0.1-seed_0")
    run.model.init_from = "some/where/nfnet_f0-epochs_1/"
    assert Cell(run, ["model.init_from"], "pretrain", []).folder == Path("R/nfnet_f0-epochs_1")
    assert "=" not in str(cell.folder)
    assert "," not in str(cell.folder)
    run.optim.peak_lr = 0.1234567  # must not share a folder with 0.1234568
    assert Cell(run, ["optim.peak_lr"], "pretrain", []).folder == Path("R/peak_lr_0.1234567")
    chosen = Cell(run, ["optim", "optim.epochs"], "pretrain", ["seed=0", "optim=vit"])
    assert chosen.folder == Path("R/optim_vit-epochs_0.25")  # the group's name, not its values


@pytest.mark.parametrize("name", ["my runs (1), again", 'my "runs"', "my\\"])
def test_a_cell_is_given_its_folder_as_it_is(name: str) -> None:
    given = ["data.shards=S", "optim.epochs=1", f"run_dir={quoted(name)}"]
    cell = Cell(to_run(composed("pretrain", given)), ["seed"], "pretrain", given)
    run = to_run(composed("pretrain", cell.command[4:]))
    assert run.run_dir == f"{name}/seed_0"
    assert run.trainer.checkpoint_dir is None


@pytest.mark.parametrize("given", ["gs://bucket/my runs", "s3://bucket/runs/", "saved, here"])
def test_cells_have_folders_of_checkpoints_of_their_own(given: str) -> None:
    words = ["data.shards=S", "optim.epochs=1", "run_dir=R", f'trainer.checkpoint_dir="{given}"']
    cell = Cell(to_run(composed("pretrain", words)), ["seed"], "pretrain", words)
    run = to_run(composed("pretrain", cell.command[4:]))
    assert run.trainer.checkpoint_dir == f"{given.rstrip('/')}/seed_0"


def test_a_cell_that_has_begun_saves_where_it_did(tmp_path: Path) -> None:
    """For example a cell whose checkpoint_dir once told it apart from the others."""
    words = ["data.shards=S", "optim.epochs=1", f"run_dir={tmp_path}", "trainer.checkpoint_dir=new"]
    cell = Cell(to_run(composed("pretrain", words)), ["seed"], "pretrain", words)
    config = {"trainer": {"checkpoint_dir": "old/place"}}
    with RecordWriter(cell.folder, {"resumed_from": 0, "config": config}):
        pass
    assert to_run(composed("pretrain", cell.command[4:])).trainer.checkpoint_dir == "old/place"


@pytest.mark.parametrize("command", [["lr_sweep", "optim.peak_lr=0.1"], ["two_trials", "lr_sweep"]])
def test_a_sweep_whose_shards_do_not_answer_is_interrupted(
    command: list[str], tmp_path: Path
) -> None:
    """Only after it has begun: launchers then repeat it. It opens them to see what is finished."""
    given = ["data.shards=http://127.0.0.1:1/x", "optim.epochs=1", "model.name=nfnet_f0"]
    given += [f"run_dir={tmp_path / 'runs'}", f"data.cache_dir={tmp_path}", "data.cache_bytes=1e6"]
    run = to_run(composed("lr_sweep", [*given, "optim.peak_lr=0.1", "seed=0"]))
    head = {"resumed_from": 0, "num_steps": 1, "fingerprint": "f" * 64, "config": asdict(run)}
    finished = tmp_path / "runs" / "nfnet_f0-epochs_1-peak_lr_0.1-seed_0"
    with RecordWriter(finished, head) as record:
        record.write("end", 1)
    program = [sys.executable, "-m", "tests.impatient", *command, *given]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert "127.0.0.1" in done.stderr


def test_two_cells_have_two_folders(
    sweep: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for pre in ("a", "b"):
        checkpoint.save(tmp_path / pre / "run" / "checkpoints", 1, {"model": {}}, {})
        head = {"resumed_from": 0, "config": {"model": {"name": "nfnet_mini_f0"}}}
        with RecordWriter(tmp_path / pre / "run", head):
            pass
    cells = f"model.init_from={tmp_path / 'a' / 'run'},{tmp_path / 'b' / 'run'}"
    with pytest.raises(SystemExit) as stopped:
        main(["finetune_sweep", *sweep, "optim.epochs=1", cells])
    assert stopped.value.code == 2
    assert "whose runs would have one folder (run): rename one" in capsys.readouterr().err
    assert not headers(tmp_path / "runs")


@pytest.mark.parametrize("job", ["evaluate", "throughput"])
def test_a_sweep_of_what_trains_nothing_skips_what_is_done(
    job: str, shards: Path, tmp_path: Path
) -> None:
    held_out = shards / "held-out"
    given = [f"run_dir={tmp_path}", "model.init_from=W", f"data.eval_shards={held_out}"]
    run = to_run(composed("evaluate", [*given, "data.shards=null", f"job={job}"]))
    cell = Cell(run, ["seed"], "evaluate", [])
    assert not cell.finished()
    head: dict[str, Any] = {"resumed_from": 0, "config": asdict(run)}
    if job == "evaluate":
        head["fingerprint"] = ShardIndex.load(held_out).fingerprint
    with RecordWriter(cell.folder, head) as record:
        record.write("end", 0)
    assert cell.finished()
    other = replace(run, model=replace(run.model, init_from="others"))
    assert not Cell(other, ["seed"], "evaluate", []).finished()
    eager = replace(run, trainer=replace(run.trainer, compile="false"))
    assert Cell(eager, ["seed"], "evaluate", []).finished() == (job == "evaluate")
    if job == "evaluate":
        with RecordWriter(cell.folder, head | {"fingerprint": "of other shards"}) as record:
            record.write("end", 0)
        assert not cell.finished()


@pytest.mark.slow
def test_a_failed_cell_does_not_lose_the_sweep(
    sweep: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The middle cell's folder holds another run; after that is moved away, the command is
    repeated, and nothing is computed twice."""
    runs = tmp_path / "runs"
    swept = ["model.name=nfnet_mini_f0", "optim.epochs=0.25", "optim.peak_lr=0.2,0.4,0.8"]
    blocked = runs / "nfnet_mini_f0-epochs_0.25-peak_lr_0.4-seed_0"
    blocked.parent.mkdir()
    blocked.write_text("a file where the folder should be")
    with pytest.raises(SystemExit) as stopped:
        main(["lr_sweep", *sweep, *swept])
    assert stopped.value.code == 1
    error = capfd.readouterr().err
    assert "1 of the sweep's runs failed" in error
    assert "peak_lr_0.4-seed_0 ended with" in error
    assert "Traceback" not in error
    assert len(headers(runs)) == 2
    blocked.unlink()
    main(["lr_sweep", *sweep, *swept])
    assert headers(runs) == {
        f"nfnet_mini_f0-epochs_0.25-peak_lr_{rate}-seed_0": 1 for rate in ("0.2", "0.4", "0.8")
    }
    assert capfd.readouterr().out.count("finished before") == 2
    points, left_out = read_points(runs)
    assert not left_out
    assert sorted(point.peak_lr for point in points) == [
        pytest.approx(rate * 16 / 256) for rate in (0.2, 0.4, 0.8)
    ]
    # A fine-tuning sweep over two of these runs uses each one's model.
    cells = ",".join(str(runs / name) for name in sorted(headers(runs))[:2])
    assert model_of(cells.split(",")[0]) == "nfnet_mini_f0"
    tuned = [f"run_dir={tmp_path / 'tuned'}", "optim.epochs=0.25", "data.repeats=2"]
    main(["finetune_sweep", *sweep, *tuned, f"model.init_from={cells}"])
    assert len(headers(tmp_path / "tuned")) == 2
    for folder in (tmp_path / "tuned").iterdir():
        if folder.is_dir():
            config = read_record(folder).headers[0]["config"]
            assert config["model"]["name"] == "nfnet_mini_f0"
            assert Path(config["model"]["init_from"]).parent == runs


@pytest.mark.slow
def test_a_sweep_that_is_asked_to_stop_goes_on_later(sweep: list[str], tmp_path: Path) -> None:
    runs, log = tmp_path / "runs", tmp_path / "log"
    swept = ["model.name=nfnet_mini_f0", "optim.epochs=4", "optim.peak_lr=0.2,0.4"]
    command = ["lr_sweep", *sweep, *swept]
    process = start(command, log)
    wait_for_step(runs, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, log.read_text()
    assert len(headers(runs)) == 1
    again = start(command, log)
    assert again.wait() == 0, log.read_text()
    assert sorted(headers(runs).values()) == [1, 2]
    (stopped,) = (name for name, starts in headers(runs).items() if starts == 2)
    assert read_record(runs / stopped).steps_lost == 0  # its state was saved


@pytest.mark.slow
def test_a_run_ends_with_the_sweep_that_started_it(sweep: list[str], tmp_path: Path) -> None:
    runs, log = tmp_path / "runs", tmp_path / "log"
    swept = ["model.name=nfnet_mini_f0", "optim.epochs=50", "optim.peak_lr=0.2"]
    process = start(["lr_sweep", *sweep, *swept], log)
    wait_for_step(runs, process)
    process.kill()
    process.wait()
    (folder,) = (path for path in runs.iterdir() if path.is_dir())
    waited = time.monotonic() + 60
    while subprocess.run(["pgrep", "-f", str(folder)], capture_output=True, check=False).stdout:
        assert time.monotonic() < waited, log.read_text()
        time.sleep(0.1)
    assert "the sweep is gone" in log.read_text()


@pytest.mark.slow
def test_two_trials_start_from_the_best_before(
    sweep: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    swept = ["model.name=nfnet_mini_f0", "optim.epochs=0.5,0.25", "seed=1,2"]
    main(["two_trials", "lr_sweep", *sweep, *swept])
    lines = [line for line in capfd.readouterr().out.splitlines() if " epochs: " in line]
    points, _ = read_points(tmp_path / "runs")
    assert len(points) == 8
    assert {point.seed for point in points} == {1, 2}
    # The paper's 1.6 for 4096 rows is optim.peak_lr=0.1 for 256, and so is the first pair.
    assert lines[0].startswith("nfnet_mini_f0 at 0.25 epochs: 0.1 and 0.05; 1.6 for a batch")
    first = [point for point in points if point.epochs == 0.25]
    best = min(first, key=lambda point: point.loss).peak_lr * 16
    assert lines[1].startswith(f"nfnet_mini_f0 at 0.5 epochs: {best:g} and {best / 2:g};")


def test_a_pair_is_the_same_when_the_sweep_is_given_again(sweep: list[str], tmp_path: Path) -> None:
    """With runs as they may be left behind: unfinished and diverged ones, its own, another's."""
    words = [*sweep, "optim.epochs=0.5", "optim.peak_lr=0.1", "model.name=nfnet_mini_f0"]
    run = to_run(composed("pretrain", words))
    run.run_dir = str(tmp_path / "runs")
    paper = next_pair(run)
    assert paper.rates == ("0.1", "0.05")
    fields = {
        "fingerprint": ShardIndex.load(str(run.data.shards)).fingerprint,
        "batch_size": run.data.batch_size,
        "image_size": run.data.image_size,
        "macs_per_image": size(run),
    }
    runs = tmp_path / "runs"
    with RecordWriter(runs / "unfinished", header(epochs=0.25, **fields)) as record:
        record.write("train", 1, loss=1.0, images_per_second=1.0)
    write_diverged(runs / "diverged", epochs=0.25, rate=0.05, **fields)
    assert next_pair(run) == paper  # no run has finished
    write_run(runs / "own", loss=1.0, epochs=0.5, rate=0.003, **fields)
    adamw = {"optim": {"optimizer": "adamw"}}
    write_run(runs / "vit", loss=1.0, epochs=0.25, rate=0.001, **adamw, **fields)
    assert next_pair(run) == paper
    write_run(runs / "shorter", loss=1.0, epochs=0.25, rate=0.025, **fields)
    assert next_pair(run).rates == ("0.4", "0.2")  # of optim.lr_batch=256, for a batch of 16


def wait_for_step(runs: Path, process: Warm) -> None:
    while process.poll() is None:
        for file in runs.glob("*/run-1.jsonl"):
            if len(read_record(file.parent).of_kind("train")) > 2:
                return
        time.sleep(0.05)
    raise AssertionError("the sweep ended")


def test_what_two_trials_refuses(sweep: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for words, part in (
        (["lr_sweep", "optim.peak_lr=0.1"], "two_trials chooses the rates"),
        (["pretrain"], "does not sweep"),
        (["absent"], "there is no recipe 'absent'"),
        (["lr_sweep", "data.repeats=1,2"], "two_trials sweeps models, epochs and seeds; give one"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["two_trials", *words, *sweep])
        assert stopped.value.code == 2
        assert part in capsys.readouterr().err


def test_the_launcher_of_a_plugin_gets_what_it_can_send(tmp_path: Path) -> None:
    """It gets only what Hydra's plugins can pickle to run a job elsewhere."""
    import pickle

    from nfnets_xla.exits import CellFailed
    from nfnets_xla.preempt import Preemption

    preemption = Preemption(grace=3.0)
    preemption.pass_on = lambda: None
    assert pickle.loads(pickle.dumps(preemption)).grace == 3.0
    assert str(pickle.loads(pickle.dumps(CellFailed("why")))) == "why"
