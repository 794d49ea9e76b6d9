"""The device a run uses, and the few things that differ between devices."""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor

from nfnets_xla import inductor, xla
from nfnets_xla.config import TrainerConfig
from nfnets_xla.devices import (
    check_uncut,
    find_device,
    measured_cpu_peak,
    smallest_fsdp,
    tpu_is_attached,
)
from nfnets_xla.hosts import ALONE, Hosts, open_hosts
from nfnets_xla.models.blocks import Recompute, recompute
from nfnets_xla.models.stacked import Scan, loop


@dataclass(frozen=True)
class Backend:
    device_kind: str
    num_devices: int  # on all hosts
    peak_flops: float | None  # FLOP/s of all devices together; None: unknown
    accelerator: Accelerator | str
    strategy: Strategy
    fetch: Callable[
        [Mapping[str, Tensor]], dict[str, Tensor]
    ]  # copies device tensors to the host, all at once
    report: Callable[[], dict[str, Any]]  # counters since the backend was opened
    hosts: Hosts = ALONE
    add_up: Callable[[Sequence[Tensor]], None] = ALONE.add  # sums gradients over hosts, in place
    scan: Scan = loop  # runs the loops of a stacked network
    cache_compilations: Callable[[Path], bool] = lambda _: True  # by default nothing to cache
    peak_memory: Callable[[], int | None] = lambda: None  # bytes on one device; None: unknown
    checkpoint: Recompute = recompute  # gradient checkpointing of a block
    compile: Callable[[Any], Any] = inductor.as_it_is  # compiles a function of tensors
    channels_last: bool = False  # memory format of the network's weights
    pin_memory: bool = False  # of batches, which are then copied while the device computes


def open_backend(trainer: TrainerConfig, kept_bytes: int = 0) -> Backend:
    """Raises ValueError if the requested device does not exist.

    `kept_bytes` is the size of the parameters and of all tensors like them that training keeps:
    with `trainer.fsdp=auto` it decides over how many devices they are sharded.
    """
    name = trainer.device
    if name == "auto":
        name = "xla" if tpu_is_attached() else "cuda" if torch.cuda.is_available() else "cpu"
    if name != "xla":
        check_uncut(trainer.fsdp, name)
        xla.stay_out()
    return BACKENDS[name](trainer, kept_bytes)


def _cpu_backend(trainer: TrainerConfig, _: int) -> Backend:
    hosts = open_hosts()
    return Backend(
        device_kind="CPU",
        num_devices=hosts.count,
        peak_flops=measured_cpu_peak() * hosts.count,
        accelerator="cpu",
        strategy=SingleDeviceStrategy(torch.device("cpu")),
        fetch=_fetch,
        hosts=hosts,
        add_up=hosts.add,
        **_compiling(trainer.compile is True),
    )


def _cuda_backend(trainer: TrainerConfig, _: int) -> Backend:
    """One GPU per process, chosen by the launcher's LOCAL_RANK."""
    device = torch.device("cuda", local_gpu())
    torch.cuda.set_device(device)
    torch.backends.cudnn.allow_tf32 = False  # float32 means full float32
    choose_by_rule()
    warnings.filterwarnings("ignore", "TensorFloat32", UserWarning)  # Inductor advises it
    hosts = open_hosts()
    kind = torch.cuda.get_device_name(device)
    known = find_device(kind)
    return Backend(
        device_kind=kind,
        num_devices=hosts.count,
        peak_flops=known and known.peak_flops * hosts.count,
        accelerator="cuda",
        strategy=SingleDeviceStrategy(device),
        fetch=_fetch,
        hosts=hosts,
        add_up=hosts.add,
        peak_memory=torch.cuda.max_memory_allocated,
        channels_last=True,
        pin_memory=True,
        **_compiling(trainer.compile is not False),
    )


def local_gpu() -> int:
    """Raises ValueError if this machine has no such GPU."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 0:
        raise ValueError("trainer.device is 'cuda', but torch sees no GPU: use trainer.device=cpu")
    if not 0 <= number < count:
        raise ValueError(
            f"LOCAL_RANK is {number}, but torch sees {count} GPUs: start as many processes as "
            "there are (torchrun --nproc_per_node=gpu)"
        )
    return number


def choose_by_rule() -> None:
    """Deterministic kernels, so that a restarted run ends in the same bits. Otherwise cuDNN and
    Inductor may pick whichever kernel is fastest at the time, and kernels differ in the order of
    summation. Operations without a deterministic kernel warn.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # needed for deterministic cuBLAS
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling costs a pass over every allocation, and nothing here reads uninitialised memory.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore


def _compiling(wanted: bool) -> dict[str, Any]:
    """The fields of a Backend that differ between torch.compile and plain PyTorch."""
    if not wanted:
        return {"report": dict}
    return {
        "report": inductor.Clock().report,
        "compile": inductor.compiled,
        "cache_compilations": inductor.keep_in,
    }


def _fetch(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}


def _xla_backend(trainer: TrainerConfig, kept_bytes: int) -> Backend:
    xla.start(trainer.virtual_devices)
    xla.multiply_in_float32()  # the head and the evaluation, as on a GPU
    from nfnets_xla.strategy import SPMDStrategy, XLAAccelerator  # after the runtime has started

    kind, count = xla.device_kind(), xla.num_devices()
    known = find_device(kind)
    peak_flops = known and count * known.peak_flops
    if kind == "XLA:CPU":
        peak_flops = measured_cpu_peak()  # virtual devices share one CPU
    fsdp = trainer.fsdp
    parts = fsdp if isinstance(fsdp, int) else smallest_fsdp(kept_bytes, known, count)
    xla.make_mesh(parts)
    strategy = SPMDStrategy(fsdp=parts)
    started = xla.counters()
    hosts = xla.open_hosts()  # needs no `add_up`: tensors are global, and XLA sums gradients

    def fetch(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return hosts.heard(lambda: xla.gather(named))

    def report() -> dict[str, Any]:
        counted = xla.counters().since(started)
        on_host = {"trace_seconds": strategy.trace_seconds}
        on_host["dispatch_seconds"] = strategy.dispatch_seconds
        numbers = {**vars(counted), **on_host}
        return {
            name: round(value, 6) if isinstance(value, float) else value
            for name, value in numbers.items()
        }

    return Backend(
        device_kind=kind,
        num_devices=count,
        peak_flops=peak_flops,
        accelerator=XLAAccelerator(),
        strategy=strategy,
        fetch=fetch,
        report=report,
        hosts=hosts,
        cache_compilations=xla.cache_compilations,
        scan=xla.scan,
        checkpoint=xla.recompute,
    )


# What config.DEVICES names, but for "auto".
BACKENDS: Mapping[str, Callable[[TrainerConfig, int], Backend]] = {
    "xla": _xla_backend,
    "cuda": _cuda_backend,
    "cpu": _cpu_backend,
}
