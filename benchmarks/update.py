"""The optimizer's update beside timm's clipping with torch's SGD: python benchmarks/update.py

Both clip a network's gradients adaptively, decay, and step with Nesterov momentum, in eager PyTorch
on the CPU. Prints the median of several runs, taken in turns, and the ratio.
"""

import statistics
import time
from collections.abc import Callable

import torch
from timm.utils.agc import adaptive_clip_grad

from nfnets_xla import create_model
from nfnets_xla.optim import SGD_AGC, parameter_roles

MODEL = "nfnet_f0"
RUNS = 9


def main() -> None:
    torch.set_num_threads(1)
    print(f"{MODEL}, torch {torch.__version__}, 1 thread, median of {RUNS} updates in turns")
    ours, timms = our_update(), timms_update()
    for update in (ours, timms):  # warm up
        update()
    times: dict[str, list[float]] = {"ours": [], "timm": []}
    for _ in range(RUNS):
        for name, update in (("ours", ours), ("timm", timms)):
            start = time.perf_counter()
            update()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, seconds in medians.items():
        print(f"{name:5} {1e3 * seconds:8.1f} ms")
    print(f"ours / timm: {medians['ours'] / medians['timm']:.2f}")


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    net = create_model(MODEL)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    return net


def our_update() -> Callable[[], object]:
    net = network()
    optimizer = SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=1e-3)
    return optimizer.step


def timms_update() -> Callable[[], object]:
    net = network()
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(
        parameters, lr=1e-3, momentum=0.9, nesterov=True, weight_decay=2e-5, foreach=False
    )
    gradients = [parameter.grad for parameter in parameters]

    def update() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        adaptive_clip_grad(parameters, clip_factor=0.01)
        optimizer.step()

    return update


if __name__ == "__main__":
    main()
