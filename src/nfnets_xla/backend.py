"""Which device a run uses, and the few things that differ between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from torch import Tensor

from nfnets_xla import xla
from nfnets_xla.config import TrainerConfig
from nfnets_xla.models.nfnet import Checkpoint, recompute
from nfnets_xla.models.stacked import Scan, loop


@dataclass(frozen=True)
class Backend:
    device_kind: str
    num_devices: int
    accelerator: Accelerator | str
    strategy: Strategy
    fetch: Callable[
        [Mapping[str, Tensor]], dict[str, Tensor]
    ]  # device tensors to the host, at once
    report: Callable[[], dict[str, Any]]  # what the runtime counted, for the record's last line
    scan: Scan = loop  # runs a stacked network's loops
    checkpoint: Checkpoint = recompute  # computes a block again in the backward pass


def open_backend(trainer: TrainerConfig) -> Backend:
    """Raises ValueError if the device asked for is not there."""
    name = trainer.device
    if name == "auto":
        name = "xla" if xla.tpu_is_attached() else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "xla":
        return _xla_backend(trainer.virtual_devices)
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("trainer.device is 'cuda', but torch sees no GPU: use trainer.device=cpu")
    xla.stay_out()
    kind = torch.cuda.get_device_name() if name == "cuda" else "CPU"
    device = torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")
    return Backend(kind, 1, name, SingleDeviceStrategy(device), _fetch, dict)


def _fetch(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named.items()}


def _xla_backend(virtual_devices: int | None) -> Backend:
    xla.start(virtual_devices)
    from nfnets_xla.strategy import SPMDStrategy, XLAAccelerator  # after the runtime has started

    started = xla.counters()

    def report() -> dict[str, Any]:
        counted = xla.counters().since(started)
        return {
            "compilations": counted.compilations,
            "compile_seconds": round(counted.compile_seconds, 3),
            "executions": counted.executions,
            "tensors_to_host": counted.tensors_to_host,
            "fallbacks": counted.fallbacks,
        }

    return Backend(
        xla.device_kind(),
        xla.num_devices(),
        XLAAccelerator(),
        SPMDStrategy(),
        xla.gather,
        report,
        xla.scan,
        xla.recompute,
    )
