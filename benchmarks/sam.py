"""What SAM costs and what it does: python benchmarks/sam.py

Cost: a step of nfnet_f0 (forward, backward, clipping, Nesterov step) with SGD, with SAM whose
ascent sees the whole batch or a fifth of it (arXiv 2102.06171, A.4), and with the two-pass SAM that
is mostly used (gradients cloned, a Python loop over parameters), medians taken in turns.

Sharpness: the largest eigenvalue of the Hessian of the training loss, by power iteration, after
training nfnet_mini_f0 on fractals with either; same seeds, same batches, same number of updates.
They have hardly learned by then (chance is a loss of ln 8 = 2.08): the ratio says little of SAM.
"""

import io
import statistics
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from _turns import Report, medians
from nfnets_xla import create_model
from nfnets_xla.data.fractals import fractal_samples
from nfnets_xla.optim import SAM, SGD_AGC, Schedule, parameter_roles

BATCH, SIZE, RUNS = 20, 96, 5
RHO, FIFTH = 0.05, 5
CLASSES, PER_CLASS, UPDATES, ROWS, PEAK, WARMUP = 8, 64, 120, 32, 0.1, 10
SEEDS, ITERATIONS, HESSIAN_ROWS = (0, 1, 2), 15, 128
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
    report.say(
        f"\nlargest eigenvalue of the Hessian, nfnet_mini_f0, {UPDATES} updates of {ROWS} rows of "
        f"{CLASSES * PER_CLASS} fractals, {len(SEEDS)} seeds"
    )
    found = {name: [trained(rho, seed) for seed in SEEDS] for name, rho in RHOS.items()}
    for name, results in found.items():
        sharpness, loss = zip(*results, strict=True)
        report.say(
            f"{name:14}median {statistics.median(sharpness):8.2f}   of "
            f"{', '.join(f'{value:.2f}' for value in sharpness)}"
            f"   training loss {statistics.median(loss):.3f}"
        )
    falls = [sam[0] / sgd[0] for sgd, sam in zip(found["SGD"], found["SAM"], strict=True)]
    report.say(f"SAM / SGD, seed by seed: {', '.join(f'{ratio:.2f}' for ratio in falls)}")
    report.save()


RHOS = {"SGD": None, "SAM": RHO}


def network(name: str, classes: int) -> nn.Module:
    """As if trained a while: a branch whose gain is 0 costs as much, and has no curvature."""
    net = create_model(name, num_classes=classes, drop_rate=0.0, drop_path_rate=0.0)
    for parameter_name, parameter in net.named_parameters():
        if parameter_name.endswith("skip_gain"):
            nn.init.constant_(parameter, 0.5)
    return net.train()


def sgd_of(net: nn.Module) -> SGD_AGC:
    return SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=1e-3)


def stepping(images: Tensor, labels: Tensor, rho: float | None, part: int = 1) -> Step:
    net = network("nfnet_f0", 1000)
    sgd = sgd_of(net)
    sam = None if rho is None else SAM(sgd, rho=rho)

    def closure() -> Tensor:
        net.zero_grad()
        rows = BATCH // part if sam is not None and sam.ascending else BATCH
        loss = F.cross_entropy(net(images[:rows]), labels[:rows])
        loss.backward()
        return loss

    return lambda: (sam or sgd).step(closure)


def usual_sam(images: Tensor, labels: Tensor) -> Step:
    net = network("nfnet_f0", 1000)
    sgd = sgd_of(net)
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


# ---- sharpness --------------------------------------------------------------------------------


def trained(rho: float | None, seed: int) -> tuple[float, float]:
    """(largest eigenvalue, training loss) on the same rows for either optimizer."""
    torch.manual_seed(seed)
    images, labels = fractals()
    net = network("nfnet_mini_f0", CLASSES)
    sgd = sgd_of(net)
    optimizer = sgd if rho is None else SAM(sgd, rho=rho)
    schedule = Schedule("cosine", PEAK, WARMUP, UPDATES)
    generator = torch.Generator().manual_seed(seed)
    for update in range(UPDATES):
        rows = torch.randint(len(images), (ROWS,), generator=generator)
        sgd.set_lr(schedule(update))

        def closure(rows: Tensor = rows) -> Tensor:
            net.zero_grad()
            loss = F.cross_entropy(net(images[rows]), labels[rows])
            loss.backward()
            return loss

        optimizer.step(closure)
    loss = F.cross_entropy(net(images[:HESSIAN_ROWS]), labels[:HESSIAN_ROWS])
    return largest_eigenvalue(loss, list(net.parameters())), float(loss.detach())


def fractals() -> tuple[Tensor, Tensor]:
    samples = list(fractal_samples(CLASSES, PER_CLASS, size=32, seed=0))
    pixels = [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for _, png, _, _ in samples]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.tensor([label for *_, label in samples])


def largest_eigenvalue(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    """Of largest magnitude, as the Rayleigh quotient after so many Hessian-vector products."""
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    vector = [torch.randn(p.shape, generator=generator) for p in parameters]
    eigenvalue = 0.0
    for _ in range(ITERATIONS):
        norm = torch.linalg.vector_norm(torch.stack([v.norm() for v in vector]))
        vector = [v / norm for v in vector]
        products = torch.autograd.grad(gradients, parameters, vector, retain_graph=True)
        eigenvalue = float(sum((p * v).sum() for p, v in zip(products, vector, strict=True)))
        vector = list(products)
    return eigenvalue


if __name__ == "__main__":
    main()
