"""What SAM costs: python benchmarks/sam.py

A step of nfnet_f0 (forward, backward, clipping, Nesterov step) with SGD, with SAM whose ascent uses
the whole batch or a fifth of it (arXiv 2102.06171, A.4), and with the usual two-pass SAM (which
clones gradients and loops over parameters in Python); medians of runs taken in turns.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _turns import Report, medians
from nfnets_xla import create_model
from nfnets_xla.optim import SAM, SGD_AGC, parameter_roles

BATCH, SIZE, RUNS = 20, 96, 5
RHO, FIFTH = 0.05, 5
Step = Callable[[], object]


def main() -> None:
    report = Report(
        "sam", f"python benchmarks/sam.py: nfnet_f0, {BATCH} rows of {SIZE} px, float32, on the CPU"
    )
    torch.manual_seed(0)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(1000, (BATCH,))
    seconds = medians(
        {
            "SGD": stepping(images, labels, rho=None),
            "SAM": stepping(images, labels, rho=RHO),
            "SAM, a fifth": stepping(images, labels, rho=RHO, part=FIFTH),
            "SAM, usual": usual_sam(images, labels),
        },
        RUNS,
    )
    for name, time in seconds.items():
        report.say(f"{name:14}{time:8.2f} s a step{time / seconds['SGD']:8.2f} x SGD")
    report.save()


def sgd_and_network() -> tuple[SGD_AGC, nn.Module]:
    net = create_model("nfnet_f0", drop_rate=0.0, drop_path_rate=0.0).train()
    return SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=1e-3), net


def stepping(images: Tensor, labels: Tensor, rho: float | None, part: int = 1) -> Step:
    sgd, net = sgd_and_network()
    sam = None if rho is None else SAM(sgd, rho=rho)

    def closure() -> Tensor:
        net.zero_grad()
        rows = BATCH // part if sam is not None and sam.ascending else BATCH
        loss = F.cross_entropy(net(images[:rows]), labels[:rows])
        loss.backward()
        return loss

    return lambda: (sam or sgd).step(closure)


def usual_sam(images: Tensor, labels: Tensor) -> Step:
    sgd, net = sgd_and_network()
    parameters = list(net.parameters())

    def gradient() -> None:
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()

    def step() -> None:
        gradient()
        with torch.no_grad():
            norms = [p.grad.norm() for p in parameters if p.grad is not None]
            scale = RHO / (torch.stack(norms).norm() + 1e-12)
            kept = [p.clone() for p in parameters]
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.add_(parameter.grad * scale)
        gradient()
        with torch.no_grad():
            for parameter, weight in zip(parameters, kept, strict=True):
                parameter.copy_(weight)
        sgd.step()

    return step


if __name__ == "__main__":
    main()
