"""Runs in which some steps are not finite, and their plain twin: runs without these updates.

    python -m tests.poisoned poison|without STEPS ARGUMENTS...

A row's weight is made NaN or infinite in the loader, so the device's program is unchanged. `STEPS`
are counted from 0, for example 0,5.
"""

import math
import sys
from collections.abc import Callable, Collection
from typing import Any

from nfnets_xla.cli import main
from nfnets_xla.data.batches import TrainBatches
from nfnets_xla.optim import SGD_AGC
from nfnets_xla.optim.ema import EMA
from nfnets_xla.task import Classification

Set = Callable[[Any, str, Any], None]  # setattr, or a monkeypatch's


def poison(steps: Collection[int], set_: Set = setattr) -> None:
    """Alternately with NaN and infinity."""
    whole = TrainBatches.of_streams

    def of_streams(self: TrainBatches, step: int, streams: range) -> dict[str, Any]:
        batch = whole(self, step, streams)
        if step in steps and streams.start == 0:  # with several hosts, a row of the first
            batch["weight_B"][0] = math.inf if step % 2 else math.nan
        return batch

    set_(TrainBatches, "of_streams", of_streams)


def without(steps: Collection[int], set_: Set = setattr) -> None:
    """Poisons nothing; these steps leave weights, momentum and average unchanged."""
    step = Classification.training_step
    fused, apart = SGD_AGC._clip_and_update_fused, SGD_AGC._clip_and_update_apart
    average, left_out = EMA.update, [False]

    def training_step(self: Classification, batch: dict[str, Any], batch_idx: int) -> None:
        left_out[0] = batch["step"] in steps
        step(self, batch, batch_idx)

    def unless_left_out(update: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: None if left_out[0] else update(*arguments)

    set_(Classification, "training_step", training_step)
    set_(SGD_AGC, "_clip_and_update_fused", unless_left_out(fused))
    set_(SGD_AGC, "_clip_and_update_apart", unless_left_out(apart))
    set_(EMA, "update", unless_left_out(average))


if __name__ == "__main__":
    what, given = sys.argv[1], {int(step) for step in sys.argv[2].split(",")}
    {"poison": poison, "without": without}[what](given)
    main(sys.argv[3:])
