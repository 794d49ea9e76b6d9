"""The ledger of a killed run proves each sample shown once; faults in a ledger are found."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nfnets_xla.cli import main
from nfnets_xla.data.order import Order
from nfnets_xla.ledger import Ledger, audit, read_ledger
from nfnets_xla.record import RecordWriter
from tests.runs import PLAIN_CPU, RECIPE, SMALL, run, run_killed_at

COUNTS = np.array([30, 25, 45])
ORDER = Order(COUNTS, seed=3, num_streams=4, unique_per_step=16, window_shards=2, epochs=2.5)
FIRST = np.cumsum(COUNTS) - COUNTS
ANY: Any = SimpleNamespace()


def batch(step: int, missed: int | None = None) -> dict[str, Any]:
    rows = ORDER.step(step)
    samples, weight = FIRST[rows.shard] + rows.row, rows.weight.copy()
    gone = [] if missed is None else [{"epoch": rows.epoch[missed], "sample": samples[missed]}]
    if missed is not None:
        weight[missed] = 0
    names = {"sample_U": samples, "epoch_U": rows.epoch, "weight_U": weight, "missed": gone}
    return {"step": step, **names}


def start(folder: Path, attempt: int, resumed_from: int, stop: int, **changes: Any) -> Path:
    head = {"samples": 100, "draws": ORDER.total_draws, "steps": ORDER.num_steps}
    ledger = Ledger(folder, attempt, {"resumed_from": resumed_from, **head})
    for step in range(resumed_from, stop):
        ledger.on_train_batch_end(ANY, ANY, None, changes.get(f"s{step}", batch(step)), step)
    ledger.close()
    return folder / f"ledger-{attempt}.bin"


def record(folder: Path, **rows: int) -> None:
    with RecordWriter(folder, {"resumed_from": 0}) as written:
        for kind, step in rows.items():
            written.write(kind, step, stopped=True)


def test_three_starts_and_a_torn_end(tmp_path: Path) -> None:
    torn = start(tmp_path, 1, 0, 9)
    torn.write_bytes(torn.read_bytes()[:-5])
    start(tmp_path, 2, 5, 7, s6=batch(6, missed=3))
    start(tmp_path, 10, 6, ORDER.num_steps, s6=batch(6, missed=3))
    (tmp_path / "ledger-11.bin").write_bytes(b'{"resu')
    record(tmp_path, end=ORDER.num_steps)
    found = audit(tmp_path)
    assert found.faults == []
    assert (found.starts, found.reached, found.steps) == (4, 16, 16)
    assert found.again == 3 + 1  # 6, 7, 8 of the first (9 is torn), 7 of the second
    assert found.shown == {0: 100, 1: 100, 2: 50}
    assert found.undecodable == 1
    assert found.report()[-1] == "every sample exactly once"


def test_what_is_missed_or_repeated_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Step 3 shows the samples of step 2, and a start began two steps late."""
    start(tmp_path, 1, 0, 8, s3={**batch(2), "step": 3})
    start(tmp_path, 2, 10, ORDER.num_steps)
    with pytest.raises(SystemExit) as stopped:
        main(["audit", str(tmp_path)])
    assert stopped.value.code == 1
    printed = capsys.readouterr().out
    assert "steps without a frame: 9, 10\n" in printed
    assert "epoch 0: shown more than once: " in printed
    assert "each once" not in printed
    assert "epoch 0: 84 of 100 samples shown; not: " in printed
    repeated = printed.split("shown more than once: ")[1].split(",")[0]
    assert int(repeated) in batch(2)["sample_U"]


def test_an_epoch_that_comes_back_is_a_fault(tmp_path: Path) -> None:
    """Step 15 shows samples of epoch 0, which was over: their counts are no longer known."""
    back = {**batch(14), "epoch_U": np.zeros_like(batch(14)["epoch_U"])}
    start(tmp_path, 1, 0, ORDER.num_steps, s14=back)
    found = audit(tmp_path)
    assert found.shown == {0: 100, 1: 100, 2: 34}
    assert "epoch 0: over, and shown again in steps 15" in found.faults


def test_an_unfinished_run_has_no_sample_twice(tmp_path: Path) -> None:
    start(tmp_path, 1, 0, 4)
    record(tmp_path, checkpoint=4)
    assert audit(tmp_path).report()[-1] == "no sample twice"
    assert audit(tmp_path).shown == {0: 64}


def test_steps_whose_effect_is_not_known_prove_nothing(tmp_path: Path) -> None:
    """Killed after the last step and before its checkpoint, whose numbers would reveal a freeze."""
    start(tmp_path, 1, 0, ORDER.num_steps)
    record(tmp_path, checkpoint=10)
    assert audit(tmp_path).report()[-1].startswith("no sample twice; certain up to step 10, ")
    (tmp_path / "run-1.jsonl").unlink()
    record(tmp_path, nonfinite=13, checkpoint=12)
    found = audit(tmp_path)
    assert (found.reached, found.stopped, found.faults) == (12, 13, [])
    assert found.report()[-1] == "no sample twice"
    (tmp_path / "run-1.jsonl").unlink()
    record(tmp_path, checkpoint=ORDER.num_steps)
    assert audit(tmp_path).report()[-1] == "every sample exactly once"


def test_damage_is_not_a_torn_end(tmp_path: Path) -> None:
    path = start(tmp_path, 1, 0, 4)
    data = bytearray(path.read_bytes())
    offset, _ = read_ledger(path)[1][2]
    data[offset + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"ledger-1.bin, offset \d+: the frame of step 2 is damag"):
        audit(tmp_path)
    with pytest.raises(ValueError, match="holds no ledger"):
        audit(tmp_path / "nothing")


def test_what_a_machine_that_stopped_leaves_is_a_torn_end(tmp_path: Path) -> None:
    """Zeros where blocks had not reached the disk: after the last frame, or inside it."""
    path = start(tmp_path, 1, 0, 8)
    data = path.read_bytes()
    place, size = read_ledger(path)[1][8]
    for left, reached in (
        (data + bytes(4096), 8),
        (data[: place + size // 2].ljust(len(data), b"\0"), 7),
        (data[: place + size // 2].ljust(len(data) + 4096, b"\0"), 7),
        (data[:place].ljust(len(data), b"\0"), 7),
        (data[: place - 6].ljust(len(data) + 50, b"\0"), 7),
    ):
        path.write_bytes(left)
        assert (audit(tmp_path).reached, audit(tmp_path).faults) == (reached, [])
    start(tmp_path, 2, 5, ORDER.num_steps)  # the step is computed again
    record(tmp_path, end=ORDER.num_steps)
    assert audit(tmp_path).report()[-1] == "every sample exactly once"
    assert audit(tmp_path).again == 2


def test_saved_steps_without_frames_are_a_fault(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The record contains the end of the run, but its ledger's end is lost."""
    path = start(tmp_path, 1, 0, ORDER.num_steps)
    record(tmp_path, checkpoint=15, end=ORDER.num_steps)
    assert audit(tmp_path).faults == []
    offset, _ = read_ledger(path)[1][12]
    path.write_bytes(path.read_bytes()[: offset + 3])
    with pytest.raises(SystemExit) as stopped:
        main(["audit", str(tmp_path)])
    assert stopped.value.code == 1
    assert capsys.readouterr().out.endswith("steps 12 to 16 are saved and have no frame\n")


def test_a_start_without_a_step_replaces_nothing(tmp_path: Path) -> None:
    """For example when the command is repeated in the folder of a live run, and killed."""
    start(tmp_path, 1, 0, ORDER.num_steps)
    record(tmp_path, end=ORDER.num_steps)
    start(tmp_path, 2, 0, 0)
    with RecordWriter(tmp_path, {"resumed_from": 0, "num_steps": ORDER.num_steps}):
        pass
    found = audit(tmp_path)
    assert (found.starts, found.again, found.reached) == (2, 0, ORDER.num_steps)
    assert found.report()[-1] == "every sample exactly once"


def test_a_start_with_steps_replaces_also_what_its_record_has_none_of(tmp_path: Path) -> None:
    """The checkpoint of step 10 was damaged; the start was killed before its first logged step."""
    start(tmp_path, 1, 0, 12)
    record(tmp_path, checkpoint=10)
    start(tmp_path, 2, 5, 7)
    with RecordWriter(tmp_path, {"resumed_from": 5, "num_steps": ORDER.num_steps}):
        pass
    found = audit(tmp_path)
    assert (found.reached, found.certain, found.again, found.faults) == (7, 5, 7, [])


def test_the_audit_of_a_killed_run(
    tmp_path: Path, data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, "optim.epochs=0.75"]
    arguments += ["trainer.checkpoint_every=2", f"run_dir={tmp_path}"]
    run_killed_at(arguments, tmp_path, 3, tmp_path / "log.txt")
    run(arguments, tmp_path / "log.txt")
    main(["audit", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "2 starts; steps 1 to 5 of 5" in printed
    assert "epoch 0: 75 of 75 samples, each once" in printed
    assert printed.endswith("every sample exactly once\n")
    assert all(path.stat().st_size < 5000 for path in tmp_path.glob("ledger-*"))
