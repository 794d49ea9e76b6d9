"""Depth as a loop against depth written out, under XLA: python benchmarks/compile.py

Runs a training step (forward, backward, clipping, update) of both forms of the same network
(models/stacked.py) on one virtual device of XLA:CPU, each form in its own process. Prints the lines
of HLO, the times to compile, to trace a step in Python and to run it (medians), and their ratios,
and writes the table to benchmarks/results/compile.txt. Tracing and running are measured in
processor time of all threads, which other work on the machine hardly affects.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nfnets_xla import NFNet, xla
from nfnets_xla.models.blocks import Stage
from nfnets_xla.models.stacked import StackedStage, stack
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.optim import SGD_AGC, parameter_roles

# Networks at 32 px, 8 rows; and F3's longest stage at full width, 1 row of 14 x 14.
WORKLOADS = ("nfnet_mini_f0", "nfnet_mini_f1", "nfnet_mini_f3", "nfnet_mini_f7", "stage")
FORMS = ("unrolled", "stacked")
STEPS = 4  # after the first step, which compiles
COLUMNS = {"hlo_lines": 0, "compile_s": 1, "trace_ms": 0, "step_ms": 0}  # decimals of each column
RESULTS = Path(__file__).parent / "results" / "compile.txt"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("WORKLOAD", "FORM"), help="what a process runs")
    parser.add_argument("workloads", nargs="*", default=WORKLOADS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    lines = [
        f"torch {version('torch')}, torch_xla {version('torch_xla')}, "
        f"Python {platform.python_version()}; XLA:CPU, {os.cpu_count()}-core machine; "
        f"XLA_FLAGS={os.environ.get('XLA_FLAGS', '')!r}",
        "python benchmarks/compile.py " + " ".join(sys.argv[1:]),
        "",
        f"{'':24}" + "".join(f"{name:>12}" for name in COLUMNS),
    ]
    print("\n".join(lines), flush=True)
    for workload in arguments.workloads:
        rows = [in_a_process(workload, form) for form in FORMS]
        block = [line(f"{workload} {form}", row) for form, row in zip(FORMS, rows, strict=True)]
        ratios = "".join(f"{rows[1][name] / rows[0][name]:12.2f}" for name in COLUMNS)
        block.append(f"{'  stacked / unrolled':24}{ratios}")
        print("\n".join(block), flush=True)
        lines += block
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text("\n".join(lines) + "\n")


def line(name: str, row: dict[str, float]) -> str:
    return f"{name:24}" + "".join(f"{row[c]:12.{places}f}" for c, places in COLUMNS.items())


def in_a_process(workload: str, form: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", workload, form]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def measure(workload: str, form: str) -> dict[str, float]:
    xla.start(virtual_devices=1)
    torch.manual_seed(0)
    module, loss = (stage if workload == "stage" else network)(workload, form == "stacked")
    module.to(xla.device())
    sgd = SGD_AGC(module.named_parameters(), parameter_roles(module, None), lr=0.1)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    xla.replicate(state | {f"momentum/{n}": m for n, m in sgd.slots()["momentum"].items()})
    xla.sync(wait=True)
    before = xla.counters()
    traced, ran = [], []
    hlo_lines = 0
    for step in range(1 + STEPS):
        sgd.set_lr(torch.tensor([0.01]).to(xla.device()))
        start = time.process_time()
        value = loss()
        value.backward()
        sgd.step()
        sgd.zero_grad()
        traced.append(time.process_time() - start)
        if step == 1:
            hlo_lines = count_lines([value, *module.parameters()])
        start = time.process_time()
        xla.sync(wait=True)
        ran.append(time.process_time() - start)
    counted = xla.counters().since(before)
    assert counted.compilations == 1, counted
    step_s = statistics.median(ran[1:])
    return {
        "hlo_lines": hlo_lines,
        "compile_s": counted.compile_seconds,
        "trace_ms": 1e3 * statistics.median(traced[1:]),
        "step_ms": 1e3 * step_s,
    }


def network(name: str, stacked: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    net = NFNet(VARIANTS[name], num_classes=10)
    if stacked:
        stack(net, scan=xla.scan)
    images, masks = torch.randn(8, 3, 32, 32), torch.rand(8, net.num_blocks) > 0.1
    inputs = [upload(images), upload(masks.float()), upload(torch.ones(8, net.num_features))]
    labels = upload(torch.randint(10, (8,)))
    return net, lambda: F.cross_entropy(net(*inputs), labels)


def stage(_: str, stacked: bool) -> tuple[nn.Module, Callable[[], Tensor]]:
    variant = VARIANTS["nfnet_f3"]
    longest = NFNet(variant, num_classes=0).stages[2]
    assert isinstance(longest, Stage)
    module = StackedStage(variant, longest, xla.scan) if stacked else longest
    maps = upload(torch.randn(1, variant.width[1], 28, 28))  # the stage's first block halves them
    return module, lambda: module(maps, None).square().mean()


def upload(tensor: Tensor) -> Tensor:
    return xla.upload_rows([tensor])[0]


def count_lines(tensors: list[Tensor]) -> int:
    from torch_xla import _XLAC  # pyright: ignore[reportPrivateImportUsage]

    return len(_XLAC._get_xla_tensors_hlo(tensors).splitlines())


if __name__ == "__main__":
    main()
