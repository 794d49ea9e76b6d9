"""A training step on XLA:CPU beside timm's network and JAX: python benchmarks/xla_step.py

Forward, backward, adaptive clipping and Nesterov step, float32, on one device, of

    ours   NFNet and SGD_AGC;
    timm   its dm_nfnet_f0 (or the same at an eighth of the width), adaptive_clip_grad and torch's
           SGD, in the loop from torch_xla's documentation;
    jax    _jax_nfnet.py, the same network and update, whose losses are compared with ours.

Each runs in its own process, in turns. All times are processor seconds of all threads, which other
work on the machine hardly affects: medians over the turns, and ratios to ours. `uv` installs JAX
into an environment separate from this project's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils.agc import adaptive_clip_grad
from torch import Tensor

from _timm_nfnet import timms_network, with_branches
from _turns import Report
from nfnets_xla import NFNet, xla
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.optim import SGD_AGC, parameter_roles

JAX = "jax==0.7.1"  # released in the same month as torch_xla 2.9
HERE = Path(__file__).parent
WORKLOADS = {"nfnet_mini_f0": (64, 32), "nfnet_f0": (8, 64)}  # rows, pixels
CLASSES, LR, STEPS, TURNS = 10, 0.01, 4, 3
LOSS_TOLERANCE = 1e-4  # relative, over all steps
COLUMNS = {"compile": "compile s", "trace": "trace ms", "run": "run ms", "step": "step ms"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("WHO", "WORKLOAD", "INPUTS"))
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(*arguments.one)))
        return
    report = Report(
        "xla_step",
        f"python benchmarks/xla_step.py: processor time, medians of {TURNS} turns; "
        f"torch_xla {version('torch_xla')}, {JAX}, one XLA:CPU device",
    )
    for workload, (rows, size) in WORKLOADS.items():
        report.say(f"\n{workload}, {rows} rows of {size} px")
        report.say(f"{'':12}" + "".join(f"{title:>12}" for title in COLUMNS.values()))
        with tempfile.TemporaryDirectory() as folder:
            inputs = Path(folder) / "inputs.npz"
            write_inputs(inputs, workload)
            turns = [
                {who: in_a_process(who, workload, inputs) for who in PEERS} for _ in range(TURNS)
            ]
        np.testing.assert_allclose(
            turns[0]["jax"]["losses"], turns[0]["ours"]["losses"], rtol=LOSS_TOLERANCE
        )
        figures = {who: summary([turn[who] for turn in turns]) for who in PEERS}
        for who, row in figures.items():
            report.say(f"{who:12}" + "".join(cell(row[name]) for name in COLUMNS))
        for who in ("timm", "jax"):
            ratios = [ratio(figures["ours"][name], figures[who][name]) for name in COLUMNS]
            report.say(f"ours / {who}".ljust(12) + "".join(ratios))
    report.save()


def cell(value: float | None) -> str:
    return f"{'-':>12}" if value is None else f"{value:12.1f}"


def ratio(ours: float | None, other: float | None) -> str:
    return f"{'-':>12}" if ours is None or other is None else f"{ours / other:12.2f}"


def summary(runs: list[dict[str, Any]]) -> dict[str, float | None]:
    """`compile` is what the first step took beyond the others; `step` is tracing and running.

    On real devices the next step is traced while this one runs.
    """
    steps = [statistics.median(run["seconds"][1:]) for run in runs]
    compiles = [run["seconds"][0] - step for run, step in zip(runs, steps, strict=True)]
    traced = [run["trace_ms"] for run in runs if run["trace_ms"] is not None]
    trace, step = statistics.median(traced) if traced else None, 1e3 * statistics.median(steps)
    return {
        "compile": statistics.median(compiles),
        "trace": trace,
        "run": step - (trace or 0.0),
        "step": step,
    }


def in_a_process(who: str, workload: str, inputs: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", who, workload, str(inputs)]
    if who == "jax":
        twin = [str(HERE / "_jax_nfnet.py"), str(inputs), str(STEPS)]
        uv = [sys.executable, "-m", "uv", "run", "-q", "--no-project", "--isolated"]
        command = [*uv, "--with", JAX, "python", *twin]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ran.returncode:
        raise RuntimeError(ran.stderr)
    return json.loads(ran.stdout.splitlines()[-1])


def write_inputs(path: Path, workload: str) -> None:
    """Write the weights, images and labels that ours and JAX's run start from."""
    net, images, labels = network(workload), *batch(workload)
    variant = VARIANTS[workload]
    arrays: dict[str, Any] = {n: p.detach().numpy() for n, p in net.named_parameters()}
    arrays |= {"images": images.numpy(), "labels": labels.numpy(), "lr": LR}
    arrays |= {"depth": variant.depth, "group_width": variant.group_width}
    np.savez(path, allow_pickle=False, **arrays)


def batch(workload: str) -> tuple[Tensor, Tensor]:
    rows, size = WORKLOADS[workload]
    torch.manual_seed(1)
    return torch.randn(rows, 3, size, size), torch.randint(CLASSES, (rows,))


def network(workload: str) -> NFNet:
    torch.manual_seed(0)
    net = NFNet(VARIANTS[workload], num_classes=CLASSES, drop_rate=0.0, drop_path_rate=0.0)
    return with_branches(net)


def run(who: str, workload: str, _: str) -> dict[str, Any]:
    xla.start(virtual_devices=1)
    images, labels = xla.upload_rows(list(batch(workload)))
    update = PEERS[who](workload)
    losses, seconds, traced = [], [], []
    for _step in range(1 + STEPS):
        start = time.process_time()
        loss = update(images, labels)
        traced.append(time.process_time() - start)
        xla.sync(wait=True)
        seconds.append(time.process_time() - start)
        losses.append(float(loss.detach().cpu()))
    return {
        "losses": losses,
        "seconds": seconds,
        "trace_ms": 1e3 * statistics.median(traced[1:]),
    }


Update = Callable[[Tensor, Tensor], Tensor]


def ours(workload: str) -> Update:
    net = network(workload).to(xla.device())
    sgd = SGD_AGC(net.named_parameters(), parameter_roles(net, "head"), lr=LR)
    xla.replicate({f"momentum/{n}": m for n, m in sgd.slots()["momentum"].items()})
    xla.replicate(dict(net.named_parameters()))
    rate = xla.upload_rows([torch.tensor([LR])])[0]
    xla.sync(wait=True)

    def update(images: Tensor, labels: Tensor) -> Tensor:
        sgd.set_lr(rate)
        sgd.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        sgd.step()
        return loss

    return update


def timms(workload: str) -> Update:
    net = with_branches(timms_network(workload, CLASSES)).to(xla.device())
    parameters = list(net.parameters())
    clipped = [p for name, p in net.named_parameters() if name != "head.fc.weight"]
    sgd = torch.optim.SGD(parameters, lr=LR, momentum=0.9, nesterov=True, weight_decay=2e-5)
    xla.sync(wait=True)

    def update(images: Tensor, labels: Tensor) -> Tensor:
        sgd.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        adaptive_clip_grad(clipped, clip_factor=0.01)
        sgd.step()
        return loss

    return update


PEERS: dict[str, Any] = {"ours": ours, "timm": timms, "jax": None}


if __name__ == "__main__":
    main()
