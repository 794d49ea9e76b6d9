"""Runs of the command line in their own processes, on real shards, and what they leave."""

import json
import os
import random
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from nfnets_xla import checkpoint
from nfnets_xla.record import read_record
from tests.warm import Warm

# 100 images: neither 16 rows per step nor 4 streams divide 1, 1.5 or 0.25 times that.
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
# Everything random: dropout, stochastic depth, crops, flips, RandAugment, MixUp and CutMix; and
# every kind of state.
RECIPE = ["finetune_sam_demo", "model.init_from=null", "model.drop_path_rate=0.2", "data.flip=true"]
RECIPE += ["optim.peak_lr=0.1", "optim.clipping=0.04"]  # tests' tolerances were chosen at these
RECIPE += ["data.randaugment_magnitude=5", "data.mix=mixup_cutmix", "optim.label_smoothing=0.1"]
UNOPTIMISED = "--xla_backend_optimization_level=0"  # compiles faster: small runs end sooner
PLAIN_CPU = ["trainer.device=cpu", "trainer.virtual_devices=null"]


def xla(devices: int) -> list[str]:
    return ["trainer.device=xla", f"trainer.virtual_devices={devices}"]


def start(arguments: list[str], log: Path, module: str = "nfnets_xla", **variables: str) -> Warm:
    environment = {
        **os.environ,
        "XLA_FLAGS": UNOPTIMISED,
        "OMP_NUM_THREADS": "1",  # bit-equality holds for one number of threads
        **variables,
    }
    return Warm(module, arguments, environment, log)


def as_hosts(count: int) -> list[dict[str, str]]:
    """The environment that a launcher gives each host. The port is one that is never assigned
    automatically, so nobody takes it before the hosts do."""
    while True:
        port = random.randint(20_000, 30_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("", port))
            break
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
    """SIGKILL the run as soon as this start's record has such a row at `step` or later."""
    print(f"to be killed: {kind} {step} of {run_dir}")  # `step` may be random
    (process,) = reach(lambda: [start(arguments, log)], run_dir, step, log, kind)
    process.kill()
    process.wait()


def reach(
    begin: Callable[[], list[Warm]], run_dir: Path, step: int, log: Path, kind: str
) -> list[Warm]:
    """Wait until each process's own record has a row of this kind at `step` or later, or says that
    it resumed from there; earlier starts' records do not count."""
    before = set(run_dir.glob("run-*.jsonl"))
    processes = begin()
    while True:
        for path in set(run_dir.glob("run-*.jsonl")) - before:
            lines = path.read_text().split("\n")[:-1]  # the last line is torn or empty
            rows = [row for row in map(json.loads, lines) if row["kind"] in ("header", kind)]
            if any(row["step"] >= step for row in rows):
                return processes
        ended = any(process.poll() is not None for process in processes)
        assert not ended, f"ended before {kind} {step}: {log.read_text()}"
        time.sleep(0.02)


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
