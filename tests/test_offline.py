"""Where there is no network, not even a loopback: everything but fetching public weights works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nfnets_xla.record import read_record
from tests.runs import PLAIN_CPU, RECIPE, SMALL

WITHOUT_NETWORK = ["unshare", "--map-root-user", "--net"]
LAID = subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True, check=False).returncode

pytestmark = pytest.mark.skipif(LAID != 0, reason="unshare may not make a network namespace here")


def alone(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WITHOUT_NETWORK, sys.executable, "-m", "nfnets_xla", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_a_run_needs_no_network(shards: Path, tmp_path: Path) -> None:
    """Its loader has a worker, which talks to it by a socket in a file."""
    data = [f"data.shards={shards / 'train'}", f"data.eval_shards={shards / 'held-out'}"]
    done = alone(
        *RECIPE,
        *data,
        *SMALL,
        *PLAIN_CPU,
        "data.workers=1",
        "optim.epochs=1",
        f"run_dir={tmp_path}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_record(tmp_path).of_kind("end")


def test_public_weights_are_missed_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = alone(
        "finetune_sam_demo",
        "model.init_from=null",
        "model.pretrained=nfnet_f0.dm_in1k",
        f"run_dir={folder}",
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert not folder.exists()
