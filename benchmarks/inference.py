"""Images per second of F0 beside timm's dm_nfnet_f0: python benchmarks/inference.py [--compile]

Eager PyTorch at 224 px in float32, on a GPU if there is one (where convolutions then use TF32,
PyTorch's default): timm by default and in channels_last, ours by default and fused. Skip gains are
set to 0.5, as they are 0 in a new network. Then the peak memory of each, in its own process. With
--compile the same under torch.compile, which takes minutes.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from _turns import Report, medians
from nfnets_xla import create_model, fuse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 224
RUNS = {1: 21, 16: 7}
Network = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        peak(given.peak)
        return
    command = "python benchmarks/inference.py" + (" --compile" if given.compile else "")
    name = "_".join(["inference", *["cuda"] * (DEVICE == "cuda"), *["compiled"] * given.compile])
    report = Report(name, f"{command}: nfnet_f0 at {SIZE} px, float32, medians taken in turns")
    nets = {name: make() for name, make in MAKERS.items()}
    if given.compile:
        nets = {name: torch.compile(net) for name, net in nets.items()}  # type: ignore[misc]
    for batch, runs in RUNS.items():
        images = inputs(batch)
        with torch.inference_mode():
            seconds = medians(
                {name: lambda n=name: nets[n](images[n]) for name in nets},  # noqa: B023
                runs,
            )
        report.say(
            f"\nbatch {batch:3}         images/s   against timm   against timm channels_last"
        )
        for name, time in seconds.items():
            report.say(
                f"{name:20} {batch / time:7.2f} {seconds['timm'] / time:11.2f} x "
                f"{seconds['timm channels_last'] / time:14.2f} x"
            )
    if not given.compile:
        report.say(f"\npeak memory of one forward pass at batch {max(RUNS)}")
        for name in MAKERS:
            used = subprocess.run(
                [sys.executable, __file__, "--peak", name], capture_output=True, check=True
            )
            report.say(f"{name:20} {float(used.stdout):7.0f} MB")
    report.save()


def inputs(batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, SIZE, SIZE, generator=generator).to(DEVICE)
    last = images.contiguous(memory_format=torch.channels_last)
    return {name: last if "last" in name else images for name in MAKERS}


def timms() -> nn.Module:
    return with_skip_gains(timm.create_model("dm_nfnet_f0"))


def ours() -> nn.Module:
    return with_skip_gains(create_model("nfnet_f0"))


def with_skip_gains(net: nn.Module) -> nn.Module:
    for name, parameter in net.named_parameters():
        if name.endswith(("skip_gain", "skipinit_gain")):
            nn.init.constant_(parameter, 0.5)
    return net.eval().to(DEVICE)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "timm": timms,
    "timm channels_last": lambda: timms().to(memory_format=torch.channels_last),  # type: ignore[call-overload]
    "ours": ours,
    "ours fused": lambda: fuse(ours()),  # type: ignore[arg-type]
}


def peak(name: str) -> None:
    """Print the peak memory of a forward pass in MB: of the GPU, or resident (Linux)."""
    net, images = MAKERS[name](), inputs(max(RUNS))[name]
    on_gpu = DEVICE == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
    with torch.inference_mode():
        net(images)
    if on_gpu:
        print(torch.cuda.max_memory_allocated() / 1e6)
        return
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            print(int(line.split()[1]) / 1e3)


if __name__ == "__main__":
    main()
