"""Training on XLA:CPU that may change form on the way; prints what happened as JSON.

    python -m tests.stacked_mesh DEVICES FSDP DTYPE FORM...

Each FORM is "stacked" or "unrolled" and trains for three steps from where the one before stopped:
weights, momentum and average pass through the host under the names of single blocks. The mesh is
DEVICES / FSDP by FSDP, and every matrix that "fsdp" divides is sharded over it. test_xla_stacked.py
runs this in its own process: the runtime reads its settings once.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nfnets_xla import NFNet, xla
from nfnets_xla.models.stacked import as_in, output_axes, per_block, stack
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.optim import SGD_AGC, parameter_roles
from nfnets_xla.optim.ema import EMA
from nfnets_xla.strategy import gather_weights

DEPTH = (1, 1, 3, 1)  # one tail of two blocks, which is stacked
STEPS_PER_FORM = 3
ROWS = 8
SIZE = 32
State = dict[str, dict[str, Tensor]]


class Training:
    """A network on the mesh with all its state."""

    def __init__(self, form: str, dtype: torch.dtype, state: State | None) -> None:
        net = network()
        if form == "stacked":
            stack(net, scan=xla.scan)
        if state is not None:
            net.load_state_dict(state["model"])
        self.net = net.to(xla.device())
        self.dtype = dtype
        named = dict(net.named_parameters())
        self.sgd = SGD_AGC(named.items(), parameter_roles(net, "head"), lr=0.0, clipping=0.02)
        self.ema = EMA(named.items(), decay=0.9)
        if state is not None:
            self.sgd.load_slots({"momentum": as_in(net, state["momentum"])}, updates=0)
            self.ema.load(as_in(net, state["ema"]))
        for tensors in (named, self.sgd.slots()["momentum"], self.ema.shadow):
            xla.shard(tensors, output_axes(net))
        xla.replicate(dict(net.named_buffers()))
        gather_weights(net)
        xla.sync(wait=True)

    def step(self, number: int) -> Tensor:
        images, keep, dropout, labels = xla.upload_rows(list(batch(self.net, number)))
        hyper_2 = torch.tensor([0.02 * number, self.ema.decay_at(number)]).to(xla.device())
        self.sgd.set_lr(hyper_2[0:1])
        loss = F.cross_entropy(self.net(images.to(self.dtype), keep, dropout), labels)
        loss.backward()
        self.sgd.step()
        self.sgd.zero_grad()
        self.ema.update(hyper_2[1:2])
        xla.sync(wait=True)
        return loss.detach()

    def bytes_per_device(self) -> int:
        named = dict(self.net.named_parameters())
        forms = named, self.sgd.slots()["momentum"], self.ema.shadow
        return sum(of_one_device(tensors) for tensors in forms)

    def state(self) -> State:
        """A copy on the host, under the names of single blocks."""
        forms = {
            "model": dict(self.net.named_parameters()),
            "momentum": self.sgd.slots()["momentum"],
            "ema": self.ema.shadow,
        }
        return {form: per_block(xla.gather(named)) for form, named in forms.items()}


def network() -> NFNet:
    torch.manual_seed(0)
    net = NFNet(replace(VARIANTS["nfnet_mini_f0"], depth=DEPTH), num_classes=10)
    for name, parameter in net.named_parameters():
        if name.endswith("skip_gain"):
            torch.nn.init.constant_(parameter, 0.5)
    return net


def batch(net: NFNet, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(ROWS, 3, SIZE, SIZE, generator=generator)
    keep = (torch.rand(ROWS, net.num_blocks, generator=generator) > 0.2).float()
    dropout = torch.ones(ROWS, net.num_features)
    return images, keep, dropout, torch.randint(10, (ROWS,), generator=generator)


def main(devices: int, fsdp: int, dtype: str, forms: list[str]) -> None:
    xla.start(virtual_devices=devices)
    xla.make_mesh(fsdp)
    state: State | None = None
    losses: list[Tensor] = []
    compilations: list[int] = []
    spread: list[str] = []
    kept: list[int] = []
    for form in forms:
        before = xla.counters().compilations
        training = Training(form, getattr(torch, dtype), state)
        for _ in range(STEPS_PER_FORM):
            losses.append(training.step(len(losses)))
        compilations.append(xla.counters().compilations - before)
        spread.append(sharding(training.net, form))
        kept.append(training.bytes_per_device())
        state = training.state()
    host = xla.gather({str(number): loss for number, loss in enumerate(losses)})
    report = {
        "losses": [float(host[str(number)]) for number in range(len(losses))],
        "compilations": compilations,
        "fallbacks": xla.counters().fallbacks,
        "shardings": spread,
        "bytes_per_device": kept,
        "devices": xla.mesh().device_ids.tolist(),
    }
    print(json.dumps(report))


def of_one_device(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that one device of the mesh holds."""
    from torch_xla import _XLAC  # pyright: ignore[reportPrivateImportUsage]

    return sum(places[0][0].nbytes for places in _XLAC._get_local_shards(list(tensors.values())))


def sharding(net: NFNet, form: str) -> str:
    """Sharding of one weight after the last step, in XLA's notation."""
    from torch_xla import _XLAC  # pyright: ignore[reportPrivateImportUsage]

    place = "tail" if form == "stacked" else "1"
    return _XLAC._get_xla_sharding_spec(net.get_parameter(f"stages.2.{place}.conv0.weight"))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
