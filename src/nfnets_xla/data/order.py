"""The order in which a run shows its samples: a pure function of (shard sizes, recipe, seed).

Every sample is shown exactly once per epoch, whatever the hosts, devices and restarts, because
nothing here knows of them: `Order.step(n)` computes the rows of global batch n from n alone. This
is what arXiv 2310.16764 (section 2) admits that its own pipeline did not guarantee.

Deal. A run is split into C *canonical streams*. Its draws are dealt to them like cards, in turn:

    draw    0 1 2 3 4 5 6 | 7 8 9 ...       N = 7 samples, C = 2: in epoch 0 stream 0 is dealt
    stream  0 1 0 1 0 1 0 | 1 0 1 ...       4 of them and stream 1 is dealt 3; in epoch 1 it is
    epoch   0 0 0 0 0 0 0 | 1 1 1 ...       the other way round, so no stream runs ahead

Line up. Epoch e permutes the shards, lays their samples end to end, and cuts that line into C
ranges with the lengths of the deal. Stream s shows range s in epoch e, shuffled in windows of
`window_shards` shards. With shards a, b, c of 3, 2, 2 samples and windows of two shards:

              line, cut into ranges            the ranges, shuffled
    epoch 0   c0 c1 a0 a1 | a2 b0 b1           a1 a0 c1 c0 | a2 b0 b1
    epoch 1   b0 b1 c0 | c1 a0 a1 a2           b0 c0 b1 | a0 a1 c1 a2

Step. A step takes U / C draws of every stream, stream by stream. Streams continue from one epoch to
the next, so a step may contain the end of one epoch and the start of the next (step 1 does). Only
the last step may need padding rows (*): those that the streams would show next, with weight 0.

    >>> order = Order(np.array([3, 2, 2]), seed=0, num_streams=2, unique_per_step=4,
    ...               window_shards=2, epochs=2)
    >>> for n in range(order.num_steps):
    ...     rows = order.step(n)
    ...     names = [f"{'abc'[shard]}{row}" for shard, row in zip(rows.shard, rows.row)]
    ...     print(*[name if weight else name + "*" for name, weight in zip(names, rows.weight)])
    a1 a0 a2 b0
    c1 c0 b1 a0
    b0 c0 a1 c1
    b1 c0* a2 b1*

So a shard is read once per epoch, in one window, by one stream, or by several if cuts fall into it.
Memory is O(shards) per epoch plus one window per stream, never O(samples).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from itertools import count
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# First word of every key, so that keys for different purposes differ.
LINE, WINDOW = 1, 2


class StepRows(NamedTuple):
    """The unique samples of one step, stream by stream: five arrays of the same length, U."""

    shard: Int64
    row: Int64  # within its shard
    epoch: Int64
    stream: Int64
    weight: NDArray[np.float32]  # 1, or 0 for a padding row


class Line(NamedTuple):
    """One epoch's samples laid end to end: S shards, C ranges."""

    shards: Int64  # (S,) in the order of the line
    starts: Int64  # (S + 1,) where each shard begins on the line; the last is N
    cuts: Int64  # (C + 1,) where each stream's range begins; the last is N


class Window(NamedTuple):
    """A range of places on an epoch's line that one stream shuffles together."""

    epoch: int
    number: int  # within the stream's range
    low: int
    high: int
    place: int  # of the requested draw, before shuffling


@dataclass(frozen=True, eq=False)
class Order:
    """The training order. Raises ValueError for settings that cannot be dealt out evenly."""

    counts: Int64  # (S,) samples of each shard, without excluded ones
    seed: int
    num_streams: int  # C; a multiple of the number of hosts
    unique_per_step: int  # U, before any repeats; a multiple of C
    window_shards: int  # shards per window: those that a stream shuffles together
    epochs: float  # may be a fraction

    def __post_init__(self) -> None:
        _check_counts(self.counts)
        for name in ("num_streams", "unique_per_step", "window_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.unique_per_step % self.num_streams:
            raise ValueError(
                f"{self.unique_per_step} unique samples per step do not divide among "
                f"{self.num_streams} streams: make batch_size / repeats a multiple of num_streams"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be in [0, 2**32)")
        if not 0 < self.epochs < float("inf") or self.total_draws < 1:
            raise ValueError(
                f"epochs is {self.epochs}; of {self.num_samples} samples it must show at least one"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled without its caches, for the loader's workers."""
        return Order, tuple(getattr(self, field.name) for field in fields(self))

    @cached_property
    def num_samples(self) -> int:
        """N, the length of an epoch."""
        return int(self.counts.sum())

    @cached_property
    def total_draws(self) -> int:
        """Samples the run shows: `epochs * num_samples`, rounded to a whole one (half to even)."""
        return round(self.epochs * self.num_samples)

    @property
    def num_steps(self) -> int:
        return -(-self.total_draws // self.unique_per_step)

    @property
    def steps_per_epoch(self) -> float:
        return self.num_samples / self.unique_per_step

    def step(self, number: int, streams: range | None = None) -> StepRows:
        """Rows of global batch `number`, counted from 0.

        With `streams`, only their rows: the part of the batch that one of several hosts reads. The
        first step after a jump computes an epoch's line and one window per stream; later steps
        reuse them. Raises ValueError past the end.
        """
        if not 0 <= number < self.num_steps:
            raise ValueError(f"step is {number}; the run's steps are 0 to {self.num_steps - 1}")
        per_stream = self.unique_per_step // self.num_streams
        stretches: list[StepRows] = []
        streams = range(self.num_streams) if streams is None else streams
        for stream in streams:
            draw, end = number * per_stream, (number + 1) * per_stream
            while draw < end:
                stretches.append(self._stretch(stream, draw, end))
                draw += len(stretches[-1].row)
        self._prepare(streams[next(self._turns) % len(streams)], (number + 1) * per_stream)
        return StepRows(*map(np.concatenate, zip(*stretches, strict=True)))

    def streams_of(self, host: int, hosts: int) -> range:
        """The streams that one of several hosts reads; its rows of a batch are contiguous."""
        if hosts < 1 or self.num_streams % hosts or not 0 <= host < hosts:
            raise ValueError(
                f"host {host} of {hosts}: hosts are numbered from 0, and {self.num_streams} "
                "streams must divide among them; choose another num_streams or number of hosts"
            )
        each = self.num_streams // hosts
        return range(host * each, (host + 1) * each)

    def shards_ahead(self, number: int, streams: range | None = None) -> list[int]:
        """Shards that a step may read and those that come next, soonest first: two windows of each
        stream. For fetching shards before they are read."""
        parts: list[tuple[int, int, list[int]]] = []  # first draw, stream, shards
        for stream in range(self.num_streams) if streams is None else streams:
            draw, room = number * (self.unique_per_step // self.num_streams), 2 * self.window_shards
            while room and self._draw_of_run(stream, draw) < self.total_draws:
                window = self._window_at(stream, draw)
                line = self._line(window.epoch)
                first, last = _shard_at(line, window.low), _shard_at(line, window.high - 1)
                shards = line.shards[first : last + 1][:room].tolist()
                parts.append((draw, stream, shards))
                draw, room = draw + window.high - window.place, room - len(shards)
        return list(dict.fromkeys(shard for *_, shards in sorted(parts) for shard in shards))

    def _stretch(self, stream: int, draw: int, end: int) -> StepRows:
        """The draws of one stream from `draw` up to `end`, or to the end of the window."""
        window = self._window_at(stream, draw)
        line = self._line(window.epoch)
        shuffled = self._shuffled(window.epoch, stream, window.number, window.high - window.low)
        places = window.low + shuffled[window.place - window.low :][: end - draw].astype(np.int64)
        at = _shard_at(line, places)
        draws = self._draw_of_run(stream, np.arange(draw, draw + len(places)))
        return StepRows(
            shard=line.shards[at],
            row=places - line.starts[at],
            epoch=np.full_like(at, window.epoch),
            stream=np.full_like(at, stream),
            weight=(draws < self.total_draws).astype(np.float32),
        )

    def _window_at(self, stream: int, draw: int) -> Window:
        """The window that contains a stream's draw."""
        epoch = self._draw_of_run(stream, draw) // self.num_samples
        line = self._line(epoch)
        begin, after = int(line.cuts[stream]), int(line.cuts[stream + 1])
        place = begin + draw - self._dealt(stream, epoch * self.num_samples)  # before shuffling

        # Windows are counted in shards, from the shard in which the range begins.
        first = _shard_at(line, begin)
        number = (_shard_at(line, place) - first) // self.window_shards
        opening = first + number * self.window_shards
        closing = min(opening + self.window_shards, len(line.shards))
        low = max(begin, int(line.starts[opening]))
        high = min(after, int(line.starts[closing]))
        return Window(epoch, number, low, high, place)

    def _prepare(self, stream: int, draw: int) -> None:
        """Shuffle the window after the one that contains a draw.

        If all shards have one size, all streams change windows in the same step, which would have
        to shuffle for all of them; instead each step prepares one stream's next window.
        """
        now = self._window_at(stream, draw)
        then = self._window_at(stream, draw + now.high - now.place)
        self._shuffled(then.epoch, stream, then.number, then.high - then.low)

    @cached_property
    def _turns(self) -> Iterator[int]:
        """Counts through the streams for `_prepare`. It affects only when work is done."""
        return count()

    def _draw_of_run(self, stream: int, draw: Any) -> Any:
        """The number in the run of a stream's draw, both from 0; an int or an array."""
        return draw * self.num_streams + stream

    def _dealt(self, stream: int, draws: int) -> int:
        """How many of the run's first `draws` draws go to this stream."""
        return max(0, (draws - stream + self.num_streams - 1) // self.num_streams)

    @cached_property
    def _line(self) -> Callable[[int], Line]:
        """Makes the line of an epoch. Four are cached: a step spans two, or more if they are
        tiny."""
        return lru_cache(maxsize=4)(self._make_line)

    @cached_property
    def _shuffled(self) -> Callable[[int, int, int, int], NDArray[np.uint32]]:
        """(epoch, stream, window's number, its length) -> the permutation of the window's places.

        Three per stream are cached: a step at the end of a window needs it and the next, and
        prepares the one after that.
        """
        return lru_cache(maxsize=3 * self.num_streams)(self._shuffle)

    @cached_property
    def _shards(self) -> Int64:
        """Shards with samples left: shards that are fully excluded do not affect the order."""
        return np.flatnonzero(self.counts)

    def _make_line(self, epoch: int) -> Line:
        shards = self._shards[_permutation(len(self._shards), LINE, self.seed, epoch)]
        first, after = epoch * self.num_samples, (epoch + 1) * self.num_samples
        streams = range(self.num_streams)
        lengths = [self._dealt(s, after) - self._dealt(s, first) for s in streams]
        return Line(
            shards=shards,
            starts=np.concatenate([[0], np.cumsum(self.counts[shards])]),
            cuts=np.concatenate([[0], np.cumsum(lengths)]),
        )

    def _shuffle(self, epoch: int, stream: int, window: int, length: int) -> NDArray[np.uint32]:
        return _permutation(length, WINDOW, self.seed, epoch, stream, window).astype(np.uint32)


@dataclass(frozen=True, eq=False)
class SequentialOrder:
    """The evaluation order: every sample once, in index order.

    The last step is padded with the last sample, at weight 0.
    """

    counts: Int64
    unique_per_step: int
    ahead: ClassVar[int] = 4  # shards to fetch before they are needed

    def __post_init__(self) -> None:
        _check_counts(self.counts)
        if self.unique_per_step < 1:
            raise ValueError(f"unique_per_step is {self.unique_per_step}; it must be at least 1")

    @cached_property
    def _ends(self) -> Int64:
        return np.cumsum(self.counts)

    @property
    def num_steps(self) -> int:
        return -(-int(self._ends[-1]) // self.unique_per_step)

    def step(self, number: int, part: slice = slice(None)) -> StepRows:
        """Rows of batch `number`, counted from 0, or `part` of them. ValueError past the end."""
        if not 0 <= number < self.num_steps:
            raise ValueError(f"step is {number}; the steps are 0 to {self.num_steps - 1}")
        wanted = np.arange(self.unique_per_step)[part] + number * self.unique_per_step
        places = np.minimum(wanted, self._ends[-1] - 1)
        shard = np.searchsorted(self._ends, places, side="right")
        row = places - (self._ends - self.counts)[shard]
        weight = (wanted < self._ends[-1]).astype(np.float32)
        return StepRows(shard, row, np.zeros_like(row), np.zeros_like(row), weight)

    def shards_ahead(self, number: int) -> list[int]:
        """Shards that a step reads, and those that come next."""
        shard = self.step(number).shard
        last = min(int(shard[-1]) + self.ahead, len(self.counts) - 1)
        return list(range(int(shard[0]), last + 1))


def _check_counts(counts: Int64) -> None:
    if len(counts) == 0 or counts.max() < 1:
        raise ValueError("there are no samples; an order needs at least one")
    if counts.min() < 0:
        raise ValueError(f"a shard has {counts.min()} samples; it must have 0 or more")


def _shard_at(line: Line, places: int | Int64) -> Any:
    """The position on the line of the shard that contains each place."""
    return np.searchsorted(line.starts, places, side="right") - 1


def _permutation(length: int, *key: int) -> Int64:
    """Numbers 0 to `length - 1`, sorted by keyed random words.

    Not `Generator.permutation`: a run that is resumed with a newer numpy must keep its order, and
    numpy guarantees the output of SeedSequence and Philox forever, but that of Generator's methods
    only until the next release (NEP 19).
    """
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(length)
    # Each number is put in the low bits of its word: words are then distinct, and sorting is
    # enough.
    low_bits = np.uint64(length.bit_length())
    words = (words >> low_bits << low_bits) | np.arange(length, dtype=np.uint64)
    words.sort()
    return (words & ((np.uint64(1) << low_bits) - np.uint64(1))).astype(np.int64)
