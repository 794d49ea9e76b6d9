"""How sharp the minima are that SAM finds: python benchmarks/sharpness.py

The largest eigenvalue of the Hessian of the training loss, by power iteration, after training
nfnet_mini_f0 on fractals with SGD or with SAM (arXiv 2010.01412); same seeds, same batches, same
number of updates.
"""

import io
import statistics

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from _turns import Report
from nfnets_xla import create_model
from nfnets_xla.data.fractals import fractal_samples
from nfnets_xla.optim import SAM, SGD_AGC, Schedule, parameter_roles

CLASSES, PER_CLASS, ROWS = 8, 64, 32
UPDATES, WARMUP, PEAK, CLIPPING = 300, 10, 0.1, 0.16
RHOS = {"SGD": None, "SAM": 0.05}
SEEDS, ITERATIONS, HESSIAN_ROWS = (0, 1, 2), 15, 128


def main() -> None:
    report = Report(
        "sharpness",
        f"python benchmarks/sharpness.py: nfnet_mini_f0, {UPDATES} updates of {ROWS} rows of "
        f"{CLASSES * PER_CLASS} fractals of {CLASSES} classes",
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


def trained(rho: float | None, seed: int) -> tuple[float, float]:
    """(largest eigenvalue, training loss), on the same rows for both optimizers."""
    torch.manual_seed(seed)
    images, labels = fractals()
    net = network()
    roles = parameter_roles(net, "head")
    sgd = SGD_AGC(net.named_parameters(), roles, lr=1e-3, clipping=CLIPPING)
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


def network() -> nn.Module:
    """Skip gains are 0.5, as if trained a while: a branch whose gain is 0 has no curvature."""
    net = create_model("nfnet_mini_f0", num_classes=CLASSES, drop_rate=0.0, drop_path_rate=0.0)
    for parameter_name, parameter in net.named_parameters():
        if parameter_name.endswith("skip_gain"):
            nn.init.constant_(parameter, 0.5)
    return net.train()


def fractals() -> tuple[Tensor, Tensor]:
    samples = list(fractal_samples(CLASSES, PER_CLASS, size=32, seed=0))
    pixels = [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for _, png, _, _ in samples]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.tensor([label for *_, label in samples])


def largest_eigenvalue(loss: Tensor, parameters: list[nn.Parameter]) -> float:
    """The eigenvalue of largest magnitude: the Rayleigh quotient after ITERATIONS Hessian-vector
    products."""
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
