"""Runs of the command line in processes of their own, on real shards, and what they left."""

import os
import signal
import socket
import time
from pathlib import Path

import torch

from nfnets_xla import checkpoint
from nfnets_xla.record import read_record
from tests.warm import Warm

# 100 images: 16 rows a step and 4 streams divide neither that nor 1.5 or 0.25 times it.
SMALL = [
    "data.image_size=16",
    "data.eval_image_size=16",
    "data.eval_margin=2",
    "data.batch_size=16",
    "data.eval_batch_size=16",
    "data.num_streams=4",
    "data.window_shards=2",
    "data.workers=0",
    "optim.warmup_steps=2",
    "optim.peak_lr=0.05",
    "trainer.log_every=1",
    "trainer.eval_every=7",
    "trainer.checkpoint_every=5",
]
# Everything that draws: dropout, stochastic depth, crops, flips, RandAugment, MixUp and CutMix; and
# every kind of state.
RECIPE = ["finetune_sam_demo", "model.init_from=null", "model.drop_path_rate=0.2", "data.flip=true"]
RECIPE += ["data.randaugment_magnitude=5", "data.mix=mixup_cutmix", "optim.label_smoothing=0.1"]
PLAIN_CPU = ["trainer.device=cpu", "trainer.virtual_devices=null"]


def xla(devices: int) -> list[str]:
    return ["trainer.device=xla", f"trainer.virtual_devices={devices}"]


def start(arguments: list[str], log: Path, module: str = "nfnets_xla", **variables: str) -> Warm:
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "OMP_NUM_THREADS": "1",  # bit-equality holds for one number of threads
        **variables,
    }
    return Warm(module, arguments, environment, log)


def as_hosts(count: int) -> list[dict[str, str]]:
    """What a launcher tells each host."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [{"RANK": str(number), "LOCAL_RANK": str(number), **common} for number in range(count)]


def start_hosts(arguments: list[str], log: Path, count: int) -> list[Warm]:
    return [start(arguments, log, **variables) for variables in as_hosts(count)]


def run(arguments: list[str], log: Path, **variables: str) -> None:
    process = start(arguments, log, **variables)
    assert process.wait() == 0, log.read_text()


def run_killed_at(
    arguments: list[str], run_dir: Path, step: int, log: Path, kind: str = "samples"
) -> None:
    """SIGKILL the run as soon as its record shows a row of this kind at `step` or later."""
    process = start(arguments, log)
    while process.poll() is None:
        started = (run_dir / "run-1.jsonl").exists()
        if started and any(row["step"] >= step for row in read_record(run_dir).of_kind(kind)):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.02)
    raise AssertionError(f"the run ended before step {step}: {log.read_text()}")


def samples(run_dir: Path) -> list[list[tuple[int, str]]]:
    """(epoch, id) of every step's rows, over all attempts."""
    rows = read_record(run_dir).of_kind("samples")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [list(zip(row["epochs"], row["ids"], strict=True)) for row in rows]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_record(run_dir).of_kind("train")]


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights, momentum and, if there is one, average of the newest checkpoint."""
    newest, skipped = checkpoint.latest(run_dir / "checkpoints")
    assert newest is not None
    assert not skipped
    assert newest.step == read_record(run_dir).headers[0]["num_steps"]
    return {
        f"{form}/{name}": tensor
        for form in newest.forms
        for name, tensor in newest.tensors(form).items()
    }


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different[:5]
