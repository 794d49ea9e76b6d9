"""Without any network, not even loopback, everything works except downloading public weights."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nfnets_xla.record import read_record
from tests.runs import PLAIN_CPU, RECIPE, SMALL

WITHOUT_NETWORK = ["unshare", "--map-root-user", "--net"]
MAY = (
    shutil.which("unshare")
    and not subprocess.run([*WITHOUT_NETWORK, "true"], capture_output=True, check=False).returncode
)

# In CI (CI=true), where all must be tested, they fail instead.
pytestmark = pytest.mark.skipif(
    not MAY and os.environ.get("CI") != "true",
    reason="unshare may not make a network namespace here",
)


def alone(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*WITHOUT_NETWORK, sys.executable, "-m", "nfnets_xla", *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )


def of(shards: Path) -> list[str]:
    return [f"data.shards={shards / 'train'}", f"data.eval_shards={shards / 'held-out'}"]


def test_a_run_needs_no_network(shards: Path, tmp_path: Path) -> None:
    """Its loader has a worker, with which it communicates through a socket in a file."""
    own = ["data.workers=1", "optim.epochs=1", f"run_dir={tmp_path}"]
    done = alone(*RECIPE, *of(shards), *SMALL, *PLAIN_CPU, *own)
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_record(tmp_path).of_kind("end")


def test_public_weights_are_missed_in_one_line(shards: Path, tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE, as in docs/models.md; otherwise the Hub's client retries for a while,
    and says so."""
    folder, hub = tmp_path / "run", str(tmp_path / "hub")
    public = ["model.name=nfnet_f0", "model.pretrained=dm_in1k", f"run_dir={folder}"]
    done = alone(*RECIPE, *of(shards), *SMALL, *PLAIN_CPU, *public, HF_HUB_OFFLINE="1", HF_HOME=hub)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("nfnets-xla: timm/dm_nfnet_f0.dm_in1k is neither in")
    assert not folder.exists()
