"""Every recipe that trains runs and resumes, in its own precision; test_sweep.py tests the sweeps.

On XLA, test_xla_runs.py kills the demo's form of finetune_sam on four devices.
"""

import subprocess
import sys

import pytest

from nfnets_xla.compose import composed
from nfnets_xla.manual import recipes
from tests.each_recipe import OPTIONS

LIKE = {  # recipes that differ from one below only in sizes, or in what they sweep
    "pretrain_demo",
    "finetune_sam_demo",
    "lr_sweep",
    "scaling_sweep",
    "finetune_sweep",
}


def ran(device: str, *names: str) -> None:
    command = [sys.executable, "-m", "tests.each_recipe", device, *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("ok  ") == len(names)
    assert done.stdout.count("equal='bit for bit'") == len(names)


def test_on_the_cpu() -> None:
    ran("cpu", *OPTIONS)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_on_xla() -> None:
    """Each start compiles for minutes."""
    pytest.importorskip("torch_xla", exc_type=ModuleNotFoundError)
    ran("xla", *OPTIONS)


def test_no_recipe_is_left_out() -> None:
    trains = {name for name in recipes() if composed(name).job == "train"}
    assert trains == OPTIONS.keys() | LIKE
