"""Lightning on XLA in SPMD mode: one accelerator and one strategy, usable with any LightningModule.

    import nfnets_xla.strategy
    Trainer(accelerator="xla", strategy="xla_spmd", devices=4)   # 4 virtual devices without a TPU

One process drives all devices of its host. Tensors are global, the batch is sharded over the mesh
along its first axis, and Lightning sees a world size of 1. Forward, backward and update are one
graph, dispatched once per step: after `optimizer_step`, or with manual optimization after the whole
`training_step`. The module casts by itself; there is no autocast, and Lightning's default precision
plug-in, which does nothing, is right. Lightning's own XLA strategies cannot run on the CPU runtime.
"""

import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from lightning.fabric.utilities.types import _DEVICE
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from nfnets_xla import xla
from nfnets_xla.devices import tpu_is_attached
from nfnets_xla.models.layers import WSConv2d


@runtime_checkable
class HasDeviceState(Protocol):
    """A module with tensors on the device that are neither parameters nor optimizer state."""

    def device_state(self) -> Mapping[str, Tensor]: ...


@runtime_checkable
class HasCutAxes(Protocol):
    """A module that says along which axis each of its parameters is sharded over "fsdp"."""

    def cut_axes(self) -> Mapping[str, int]:
        """{name of a parameter, or in `device_state`: axis}; all others are replicated."""
        ...


T = TypeVar("T")


class XLAAccelerator(Accelerator):
    """All XLA devices of this host: a TPU's chips, or virtual devices of the CPU runtime.

    Not derived from Lightning's XLAAccelerator, which Lightning ties to its own strategies.
    """

    def setup_device(self, device: torch.device) -> None:
        if device.type != "xla":
            raise ValueError(
                f"the xla accelerator was given device {device}; it needs an xla device"
            )

    def teardown(self) -> None: ...

    def get_device_stats(self, device: _DEVICE) -> dict[str, Any]:
        del device
        counters = xla.counters()
        return {"compilations": counters.compilations, "executions": counters.executions}

    @staticmethod
    def parse_devices(devices: Any) -> int:
        """A number of devices, virtual ones if there is no TPU; -1 means all, as "auto" does."""
        if not re.fullmatch(r"-1|0*[1-9]\d*", str(devices)):
            raise ValueError(
                f"devices={devices!r}: one process drives all devices of its host; give their "
                "number, or 'auto'"
            )
        return XLAAccelerator.auto_device_count() if int(devices) == -1 else int(devices)

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        """Starts the runtime; without a TPU, with `devices` virtual devices."""
        xla.start(None if tpu_is_attached() else devices)
        if xla.num_devices() != devices:
            raise ValueError(f"devices={devices}, but the TPU has {xla.num_devices()}: use 'auto'")
        return [torch.device("xla", 0)]

    @staticmethod
    def auto_device_count() -> int:
        xla.start()
        return xla.num_devices()

    @staticmethod
    def is_available() -> bool:
        return xla.is_installed()

    @staticmethod
    def name() -> str:
        return "xla"


class SPMDStrategy(SingleDeviceStrategy):
    """Global tensors over one mesh; see the head of this module."""

    strategy_name = "xla_spmd"

    def __init__(self, fsdp: int = 1) -> None:
        """`fsdp` devices shard one copy of parameters and state; it divides all devices."""
        super().__init__(device=torch.device("xla", 0))
        self.fsdp = fsdp
        self.trace_seconds = 0.0  # of training steps: in Python, until the graph is complete
        self.dispatch_seconds = 0.0  # then until the runtime has it, including compilation
        self._num_hosts = 1
        self._has_stepped = False
        self._has_failed = False
        self._at_teardown = ExitStack()

    @property
    def precision_plugin(self) -> Precision:
        return super().precision_plugin

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        """ValueError for autocast: Lightning would use that of CUDA, whatever the device."""
        if isinstance(precision_plugin, MixedPrecision):
            raise ValueError(
                f"precision is {precision_plugin.precision!r}, and {self.strategy_name} has no "
                "autocast: give precision='bf16-true', or cast inside the module"
            )
        self._precision_plugin = precision_plugin

    def setup_environment(self) -> None:
        xla.start()
        xla.make_mesh(self.fsdp)
        self._num_hosts = xla.num_hosts()
        self._root_device = xla.device()
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Place the module, make the optimizers, then fix the sharding of every tensor."""
        super().setup(trainer)
        named, axes = self._tensors_on_device()
        xla.shard(named, axes)
        if self.fsdp > 1:
            assert self.lightning_module is not None
            self._at_teardown.callback(gather_weights(self.lightning_module))
        # Not Lightning's default: torch_xla fails on views of inference tensors (as in F.linear).
        for loop in (trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
            loop.inference_mode = False
        xla.sync(wait=True)

    def _tensors_on_device(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All tensors that live as long as the run, by name, and the axes to shard them along.

        Without `cut_axes`, parameters of at least two axes are sharded along their outputs.
        Optimizer state of its parameter's shape is sharded as the parameter is.
        """
        module = self.lightning_module
        assert module is not None
        parameters = dict(module.named_parameters())
        named: dict[str, Tensor] = parameters | dict(module.named_buffers())
        if isinstance(module, HasDeviceState):
            named |= module.device_state()
        if isinstance(module, HasCutAxes):
            axes = dict(module.cut_axes())
        else:
            axes = {name: 0 for name, parameter in parameters.items() if parameter.ndim > 1}
        name_of = {id(parameter): name for name, parameter in parameters.items()}
        for number, optimizer in enumerate(self.optimizers):
            for place, (parameter, state) in enumerate(optimizer.state.items()):
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.device.type == "xla":
                        name = f"optimizer {number}/{place}/{key}"
                        named[name] = value
                        axis = axes.get(name_of.get(id(parameter), ""))
                        if axis is not None and value.shape == parameter.shape:
                            axes[name] = axis
        return named, axes

    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """Upload, with rows sharded over the mesh; then the module's transfer hooks are called."""
        batch = _moved(batch, "cpu", lambda rows: self._heard(lambda: xla.upload_rows(rows)))
        return super().batch_to_device(batch, device, dataloader_idx)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        if not self._is_automatic:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        return self._dispatched(super().optimizer_step, optimizer, closure, model, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_automatic:
            return super().training_step(*args, **kwargs)
        return self._dispatched(super().training_step, *args, **kwargs)

    def _dispatched(self, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = step(*args, **kwargs)
        traced = time.perf_counter()
        self._sync()
        self._has_stepped = True
        self.trace_seconds += traced - start
        self.dispatch_seconds += time.perf_counter() - traced
        return output

    def _sync(self) -> None:
        self._heard(xla.sync)

    def _heard(self, exchange: Callable[[], T]) -> T:
        """With several hosts, after the first step, an error of the runtime becomes HostLost: by
        then it is not the program's fault, and any use of the devices may raise it."""
        try:
            return exchange()
        except RuntimeError as error:  # before the first step, open_hosts could block
            if self._has_stepped and self._num_hosts > 1:
                raise xla.open_hosts().lost(error) from error
            raise

    @property
    def _is_automatic(self) -> bool:
        """If true, Lightning calls `training_step` inside the optimizer's step."""
        assert self.lightning_module is not None
        return self.lightning_module.automatic_optimization

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().validation_step(*args, **kwargs)
        self._sync()
        return output

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().test_step(*args, **kwargs)
        self._sync()
        return output

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().predict_step(*args, **kwargs)
        self._sync()
        return output

    def on_exception(self, exception: BaseException) -> None:
        super().on_exception(exception)
        self._has_failed = True

    def teardown(self) -> None:
        """Brings weights and optimizer state to the host, unless one of several hosts failed:
        gathering needs all hosts, and the current step may wait for one that is gone."""
        self._at_teardown.close()
        if self._has_failed and self._num_hosts > 1:
            return
        if self.fsdp > 1 and self.lightning_module is not None:
            _to_host(self.lightning_module, self.optimizers)
        super().teardown()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Lightning's checkpoint of a user's module, with host copies of all device tensors, also
        those in callbacks' states, such as a best score."""
        super().save_checkpoint(_gathered(checkpoint), filepath, storage_options)


def _to_host(module: nn.Module, optimizers: list[Optimizer]) -> None:
    """As Lightning's teardown, but gathered at once: each sharded tensor would cost a graph."""
    module.zero_grad()
    named = dict(module.named_parameters())
    host = {id(named[name]): value for name, value in _gathered(named).items()}
    module._apply(lambda tensor: host[id(tensor)] if id(tensor) in host else tensor.cpu())
    for optimizer in optimizers:
        entries = list(optimizer.state.values())
        for key in {key for state in entries for key in state}:
            values = {str(n): state[key] for n, state in enumerate(entries) if key in state}
            for place, value in _gathered(values).items():
                entries[int(place)][key] = value


def gather_weights(module: nn.Module) -> Callable[[], None]:
    """Make every part of `module` gather its sharded parameters only when it runs.

    Then only one block's weights are whole at a time, and in the compute dtype where the module
    casts them itself. Returns a function that undoes it, for when the weights are on the host.
    """
    undo = ExitStack()
    for part in module.modules():
        if isinstance(part, WSConv2d):
            part.place_weight = xla.whole
            undo.callback(delattr, part, "place_weight")
        elif any(parameter.ndim > 1 for parameter in part.parameters(recurse=False)):
            undo.callback(part.register_forward_pre_hook(_use_whole).remove)
            undo.callback(part.register_forward_hook(_use_own, always_call=True).remove)
    return undo.close


def _use_whole(part: nn.Module, _inputs: Any) -> None:
    """An entry in `__dict__` hides the one in `_parameters`, which torch looks up last."""
    for name, parameter in part.named_parameters(recurse=False):
        if parameter.ndim > 1:
            part.__dict__[name] = xla.whole(parameter)


def _use_own(part: nn.Module, _inputs: Any, _output: Any) -> None:
    for name, _ in part.named_parameters(recurse=False):
        part.__dict__.pop(name, None)


def _gathered(values: dict[str, Any]) -> dict[str, Any]:
    """`values` with all device tensors, however deeply nested, replaced by host copies."""

    def gather(tensors: list[Tensor]) -> Iterable[Tensor]:
        return xla.gather({str(n): tensor for n, tensor in enumerate(tensors)}).values()

    return _moved(values, "xla", gather)


def _moved(
    collection: Any, device_type: str, move: Callable[[list[Tensor]], Iterable[Tensor]]
) -> Any:
    """A copy of `collection` with its tensors on that type of device moved, all at once."""
    found: list[Tensor] = []
    apply_to_collection(collection, Tensor, found.append, allow_frozen=True)
    moved = iter(move([tensor for tensor in found if tensor.device.type == device_type]))
    return apply_to_collection(
        collection,
        Tensor,
        lambda tensor: next(moved) if tensor.device.type == device_type else tensor,
        allow_frozen=True,
    )


if "xla" not in AcceleratorRegistry:
    AcceleratorRegistry.register("xla", XLAAccelerator, description="XLA devices in SPMD mode")
if SPMDStrategy.strategy_name not in StrategyRegistry:
    SPMDStrategy.register_strategies(StrategyRegistry)
