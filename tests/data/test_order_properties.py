"""The order's guarantees for any data set, and how close it comes to a full shuffle.

Order.step is all there is: hosts, workers and restarts only ask for different parts of it, in
another sequence, from another process.
"""

import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from nfnets_xla.data.order import Order, StepRows

Int64 = NDArray[np.int64]

settings.register_profile("order", max_examples=80, deadline=None, derandomize=True)
settings.load_profile("order")


@st.composite
def orders(draw: st.DrawFn) -> Order:
    counts = draw(st.lists(st.integers(0, 25), min_size=1, max_size=12).filter(sum))
    streams = draw(st.integers(1, 8))
    epochs = draw(st.sampled_from([0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.25, 8.0]))
    if round(epochs * sum(counts)) < 1:
        epochs = 1.0
    return Order(
        counts=np.array(counts),
        seed=draw(st.integers(0, 2**32 - 1)),
        num_streams=streams,
        unique_per_step=streams * draw(st.integers(1, 5)),
        window_shards=draw(st.integers(1, 5)),
        epochs=epochs,
    )


def fresh(order: Order) -> Order:
    """A new order, as another process would have it."""
    return pickle.loads(pickle.dumps(order))


def joined(parts: list[StepRows]) -> list[tuple]:
    return list(zip(*(np.concatenate(column) for column in zip(*parts, strict=True)), strict=True))


def run(order: Order, start: int = 0) -> list[list[tuple]]:
    return [joined([order.step(step)]) for step in range(start, order.num_steps)]


# ---- the promise --------------------------------------------------------------------------------


@given(orders())
def test_exactly_once_per_epoch(order: Order) -> None:
    everything = {(s, r) for s, count in enumerate(order.counts) for r in range(count)}
    shown = Counter(
        (int(epoch), int(shard), int(row))
        for rows in run(order)
        for shard, row, epoch, _, weight in rows
        if weight
    )
    assert max(shown.values()) == 1
    assert shown.total() == order.total_draws
    for epoch in range(int(order.epochs)):
        assert {key[1:] for key in shown if key[0] == epoch} == everything
    assert {key[1:] for key in shown} <= everything


@given(orders(), st.data())
def test_the_union_over_hosts_does_not_know_of_hosts(order: Order, data: st.DataObject) -> None:
    """Nor on when the number of hosts changed, nor on workers that take every n-th step."""
    whole = run(order)
    divisors = [h for h in range(1, order.num_streams + 1) if order.num_streams % h == 0]
    hosts = data.draw(st.sampled_from(divisors))
    workers = data.draw(st.integers(1, 4))
    started: dict[tuple[int, int, int], Order] = {}
    for step in range(order.num_steps):
        if data.draw(st.booleans()) and step % 7 == 3:  # killed: all start anew, in another number
            hosts = data.draw(st.sampled_from(divisors))
            started.clear()
        parts = []
        for host in range(hosts):
            of = started.setdefault((host, hosts, step % workers), fresh(order))
            parts.append(of.step(step, of.streams_of(host, hosts)))
        assert joined(parts) == whole[step]


@given(orders(), st.data())
def test_what_comes_after_a_restart_is_the_rest(order: Order, data: st.DataObject) -> None:
    whole = run(order)
    start = data.draw(st.integers(0, order.num_steps))
    assert run(fresh(order), start) == whole[start:]


@given(orders())
def test_streams_run_on_and_never_drift_apart(order: Order) -> None:
    """After any step no stream is ahead of another by more than one sample."""
    shown = np.zeros(order.num_streams, np.int64)
    for step in range(order.num_steps):
        rows = order.step(step)
        shown += np.bincount(rows.stream[rows.weight > 0], minlength=order.num_streams)
        assert shown.max() - shown.min() <= 1


@given(orders())
def test_what_is_fetched_ahead_is_read_and_is_no_more_than_two_windows_a_stream(
    order: Order,
) -> None:
    """In one epoch of shards at least as long as a step, so that a step meets at most two."""
    order = replace(order, counts=order.counts + 5, epochs=1.0)
    steps = [order.step(step) for step in range(order.num_steps)]
    for stream in range(order.num_streams):
        shown = [set(r.shard[(r.stream == stream) & (r.weight > 0)].tolist()) for r in steps]
        for step, now in enumerate(shown):
            ahead = order.shards_ahead(step, range(stream, stream + 1))
            assert len(ahead) == len(set(ahead)) <= 2 * order.window_shards
            assert now <= set(ahead) <= set().union(*shown)


# ---- how well it shuffles -----------------------------------------------------------------------

PER_SHARD, UNIQUE, STREAMS, WINDOW = 64, 64, 16, 8
SHUFFLED_TOGETHER = STREAMS * WINDOW  # shards


def places(shards: int, seed: int, epoch: int) -> Int64:
    """For each sample, in packing order, its position in an epoch."""
    counts = np.full(shards, PER_SHARD)
    order = Order(counts, seed, STREAMS, UNIQUE, WINDOW, epoch + 1)
    per_epoch = order.num_samples // UNIQUE
    steps = [order.step(step) for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)]
    rows = StepRows(*map(np.concatenate, zip(*steps, strict=True)))
    when = np.empty(order.num_samples, np.int64)
    when[rows.shard * PER_SHARD + rows.row] = np.arange(len(rows.row))
    return when


def full(shards: int, seed: int, epoch: int) -> Int64:
    return np.random.default_rng([seed, epoch]).permutation(shards * PER_SHARD)


def correlation(one: Int64, other: Int64) -> float:
    """Spearman's correlation of two permutations."""
    return float(np.corrcoef(one, other)[0, 1])


@pytest.mark.parametrize("shards", [128, 512])
def test_an_epoch_keeps_nothing_of_the_packing_order_or_of_the_epoch_before(shards: int) -> None:
    """Shards move as wholes, so one standard deviation of chance is 1 / sqrt(shards)."""
    found = []
    for seed in range(6):
        epochs = [places(shards, seed, epoch) for epoch in (0, 1)]
        packing = np.arange(shards * PER_SHARD)
        found += [correlation(packing, epochs[0]), correlation(packing, epochs[1])]
        found.append(correlation(*epochs))
    assert max(map(abs, found)) < 4 / shards**0.5
    assert abs(np.mean(found)) < 4 / (shards * len(found)) ** 0.5


def together(make: Any, shards: int, epochs: int) -> tuple[float, float]:
    """How often two samples of one shard share a batch, in one epoch and in two consecutive ones;
    both divided by chance."""
    once = twice = 0.0
    before: NDArray[np.bool_] | None = None
    i, j = np.triu_indices(PER_SHARD, 1)
    for epoch in range(epochs):
        batch = make(shards, 11, epoch).reshape(shards, PER_SHARD) // UNIQUE
        same = batch[:, i] == batch[:, j]
        once += same.mean() / epochs
        if before is not None:
            twice += (same & before).mean() / (epochs - 1)
        before = same
    chance = (UNIQUE - 1) / (shards * PER_SHARD - 1)
    return once / chance, twice / chance**2


def test_shard_mates_meet_as_in_a_full_shuffle_if_all_shards_are_in_windows() -> None:
    """Otherwise they meet more often, by the ratio of shards to C * window_shards: see
    docs/data.md."""
    shuffled = together(full, SHUFFLED_TOGETHER, 6)
    ours = together(places, SHUFFLED_TOGETHER, 6)
    assert shuffled[0] == pytest.approx(1, abs=0.05)
    assert ours[0] == pytest.approx(1, abs=0.3)
    more = together(places, 4 * SHUFFLED_TOGETHER, 3)
    assert more[0] == pytest.approx(4, rel=0.3)
    for one, two in (ours, more):  # having met in one epoch changes nothing in the next
        assert two == pytest.approx(one**2, rel=0.2)
