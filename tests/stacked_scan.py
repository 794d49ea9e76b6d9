"""Gradients of both forms on XLA:CPU, with and without recomputation, and what they save; JSON.

The stem is frozen, so that the first block's input requires no gradient, which torch_xla's own
checkpoint does not handle. test_xla_stacked.py runs this in its own process.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nfnets_xla import NFNet, xla
from nfnets_xla.models.stacked import per_block, stack
from tests.stacked_mesh import batch, network

ROWS = 3  # unlike any number of channels or blocks after the stem


def frozen_stem(form: str) -> NFNet:
    net = network()
    net.stem.requires_grad_(False)
    if form.startswith("stacked"):
        stack(net, scan=xla.scan)
    if form.endswith("recomputing"):
        net.set_grad_checkpointing(checkpoint=xla.recompute)
    return net


def backward(net: NFNet) -> dict[str, Tensor]:
    """Gradients of the sum of all logits, on the parameters' device."""
    device = next(net.parameters()).device
    images, keep, dropout, _ = (x[:ROWS].to(device) for x in batch(net, 0))
    net(images, keep, dropout).square().sum().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@contextmanager
def count_stacks_of_maps(depth: int) -> Iterator[list[Tensor]]:
    """Number of tensors with the feature maps (or gates) of this many blocks that are saved for the
    backward pass."""
    found: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.ndim == 5 and tensor.shape[:2] == (depth, ROWS):
            found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def main() -> None:
    xla.start(virtual_devices=1)
    expected = backward(frozen_stem("unrolled"))
    report: dict[str, Any] = {"kept_per_tail": {}, "barriers": {}, "differences": {}}
    for form in ("unrolled", "unrolled, recomputing", "stacked", "stacked, recomputing"):
        net = frozen_stem(form).to(xla.device())
        depth = net.variant.depth[2] - 1
        with count_stacks_of_maps(depth) as found:
            on_device = backward(net)
        if form.startswith("stacked"):
            report["kept_per_tail"][form] = len(found)
        else:
            report["barriers"][form] = hlo(on_device).count(" opt-barrier(")
        gradients = per_block(xla.gather(on_device))
        assert gradients.keys() == expected.keys()
        report["differences"][form] = largest_difference(gradients, expected)
    report |= {"num_blocks": net.num_blocks, "compilations": xla.counters().compilations}
    print(json.dumps(report))


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative to each gradient's largest element; scalars, each a sum that cancels, are compared
    together."""
    scalars = [name for name, value in theirs.items() if value.ndim == 0]
    pairs = [(ours[name], theirs[name]) for name in theirs if name not in scalars]
    ours_S, theirs_S = (torch.stack([of[name] for name in scalars]) for of in (ours, theirs))
    pairs.append((ours_S, theirs_S))
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def hlo(tensors: dict[str, Tensor]) -> str:
    from torch_xla import _XLAC  # pyright: ignore[reportPrivateImportUsage]

    return _XLAC._get_xla_tensors_hlo(list(tensors.values()))


if __name__ == "__main__":
    main()
