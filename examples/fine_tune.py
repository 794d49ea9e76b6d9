"""A training loop of your own: a mini NFNet learns digits with SGD, AGC and SAM, and is exported.

    python examples/fine_tune.py [STEPS]        (needs torch, timm and scikit-learn; no trainer)

To start from public weights instead, use `pretrained=True` and a name of `nfnets-xla models`.
"""

import sys
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

import nfnets_xla
from nfnets_xla.optim import SAM, SGD_AGC, Schedule, parameter_roles

BATCH, SIZE, HELD_OUT = 32, 32, 297


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    torch.manual_seed(0)
    images_BCHW, labels_B = digits()
    train, held_out = slice(HELD_OUT, None), slice(HELD_OUT)
    net = nfnets_xla.create_model("nfnet_mini_f0", num_classes=10, drop_path_rate=0.0)
    assert isinstance(net, nfnets_xla.NFNet)
    schedule = Schedule("cosine", peak=0.1, warmup_steps=max(1, steps // 10), total_steps=steps + 1)
    roles = parameter_roles(net, classifier="head")
    sgd = SGD_AGC(net.named_parameters(), roles, lr=schedule.peak, weight_decay=1e-5)
    optimizer = SAM(sgd, rho=0.05)
    for step in range(steps):
        rows = torch.randint(len(labels_B[train]), (BATCH,))
        x_BCHW, y_B = images_BCHW[train][rows], labels_B[train][rows]
        dropout = (torch.rand(BATCH, net.num_features) >= net.drop_rate).to(x_BCHW)

        def closure(x: Tensor = x_BCHW, y: Tensor = y_B, mask: Tensor = dropout) -> Tensor:
            optimizer.zero_grad()  # both of SAM's passes see the same mask
            loss = functional.cross_entropy(net(x, None, mask), y)
            loss.backward()
            return loss

        sgd.set_lr(torch.tensor([schedule(step)]))
        loss = optimizer.step(closure)
        if step % 10 == 0:
            print(f"step {step:3}  loss {float(loss.detach()):.3f}")

    fused = nfnets_xla.fuse(net.eval())  # plain convolutions: exports anywhere
    with torch.inference_mode():
        right = fused(images_BCHW[held_out]).argmax(dim=1) == labels_B[held_out]
    print(f"held out: {float(right.float().mean()):.1%} of {HELD_OUT} digits")
    program = torch.export.export(fused, (images_BCHW[:2],))
    print(f"exported: {len(program.graph.nodes)} operations")


def digits() -> tuple[Tensor, Tensor]:
    data: Any = load_digits()
    order = torch.randperm(len(data.target))
    grey_B1HW = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1
    images_B1HW = functional.interpolate(grey_B1HW, size=SIZE, mode="bicubic")
    return images_B1HW.expand(-1, 3, -1, -1).contiguous(), torch.tensor(data.target)[order]


if __name__ == "__main__":
    main()
