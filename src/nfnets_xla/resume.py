"""What a checkpoint says beside its tensors, and when a run may go on from it.

| the checkpoint is of | then |
|---|---|
| another recipe, model, seed, shards or classes | refused, naming every difference |
| another order of the same shards (of another release) | refused |
| other streams (`data.num_streams`) | refused: they are part of the order |
| other hosts, devices, mesh, loader workers, form of the network | taken as it is |
| other versions of the libraries | taken, and said: the bits may differ |
"""

import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nfnets_xla import checkpoint
from nfnets_xla.checkpoint import Checkpoint
from nfnets_xla.config import differences
from nfnets_xla.data.order import Order
from nfnets_xla.record import Row, read_record

# Recorded with a run: what its numbers and pixels may depend on.
VERSIONS = ("nfnets_xla", "torch", "lightning", "numpy", "pillow", "simplejpeg")


@dataclass(frozen=True)
class RunState:
    """Makes the state of each checkpoint of a run. No clock is in it that could be set back."""

    identity: dict[str, Any]
    order: Order
    versions: dict[str, str]
    seconds_before: float  # of earlier starts, up to the checkpoint that this one goes on from
    _began: float = field(default_factory=time.monotonic)

    def at(self, step: int) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "recipe": digest(self.identity),
            "samples": min(step * self.order.unique_per_step, self.order.total_draws),
            "next": position(self.order, step),
            "seconds": round(self.seconds_before + time.monotonic() - self._began, 3),
            "versions": self.versions,
        }


def installed() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONS}}


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def position(order: Order, step: int) -> str | None:
    """Stands for the samples of the update after `step`: another order has others there."""
    if step >= order.num_steps:
        return None
    rows = order.step(step)
    columns = [rows.shard, rows.row, rows.epoch, rows.stream]
    return digest([column.tolist() for column in columns])


def find_resume(
    root: str,
    run_dir: Path,
    identity: dict[str, Any],
    order: Order,
    versions: dict[str, str],
    say: Callable[[str], None],
) -> Checkpoint | None:
    """The checkpoint to go on from, or None if there is none. Raises ValueError as said above."""
    found, skipped = checkpoint.latest(root)
    for line in skipped:
        say(f"warning: {line}")
    if found is None:
        return None
    changed = differences(found.state["identity"], identity)
    if changed:
        raise ValueError(
            f"{run_dir} holds another run ({'; '.join(changed)}): choose another run_dir, or give "
            "the values it was started with"
        )
    if found.state.get("next") != position(order, found.step):
        raise ValueError(
            f"{found} was written in another order of the same samples: go on with the release of "
            f"nfnets_xla that wrote it ({found.state.get('versions', {}).get('nfnets_xla')})"
        )
    before = found.state.get("versions", {})
    if newer := differences(before, versions):
        say(f"warning: {found} was written under other versions ({'; '.join(newer)})")
    say(f"resuming from {found}")
    return found


def ended(run_dir: Path) -> Row | None:
    """The line with which a finished run closed its record."""
    if not any(run_dir.glob("run-*.jsonl")):
        return None
    rows = read_record(run_dir).of_kind("end")
    return rows[-1] if rows else None


def evaluations(run_dir: Path, step: int) -> dict[int, float]:
    """{step: held-out loss} of what was evaluated up to `step`: of the average, if there is one."""
    if not step:
        return {}
    rows = [row for row in read_record(run_dir).of_kind("eval") if row["step"] <= step]
    return {row["step"]: row["loss"] for row in rows}  # "ema" is written after "raw"
