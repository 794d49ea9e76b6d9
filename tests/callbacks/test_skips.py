"""A step that is not finite is skipped, or ends the run with the state before it saved."""

import math
from pathlib import Path

import numpy as np
import pytest

from nfnets_xla import checkpoint
from nfnets_xla.callbacks.skips import Skips
from nfnets_xla.cli import main
from nfnets_xla.exits import Unreachable
from nfnets_xla.ledger import audit
from nfnets_xla.record import Discard, RecordWriter, read_record
from tests.poisoned import poison, without
from tests.runs import (
    PLAIN_CPU,
    RECIPE,
    SMALL,
    as_hosts,
    assert_bit_equal,
    final_state,
    losses,
    samples,
    start,
    xla,
)

BAD = (0, 3)  # counted from 0; the first has a learning rate of 0
ONE = [*RECIPE, *SMALL, "optim.epochs=1", "trainer.eval_every=null"]
ONE += ["trainer.keep_checkpoints=9", "trainer.tensorboard=false"]
SKIPPING = ["optim.max_skipped=2", "trainer.log_every=4", "trainer.checkpoint_every=3"]


def test_samples_that_cannot_be_named_cost_nothing_else(tmp_path: Path) -> None:
    """Their shards may be on another host, or at an address that does not answer at the moment: the
    step is still counted once, and the save in progress completes."""

    def gone(_: int) -> list[str]:
        raise Unreachable("s3://b/shard-3.ids could not be had in 300 s")

    said: list[str] = []
    with RecordWriter(tmp_path, {"resumed_from": 0}) as record:
        one = {"ceiling": 3, "before": 0, "start_step": 0, "say": said.append}
        skips = Skips(record, ids=gone, **one)
        for _ in range(2):
            skips.read(3, [0.0, 0.0, 0.0, 1.0, 0.0])
        other = Skips(Discard(), ids=None, **one)  # of a host that writes no record
        other.read(3, [0.0, 0.0, 0.0, 1.0, 0.0])
    assert (skips.count, other.count) == (1, 1)
    (row,) = read_record(tmp_path).of_kind("nonfinite")
    assert (row["step"], row["count"], row["ids"]) == (2, 1, None)
    assert said[0].endswith("could not be read (s3://b/shard-3.ids could not be had in 300 s)")
    assert said[1].endswith("1 of at most 3")


def test_what_comes_after_the_freeze_is_not_counted() -> None:
    """The device continues until the host reads; its later steps may be bad, too. Each is reported
    once."""
    said: list[str] = []
    skips = Skips(Discard(), ceiling=1, before=0, start_step=0, ids=lambda _: [], say=said.append)
    skips.read(2, [1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    for step, frozen, bad in ((6, 3, [0.0, 1.0, 0.0, 1.0]), (8, 5, [0.0, 1.0, 1.0, 1.0])):
        skips.read(step, [1.0, frozen, *bad])
        assert (skips.frozen_at, skips.count, len(said)) == (4, 1, 1)
    assert "Step 3 is saved; the same command" in skips.why()
    assert "--step 4, with" in skips.why()


def test_what_earlier_starts_left_out_counts_and_is_not_told_again() -> None:
    said: list[str] = []
    skips = Skips(Discard(), ceiling=4, before=2, start_step=5, ids=None, say=said.append)
    skips.read(6, [3.0, 0.0, 1.0, 1.0])
    assert (skips.count, len(said)) == (3, 1)
    assert "step 6: " in said[0]


def state_of(run_dir: Path, step: int) -> dict:
    found = checkpoint.load(run_dir / "checkpoints" / f"step-{step:08d}")
    return {f"{form}/{n}": t for form in found.forms for n, t in found.tensors(form).items()}


@pytest.fixture(scope="module")
def skipping(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of seven steps on a CPU, of which the first and the fourth are bad."""
    run_dir = tmp_path_factory.mktemp("skipping") / "run"
    data = [f"data.shards={shards / 'train'}", f"data.eval_shards={shards / 'held-out'}"]
    with pytest.MonkeyPatch.context() as patch:
        poison(BAD, patch.setattr)
        main([*ONE, *data, *PLAIN_CPU, *SKIPPING, f"run_dir={run_dir}"])
    return run_dir


def test_a_bad_step_is_as_if_its_update_had_been_left_out(
    skipping: Path, tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, momentum and average are equal to the bit, with SAM, dropout and mixing on."""
    without(BAD, monkeypatch.setattr)
    main([*ONE, *data, *PLAIN_CPU, *SKIPPING, f"run_dir={tmp_path}"])
    assert_bit_equal(final_state(skipping), final_state(tmp_path))
    assert len(samples(skipping)) == 7


def test_what_was_left_out_is_on_record_with_its_samples(
    skipping: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_record(skipping)
    rows = record.of_kind("nonfinite")
    assert [(row["step"], row["count"], row["stopped"]) for row in rows] == [
        (1, 1, False),
        (4, 2, False),
    ]
    shown = samples(skipping)
    for row in rows:
        assert row["ids"] == [sample for _, sample in shown[row["step"] - 1]]
    assert record.of_kind("end")[0]["skipped"] == 2
    at_three = checkpoint.load(skipping / "checkpoints" / "step-00000003")
    assert at_three.state["skipped"] == 1
    found = audit(skipping)
    assert (found.faults, found.skipped, found.without_effect) == ([], [1, 4], 32)
    assert "steps 1, 4 were left out (loss or gradient not finite): 32 of the samples changed" in (
        "\n".join(found.report())
    )
    # The recorded samples can be shown.
    of_run = [option for option in ONE if option.startswith(("data.", "optim.epochs"))]
    sheet = ["--recipe", RECIPE[0], "--out", str(tmp_path / "4.png"), "--step", "4", "--rows", "2"]
    main(["shards", "show", str(shards / "train"), *sheet, *of_run])
    printed = capsys.readouterr().out
    assert "16 views" in printed
    assert all(f"{sample} (" in printed for sample in rows[1]["ids"])


@pytest.mark.parametrize(
    ("often", "reached"),
    [
        # Logged at step 4; read when step 6 is logged.
        (["trainer.log_every=2", "trainer.checkpoint_every=null"], 6),
        # Nothing is logged before the end; the save at step 5 is of step 3.
        (["trainer.log_every=100", "trainer.checkpoint_every=5"], 5),
    ],
    ids=["an interval late", "with a checkpoint"],
)
def test_one_too_many_ends_the_run_with_the_state_before_it(
    skipping: Path,
    tmp_path: Path,
    data: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    often: list[str],
    reached: int,
) -> None:
    """Repeated, it ends so again; where one more is allowed it continues, to the same end."""
    poison(BAD, monkeypatch.setattr)
    command = [*ONE, *data, *PLAIN_CPU, *often, f"run_dir={tmp_path}"]
    for attempt in (1, 2):
        with pytest.raises(SystemExit) as ended:
            main([*command, "optim.max_skipped=1"])
        assert ended.value.code == 1
        assert "step 4: loss or gradient is not finite, and optim.max_skipped=1 such" in (
            capsys.readouterr().err
        )
        record = read_record(tmp_path)
        assert len(record.headers) == attempt
        assert record.of_kind("samples")[-1]["step"] == reached
        assert record.of_kind("nonfinite")[-1]["stopped"]
        assert checkpoint.steps(tmp_path / "checkpoints")[0] == 3
        assert_bit_equal(state_of(tmp_path, 3), state_of(skipping, 3))
        assert (audit(tmp_path).reached, audit(tmp_path).stopped) == (3, 4)
    main([*command, "optim.max_skipped=2"])
    assert_bit_equal(final_state(tmp_path), final_state(skipping))
    rows = read_record(tmp_path).of_kind("nonfinite")
    assert [(row["step"], row["stopped"]) for row in rows] == [(1, False), (4, False)]
    assert audit(tmp_path).report()[-1] == "every sample exactly once"


def test_a_run_whose_very_first_step_is_bad(
    skipping: Path, tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 0, the initial weights, is saved, and a new start continues from it."""
    poison(BAD, monkeypatch.setattr)
    command = [*ONE, *data, *PLAIN_CPU, f"run_dir={tmp_path}"]
    with pytest.raises(SystemExit) as ended:
        main([*command, "optim.max_skipped=0"])
    assert ended.value.code == 1
    assert checkpoint.steps(tmp_path / "checkpoints") == [0]
    initial = state_of(tmp_path, 0)
    assert not any(t.any() for name, t in initial.items() if name.startswith("momentum/"))
    main([*command, "optim.max_skipped=2"])
    assert_bit_equal(final_state(tmp_path), final_state(skipping))


def run(what: str, arguments: list[str], folder: Path, code: int = 0) -> Path:
    command = [what, ",".join(map(str, BAD)), *arguments, f"run_dir={folder}"]
    process = start(command, folder.with_suffix(".txt"), module="tests.poisoned")
    assert process.wait() == code, folder.with_suffix(".txt").read_text()
    return folder


def known(run_dir: Path) -> list[float]:
    """Losses of logged steps; null for a skipped step."""
    return [math.nan if loss is None else loss for loss in losses(run_dir)]


@pytest.mark.slow
def test_on_devices_it_costs_no_graph_and_no_read(
    skipping: Path, tmp_path: Path, data: list[str]
) -> None:
    """On a mesh that shards the parameters; the losses of the other steps are those of a CPU."""
    pytest.importorskip("torch_xla", exc_type=ModuleNotFoundError)
    devices = [*ONE, *data, *xla(2), "trainer.fsdp=2", *SKIPPING]
    folder = run("poison", devices, tmp_path / "run")
    record = read_record(folder)
    assert [row["step"] for row in record.of_kind("nonfinite")] == [1, 4]
    (end,) = record.of_kind("end")
    assert (end["compilations"], end["gather_compilations"], end["fallbacks"]) == (2, 1, {})
    assert samples(folder) == samples(skipping)
    np.testing.assert_allclose(known(folder), known(skipping), rtol=1e-4)


@pytest.mark.slow
def test_hosts_decide_alike(skipping: Path, tmp_path: Path, data: list[str]) -> None:
    """Only one host has the bad row; both skip the step, and both end above the ceiling."""
    for ceiling, code in ((2, 0), (1, 1)):
        folder, log = tmp_path / str(ceiling), tmp_path / "log.txt"
        command = [*ONE, *data, *PLAIN_CPU, *SKIPPING, f"optim.max_skipped={ceiling}"]
        command = ["poison", "0,3", *command, f"run_dir={folder}"]
        hosts = [start(command, log, module="tests.poisoned", **each) for each in as_hosts(2)]
        assert [host.wait() for host in hosts] == [code, code], log.read_text()
    np.testing.assert_allclose(known(tmp_path / "2"), known(skipping), rtol=1e-4)
    assert [row["step"] for row in read_record(tmp_path / "2").of_kind("nonfinite")] == [1, 4]
    assert checkpoint.steps(tmp_path / "1" / "checkpoints") == [3]


@pytest.mark.slow
def test_on_devices_it_is_as_on_a_cpu(tmp_path: Path, data: list[str]) -> None:
    """Bit-equal to the twin, and the state before the step is saved; stacked, with accumulation."""
    pytest.importorskip("torch_xla", exc_type=ModuleNotFoundError)
    form = ["model.stacked=true", "optim.accumulation=2", *xla(2)]
    skipped = run("poison", [*ONE, *data, *form, *SKIPPING], tmp_path / "skipped")
    twin = run("without", [*ONE, *data, *form, *SKIPPING], tmp_path / "twin")
    assert_bit_equal(final_state(skipped), final_state(twin))
    stops = ["optim.max_skipped=1", "trainer.log_every=2", "trainer.checkpoint_every=null"]
    stopped = run("poison", [*ONE, *data, *form, *stops], tmp_path / "stopped", code=1)
    assert checkpoint.steps(stopped / "checkpoints") == [3]
    assert_bit_equal(state_of(stopped, 3), state_of(skipped, 3))
