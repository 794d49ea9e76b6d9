"""Forward and backward of F0 beside timm's dm_nfnet_f0: python benchmarks/train_step.py

Eager PyTorch, float32, nothing dropped; on a CUDA device if there is one, else on the CPU at 128
px. Both in PyTorch's own layout and in channels_last.
"""

from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import nn

from _turns import Report, medians
from nfnets_xla import create_model

CUDA = torch.cuda.is_available()
BATCH, SIZE, RUNS = (64, 224, 15) if CUDA else (8, 128, 9)


def main() -> None:
    report = Report(
        "train_step_cuda" if CUDA else "train_step",
        f"python benchmarks/train_step.py: nfnet_f0 at {SIZE} px, batch {BATCH}, forward and "
        "backward, float32",
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        competitors = {
            "timm": step(timm.create_model("dm_nfnet_f0", drop_path_rate=0.0), layout),
            "ours": step(create_model("nfnet_f0", drop_rate=0.0, drop_path_rate=0.0), layout),
        }
        seconds = medians(competitors, RUNS)
        report.say(f"\n{str(layout).removeprefix('torch.')}")
        for name, time in seconds.items():
            report.say(
                f"{name:6} {BATCH / time:8.2f} images/s {seconds['timm'] / time:8.2f} x timm"
            )
    report.save()


def step(net: nn.Module, layout: torch.memory_format) -> Callable[[], None]:
    device = "cuda" if CUDA else "cpu"
    torch.manual_seed(0)
    net = net.to(device).train().to(memory_format=layout)  # type: ignore[call-overload]
    images = torch.randn(BATCH, 3, SIZE, SIZE, device=device).contiguous(memory_format=layout)
    labels = torch.randint(1000, (BATCH,), device=device)
    for name, parameter in net.named_parameters():
        if name.endswith(("skip_gain", "skipinit_gain")):
            nn.init.constant_(parameter, 0.5)

    def work() -> None:
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        if CUDA:
            torch.cuda.synchronize()

    return work


if __name__ == "__main__":
    main()
