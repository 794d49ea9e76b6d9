"""When undecodable samples are too many, and what hosts tell each other about them."""

from types import SimpleNamespace
from typing import Any

import pytest

from nfnets_xla.callbacks.missed import AT_LEAST, NO_BATCH, Missed
from nfnets_xla.exits import Failed, Unreachable
from nfnets_xla.hosts import Hosts
from nfnets_xla.record import Discard

CEILING, PER_STEP = 0.01, 100
TRAINER: Any = SimpleNamespace(global_step=7)
MODULE: Any = None


def made(before: int = 0, hosts: Hosts | None = None) -> Missed:
    return Missed(
        Discard(),
        ceiling=CEILING,
        unique_per_step=PER_STEP,
        train_samples=1_000_000,
        eval_samples=1_000,
        before=before,
        hosts=hosts or Hosts(),
        say=lambda _: None,
    )


def batch(step: int, count: int) -> dict[str, Any]:
    one = {"id": "a", "shard": "s.tar", "offset": 0, "reason": "truncated"}
    return {"step": step - 1, "missed": [one] * count}


def test_the_ceiling_is_a_share_of_what_was_shown() -> None:
    """Exactly that many are allowed, not one more; of few samples, it is the share of AT_LEAST."""
    for step, shown in ((1, AT_LEAST), (1_000, 1_000 * PER_STEP)):
        missed = made(before=round(CEILING * shown) - 1)
        missed.on_train_batch_start(TRAINER, MODULE, batch(step, 1), 0)
        with pytest.raises(Failed, match=rf"More than data\.max_missed=0\.01 of {shown}:"):
            missed.on_train_batch_start(TRAINER, MODULE, batch(step, 1), 0)


def test_of_a_short_run_no_more_is_allowed_than_its_share() -> None:
    missed = made(before=5)
    missed.train_samples = 500
    with pytest.raises(Failed, match=r"More than data\.max_missed=0\.01 of 500:"):
        missed.on_train_batch_start(TRAINER, MODULE, batch(1, 1), 0)


def test_an_evaluation_counts_its_own() -> None:
    """The count covers its batches, and starts anew in the next evaluation."""
    missed = made()
    for _ in range(2):
        missed.on_validation_start(TRAINER, MODULE)
        missed.on_validation_batch_start(TRAINER, MODULE, batch(1, 6), 0)
    with pytest.raises(Failed, match=r"12 undecodable eval samples, now 6: .* of 1000:"):
        missed.on_validation_batch_start(TRAINER, MODULE, batch(1, 6), 0)


def test_a_host_that_was_told_says_nothing_more() -> None:
    """A host without a batch reports the end once, in place of a number; the others then end."""
    said: list[int] = []

    class Two(Hosts):
        def total(self, number: int) -> int:
            said.append(number)
            return number + (0 if number == NO_BATCH else NO_BATCH)

    told = made(hosts=Two(1, 2))
    with pytest.raises(Unreachable, match="another host could not read its samples") as ended:
        told.on_train_batch_start(TRAINER, MODULE, batch(3, 0), 0)
    told.on_exception(TRAINER, MODULE, ended.value)
    assert said == [0]
    made(hosts=Two(0, 2)).on_exception(TRAINER, MODULE, Unreachable("no shard"))
    assert said == [0, NO_BATCH]
