"""On XLA a whole step is one graph, compiled once, however the hyper-parameters change."""

import json
import os
import subprocess
import sys

import pytest

from tests.optim.network import SETTINGS
from tests.runs import UNOPTIMISED

pytest.importorskip("torch_xla", exc_type=ModuleNotFoundError)


# Absolute, for float32 sums in another order. AdamW moves a weight by the rate, here up to 1,
# however small its gradient is, so rounding errors of a small one show.
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-4}


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_sam_optimizer_and_ema_compile_one_graph_and_fall_back_nowhere(optimizer: str) -> None:
    """Also with steps that are not finite; the weights are then a CPU's, too."""
    environment = {
        **os.environ,
        "XLA_FLAGS": UNOPTIMISED,
        "OMP_NUM_THREADS": "1",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "tests.optim.one_graph", optimizer],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["compilations"] == [0, 1, 1, 1, 1, 1, 1, 1, 1]
    assert report["fallbacks"] == {}
    assert report["guard"] == [1, 2, 1, 0, 1, 0]  # steps 4 and 6 of 0 to 7, frozen for 6 and 7
    assert max(report["differences"].values()) < TOLERANCE[optimizer]
