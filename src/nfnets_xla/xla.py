"""The only module that uses torch_xla: starts the runtime, places tensors, runs steps, counts.

Import-linter checks that no other module imports torch_xla (setup.cfg), so another runtime can
replace it by implementing the functions below. The mode is SPMD: one process per host, one mesh
over all devices with the axes ("data", "fsdp"), and every tensor in the program is global.
`PJRT_DEVICE=CPU` with `CPU_NUM_DEVICES=N` runs the same program on N virtual devices.
"""

import importlib.metadata
import importlib.util
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nfnets_xla.devices import Counters, tpu_is_attached
from nfnets_xla.exits import Interrupted
from nfnets_xla.hosts import Hosts


def is_installed() -> bool:
    return importlib.util.find_spec("torch_xla") is not None


def start(virtual_devices: int | None = None) -> None:
    """Start the runtime in SPMD mode; must come before anything else that touches torch_xla.

    `virtual_devices` asks for the CPU runtime with that many devices; None takes the attached TPU,
    or one CPU device. ValueError if the runtime has already started with another number, which is
    fixed per process. Interrupted if a TPU does not start, which may be temporary.
    """
    if not is_installed():
        raise ValueError(
            "device 'xla' needs torch_xla, which is not installed: "
            "pip install 'nfnets_xla[xla]' (CPU) or 'nfnets_xla[tpu]'"
        )
    if importlib.util.find_spec("torch_tpu") is not None:
        raise ValueError(
            "torch_xla and torch_tpu are both installed, and each takes the TPU for itself: "
            "pip uninstall torch_tpu, which this library does not use yet"
        )
    if virtual_devices is not None and virtual_devices < 1:
        raise ValueError(f"trainer.virtual_devices is {virtual_devices}; it must be at least 1")
    if "torch_xla" not in sys.modules:
        _choose_environment(virtual_devices)
    import torch_xla.runtime as xr

    try:
        if not xr.is_spmd():
            xr.use_spmd()
        found = xr.global_runtime_device_count()
    except RuntimeError as error:
        raise Interrupted(
            f"the TPU does not start ({error}): another process may have it, or another host of "
            "the slice may not be there yet; the same command may succeed"
        ) from error
    if virtual_devices is not None and found != virtual_devices:
        raise ValueError(
            f"{virtual_devices} virtual devices were asked for, but this process already runs "
            f"torch_xla with {found}: start a new process"
        )


def stay_out() -> None:
    """For a run without XLA: Lightning imports torch_xla if it is installed, which then looks for a
    TPU and warns if there is none."""
    os.environ.setdefault("PJRT_DEVICE", "CPU")


def _choose_environment(virtual_devices: int | None) -> None:
    if virtual_devices is not None:
        os.environ["PJRT_DEVICE"] = "CPU"
        os.environ["CPU_NUM_DEVICES"] = str(virtual_devices)
    elif "PJRT_DEVICE" not in os.environ:
        os.environ["PJRT_DEVICE"] = "TPU" if tpu_is_attached() else "CPU"
    # Without this a scalar that is exactly 0 or 1 is compiled in, which costs another graph.
    os.environ["XLA_NO_SPECIAL_SCALARS"] = "1"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # GSPMD's deprecation notice, per compile


def multiply_in_float32() -> None:
    """Compute float32 products in full float32; call it before the first step.

    By default a TPU rounds the factors to bfloat16; full precision takes six passes. It does not
    affect bfloat16 products, nor, in torch_xla 2.9, a convolution's gradient with respect to its
    input.
    """
    from torch_xla import _XLAC  # pyright: ignore[reportPrivateImportUsage]

    _XLAC._xla_set_mat_mul_precision("highest")  # torch_xla.backends would warn


def device() -> torch.device:
    import torch_xla

    return torch_xla.device()


def num_hosts() -> int:
    import torch_xla.runtime as xr

    return xr.process_count()


def num_devices() -> int:
    """Devices of the whole mesh, over all hosts."""
    import torch_xla.runtime as xr

    return xr.global_runtime_device_count()


def device_kind() -> str:
    """The hardware's name in the record: "XLA:CPU", or Cloud TPU's name of a slice, "v4-8"."""
    import torch_xla.runtime as xr
    from torch_xla._internal.tpu import get_tpu_env

    kind = xr.device_type() or "unknown"
    if kind != "TPU":
        return "XLA:CPU" if kind == "CPU" else kind
    named = os.environ.get("TPU_ACCELERATOR_TYPE")  # set on GKE
    try:  # on a VM: from the metadata server
        return named or get_tpu_env().get("ACCELERATOR_TYPE") or kind
    except OSError:  # includes all errors of `requests`: there is no such server
        return kind


_meshes: list[Any] = []  # this process's mesh, once it is made


def make_mesh(fsdp: int) -> None:
    """Lay all devices out as (devices / fsdp, fsdp); parameters are sharded over the second axis.

    A process has one mesh: asking for another later is a ValueError.
    """
    import torch_xla.distributed.spmd as spmd

    count = num_devices()
    if fsdp < 1 or count % fsdp:
        raise ValueError(f"trainer.fsdp is {fsdp}; it must divide the number of devices, {count}")
    if _meshes and (before := _meshes[0].shape()["fsdp"]) != fsdp:
        raise ValueError(f"fsdp={fsdp}, but this process's mesh has {before}: start a new process")
    if not _meshes:
        _meshes.append(spmd.Mesh(device_order(), (count // fsdp, fsdp), ("data", "fsdp")))
        spmd.set_global_mesh(_meshes[0])


def device_order() -> list[int]:
    """Ordinals of all devices, host by host: torch_xla splits a host's rows in the order of that
    host's devices, which a slice may number in any way ("TPU:5" on host 0)."""
    from torch_xla import _XLAC  # pyright: ignore[reportPrivateImportUsage]

    own = [int(name.rpartition(":")[2]) for name in _XLAC._xla_get_runtime_devices()]
    return [ordinal for of_host in open_hosts().gather(own) for ordinal in of_host]


def mesh() -> Any:
    """The mesh ("data", "fsdp") over all devices; with fsdp = 1 if none was made before."""
    if not _meshes:
        make_mesh(fsdp=1)
    return _meshes[0]


def open_hosts() -> Hosts:
    """The hosts of a TPU slice. Never run on several, for lack of such a slice."""
    import torch_xla.runtime as xr

    if num_hosts() == 1:
        return Hosts()
    import torch_xla.distributed.xla_backend  # noqa: F401  # knows init_method "xla://"

    hosts = Hosts(xr.process_index(), num_hosts())
    if not torch.distributed.is_initialized():
        hosts.heard(lambda: torch.distributed.init_process_group("gloo", "xla://"))
    return hosts


def cache_compilations(folder: Path) -> bool:
    """Cache compiled programs in `folder` for later starts; call it before the first step. False if
    the runtime cannot read them back: XLA:CPU writes such files but fails on reading them."""
    import torch_xla.runtime as xr

    if device_kind() == "XLA:CPU":
        return False
    own = folder / str(xr.process_index())  # hosts do not wait for each other's files
    own.mkdir(parents=True, exist_ok=True)
    xr.initialize_cache(str(own))
    return True


def upload_rows(tensors: list[Tensor]) -> list[Tensor]:
    """Send a batch's tensors to the devices at once, the first axis (rows) sharded over the mesh.

    With several hosts each gives its own rows, and the result is the global batch. A tensor whose
    first axis is not divisible by the devices (or that has none) is replicated: correct for any
    user's batch on one host, and our own loader never sends one.
    """
    import torch_xla.core.xla_model as xm

    rows = [tensor.contiguous() for tensor in tensors]
    sent: Any = xm.send_cpu_data_to_device(rows, device(), _Rows())  # pyright: ignore[reportArgumentType]
    return sent


class _Rows:
    """Acts as a `ShardingSpec` in `send_cpu_data_to_device`, for tensors of any rank."""

    def __init__(self) -> None:
        import torch_xla.runtime as xr

        self.minibatch = num_hosts() > 1
        self._local_devices = xr.addressable_runtime_device_count()

    def xla_spec(self, tensor: Tensor) -> Any:
        import torch_xla.distributed.spmd as spmd

        divides = tensor.ndim > 0 and tensor.shape[0] % self._local_devices == 0
        first = (("data", "fsdp"),) if divides else ()
        axes = first + (None,) * (tensor.ndim - len(first))
        minibatch = self.minibatch and divides
        return spmd.ShardingSpec(mesh(), axes, minibatch=minibatch).xla_spec(tensor)


def replicate(tensors: Mapping[str, Tensor]) -> None:
    """Mark device tensors as replicated on every device of the mesh.

    Buffers made on the device (momentum, EMA) get a sharding only in the first step; without this
    mark the step would be compiled twice.
    """
    shard(tensors, {})


def shard(tensors: Mapping[str, Tensor], axes: Mapping[str, int]) -> None:
    """Mark device tensors as sharded over "fsdp" along their axis in `axes`.

    Tensors without an axis there, or whose axis is not divisible, are replicated.
    """
    import torch_xla.distributed.spmd as spmd

    parts = mesh().shape()["fsdp"]
    for name, tensor in tensors.items():
        axis = axes.get(name)
        cut = axis is not None and tensor.shape[axis] % parts == 0
        spec = ("fsdp" if cut and place == axis else None for place in range(tensor.ndim))
        spmd.mark_sharding(tensor, mesh(), tuple(spec))


def whole(tensor: Tensor) -> Tensor:
    """A replicated copy of a sharded `tensor`, whose gradient is replicated, too.

    For sharded weights: an all-gather here; an all-reduce and re-sharding in the backward pass.
    Without it XLA's partitioner splits convolutions by channels, and is then wrong for maps of one
    pixel: wrong gradients on a 2 by 2 mesh, an abort on 1 by 4 (torch_xla 2.9).
    """
    from torch_xla.distributed.spmd.xla_sharding import MarkShardingFunction

    computed = tensor.neg().neg()  # the sharding of a parameter, or its clone, cannot be changed
    marked: Any = MarkShardingFunction.apply(computed, mesh(), (None,) * tensor.ndim)
    return marked


# ---- loops over depth -------------------------------------------------------------------------


def scan(
    body: Callable[[Tensor, Any], Tensor],
    carry: Tensor,
    stacked: Any,
    checkpoint: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The last `carry` of `carry = body(carry, slices)` along the first axis of every tensor.

    The loop is one operation in the graph. `body` must be a pure function, and is traced once per
    structure and shapes of its inputs. If `checkpoint` is not None, each iteration keeps only its
    inputs for the backward pass.
    """
    from functorch.compile import default_partition

    steps = _steps.setdefault(body, _Step(weakref.ref(body)))
    partition = default_partition if checkpoint is None else _keep_inputs
    return _scan_module().scan(steps, carry, stacked, partition, is_fn_pure=True)[0]


@dataclass(eq=False)  # torch_xla caches its trace by the identity of this object
class _Step:
    """`body` with the second result that torch_xla's scan requires."""

    body: "weakref.ref[Callable[[Tensor, Any], Tensor]]"

    def __call__(self, carry: Tensor, slices: Any) -> tuple[Tensor, tuple[()]]:
        body = self.body()
        assert body is not None
        return body(carry, slices), ()


_steps: "weakref.WeakKeyDictionary[Any, _Step]" = weakref.WeakKeyDictionary()


def _keep_inputs(*arguments: Any, **options: Any) -> Any:
    """A partition that saves only inputs: functorch's min-cut, with a memory budget of 0."""
    import torch._functorch.config as functorch_config
    from functorch.compile import min_cut_rematerialization_partition

    with functorch_config.patch(activation_memory_budget=0.0):
        return min_cut_rematerialization_partition(*arguments, **options)


@cache
def _scan_module() -> Any:
    """torch_xla's scan without its sharding hints for gradients, which are not needed.

    The hints (`shard_as`) need jax 0.7.1 and torchax; XLA's partitioner finds the same shardings
    by itself. Only release 2.9.0, which was checked, is patched.
    """
    import torch_xla.experimental.scan

    module: Any = torch_xla.experimental.scan
    if importlib.metadata.version("torch_xla") == "2.9.0":
        module.shard_as = lambda a, b: (a, b)
    return module


def recompute(function: Callable[..., Tensor], x: Tensor, *arguments: Any) -> Tensor:
    """`function(x, *arguments)`; the backward pass computes it again (gradient checkpointing).

    It uses an optimization barrier: XLA merges equal computations, so torch's checkpoint would save
    nothing.
    """
    from torch_xla.utils.checkpoint import checkpoint

    if not x.requires_grad:  # else torch_xla's checkpoint silently gives weights no gradient
        x = x.detach().requires_grad_()
    if isinstance(function, torch.nn.Module):
        function = function.forward  # for a bound method, the weights are behind the barrier, too
    result: Any = checkpoint(function, x, *arguments, preserve_rng_state=False)
    return result


# ---- work and results -------------------------------------------------------------------------

_compiled_to_gather: list[int] = []


def sync(*, wait: bool = False) -> None:
    """Compile (if new) and dispatch everything traced so far; `wait` for the device to finish."""
    import torch_xla

    torch_xla.sync(wait=wait)


def gather(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Host copies of device tensors, in one transfer and without compiling a graph per tensor.

    Sharded tensors are gathered by one graph, which needs memory for a whole copy while it runs and
    is compiled once per set of shapes. Every host must call it with the same names in the same
    order.
    """
    from torch_xla import _XLAC  # pyright: ignore[reportPrivateImportUsage]

    sync(wait=True)
    on_device = {name: tensor.detach() for name, tensor in named.items()}
    cut = [name for name, t in on_device.items() if "devices=" in _XLAC._get_xla_sharding_spec(t)]
    if cut:
        before = counters()
        copies = {name: on_device[name].neg().neg() for name in cut}  # as in `whole`
        replicate(copies)
        sync(wait=True)
        on_device |= copies
        _compiled_to_gather.append(counters().since(before).compilations)
    host = _XLAC._xla_get_cpu_tensors(list(on_device.values()))
    return {name: value.clone() for name, value in zip(on_device, host, strict=True)}


def counters() -> Counters:
    import torch_xla.debug.metrics as metrics

    def metric(*names: str) -> tuple[int, float]:
        found = [data for name in names if (data := metrics.metric_data(name))]
        return sum(int(data[0]) for data in found), sum(float(data[1]) for data in found)

    compilations, nanoseconds = metric("CompileTime")
    executions, execute_nanoseconds = metric("ExecuteTime", "ExecuteReplicatedTime")
    gathers = sum(_compiled_to_gather)
    on_host = [name for name in metrics.counter_names() if name.startswith("aten::")]
    return Counters(
        compilations=compilations - gathers,
        gather_compilations=gathers,
        compile_seconds=nanoseconds / 1e9,
        executions=executions,
        execute_seconds=execute_nanoseconds / 1e9,
        tensors_to_host=metric("TransferFromDeviceTime")[0],
        fallbacks=Counter({name: int(metrics.counter_value(name) or 0) for name in on_host}),
    )
