"""What a start finds: held-out samples that changed during the run, hosts with different views."""

from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nfnets_xla import checkpoint
from nfnets_xla.exits import Interrupted
from nfnets_xla.history import Past
from nfnets_xla.hosts import Hosts
from nfnets_xla.prepare import agree, other_held_out
from tests.data.images import packed
from tests.runs import PLAIN_CPU, RECIPE, SMALL, run, run_killed_at


def test_the_best_is_of_one_set_of_held_out_samples(tmp_path: Path, data: list[str]) -> None:
    log, folder, other = tmp_path / "log.txt", tmp_path / "run", tmp_path / "other"
    packed(other, 13, 8, 5)
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, "optim.epochs=0.5", f"run_dir={folder}"]
    arguments += ["trainer.checkpoint_every=2", "trainer.eval_every=2", "trainer.keep_best=true"]
    run_killed_at(arguments, folder, 3, log, kind="samples")
    start = checkpoint.latest(folder / "checkpoints")[0]
    assert start is not None
    assert start.step == 2
    run([*arguments, f"data.eval_shards={other}"], log)
    said = "data.eval_shards holds other samples than up to step 2: held-out losses before and"
    assert log.read_text().count(said) == 1
    # It was written before the evaluation after it, so it has none of the new samples.
    assert checkpoint.load(folder / "checkpoints" / "step-00000004").state["best"] is None


def test_where_another_set_of_held_out_samples_was_used_last() -> None:
    """At the steps that no later start replaced; older records lack it."""
    first: dict[str, Any] = {"resumed_from": 0, "held_out": "a"}
    second, third = {"resumed_from": 4, "held_out": "b"}, {"resumed_from": 8, "held_out": "b"}
    assert other_held_out([first], 4, "a") == 0
    assert other_held_out([first], 4, "b") == 4
    assert other_held_out([first, second], 4, "b") == 4  # that start made no progress
    assert other_held_out([first, second], 4, "a") == 0
    assert other_held_out([first, second, third], 10, "b") == 4
    assert other_held_out([first, second, third], 10, "a") == 10
    assert other_held_out([{"resumed_from": 0}, second | {"held_out": None}], 6, "b") == 0


@pytest.mark.parametrize(
    ("theirs", "ends"),
    [
        # A share's listing of a minute ago, on a host that looked earlier.
        ([40, 30], pytest.raises(Interrupted, match=r"from different steps \(50, 40\)")),
        ([], pytest.raises(ValueError, match=r"hosts differ in the checkpoints .*\[50, 40\]")),
        ([45], pytest.raises(ValueError, match="hosts differ in the checkpoints")),
    ],
)
def test_hosts_that_see_other_checkpoints(
    tmp_path: Path, theirs: list[int], ends: AbstractContextManager[Any]
) -> None:
    """In one folder they will agree later; with a folder each they never will."""
    for step in (40, 50):
        checkpoint.save(tmp_path, step, {"model": {"a": torch.ones(1)}}, {})

    class Two(Hosts):
        """Host 0 of two. The other reports what this one does, but for its own folder."""

        def gather(self, value: Any) -> list[Any]:
            if value == 50:
                return [value, max(theirs, default=0)]
            if value == [50, 40]:
                return [value, theirs]
            if isinstance(value, dict) and "the checkpoints that they see" in value:
                return [value, {"the checkpoints that they see": theirs}]
            return [value, value]

    plan: Any = SimpleNamespace(
        held_out=None,
        index=SimpleNamespace(fingerprint="f"),
        num_classes=2,
        run=SimpleNamespace(shared=lambda: {"seed": 1}),
        checkpoints=str(tmp_path),
    )
    with ends:
        agree(plan, Two(0, 2), Past(step=50), None)
