"""The record: complete lines, attempts joined into one history, damage distinguished from a torn
end."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from nfnets_xla.record import RecordWriter, read_record


def attempt(folder: Path, resumed_from: int, steps: range, end: bool = False) -> Path:
    with RecordWriter(folder, {"resumed_from": resumed_from}) as writer:
        for step in steps:
            writer.write("train", step, loss=float(step), attempt=writer.attempt)
        if end:
            writer.write("end", steps[-1])
    return writer.path


def test_a_restart_replaces_what_it_repeats(tmp_path: Path) -> None:
    attempt(tmp_path, 0, range(1, 8))
    attempt(tmp_path, 5, range(6, 7))
    attempt(tmp_path, 5, range(6, 11), end=True)
    record = read_record(tmp_path)
    rows = record.of_kind("train")
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["attempt"] for row in rows] == [1] * 5 + [3] * 5
    assert record.steps_lost == 2 + 1
    assert [header["resumed_from"] for header in record.headers] == [0, 5, 5]
    assert len(record.of_kind("end")) == 1


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = attempt(tmp_path, 0, range(1, 4))
    text = path.read_text()
    path.write_text(text[: len(text) - 9])
    assert [row["step"] for row in read_record(tmp_path).of_kind("train")] == [1, 2]


def test_a_torn_header_is_no_attempt(tmp_path: Path) -> None:
    attempt(tmp_path, 0, range(1, 3))
    (tmp_path / "run-2.jsonl").write_text('{"kind":"hea')
    assert len(read_record(tmp_path).headers) == 1
    assert attempt(tmp_path, 2, range(3, 4)).name == "run-3.jsonl"


def test_damage_elsewhere_is_an_error(tmp_path: Path) -> None:
    path = attempt(tmp_path, 0, range(1, 4))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:10], lines[2]]) + "\n")
    with pytest.raises(ValueError, match=r"run-1\.jsonl, line 2 is not JSON .* or delete the line"):
        read_record(tmp_path)
    with pytest.raises(ValueError, match="not the folder of a run"):
        read_record(tmp_path / "elsewhere")


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, {"resumed_from": 0}) as writer:
        writer.write("train", 1, loss=float("nan"), others=[float("inf"), {"x": float("-inf")}])
    row = json.loads(writer.path.read_text().splitlines()[1])
    assert row.pop("seconds") >= 0
    assert row == {"kind": "train", "step": 1, "loss": None, "others": [None, {"x": None}]}


def test_every_line_is_on_disk_before_write_returns(tmp_path: Path) -> None:
    with RecordWriter(tmp_path, {"resumed_from": 0}) as writer:
        writer.write("train", 1, loss=1.0)
        assert read_record(tmp_path).of_kind("train")[0]["loss"] == 1.0


def test_seconds_are_of_all_starts_and_unknown_in_older_records(tmp_path: Path) -> None:
    for number, seconds in ((1, 30.5), (2, 12)):
        header = {"kind": "header", "step": 0, "seconds": 0.0, "resumed_from": 0}
        last = {"kind": "train", "step": 1, "seconds": seconds}
        text = "".join(json.dumps(row) + "\n" for row in (header, last))
        (tmp_path / f"run-{number}.jsonl").write_text(text)
    assert read_record(tmp_path).seconds == 42.5
    (tmp_path / "run-3.jsonl").write_text('{"kind":"header","step":0,"resumed_from":0}\n')
    assert read_record(tmp_path).seconds is None


def test_seconds_that_a_restart_threw_away(tmp_path: Path) -> None:
    """The first start dies 9 s after the checkpoint of step 5, the second before its own next."""
    clocks = [(0, [(5, 20.0), (6, 25.0), (7, 29.0)]), (5, [(6, 11.0)]), (5, [(6, 12.0)])]
    for number, (resumed_from, rows) in enumerate(clocks, start=1):
        if number == 3:  # what it replaces is known before it has written anything
            assert read_record(tmp_path).seconds_lost == 9
            assert read_record(tmp_path, {"resumed_from": 5}).seconds_lost == 9 + 11
        lines = [{"kind": "header", "step": resumed_from, "seconds": 0.0}]
        lines[0]["resumed_from"] = resumed_from
        lines += [{"kind": "train", "step": step, "seconds": clock} for step, clock in rows]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (tmp_path / f"run-{number}.jsonl").write_text(text)
    record = read_record(tmp_path)
    assert record.seconds_lost == 9 + 11
    assert record.seconds == 29 + 11 + 12


def test_what_another_folder_tells_is_not_made_up_for(tmp_path: Path) -> None:
    """Two run_dirs share their checkpoints: this one was at 10 when the other, which had continued
    from this one's step 5, saved 10, from which this one then resumes."""
    attempt(tmp_path, 0, range(1, 11))
    header = {"resumed_from": 10, "continues": "elsewhere", "since": 5}
    with RecordWriter(tmp_path, header) as writer:
        writer.write("train", 11, loss=1.0)
    record = read_record(tmp_path)
    assert [row["step"] for row in record.of_kind("train")] == [1, 2, 3, 4, 5, 11]
    assert record.steps_lost == 5


def test_an_evaluation_that_was_made_up_for_appears_once(tmp_path: Path) -> None:
    """The next start repeats it; the first still lives. A third was killed before the average."""
    both = ("raw", "ema")
    for number, resumed_from, evaluated in ((1, 0, both), (2, 3, both), (3, 3, ("raw",))):
        with RecordWriter(tmp_path, {"resumed_from": resumed_from}) as writer:
            for weights in evaluated:
                writer.write("eval", 3, weights=weights, loss=float(number))
    rows = read_record(tmp_path).of_kind("eval")
    assert [(row["weights"], row["loss"]) for row in rows] == [("ema", 2.0), ("raw", 3.0)]


def test_a_number_that_another_machine_has_taken_is_left_to_it(tmp_path: Path) -> None:
    """A share may show it only after the folder was listed."""
    attempt(tmp_path, 0, range(1, 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nfnets_xla.record._attempts", lambda _: [])
        with RecordWriter(tmp_path, {"resumed_from": 0}) as writer:
            assert (writer.attempt, writer.path.name) == (2, "run-2.jsonl")


def test_a_history_is_read_in_one_look_at_each_row(tmp_path: Path) -> None:
    """Looking once per start took minutes with 1,000 starts."""
    looks = Counter[str]()

    class Counted(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            looks[key] += 1
            return super().__getitem__(key)

    for number in range(1, 101):
        lines = [{"kind": "header", "resumed_from": number - 1}]
        lines += [{"kind": "train", "step": number + more} for more in range(3)]
        text = "".join(json.dumps({**line, "seconds": 1.0}) + "\n" for line in lines)
        (tmp_path / f"run-{number}.jsonl").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json, "loads", lambda line: Counted(json.JSONDecoder().decode(line.decode())))
        record = read_record(tmp_path)
    assert [row["step"] for row in record.rows] == [*range(1, 100), 100, 101, 102]
    assert looks["step"] < 4 * 300


def test_a_training_that_has_computed_nothing_replaces_nothing(tmp_path: Path) -> None:
    """A second start in the folder of a live run was killed before its first step."""
    attempt(tmp_path, 0, range(1, 8), end=True)
    with RecordWriter(tmp_path, {"resumed_from": 5, "num_steps": 9}):
        pass
    record = read_record(tmp_path)
    assert [row["step"] for row in record.of_kind("train")] == list(range(1, 8))
    assert record.of_kind("end")
    assert (record.steps_lost, record.seconds_lost) == (0, 0)
    assert (len(record.headers), record.newest) == (2, record.headers[1:])
    assert len(read_record(tmp_path, begun=[2]).of_kind("train")) == 5
    attempt(tmp_path, 5, range(6, 7))
    assert [row["attempt"] for row in read_record(tmp_path).of_kind("train")] == [1] * 5 + [3]
    assert read_record(tmp_path).steps_lost == 2


def test_what_a_run_is_says_the_start_that_it_began_with(tmp_path: Path) -> None:
    """A run that ended before its first checkpoint leaves nothing, not even its model."""
    for model, resumed_from, steps in (("a", 0, 2), ("b", 0, 4), ("b", 4, 2), ("c", 0, 0)):
        opening = {"resumed_from": resumed_from, "num_steps": 9, "model": model}
        with RecordWriter(tmp_path, opening) as writer:
            for step in range(resumed_from + 1, resumed_from + steps + 1):
                writer.write("train", step, loss=1.0)
    record = read_record(tmp_path)
    assert record.opening == record.headers[1]
    assert [row["step"] for row in record.of_kind("train")] == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_begins_anew_with_its_header(tmp_path: Path) -> None:
    """With other weights: being killed, it does not inherit the end of the evaluation before it."""
    for kinds in (["eval", "end"], []):
        with RecordWriter(tmp_path, {"resumed_from": 0}) as writer:
            for kind in kinds:
                writer.write(kind, 0)
    assert not read_record(tmp_path).of_kind("end")
