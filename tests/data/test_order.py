"""The order against a brute-force reference, for many shapes of data; and its shape.

test_order_properties.py tests that every sample comes once per epoch, whatever hosts and restarts.
"""

import doctest
import itertools
import pickle
import tracemalloc
from typing import Any

import numpy as np
import pytest

from nfnets_xla.data import order as module
from nfnets_xla.data.order import Order, SequentialOrder, StepRows
from tests.reference import order as reference

Shape = tuple[list[int], int, int, int, float]

# (samples per shard, streams, unique per step, window, epochs). Chosen to be awkward: N divisible
# by neither C nor U, fewer shards than streams, one shard, fewer samples than streams.
AWKWARD: list[Shape] = [
    ([7], 2, 2, 1, 2.0),
    ([5, 9, 3], 4, 8, 2, 1.0),
    ([10, 11, 12, 13, 14], 4, 4, 2, 3.0),
    ([3] * 20, 8, 16, 3, 1.5),
    ([17, 1, 1, 30, 2], 3, 6, 2, 0.25),
    ([2, 1], 8, 8, 1, 4.0),
    ([40, 37, 41, 39], 16, 32, 4, 2.0),
    ([1] * 50, 5, 10, 7, 1.5),
]


def random_shape(number: int) -> Shape:
    rng = np.random.default_rng([7, number])
    counts = rng.integers(1, 30, size=rng.integers(1, 12)).tolist()
    streams = int(rng.integers(1, 9))
    unique = streams * int(rng.integers(1, 5))
    return counts, streams, unique, int(rng.integers(1, 6)), [0.25, 1.0, 1.5, 3.0][number % 4]


SHAPES = [shape for shape in AWKWARD + [random_shape(n) for n in range(60)] if sum(shape[0]) > 2]


def make(shape: Shape, seed: int = 3) -> Order:
    counts, streams, unique, window, epochs = shape
    return Order(np.array(counts), seed, streams, unique, window, epochs)


def all_steps(order: Order) -> list[StepRows]:
    return [order.step(number) for number in range(order.num_steps)]


def shown(order: Order, epoch: int | None = None) -> list[tuple[int, int]]:
    """(shard, row) of all rows of weight 1, step by step, of one epoch or of all."""
    return [
        (int(shard), int(row))
        for rows in all_steps(order)
        for shard, row, of, _, weight in zip(*rows, strict=True)
        if weight == 1 and epoch in (None, of)
    ]


def assert_same(one: StepRows, other: StepRows) -> None:
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


# ---- the promise --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_order_dealt_by_hand(shape: Shape) -> None:
    counts, streams, unique, window, epochs = shape
    for seed in (0, 2**32 - 1):
        expected = reference.deal(counts, seed, streams, unique, window, epochs)
        steps = all_steps(make(shape, seed))
        assert len(steps) == len(expected)
        for rows, cards in zip(steps, expected, strict=True):
            columns = [rows.shard.tolist(), rows.row.tolist(), rows.epoch.tolist()]
            assert list(zip(*columns, strict=True)) == [card for card, _ in cards]
            assert rows.weight.tolist() == [weight for _, weight in cards]


@pytest.mark.parametrize("shape", AWKWARD, ids=str)
def test_a_step_depends_on_nothing_asked_before_so_resuming_is_a_suffix(shape: Shape) -> None:
    forward = all_steps(make(shape))
    used = make(shape)
    for number in np.random.default_rng(0).permutation(len(forward)).tolist():
        assert_same(used.step(number), forward[number])
        assert_same(make(shape).step(number), forward[number])
        assert_same(pickle.loads(pickle.dumps(used)).step(number), forward[number])


def test_the_worked_example_holds() -> None:
    """Its rows are golden: if they change, so does the order of every run ever started."""
    failures, examples = doctest.testmod(module)
    assert (failures, examples) == (0, 2)


# ---- the shape of it ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_stream_major_and_only_the_last_step_has_some_to_spare(shape: Shape) -> None:
    counts, streams, unique, *_ = shape
    order = make(shape)
    for number, rows in enumerate(all_steps(order)):
        assert rows.stream.tolist() == np.repeat(range(streams), unique // streams).tolist()
        assert (rows.row < np.array(counts)[rows.shard]).all()  # including rows of weight 0
        spare = max(0, (number + 1) * unique - order.total_draws)
        assert int((rows.weight == 0).sum()) == spare
        assert rows.weight.dtype == np.float32  # like the loss
        assert spare == 0 or number == order.num_steps - 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_shard_is_cut_only_where_a_range_is(shape: Shape) -> None:
    """C ranges have C - 1 cuts; a shard no longer than a range is in at most two streams."""
    counts, streams, *_, epochs = shape
    for epoch in range(int(epochs)):
        owners: dict[int, set[int]] = {shard: set() for shard in range(len(counts))}
        for rows in all_steps(make(shape)):
            now = rows.epoch == epoch
            for shard, stream in zip(rows.shard[now], rows.stream[now], strict=True):
                owners[int(shard)].add(int(stream))
        assert sum(map(len, owners.values())) <= len(counts) + streams - 1
        for shard, of in owners.items():
            assert len(of) <= 2 or counts[shard] > sum(counts) // streams
            assert max(of) - min(of) == len(of) - 1  # neighbours


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    shape = ([30] * 8, 2, 2, 4, 2.0)
    first, second = shown(make(shape), 0), shown(make(shape), 1)
    assert sorted(first) == sorted(second)
    others = [second, shown(make(shape, seed=4), 0), sorted(first)]
    for other in others:
        assert sum(a == b for a, b in zip(first, other, strict=True)) < 10  # of 240; 1 by chance


def test_a_window_is_mixed_and_is_all_that_a_stream_reads_from_at_a_time() -> None:
    steps = all_steps(make(([25] * 40, 4, 4, 5, 1.0)))
    for stream in range(4):
        shards = [int(rows.shard[stream]) for rows in steps]
        changes = sum(a != b for a, b in itertools.pairwise(shards[:125]))
        assert changes > 80  # of 124: five shards shuffled together, not one after the other
        for shard in set(shards):
            places = [place for place, other in enumerate(shards) if other == shard]
            assert places[-1] - places[0] < 5 * 25


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Records the keys of the permutations that are made."""
    keys: list[tuple[int, ...]] = []
    permutation = module._permutation
    monkeypatch.setattr(
        module,
        "_permutation",
        lambda length, *key: (keys.append(key), permutation(length, *key))[1],
    )
    return keys


@pytest.mark.parametrize("shape", AWKWARD[1:4], ids=str)
def test_going_forward_nothing_is_shuffled_twice(shape: Shape, made: list[tuple[int, ...]]) -> None:
    all_steps(make(shape))
    assert len(made) == len(set(made))


def test_after_the_first_a_step_shuffles_one_window_at_most(made: list[tuple[int, ...]]) -> None:
    """Although all eight streams change windows at one step, since shards have one size."""
    order = make(([25] * 64, 8, 8, 2, 1.0))
    order.step(0)
    for step in range(1, order.num_steps):
        made.clear()
        order.step(step)
        assert sum(key[0] == module.WINDOW for key in made) <= 1


def test_memory_is_shards_and_windows_not_samples() -> None:
    """4e9 samples in 400k shards, the size of JFT-4B, in the middle of the second epoch."""
    counts = np.full(400_000, 10_000)
    streams, window_shards = 8, 2
    tracemalloc.start()
    order = Order(counts, 0, streams, 4096, window_shards, 2.0)
    rows = order.step(round(1.5 * order.steps_per_epoch))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order.total_draws == 8_000_000_000
    assert set(rows.epoch.tolist()) == {1}
    assert peak < 8 * (8 * len(counts) + 4 * streams * window_shards * 10_000)


# ---- evaluation and errors ----------------------------------------------------------------------


@pytest.mark.parametrize("unique", [1, 4, 5, 8, 20])
def test_sequential_shows_each_sample_once_and_fills_up_with_weight_0(unique: int) -> None:
    order = SequentialOrder(np.array([3, 1, 4]), unique)
    steps = [order.step(number) for number in range(order.num_steps)]
    rows = StepRows(*map(np.concatenate, zip(*steps, strict=True)))
    assert len(rows.row) == order.num_steps * unique
    assert rows.weight.tolist() == [1] * 8 + [0] * (len(rows.row) - 8)
    assert rows.shard.tolist() == [0, 0, 0, 1, 2, 2, 2, 2] + [2] * (len(rows.row) - 8)
    assert rows.row.tolist() == [0, 1, 2, 0, 0, 1, 2, 3] + [3] * (len(rows.row) - 8)
    assert rows.weight.dtype == np.float32
    for outside in (-1, order.num_steps):
        message = f"step is {outside}; the steps are 0 to {order.num_steps - 1}$"
        with pytest.raises(ValueError, match=message):
            order.step(outside)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": np.array([], np.int64)}, "there are no samples"),
        ({"counts": np.array([0, 0])}, "there are no samples"),
        ({"counts": np.array([3, -1])}, "a shard has -1 samples"),
        ({"num_streams": 3}, "do not divide among 3 streams: make"),
        ({"num_streams": 0}, "num_streams is 0"),
        ({"unique_per_step": 0}, "unique_per_step is 0"),
        ({"window_shards": 0}, "window_shards is 0"),
        ({"seed": -1}, r"seed is -1; it must be in \[0, 2\*\*32\)"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"epochs": 0.001}, "must show at least one"),
        ({"epochs": -1.0}, "epochs is -1.0"),
        ({"epochs": float("nan")}, "epochs is nan"),
        ({"epochs": float("inf")}, "epochs is inf"),
    ],
)
def test_what_cannot_be_dealt_is_refused(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "counts": np.array([5, 5]),
        "seed": 0,
        "num_streams": 2,
        "unique_per_step": 4,
        "window_shards": 2,
        "epochs": 1.0,
    }
    assert Order(**good).num_steps == 3
    with pytest.raises(ValueError, match=message):
        Order(**(good | change))


@pytest.mark.parametrize("number", [-1, 3])
def test_steps_outside_the_run_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match="steps are 0 to 2"):
        Order(np.array([5, 5]), 0, 2, 4, 2, 1.0).step(number)


@pytest.mark.parametrize(("host", "hosts"), [(0, 0), (0, 3), (-1, 2), (2, 2), (3, 2)])
def test_hosts_that_cannot_share_the_streams_are_refused(host: int, hosts: int) -> None:
    order = Order(np.array([5, 5]), 0, 4, 4, 2, 1.0)
    assert [order.streams_of(host, 2) for host in range(2)] == [range(2), range(2, 4)]
    with pytest.raises(ValueError, match=f"host {host} of {hosts}: .* and 4 streams must divide"):
        order.streams_of(host, hosts)


def test_a_sequential_order_needs_samples_and_a_batch() -> None:
    with pytest.raises(ValueError, match="there are no samples"):
        SequentialOrder(np.array([0]), 2)
    with pytest.raises(ValueError, match="unique_per_step is 0"):
        SequentialOrder(np.array([1]), 0)


# ---- what is fetched ahead ----------------------------------------------------------------------


@pytest.mark.parametrize(("epochs", "streams"), [(1, None), (1, range(1, 3)), (2.5, None)])
def test_what_comes_next_is_known_ahead(epochs: float, streams: range | None) -> None:
    order = Order(np.array([20] * 12 + [13, 11, 19]), 3, 4, 8, window_shards=2, epochs=epochs)
    num = 4 if streams is None else len(streams)
    before: list[int] | None = None
    wanted, used = set[int](), set[int]()
    for step in range(order.num_steps):
        rows, ahead = order.step(step, streams), order.shards_ahead(step, streams)
        read = set(rows.shard[rows.weight > 0].tolist())
        wanted, used = wanted | set(ahead), used | read
        assert read <= set(ahead)
        assert len(ahead) == len(set(ahead)) <= 2 * 2 * num
        if epochs == 1 and before is not None:  # otherwise windows at an epoch's end may be tiny
            assert read <= set(before)
        if not step:  # the current window of each stream comes first
            assert read <= set(ahead[: 2 * num])
        before = ahead
    assert wanted == used  # nothing from other streams, nor from after the end


def test_evaluation_knows_the_next_shards() -> None:
    order = SequentialOrder(np.array([4] * 9), unique_per_step=6)
    assert order.shards_ahead(0) == [0, 1, 2, 3, 4, 5]
    assert order.shards_ahead(order.num_steps - 1) == [7, 8]
    order = SequentialOrder(np.array([4] * 9), unique_per_step=5)  # one sample is in another shard:
    assert order.shards_ahead(0) == [0, 1, 2, 3, 4, 5]  # the step's last one
    assert order.shards_ahead(3) == [3, 4, 5, 6, 7, 8]  # the step's first one
