"""Which of all starts' rows led to a run's weights: of starts one after another, and beside."""

import json
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfnets_xla.record import RecordWriter, Row, RunRecord, read_record


def joined_one_by_one(
    starts: list[list[Row]], resuming_at: int | None
) -> tuple[list[Row], int, float]:
    """Rows, steps and seconds lost, by what each start did to what was there before it."""
    rows: list[tuple[Row, float]] = []
    steps_lost, seconds_lost = 0, 0.0

    def go_on_from(step: int) -> None:
        nonlocal rows, seconds_lost
        seconds_lost += sum(took for row, took in rows if row["step"] > step)
        rows = [entry for entry in rows if entry[0]["step"] <= step and entry[0]["kind"] != "end"]

    for lines in starts:
        begun = lines[0]["resumed_from"]
        reached = [row["step"] for row, _ in rows if row["kind"] in ("train", "samples")]
        steps_lost += max(0, max(reached, default=0) - begun)
        go_on_from(begun)
        clock = [row["seconds"] for row in lines]
        rows += zip(lines[1:], (b - a for a, b in pairwise(clock)), strict=True)
    if resuming_at is not None:
        go_on_from(resuming_at)
    return [row for row, _ in rows], steps_lost, seconds_lost


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_however_starts_follow_each_other(tmp_path: Path, data: st.DataObject) -> None:
    """Joined at one look, and as each start found the folder. Rows of a start need not be in the
    order of their steps: what has been read of an earlier one is written later."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    step = st.integers(0, 9)
    starts: list[list[Row]] = []
    for number in range(1, data.draw(st.integers(1, 6)) + 1):
        begun = data.draw(step) if number > 1 else 0
        row = st.tuples(st.integers(begun + 1, 10), st.sampled_from(["train", "eval", "samples"]))
        rows = data.draw(st.lists(row, max_size=5))
        lines: list[Row] = [{"kind": "header", "resumed_from": begun}]
        lines += [{"kind": kind, "step": at} for at, kind in rows]
        lines += [{"kind": "end", "step": 10}] * data.draw(st.booleans())
        starts.append([{**line, "seconds": float(n), "n": n} for n, line in enumerate(lines)])
        text = "".join(json.dumps(line) + "\n" for line in starts[-1])
        (folder / f"run-{number}.jsonl").write_text(text)
    resuming_at = data.draw(st.none() | step)
    following: Row | None = None if resuming_at is None else {"resumed_from": resuming_at}
    found = read_record(folder, following)
    rows, steps_lost, seconds_lost = joined_one_by_one(starts, resuming_at)
    ended = [line for line in found.rows if line["kind"] == "end"]
    assert [line for line in found.rows if line not in ended] == [r for r in rows if r not in ended]
    assert len(ended) <= 1
    assert (found.steps_lost, found.seconds_lost) == (steps_lost, seconds_lost)


@dataclass(eq=False)
class Training:
    """One start of a World's run."""

    number: int
    resumed_from: int
    lineage: list[int]  # of each step of the run behind its weights, which start computed it
    has_saved: bool = False


class World:
    """Starts of one run that may train beside each other, and the checkpoints of all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.saved: dict[int, list[int]] = {0: []}  # by step, the lineage
        self.recorded: list[int] = []  # steps that were saved, whatever became of them
        self.alive: list[Training] = []
        self.count = self.computed = 0
        self.begin()

    def begin(self) -> None:
        self.count += 1
        newest = max(self.saved)
        lineage = self.saved[newest]
        header = {"kind": "header", "step": newest, "resumed_from": newest, "num_steps": 99}
        header |= {"start": str(self.count), "continues": str(lineage[-1]) if lineage else None}
        header["saved_to"] = max([newest, *self.recorded])
        self.header, self.last = header, Training(self.count, newest, list(lineage))
        self.ahead: Training | None = None  # of the last, which has saved nothing
        self.alive.append(self.last)
        self.write(self.count, header)

    def compute(self, start: Training) -> None:
        self.computed += 1
        start.lineage.append(start.number)
        self.write(start.number, {"kind": "train", "step": len(start.lineage), "by": start.number})

    def save(self, start: Training) -> None:
        """As checkpoint.save has it: one that has been overtaken ends."""
        step = len(start.lineage)
        newest = max(self.saved)
        if newest > start.resumed_from and self.saved[newest][-1] != start.number:
            self.alive.remove(start)
        elif step > start.resumed_from:
            self.saved[step] = list(start.lineage)
            self.recorded.append(step)
            start.has_saved = True
            self.write(start.number, {"kind": "checkpoint", "step": step})
            if not self.last.has_saved and step > self.header["saved_to"]:
                self.ahead = start

    def damage(self, _: Training) -> None:
        del self.saved[max(self.saved)]
        self.saved.setdefault(0, [])

    def kill(self, start: Training) -> None:
        self.alive.remove(start)

    def write(self, number: int, row: Row) -> None:
        with (self.folder / f"run-{number}.jsonl").open("a") as file:
            file.write(json.dumps({**row, "seconds": 0.0}) + "\n")


def computed_by(record: RunRecord) -> list[int]:
    rows = record.of_kind("train")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["by"] for row in rows]


@pytest.mark.parametrize("damaging", [False, True])
@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_however_starts_train_beside_each_other(
    tmp_path: Path, data: st.DataObject, damaging: bool
) -> None:
    """What is read is what led to the newest checkpoint, and what was computed from there."""
    world = World(Path(tempfile.mkdtemp(dir=tmp_path)))
    actions = ["begin", "compute", "compute", "compute", "save", "kill", *["damage"] * damaging]
    for what in data.draw(st.lists(st.sampled_from(actions), max_size=40)):
        if what == "begin" or not world.alive:
            world.begin()
        else:
            getattr(world, what)(data.draw(st.sampled_from(world.alive)))
    if len(world.last.lineage) > world.last.resumed_from:  # else it replaces nothing yet
        newest = world.last if world.ahead is None or world.last.has_saved else world.ahead
        assert computed_by(read_record(world.folder)) == newest.lineage
    world.begin()
    before = read_record(world.folder, world.header)
    assert computed_by(before) == world.saved[max(world.saved)]
    for _ in range(2):
        world.compute(world.last)
    record = read_record(world.folder)
    assert computed_by(record) == world.last.lineage
    assert damaging or record.steps_lost == world.computed - len(world.last.lineage)


def test_what_led_nowhere_makes_nobody_a_rival(tmp_path: Path) -> None:
    """The third went on from a checkpoint of the first that was damaged since; then the second,
    which had begun with the first, saved."""
    world = World(tmp_path)
    world.begin()
    first, second = world.alive
    world.compute(first)
    world.save(first)
    world.begin()
    world.damage(first)
    for _ in range(5):
        world.compute(second)
    world.save(second)
    world.begin()
    world.compute(world.last)
    assert computed_by(read_record(tmp_path)) == [2, 2, 2, 2, 2, 4]


def test_one_that_has_saved_is_not_behind(tmp_path: Path) -> None:
    """Though another had saved before it, which was damaged since."""
    world = World(tmp_path)
    (first,) = world.alive
    world.begin()
    world.compute(first)
    world.save(first)
    assert computed_by(read_record(tmp_path)) == [1]
    world.compute(world.last)
    assert computed_by(read_record(tmp_path)) == [1]
    world.damage(first)
    world.compute(world.last)
    world.save(world.last)
    assert computed_by(read_record(tmp_path)) == [2, 2]


def test_only_who_was_overtaken_computed_in_vain(tmp_path: Path) -> None:
    """From where it began. Who evaluated step 3 and was killed before it trained was not."""
    for start, continues, resumed_from, kind, steps in (
        ("a", None, 0, "train", [1, 2, 3]),
        ("b", "a", 3, "eval", [3]),
        ("c", "a", 3, "train", [4]),  # and saved it
        ("d", "a", 3, "train", [4, 5]),
        ("e", "c", 4, "train", [5]),
    ):
        header = {"resumed_from": resumed_from, "start": start, "continues": continues}
        with RecordWriter(tmp_path, header) as writer:
            for step in steps:
                writer.write(kind, step, loss=1.0)
    record = read_record(tmp_path)
    assert record.rivals == {4}
    assert [row["step"] for row in record.rows] == [1, 2, 3, 3, 4, 5]
    assert record.steps_lost == 2


def test_the_step_that_a_start_resumed_from_is_not_replaced(tmp_path: Path) -> None:
    """The second was killed after it evaluated step 5; the third begins before that."""
    for resumed_from, kind, steps in (
        (0, "train", range(1, 6)),
        (5, "eval", [5]),
        (3, "eval", [3]),
    ):
        with RecordWriter(tmp_path, {"resumed_from": resumed_from}) as writer:
            for step in steps:
                writer.write(kind, step, loss=1.0)
    assert read_record(tmp_path).steps_lost == 2
