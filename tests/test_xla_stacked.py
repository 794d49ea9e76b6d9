"""The stacked form under XLA: scans on one device and on a mesh that shards the parameters."""

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tests.runs import UNOPTIMISED

pytest.importorskip("torch_xla", exc_type=ModuleNotFoundError)


def in_a_process(module: str, *arguments: str) -> dict[str, Any]:
    """The JSON that `module` prints last."""
    ran = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env={**os.environ, "XLA_FLAGS": UNOPTIMISED},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def train(devices: int, fsdp: int, dtype: str, *forms: str) -> dict[str, Any]:
    report = in_a_process("tests.stacked_mesh", str(devices), str(fsdp), dtype, *forms)
    assert report["fallbacks"] == {}
    return report


def test_gradients_are_the_cpus_and_recomputation_keeps_a_blocks_input_only() -> None:
    report = in_a_process("tests.stacked_scan")
    assert max(report["differences"].values()) < 2e-5  # relative to the largest element
    assert report["compilations"] == 4  # two forms, with and without recomputation
    assert report["kept_per_tail"]["stacked"] > 8
    assert report["kept_per_tail"]["stacked, recomputing"] == 1
    assert report["barriers"]["unrolled"] == 0
    assert report["barriers"]["unrolled, recomputing"] >= report["num_blocks"]


def test_cut_over_a_2_by_2_mesh_it_trains_as_on_one_device() -> None:
    """Stacked parameters, momentum and average are sharded over fsdp, along their outputs."""
    one = train(1, 1, "float32", "unrolled")
    four = train(4, 2, "float32", "stacked")
    np.testing.assert_allclose(four["losses"], one["losses"], rtol=1e-5)
    assert four["devices"] == [0, 1, 2, 3]
    assert four["compilations"] == [1]
    assert four["shardings"][0].startswith("{devices=[1,2,1,1,1,2]")  # not along the stack
    share = four["bytes_per_device"][0] / one["bytes_per_device"][0]
    assert 0.5 <= share < 0.53  # vectors, and matrices of odd heights, are replicated


@pytest.mark.slow
def test_the_form_may_change_on_the_mesh() -> None:
    """Weights, momentum and average pass through the host from each form to the other."""
    one = train(1, 1, "float32", "unrolled", "unrolled", "unrolled")
    four = train(4, 2, "float32", "stacked", "unrolled", "stacked")
    np.testing.assert_allclose(four["losses"], one["losses"], rtol=1e-5)
    assert four["compilations"] == [1, 1, 0]


@pytest.mark.slow
def test_in_bfloat16_the_mesh_differs_by_rounding() -> None:
    one = train(1, 1, "bfloat16", "stacked")
    four = train(4, 2, "bfloat16", "stacked")
    np.testing.assert_allclose(four["losses"], one["losses"], rtol=1e-3)
    assert four["compilations"] == [1]
