"""Eight steps of SAM, an optimizer and EMA on XLA:CPU; prints what the runtime did as JSON.

Run by test_xla.py in a process of its own: the runtime reads its settings once.
"""

import json
import math
import sys

import torch
import torch.nn.functional as F
from torch import nn

from nfnets_xla import xla
from nfnets_xla.optim import SAM, Guard, Passes, parameter_roles
from nfnets_xla.optim.ema import EMA
from tests.optim.network import an_optimizer, images_and_labels, small_net

# Learning rate, decay, rho: each is exactly 0 and exactly 1 at some step.
HYPERPARAMETERS = [
    (0.0, 0.1, 0.05),
    (0.5, 0.0, 0.05),
    (1.0, 1.0, 0.0),
    (0.7, 0.5, 1.0),
    (0.3, 0.9, 0.05),
    (0.0, 0.99999, 0.05),
    (0.7, 0.9, 0.05),
    (0.7, 0.9, 0.05),
]
BAD = {4: math.nan, 6: math.inf}  # pixels at these steps: one is skipped, the next freezes


def train(name: str, device: torch.device) -> tuple[dict[str, torch.Tensor], list[int]]:
    """All state, and the number of graphs compiled before and after each step."""
    net = small_net().to(device)
    guard = Guard(device, allowed=1, memory=4)
    updater = an_optimizer(name, net, parameter_roles(net, "head"), lr=0.0, guard=guard)
    sam = SAM(updater, rho=0.05, microbatches=2)
    passes = Passes(images=3, views=1, accumulation=3, ascent_fraction=0.67)
    ema = EMA(net.named_parameters(), decay=0.99999)
    parts: list[list[torch.Tensor]] = []

    def closure() -> torch.Tensor:
        net.zero_grad()
        losses: list[torch.Tensor] = []
        for places in passes.of_step(0, ascending=sam.ascending):
            x, y = (passes.take(rows, places) for rows in parts[sam.microbatch])
            losses.append(F.cross_entropy(net(x), y))
            losses[-1].backward()
        return losses[0]

    if device.type == "xla":  # as the strategy does before the first step
        xla.replicate({**state(net, ema), "guard": guard.numbers_G})
        for tensors in updater.state.values():
            xla.replicate(tensors)
    compilations = [xla.counters().compilations]
    for step, values in enumerate(HYPERPARAMETERS):
        images, labels = images_and_labels()
        images[1, 0, 0, 0] = BAD.get(step, images[1, 0, 0, 0])
        batches = (images, labels.flip(0)), (images.flip(0), labels)
        parts[:] = [[rows.to(device) for rows in batch] for batch in batches]
        hyper_3 = torch.tensor(values).to(device)
        updater.set_lr(hyper_3[0:1])
        sam.set_rho(hyper_3[2:3])
        sam.step(closure)
        assert guard.holds is not None
        ema.update(torch.maximum(hyper_3[1:2], guard.holds))
        guard.holds = None
        if device.type == "xla":
            xla.sync(wait=True)
        compilations.append(xla.counters().compilations)
    return {**state(net, ema), "guard": guard.numbers_G}, compilations


def main() -> None:
    xla.start(virtual_devices=2)
    found, compilations = train(sys.argv[1], xla.device())
    fallbacks = xla.counters().fallbacks
    expected, _ = train(sys.argv[1], torch.device("cpu"))
    differences = {
        name: float((found[name].detach().cpu() - tensor.detach()).abs().max())
        for name, tensor in expected.items()
    }
    report = {
        "compilations": compilations,
        "fallbacks": fallbacks,
        "differences": differences,
        "guard": found["guard"].tolist(),
    }
    print(json.dumps(report))


def state(net: nn.Module, ema: EMA) -> dict[str, torch.Tensor]:
    averages = {f"ema/{name}": tensor for name, tensor in ema.shadow.items()}
    return {**dict(net.named_parameters()), **averages}


if __name__ == "__main__":
    main()
