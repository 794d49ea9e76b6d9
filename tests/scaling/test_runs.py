"""Points from records: typical and all-in costs, restarts, and what is left out."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from nfnets_xla.commands.runs import overviews
from nfnets_xla.record import RecordWriter
from nfnets_xla.scaling import runs
from tests.scaling.made_runs import BATCH, header, write_diverged, write_run


def test_a_run_is_counted_by_its_median_speed(tmp_path: Path) -> None:
    """One slow interval, as a compilation causes, does not count."""
    first = write_run(tmp_path / "a", loss=2.5, top1=0.4, speeds=(5.0, 100.0, 90.0, 110.0, 100.0))
    (point,), left_out = runs.read_points(tmp_path)
    assert not left_out
    assert (point.run, point.loss, point.error) == ("a", 2.5, 0.6)
    assert point.rows == first["num_steps"] * BATCH == 40_000
    assert point.flops == 6 * first["macs_per_image"] * 40_000
    assert point.typical_seconds == 40_000 / 100
    assert point.restarts == 0


def test_restarts_cost_all_in_but_not_typically(tmp_path: Path) -> None:
    """Killed after step 400 of 500, resumed from 300."""
    rows = [
        [("header", 0, 0.0), ("train", 200, 160.0), ("train", 400, 320.0)],
        [("header", 300, 0.0), ("train", 500, 170.0), ("eval", 500, 180.0), ("end", 500, 181.0)],
    ]
    for attempt, lines in enumerate(rows, start=1):
        file = tmp_path / "a" / f"run-{attempt}.jsonl"
        file.parent.mkdir(exist_ok=True)
        with file.open("w") as out:
            for kind, step, seconds in lines:
                row = {"kind": kind, "step": step, "seconds": seconds, "images_per_second": 100.0}
                row |= {"weights": "raw", "loss": 2.0, "top1": 0.5}
                row |= header(resumed_from=step) if kind == "header" else {}
                out.write(json.dumps(row) + "\n")
    (point,), _ = runs.read_points(tmp_path)
    assert (point.restarts, point.steps_lost) == (1, 100)
    assert point.typical_seconds == 400
    assert point.all_in_seconds == 320 + 181
    assert runs.without_restarts([point]) == []


def test_a_run_that_went_on_on_other_devices_counts_as_all_on_the_last(tmp_path: Path) -> None:
    """The first start's chips with the second's speed would give a sixteenth."""
    v4 = {"device_kind": "TPU v4", "num_devices": 4, "macs_per_image": 10**9}
    write_run(tmp_path / "a", loss=2, speeds=(100.0,) * 5, **v4)
    rows = [json.loads(x) for x in (tmp_path / "a" / "run-1.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"num_devices": 64, "resumed_from": 0} if row["kind"] == "header" else {}
        row |= {"images_per_second": 1600.0} if row["kind"] == "train" else {}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a" / "run-2.jsonl").write_text(text)
    (point,), _ = runs.read_points(tmp_path)
    assert (point.devices, point.typical_seconds) == (64, 40_000 / 1600)
    assert point.all_in_seconds is None
    assert point.core_hours("v4") == pytest.approx(25 * 128 / 3600)


def test_a_copy_of_a_run_is_no_other_seed(tmp_path: Path) -> None:
    write_run(tmp_path / "a", loss=2.6)
    write_run(tmp_path / "b", loss=2.8, seed=1)
    points, _ = runs.read_points(tmp_path)
    (best,) = runs.best_per_cell(points)
    assert (best.seeds, best.loss) == (2, pytest.approx(2.7))
    shutil.copytree(tmp_path / "a", tmp_path / "old" / "a")
    points, _ = runs.read_points(tmp_path)
    with pytest.raises(ValueError, match="a and old/a are one run, of the same seed and loss"):
        runs.best_per_cell(points)


def test_core_hours_are_measured_on_the_hardware_or_assumed(tmp_path: Path) -> None:
    """40,000 rows at 100 per second are 400 s, on 32 cores 3.56 core-hours."""
    write_run(tmp_path / "tpu", loss=2, device_kind="TPU v4", num_devices=16, macs_per_image=10**11)
    write_run(tmp_path / "cpu", loss=2)
    (cpu, tpu), _ = runs.read_points(tmp_path)
    assert tpu.core_hours("v4") == pytest.approx(400 * 32 / 3600)
    assert tpu.mfu("v4") == pytest.approx(6e11 * 100 / (32 * 137.5e12))
    assert cpu.mfu("v4") is None
    assert cpu.core_hours("v4", mfu=0.4) == pytest.approx(cpu.flops / (0.4 * 137.5e12 * 3600))
    with pytest.raises(ValueError, match="cpu ran on CPU, not on v4: give the MFU"):
        cpu.core_hours("v4")
    assert tpu.cores("v4") == 32  # two per chip, which PyTorch sees as one device
    assert tpu.cores("v3") is None
    with pytest.raises(ValueError, match="hardware is 'v9'"):
        tpu.cores("v9")


def test_unfinished_runs_and_evaluations_are_left_out(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "evaluation", {"resumed_from": 0, "config": {}}) as record:
        record.write("eval", 0, loss=1.0)
    with RecordWriter(tmp_path / "unfinished", header()) as record:
        record.write("train", 1, images_per_second=1.0)
    with pytest.raises(ValueError, match=r"no finished training run \(unfinished: not finished\)"):
        runs.read_points(tmp_path)
    write_run(tmp_path / "done", loss=1.0)
    points, left_out = runs.read_points(tmp_path)
    assert [point.run for point in points] == ["done"]
    assert left_out == ["unfinished: not finished"]
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        runs.read_points("nowhere")


def test_a_run_that_diverged_is_a_point_of_infinite_loss(tmp_path: Path) -> None:
    """It was ended by the guard, or ended with a loss that is not finite."""
    write_diverged(tmp_path / "0.4", rate=0.4)
    write_run(tmp_path / "0.8", loss=float("nan"), rate=0.8)
    with pytest.raises(ValueError, match=r"no finished training run \(0\.4 diverged\)"):
        runs.read_points(tmp_path)
    write_run(tmp_path / "0.2", loss=2.0, rate=0.2)
    points, left_out = runs.read_points(tmp_path)
    assert not left_out
    assert [point.diverged for point in points] == [False, True, True]
    (best,) = runs.best_per_cell(points)
    assert best.peak_lr == 0.2
    assert runs.best_per_cell(points[1:]) == []


def test_a_rate_at_which_one_seed_diverged_is_not_the_best(tmp_path: Path) -> None:
    write_run(tmp_path / "a", loss=1.0, rate=0.2)
    write_diverged(tmp_path / "b", rate=0.2, seed=1)
    write_run(tmp_path / "c", loss=2.0, rate=0.1)
    (best,) = runs.best_per_cell(runs.read_points(tmp_path)[0])
    assert best.peak_lr == 0.1


def test_rates_and_seeds_of_a_cell_differ_in_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path / "a", loss=1.0, optim={"weight_decay": 2e-5})
    write_run(tmp_path / "b", loss=1.1, optim={"weight_decay": 2e-5}, rate=0.2, seed=1)
    write_run(tmp_path / "0", loss=1.2)  # from a release that did not record it
    runs.check_cells(runs.read_points(tmp_path)[0])
    write_run(tmp_path / "d", loss=0.9, optim={"weight_decay": 0.0}, epochs=2)
    runs.check_cells(runs.read_points(tmp_path)[0])
    write_run(tmp_path / "f", loss=0.9, epochs=4, held_out="0" * 64)
    write_run(tmp_path / "g", loss=0.9, epochs=4, held_out="1" * 64)
    with pytest.raises(ValueError, match=r"f and g .* the held-out shards \(0{12}, 1{12}\)"):
        runs.check_cells(runs.read_points(tmp_path)[0])
    write_run(tmp_path / "e", loss=0.9, optim={"weight_decay": 0.0})
    with pytest.raises(ValueError, match=r"a and e .* differ in optim.weight_decay \(2e-05, 0.0"):
        runs.check_cells(runs.read_points(tmp_path)[0])


def test_a_run_that_goes_on_past_the_guard_has_not_diverged(tmp_path: Path) -> None:
    write_diverged(tmp_path / "a")
    with RecordWriter(tmp_path / "a", header(resumed_from=1)) as record:
        record.write("train", 500, loss=2.0, images_per_second=100.0)
        record.write("eval", 500, weights="raw", loss=2.0, top1=0.5)
        record.write("end", 500)
    (point,), _ = runs.read_points(tmp_path)
    assert (point.loss, point.diverged) == (2.0, False)


def test_a_source_may_be_named_from_further_down(tmp_path: Path) -> None:
    """The path is relative to where the run was started; an error if two runs could be meant."""
    write_run(tmp_path / "project" / "runs" / "f0", loss=2)
    write_run(tmp_path / "tuned", loss=1, init_from="runs/f0")
    points, _ = runs.read_points(tmp_path)
    source = runs.source_of(points[-1], points)
    assert source is points[0]
    assert runs.source_of(replace(points[-1], init_from="/runs/f0"), points) is None
    write_run(tmp_path / "another" / "runs" / "f0", loss=2)
    points, _ = runs.read_points(tmp_path)
    assert runs.source_of(points[-1], points) is None


def test_fine_tuned_runs_name_their_source(tmp_path: Path) -> None:
    write_run(tmp_path / "f0-1", loss=2)
    write_run(tmp_path / "f0-11", loss=2)
    write_run(tmp_path / "tuned", loss=1, init_from="/moved/since/f0-1")
    points, _ = runs.read_points(tmp_path)
    tuned = points[-1]
    source = runs.source_of(tuned, points)
    assert source is not None
    assert source.run == "f0-1"
    assert runs.source_of(points[0], points) is None
    inside = "checkpoints/step-00000500"
    for path in (f"/x/f0-1/{inside}", "f0-1/checkpoints", f"x/f0-1/{inside}/ema.safetensors"):
        assert runs.source_of(replace(tuned, init_from=path), points) is source, path
    for path in ("/x/f0-1/elsewhere", "/x/f0-1/f0", "0-1", "/f0-111"):
        assert runs.source_of(replace(tuned, init_from=path), points) is None, path
    assert [point.run for point in runs.pretrained(points)] == ["f0-1", "f0-11"]
    assert tuned.flops == 2 * points[0].flops  # SAM's second gradient


def test_sam_costs_the_share_that_was_computed(tmp_path: Path) -> None:
    """A fifth of a stream's 2 images is one of them; the header records it, older ones do not."""
    optim = {"sam_rho": 0.05, "sam_ascent_fraction": 0.2}
    write_run(tmp_path / "new", loss=1, optim=optim, ascent_share=0.5)
    write_run(tmp_path / "old", loss=1, optim=optim)
    write_run(tmp_path / "plain", loss=1, ascent_share=0.0)
    (new, old, plain), _ = runs.read_points(tmp_path)
    assert (new.flops, old.flops) == pytest.approx((1.5 * plain.flops, 1.2 * plain.flops))
    assert [row.flops for row in overviews(tmp_path)] == [new.flops, old.flops, plain.flops]


def test_the_best_rate_of_a_cell_is_that_of_the_lowest_mean_loss(tmp_path: Path) -> None:
    """0.2 has the luckiest seed, and 0.1 the lower mean, which is the cell's loss; the other
    numbers are of the run nearest to it."""
    losses = {(0.1, 0): 2.00, (0.1, 1): 2.06, (0.1, 2): 2.02, (0.2, 0): 1.98, (0.2, 1): 2.20}
    for (rate, seed), loss in losses.items():
        write_run(tmp_path / f"{rate}-{seed}", loss=loss, rate=rate, seed=seed)
    points, _ = runs.read_points(tmp_path)
    (best,) = runs.best_per_cell(points)
    assert (best.peak_lr, best.seed, best.seeds) == (0.1, 2, 3)
    assert best.loss == pytest.approx((2.00 + 2.06 + 2.02) / 3)
    assert runs.best_per_cell(points[::-1]) == [best]
