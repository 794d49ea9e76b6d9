"""Lightning on XLA in SPMD mode: one accelerator and one strategy, usable with any LightningModule.

    import nfnets_xla.strategy
    Trainer(accelerator="xla", strategy="xla_spmd", devices=4)   # 4 virtual devices without a TPU

One process drives all devices of its host; tensors are global, the batch is cut over the mesh by
its first axis, and world size is 1 as Lightning counts it. A step is dispatched once, so that
forward, backward and update are one graph: after `optimizer_step`, or with manual optimization
after the whole `training_step`. Precision is the module's own business (no autocast here):
Lightning's default precision plug-in does nothing, which is what is wanted. Lightning's own XLA
strategies cannot run on the CPU runtime.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.types import _DEVICE
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.optim import Optimizer

from nfnets_xla import xla


@runtime_checkable
class HasDeviceState(Protocol):
    """A module with tensors on the device that are neither parameters nor optimizer state."""

    def device_state(self) -> Mapping[str, Tensor]: ...


class XLAAccelerator(Accelerator):
    """Every XLA device of this host: a TPU's chips, or virtual devices of the CPU runtime.

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
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        """Starts the runtime: without a TPU, with so many virtual devices."""
        xla.start(None if xla.tpu_is_attached() else devices)
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

    def __init__(self) -> None:
        super().__init__(device=torch.device("xla", 0))

    def setup_environment(self) -> None:
        xla.start()
        self._root_device = xla.device()
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Place the module, make the optimizers, then fix every tensor's sharding for good."""
        super().setup(trainer)
        xla.replicate(self._tensors_on_device())
        xla.sync(wait=True)

    def _tensors_on_device(self) -> dict[str, Tensor]:
        module = self.lightning_module
        assert module is not None
        named: dict[str, Tensor] = dict(module.named_parameters()) | dict(module.named_buffers())
        for number, optimizer in enumerate(self.optimizers):
            for place, state in enumerate(optimizer.state.values()):
                for key, value in state.items():
                    if isinstance(value, Tensor) and value.device.type == "xla":
                        named[f"optimizer {number}/{place}/{key}"] = value
        if isinstance(module, HasDeviceState):
            named |= module.device_state()
        return named

    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        """Upload with the rows cut over the mesh; the module's transfer hooks then see that."""
        batch = apply_to_collection(batch, Tensor, _to_mesh)
        return super().batch_to_device(batch, device, dataloader_idx)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        output = super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._is_automatic:
            xla.sync()
        return output

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().training_step(*args, **kwargs)
        if not self._is_automatic:
            xla.sync()
        return output

    @property
    def _is_automatic(self) -> bool:
        """Then Lightning calls `training_step` inside the optimizer's step."""
        assert self.lightning_module is not None
        return self.lightning_module.automatic_optimization

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().validation_step(*args, **kwargs)
        xla.sync()
        return output

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().test_step(*args, **kwargs)
        xla.sync()
        return output

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        output = super().predict_step(*args, **kwargs)
        xla.sync()
        return output

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Host copies, for Lightning's own checkpoints of a user's module."""
        return _gathered(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = super().optimizer_state(optimizer)
        flat = {
            f"{parameter}/{key}": value
            for parameter, entries in state["state"].items()
            for key, value in entries.items()
        }
        gathered = _gathered(flat)
        state["state"] = {
            parameter: {key: gathered[f"{parameter}/{key}"] for key in entries}
            for parameter, entries in state["state"].items()
        }
        return state


def _to_mesh(tensor: Tensor) -> Tensor:
    return xla.upload_rows(tensor) if tensor.device.type == "cpu" else tensor


def _gathered(values: dict[str, Any]) -> dict[str, Any]:
    on_device = {
        name: value
        for name, value in values.items()
        if isinstance(value, Tensor) and value.device.type == "xla"
    }
    return values | xla.gather(on_device)


if "xla" not in AcceleratorRegistry:
    AcceleratorRegistry.register("xla", XLAAccelerator, description="XLA devices in SPMD mode")
if SPMDStrategy.strategy_name not in StrategyRegistry:
    SPMDStrategy.register_strategies(StrategyRegistry)
