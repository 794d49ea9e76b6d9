"""On a GPU, if there is one: the CPU's numbers, no waiting in a step, two graphs, resuming.

float32 is real float32 here (no TF32): metrics of steps equal the CPU's within 1e-4 of them, losses
of whole runs within 1e-3. Skipped without a GPU; compiling takes minutes.
"""

import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nfnets_xla.backend import choose_by_rule
from nfnets_xla.devices import find_device
from nfnets_xla.inductor import as_it_is, compiled
from nfnets_xla.record import read_record
from nfnets_xla.task import Compile
from tests.runs import (
    PLAIN_CPU,
    RECIPE,
    SMALL,
    assert_bit_equal,
    final_state,
    losses,
    run,
    run_killed_at,
    samples,
    start_hosts,
    xla,
)
from tests.steps import SAM, batch, channels_last, on, task

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32:UserWarning"),  # Inductor recommends it
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]
CUDA = ["trainer.device=cuda", "trainer.virtual_devices=null"]
EAGER = [*CUDA, "trainer.compile=false"]


@pytest.fixture(autouse=True)
def _as_in_a_run() -> Iterator[None]:
    """An operator without a deterministic kernel warns, and so fails here."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    choose_by_rule()
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


def metrics(device: str, compile: Compile = as_it_is) -> Tensor:
    form: dict[str, Any] = {"form": channels_last} if device == "cuda" else {}
    of = task(**SAM, ema_decay=0.9, device=device, compile=compile, **form)
    found = []
    for step in range(4):
        of.training_step(on(device, batch(step, mix=True)), step)
        assert of.step_metrics_M is not None
        found.append(of.step_metrics_M.cpu())
    return torch.stack(found)


@pytest.mark.parametrize("compile", [as_it_is, compiled])
def test_steps_have_the_numbers_of_the_cpu(compile: Compile) -> None:
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    torch.testing.assert_close(metrics("cuda", compile), metrics("cpu"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compile", [as_it_is, compiled])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_waits_for_nothing_on_the_device(compile: Compile, dtype: torch.dtype) -> None:
    """With SAM, clipping, momentum, average and mixing. The first steps compile, and upload
    constants."""
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    options: dict[str, Any] = {"form": channels_last, "compile": compile, "compute_dtype": dtype}
    of = task(**SAM, ema_decay=0.9, device="cuda", **options)
    batches = [on("cuda", batch(step, mix=True)) for step in range(5)]
    for step in range(2):
        of.training_step(batches[step], step)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2, 5):
            of.training_step(batches[step], step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert of.step_metrics_M is not None
    assert bool(of.step_metrics_M.isfinite().all())


def test_maps_lie_channels_last_from_end_to_end() -> None:
    """If one did not, cuDNN would get a copy, and the weights' layout would be in vain."""
    of = task(device="cuda", form=channels_last, compute_dtype=torch.bfloat16, sam_rho=None)
    seen: list[bool] = []

    def look(_: object, given: tuple[Tensor, ...], result: Tensor) -> None:
        maps = [x for x in (given[0], result) if x.shape[1] > 1 and x.shape[2] > 1]
        seen.extend(x.is_contiguous(memory_format=torch.channels_last) for x in maps)

    for module in of.net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(look)
    of.training_step(on("cuda", batch(0)), 0)
    assert len(seen) > 20
    assert all(seen)


def test_a_run_has_the_cpus_samples_and_losses_and_compiles_twice(
    tmp_path: Path, data: list[str]
) -> None:
    arguments = [*RECIPE, *data, *SMALL, "optim.epochs=1.5"]
    for name, options in (("cpu", PLAIN_CPU), ("eager", EAGER), ("cuda", CUDA)):
        run([*arguments, *options, f"run_dir={tmp_path / name}"], tmp_path / "log.txt")
    for name in ("eager", "cuda"):
        assert samples(tmp_path / name) == samples(tmp_path / "cpu")
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "cpu"), rtol=1e-3)
    record = read_record(tmp_path / "cuda")
    (end,) = record.of_kind("end")
    assert end["compilations"] == 2
    rows = record.of_kind("train")
    assert [row["compilations"] for row in rows] == [1] + [0] * (len(rows) - 1)
    assert record.headers[0]["device_kind"] == torch.cuda.get_device_name()
    assert (rows[-1]["mfu"] is not None) == (find_device(torch.cuda.get_device_name()) is not None)


@pytest.mark.parametrize("options", [EAGER, CUDA])
def test_a_killed_run_ends_as_if_it_had_not_been(
    tmp_path: Path, data: list[str], options: list[str]
) -> None:
    arguments = [*RECIPE, *data, *SMALL, *options, "optim.epochs=1.5", "trainer.compile_cache=true"]
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log.txt"
    run([*arguments, f"run_dir={whole}"], log)
    run_killed_at([*arguments, f"run_dir={killed}"], killed, random.randint(2, 8), log)
    run([*arguments, f"run_dir={killed}"], log)
    assert samples(killed) == samples(whole)
    assert losses(killed) == losses(whole)
    assert_bit_equal(final_state(killed), final_state(whole))


def test_a_run_goes_on_from_the_gpu_to_the_cpu_and_to_xla(tmp_path: Path, data: list[str]) -> None:
    """Back to the GPU if torch_xla, which needs one release of torch, is not installed."""
    last = xla(2) if find_spec("torch_xla") else EAGER
    arguments = [*RECIPE, *data, *SMALL, "optim.epochs=2", "trainer.checkpoint_every=2"]
    whole, moved, log = tmp_path / "whole", tmp_path / "moved", tmp_path / "log.txt"
    run([*arguments, *PLAIN_CPU, f"run_dir={whole}"], log)
    arguments.append(f"run_dir={moved}")
    run_killed_at([*arguments, *EAGER], moved, 4, log)
    run_killed_at([*arguments, *PLAIN_CPU], moved, 8, log)
    run([*arguments, *last], log)
    assert len(read_record(moved).headers) == 3
    assert samples(moved) == samples(whole)
    np.testing.assert_allclose(losses(moved), losses(whole), rtol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch sees fewer than 2 GPUs")
def test_two_gpus_train_what_one_does(tmp_path: Path, data: list[str]) -> None:
    """One process per GPU; gradients are summed from device to device."""
    arguments = [*RECIPE, *data, *SMALL, *EAGER, "optim.epochs=1.5"]
    log = tmp_path / "log.txt"
    run([*arguments, f"run_dir={tmp_path / 'one'}"], log)
    two = start_hosts([*arguments, f"run_dir={tmp_path / 'two'}"], log, 2)
    assert [process.wait() for process in two] == [0, 0], log.read_text()
    assert samples(tmp_path / "two") == samples(tmp_path / "one")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-3)
