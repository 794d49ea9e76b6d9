"""Measures competitors in turns, so that a noisy machine affects all alike; reports medians."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import timm
import torch

RESULTS = Path(__file__).parent / "results"


def medians(
    competitors: Mapping[str, Callable[[], object]],
    runs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each competitor by `clock`, GPU work included, after one warm-up run."""
    times: dict[str, list[float]] = {name: [] for name in competitors}
    for number in range(runs + 1):
        for name, work in competitors.items():
            start = clock()
            work()
            wait()
            if number:
                times[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def wait() -> None:
    """Wait until a GPU, if one is used, has finished its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def machine() -> str:
    """One line about the hardware and versions that the numbers below it were measured with."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return (
        f"{device}, {torch.get_num_threads()} threads; python {platform.python_version()}, "
        f"torch {torch.__version__}, timm {timm.__version__}"
    )


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


class Report:
    """Prints lines as they come, and saves them as benchmarks/results/<name>.txt."""

    def __init__(self, name: str, title: str) -> None:
        self.path = RESULTS / f"{name}.txt"
        self.lines: list[str] = []
        self.say(title)
        self.say(machine())

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def save(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        self.path.write_text("\n".join(self.lines) + "\n")
