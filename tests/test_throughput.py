"""The step without data loading, and the check of a machine: what they write and refuse."""

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from nfnets_xla import smoke as smoke_module
from nfnets_xla.cli import main
from nfnets_xla.compose import composed, execute, to_run
from nfnets_xla.data.fractals import fractal_samples
from nfnets_xla.data.pack import Sample
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.preempt import Preemption
from nfnets_xla.record import RecordWriter, read_record
from tests.runs import PLAIN_CPU, run, start_hosts, xla
from tests.warm import Warm

SMALL = ["model.name=nfnet_mini_f0", "model.compute_dtype=float32", "data.image_size=32"]
SMALL += ["data.batch_size=32", "data.eval_batch_size=32", "data.num_streams=8"]
STEPS = ["optim.epochs=8", "optim.warmup_steps=2", "trainer.log_every=2"]


def test_a_step_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["throughput", *SMALL, *STEPS, "trainer.device=cpu", f"run_dir={tmp_path}"])
    record = read_record(tmp_path)
    rows = record.of_kind("train")
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert rows[-1]["loss"] < rows[0]["loss"]  # it does train, on the one batch
    (end,) = record.of_kind("end")
    assert end["host_memory_mib"] > 100
    assert end["images_per_second"] > 0
    assert "peak host memory" in capsys.readouterr().out


def test_repeats_are_steps_of_the_same_rows(tmp_path: Path) -> None:
    """With four views of a quarter of the images, the batch and the passes stay the same."""
    words = ["data.repeats=4", "trainer.device=cpu", f"run_dir={tmp_path}"]
    main(["throughput", *SMALL, *STEPS, *words])
    assert read_record(tmp_path).of_kind("end")[0]["step"] == 8


@pytest.mark.parametrize("job", ["throughput", "evaluate"])
def test_the_record_of_a_training_is_left_alone(
    job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RecordWriter(tmp_path, {"resumed_from": 0, "num_steps": 2}) as writer:
        writer.write("train", 1, loss=1.0)
    given = ["model.init_from=weights", "data.eval_shards=shards"] if job == "evaluate" else STEPS
    with pytest.raises(SystemExit) as stopped:
        main([job, *SMALL[:1], *given, "trainer.device=cpu", f"run_dir={tmp_path}"])
    assert stopped.value.code == 2
    assert "holds a training run, and its record would be replaced" in capsys.readouterr().err
    assert len(read_record(tmp_path).of_kind("train")) == 1
    preemption = Preemption()
    run = to_run(composed(job, [*SMALL[:1], *given, "trainer.device=cpu", f"run_dir={tmp_path}"]))
    with pytest.raises(ValueError, match="choose another run_dir"):
        execute(run, preemption)
    assert not preemption.resumes  # nothing can be resumed: Ctrl-C gives 130, not 75


@pytest.mark.slow
def test_any_recipe_and_any_device(tmp_path: Path) -> None:
    recipe = ["finetune_sam", "job=throughput", "model.init_from=null", "data.shards=null"]
    recipe += [*SMALL, *STEPS, *xla(4), f"run_dir={tmp_path / 'run'}"]
    run([*recipe, "data.num_classes=10"], tmp_path / "log")
    (end,) = read_record(tmp_path / "run").of_kind("end")
    assert end["compilations"] == 1
    assert not end["fallbacks"]


@pytest.mark.parametrize(
    "device", [PLAIN_CPU, pytest.param(xla(2), marks=pytest.mark.slow)], ids=["cpu", "xla"]
)
def test_smoke(device: list[str], tmp_path: Path) -> None:
    run(["smoke", *device, f"run_dir={tmp_path / 'run'}"], tmp_path / "log")
    assert "smoke: passed" in (tmp_path / "log").read_text()
    run(["smoke", *device, f"run_dir={tmp_path / 'run'}"], tmp_path / "log")  # repeated
    assert len(list((tmp_path / "run").glob("run-*.jsonl"))) == 1


def test_smoke_on_two_hosts_is_one_run(tmp_path: Path) -> None:
    """Both begin in a folder without data, and load what the first has saved."""
    folder, log = tmp_path / "run", tmp_path / "log"
    hosts = start_hosts(["smoke", *PLAIN_CPU, f"run_dir={folder}"], log, 2)
    assert all_end(hosts) == [0, 0], log.read_text()
    assert log.read_text().count("smoke: passed") == 1
    assert sorted(path.name for path in (folder / "shards").iterdir()) == ["held-out", "train"]
    assert len(read_record(folder).headers) == 1


def all_end(hosts: list[Warm]) -> list[int]:
    """Their exit codes. Processes that lost a host would wait for it, so they are ended, too."""
    while None in (codes := [host.poll() for host in hosts]):
        if any(codes):
            for host in hosts:
                host.kill()
        time.sleep(0.05)
    return [code for code in codes if code is not None]


def test_smoke_that_was_stopped_while_it_packed_packs_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: Any, **options: Any) -> Iterator[Sample]:
        samples = fractal_samples(*args, **options)
        yield from islice(samples, 40)  # a shard, and part of the next
        raise KeyboardInterrupt

    with monkeypatch.context() as first:
        first.setattr(smoke_module, "fractal_samples", stopped)
        with pytest.raises(KeyboardInterrupt):
            smoke_module._pack(tmp_path / "train", per_class=10, first=0, size=32)
    smoke_module._pack(tmp_path / "train", per_class=10, first=0, size=32)
    assert ShardIndex.load(tmp_path / "train").num_samples == 10 * smoke_module.CLASSES
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_smoke_sees_weights_that_are_not_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smoke_module, "evaluate", lambda run, say: {"loss": 1.0})
    with pytest.raises(SystemExit) as stopped:
        main(["smoke", f"run_dir={tmp_path / 'run'}", "trainer.device=cpu"])
    assert stopped.value.code == 1
    assert "the loaded weights have loss 1.0000000" in capsys.readouterr().err
