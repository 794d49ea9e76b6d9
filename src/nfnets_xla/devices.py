"""Which accelerator is attached, its peak FLOP/s and memory, and its runtime's counters.

Figures are the vendors' published ones, bfloat16 without sparsity. A "device" is what PyTorch
sees as one: a chip on TPU v4 to v6e, a core on v2, v3 and v7.
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

GIB = 2**30


@dataclass(frozen=True)
class Device:
    peak_flops: float  # FLOP/s; a multiply-add counts as two
    memory: int  # bytes
    cores: int  # TensorCores; the papers count in core-hours


# Cloud TPU and NVIDIA documentation, read November 2026 at the latest.
HARDWARE = {
    "v2": Device(22.5e12, 8 * GIB, 1),
    "v3": Device(61.5e12, 16 * GIB, 1),
    "v4": Device(275e12, 32 * GIB, 2),
    "v5e": Device(197e12, 16 * GIB, 1),
    "v5p": Device(459e12, 95 * GIB, 2),
    "v6e": Device(918e12, 32 * GIB, 1),
    "v7": Device(1153.5e12, 96 * GIB, 1),  # half a chip: TPU7x has no megacore
    "A100": Device(312e12, 80 * GIB, 1),
    "H100": Device(989e12, 80 * GIB, 1),
    "H200": Device(989e12, 141 * GIB, 1),
}
# PCI IDs of TPU chips (torch_xla/_internal/tpu.py; 0x0062, v5p, is from JAX's list). The vendor ID
# alone is not enough: Google's network card, also in machines with GPUs, has it, too.
GOOGLE_PCI_VENDOR = "0x1ae0"
TPU_PCI_DEVICES = ("0x0027", "0x005e", "0x0062", "0x0063", "0x006f", "0x0076")  # v2 to 7x
PCI_DEVICES = Path("/sys/bus/pci/devices")
_ALSO = {"v5litepod": "v5e", "v5lite": "v5e", "tpu7x": "v7", "v6lite": "v6e"}


def find_device(kind: str) -> Device | None:
    """The device by a runtime's name for it: "v4-8", "TPU v4", "NVIDIA H100 80GB HBM3".

    None if it is not in the table, e.g. for a CPU.
    """
    words = kind.replace("-", " ").replace("_", " ").split()
    for word in words:
        name = _ALSO.get(word.lower(), word)
        if name in HARDWARE:
            return HARDWARE[name]
    return None


def tpu_is_attached() -> bool:
    """Whether this host has a TPU chip; loads no runtime."""
    return any(
        path.read_text().strip() == GOOGLE_PCI_VENDOR
        and path.with_name("device").read_text().strip() in TPU_PCI_DEVICES
        for path in PCI_DEVICES.glob("*/vendor")
    )


def measured_cpu_peak() -> float:
    """FLOP/s of float32 matrix products on all cores, the best of a few; takes half a second."""
    import torch

    size = 1024
    a, b = torch.randn(2, size, size)
    best = float("inf")
    for _ in range(6):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def check_uncut(fsdp: int | str, where: str) -> None:
    """ValueError for a `trainer.fsdp` that shards parameters where there is no XLA."""
    if fsdp not in ("auto", 1):
        raise ValueError(
            f"trainer.fsdp is {fsdp}; on {where} every process keeps all parameters "
            "(docs/gpu.md says why): use 1"
        )


def smallest_fsdp(kept_bytes: int, device: Device | None, num_devices: int) -> int:
    """The smallest number of devices over which to shard parameters so that training fits.

    `kept_bytes` counts parameters, gradients, optimizer state, average and SAM's copy, which may
    take half of a device's memory; the rest is for activations. 1 if the memory is unknown. Raises
    ValueError if they do not fit even when sharded over all devices.
    """
    if device is None:
        return 1
    for fsdp in range(1, num_devices + 1):
        if num_devices % fsdp == 0 and kept_bytes / fsdp <= device.memory / 2:
            return fsdp
    raise ValueError(
        f"parameters and what is kept with them are {kept_bytes / GIB:.1f} GiB, more than half "
        f"of what {num_devices} devices of {device.memory / GIB:.0f} GiB have: use more devices"
    )


@dataclass(frozen=True)
class Counters:
    """What the runtime did since the process began; all counts are totals."""

    compilations: int  # not counting those of `gather`
    gather_compilations: int
    compile_seconds: float
    executions: int
    execute_seconds: float  # on the devices, as the runtime measures it
    tensors_to_host: int
    fallbacks: Counter[str]  # aten:: operations that XLA could not lower and ran on the host

    def since(self, earlier: "Counters") -> "Counters":
        now, before = vars(self), vars(earlier)
        return Counters(**{name: now[name] - before[name] for name in now})
