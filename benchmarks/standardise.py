"""Ways to standardise a convolution's weight: python benchmarks/standardise.py

Forward and backward of 128 filters of 3x3x128, float32, eager and under torch.compile, of

    ours        models/layers.py, with its own derivative;
    arithmetic  mean, difference and sum of squares, with autograd's derivative;
    var_mean    torch.var_mean, with autograd's derivative, as timm and others write it.

Processor time of one thread on a CPU, wall-clock time on a GPU; medians of runs taken in turns.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from _turns import Report, medians
from nfnets_xla.models.layers import WS_FLOOR, Standardise

CUDA = torch.cuda.is_available()
OUT, IN, RUNS = 128, 128, 51
AXES = (1, 2, 3)
Form = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    torch.set_num_threads(1)
    device = "cuda" if CUDA else "cpu"
    report = Report(
        "standardise_cuda" if CUDA else "standardise",
        f"python benchmarks/standardise.py: {OUT} filters of 3x3x{IN}, forward and backward",
    )
    generator = torch.Generator().manual_seed(0)
    weight, out = torch.randn(2, OUT, IN, 3, 3, generator=generator).to(device)
    given = weight.mul(0.03).requires_grad_(), torch.ones(OUT, device=device, requires_grad=True)
    work = {f"{name} eager": step(form, *given, out) for name, form in FORMS.items()}
    for name, form in FORMS.items():
        compiled = torch.compile(form, fullgraph=True, dynamic=False)
        work[f"{name} compiled"] = step(compiled, *given, out)
    seconds = medians(work, RUNS, time.perf_counter if CUDA else time.process_time)
    for name, taken in seconds.items():
        ours = seconds[f"ours {name.split()[1]}"]
        report.say(f"{name:20}{1e3 * taken:9.3f} ms{taken / ours:8.2f} x ours")
    report.save()


def step(form: Form, weight: Tensor, gain: Tensor, gradient: Tensor) -> Callable[[], None]:
    def work() -> None:
        weight.grad = gain.grad = None
        form(weight, gain).backward(gradient)

    return work


def ours(weight: Tensor, gain: Tensor) -> Tensor:
    return Standardise.apply(weight, gain, WS_FLOOR, 0.0)[0]  # type: ignore[index]


def arithmetic(weight: Tensor, gain: Tensor) -> Tensor:
    centred = weight - weight.mean(dim=AXES, keepdim=True)
    squares = centred.square().sum(dim=AXES, keepdim=True)
    return centred * (torch.rsqrt(squares.clamp(min=WS_FLOOR)) * gain[:, None, None, None])


def var_mean(weight: Tensor, gain: Tensor) -> Tensor:
    variance, mean = torch.var_mean(weight, dim=AXES, keepdim=True, correction=0)
    squares = variance * weight[0].numel()
    return (weight - mean) * (torch.rsqrt(squares.clamp(min=WS_FLOOR)) * gain[:, None, None, None])


FORMS: dict[str, Form] = {"ours": ours, "arithmetic": arithmetic, "var_mean": var_mean}


if __name__ == "__main__":
    main()
