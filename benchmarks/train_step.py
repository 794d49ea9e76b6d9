"""A whole training step beside timm's, and JAX's if there is one: python benchmarks/train_step.py

    python benchmarks/train_step.py --device cuda --compile --models nfnet_f0 nfnet_f1 nfnet_f3

Forward, backward, adaptive clipping, Nesterov step and average of the weights, without dropout, of

    ours   NFNet, SGD_AGC and EMA, as in a run;
    timm   its dm_nfnet_*, adaptive_clip_grad, torch's SGD and ModelEmaV3, at their defaults; in
           bfloat16 by autocast;
    jax    _jax_nfnet.py, without the average.

Medians of runs taken in turns, channels_last, eager and with --compile also under torch.compile
(--mode is its mode, for both). On a CPU in processor time, which other work on the machine hardly
affects; on a GPU with the peak memory of each. MFU counts the multiply-accumulates of three forward
passes against the vendor's peak. The floor is the least time the step could take: these operations
at the rate of the best matrix product, or, if that is longer, the memory traffic at the rate of the
best copy: every convolution's input and output read or written once in each of three passes, and
the update's tensors. Both rates are measured here.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils.agc import adaptive_clip_grad
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from _timm_nfnet import timms_network, with_branches
from _turns import Report, medians, wait
from nfnets_xla import NFNet
from nfnets_xla.devices import find_device
from nfnets_xla.inductor import Clock
from nfnets_xla.models.layers import WSConv2d
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.optim import SGD_AGC, parameter_roles
from nfnets_xla.optim.ema import EMA

CLASSES, LR, EMA_DECAY = 1000, 1e-3, 0.999
HERE = Path(__file__).parent
Work = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    model: str
    rows: int
    size: int
    dtype: torch.dtype
    device: str

    def batch(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(self.rows, 3, self.size, self.size, generator=generator)
        labels = torch.randint(CLASSES, (self.rows,), generator=generator)
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        return images, labels.to(self.device)

    def network(self) -> NFNet:
        torch.manual_seed(0)
        net = NFNet(VARIANTS[self.model], num_classes=CLASSES, drop_rate=0.0, drop_path_rate=0.0)
        return with_branches(net)

    def placed(self, net: nn.Module) -> nn.Module:
        return net.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--models", nargs="+", default=["nfnet_f0"], choices=[*VARIANTS])
    parser.add_argument("--device", default="cuda" if cuda else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--batch", type=int, default=64 if cuda else 8)
    parser.add_argument("--size", type=int, default=224 if cuda else 128)
    parser.add_argument("--dtype", default="bfloat16" if cuda else "float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--mode", default="default", help="of torch.compile")
    parser.add_argument("--runs", type=int, default=15 if cuda else 5)
    given = parser.parse_args()
    mode = [] if given.mode == "default" else [given.mode]
    compiled = ["compiled", *mode] if given.compile else []
    name = "_".join(["train_step", given.device, *given.models, *compiled])
    report = Report(name, "python benchmarks/train_step.py " + " ".join(sys.argv[1:]))
    dtype = getattr(torch, given.dtype)
    flops, bandwidth = matmul_rate(given.device, dtype), copy_rate(given.device)
    report.say(f"best product {flops / 1e12:.3g} TFLOP/s, best copy {bandwidth / 1e9:.4g} GB/s")
    for model in given.models:
        work = Workload(model, given.batch, given.size, dtype, given.device)
        measure(work, given, report, flops, bandwidth)
        report.save()
        torch._dynamo.reset()  # would keep this model's networks in memory during the next


def measure(
    work: Workload, given: argparse.Namespace, report: Report, flops: float, bandwidth: float
) -> None:
    needed, moved = needs(work)
    floor = max(needed / flops, moved / bandwidth)
    report.say(
        f"\n{work.model}, {work.rows} rows of {work.size} px, {str(work.dtype)[6:]}: at least "
        f"{1e3 * floor:.4g} ms ({1e3 * needed / flops:.4g} of products, "
        f"{1e3 * moved / bandwidth:.4g} of memory)"
    )
    report.say(f"{'':16}{'ms':>10}{'images/s':>10}{'x timm':>8}{'MFU':>8}{'floor':>8}{'MiB':>10}")
    steps: dict[str, Work] = {}
    memory: dict[str, float | None] = {}
    forms = (False, True) if given.compile else (False,)
    for compiled in forms:
        for who, make in (("timm", timms), ("ours", ours)):
            name, compiler = f"{who}{' compiled' * compiled}", Clock()
            mode = given.mode if compiled else None
            steps[name], memory[name] = with_memory(lambda m=make, k=mode: m(work, k), work.device)
            if compiled:
                report.say(f"{name}: {compiler.graphs} graphs in {compiler.seconds:.0f} s")
    clock = time.perf_counter if work.device == "cuda" else time.process_time
    seconds = medians(steps, given.runs, clock)
    known = find_device(torch.cuda.get_device_name()) if work.device == "cuda" else None
    best = min(time for name, time in seconds.items() if name.startswith("timm"))

    def row(name: str, taken: float, mib: float | None) -> str:
        mfu = f"{needed / taken / known.peak_flops:8.1%}" if known else f"{'-':>8}"
        return (
            f"{name:16}{1e3 * taken:10.2f}{work.rows / taken:10.2f}{best / taken:8.2f}{mfu}"
            f"{floor / taken:8.1%}" + (f"{'-':>10}" if mib is None else f"{mib:10.0f}")
        )

    for name, taken in seconds.items():
        report.say(row(name, taken, memory[name]))
    if importlib.util.find_spec("jax") is not None:
        report.say(row("jax", jax_seconds(work, given.runs), None))


# ---- competitors ------------------------------------------------------------------------------


def ours(work: Workload, mode: str | None) -> Work:
    net = work.network()
    work.placed(net)
    images, labels = work.batch()
    sgd = SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=LR)
    ema = EMA(net.named_parameters(), EMA_DECAY)
    decay = torch.tensor([EMA_DECAY], device=work.device)

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(net(images.to(work.dtype)), labels)

    forward = _compiled(loss_of, mode)

    def step() -> None:
        sgd.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        forward(images, labels).backward()
        sgd.step()
        ema.update(decay)

    return step


def timms(work: Workload, mode: str | None) -> Work:
    torch.manual_seed(0)
    net = with_branches(timms_network(work.model, CLASSES))
    work.placed(net)
    images, labels = work.batch()
    clipped = [p for name, p in net.named_parameters() if name != "head.fc.weight"]
    sgd = torch.optim.SGD(net.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=2e-5)
    ema = ModelEmaV3(net, decay=EMA_DECAY)
    forward = _compiled(net, mode)
    narrow = work.dtype != torch.float32

    def step() -> None:
        sgd.zero_grad()
        torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(work.device, work.dtype) if narrow else nullcontext():
            loss = F.cross_entropy(forward(images), labels)
        loss.backward()
        adaptive_clip_grad(clipped, clip_factor=0.01)
        sgd.step()
        ema.update(net)

    return step


def _compiled(function: Any, mode: str | None) -> Any:
    if mode is None:
        return function
    return torch.compile(function, dynamic=False, mode=None if mode == "default" else mode)


def jax_seconds(work: Workload, runs: int) -> float:
    """Runs in its own process, which sees the same device."""
    net, (images, labels) = work.network(), work.batch()
    variant = VARIANTS[work.model]
    arrays: dict[str, Any] = {n: p.detach().numpy() for n, p in net.named_parameters()}
    arrays |= {"images": images.cpu().numpy(), "labels": labels.cpu().numpy(), "lr": LR}
    arrays |= {"depth": variant.depth, "group_width": variant.group_width}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(inputs := Path(folder) / "inputs.npz", allow_pickle=False, **arrays)
        twin = [str(HERE / "_jax_nfnet.py"), str(inputs), str(runs), str(work.dtype)[6:]]
        ran = subprocess.run([sys.executable, *twin], capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    return statistics.median(found["clock" if work.device == "cuda" else "seconds"][1:])


# ---- what the machine can do, and what a step needs -------------------------------------------


def with_memory(make: Callable[[], Work], device: str) -> tuple[Work, float | None]:
    """A step that has been run twice, and its peak device memory in MiB: what it keeps, and what it
    needs while it runs."""
    before = torch.cuda.memory_allocated() if device == "cuda" else 0
    step = make()
    step()
    if device != "cuda":
        return step, None
    torch.cuda.reset_peak_memory_stats()
    step()
    return step, (torch.cuda.max_memory_allocated() - before) / 2**20


def needs(work: Workload) -> tuple[float, float]:
    """(floating-point operations, bytes moved) of a step; see the docstring of this file."""
    net = work.network()
    elements = 0

    def count(_: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        nonlocal elements
        elements += given[0].numel() + result.numel()

    for module in net.modules():
        if isinstance(module, WSConv2d):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(torch.zeros(1, 3, work.size, work.size))
    # Weight, gradient, momentum and average are read, and all but the gradient written, in float32.
    update = 7 * 4 * sum(parameter.numel() for parameter in net.parameters())
    maps = 3 * elements * work.rows * work.dtype.itemsize
    return 6.0 * net.macs(work.size) * work.rows, float(maps + update)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / shortest(lambda: torch.mm(a, b), device)


def copy_rate(device: str) -> float:
    """Bytes read and written per second."""
    a = torch.zeros(2**28 if device == "cuda" else 2**26, device=device)
    b = torch.empty_like(a)
    return 2 * a.nbytes / shortest(lambda: b.copy_(a), device)


def shortest(work: Work, device: str) -> float:
    clock = time.perf_counter if device == "cuda" else time.process_time
    times = []
    for _ in range(10):
        start = clock()
        work()
        wait()
        times.append(clock() - start)
    return min(times)


if __name__ == "__main__":
    main()
