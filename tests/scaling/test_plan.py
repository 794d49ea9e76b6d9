"""Plans: the rules give the paper's own runs; with runs, plans recover what was planted."""

import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.scaling import published
from nfnets_xla.scaling.account import macs_per_image, train_flops
from nfnets_xla.scaling.law import Extrapolation
from nfnets_xla.scaling.plan import Job, Study, best_of_study, describe, make_plan, nearest_model
from nfnets_xla.scaling.report import report
from nfnets_xla.scaling.runs import HELD_OUT, Point

CONF = Path(__file__).parents[2] / "conf"
IMAGES = 50_000
MODELS = tuple(f"nfnet_mini_f{n}" for n in (0, 1, 3, 5, 7))


def made_point(model: str, epochs: float, rate: float = 0.1, **changes: object) -> Point:
    """L = 1.5 + A / M^0.4 + B / D^0.4: size and epochs at the same rate."""
    macs, rows = macs_per_image(model, 32, 200), round(epochs * IMAGES)
    loss = 1.5 + 3e2 * macs**-0.4 + 1e2 * rows**-0.4 + 0.01 * np.log2(rate / 0.1) ** 2
    point = Point(
        run=f"{model}-{epochs:g}-{rate:g}",
        model=model,
        epochs=epochs,
        peak_lr=rate,
        seed=0,
        loss=float(loss),
        top1=0.5,
        objective="softmax",
        optimizer="sgd",
        macs=macs,
        parameters=1,
        image_size=32,
        num_classes=200,
        batch_size=64,
        repeats=1,
        rows=rows,
        flops=train_flops(macs, rows),
        device_kind="CPU",
        devices=1,
        typical_seconds=1.0,
        all_in_seconds=1.0,
        restarts=0,
        steps_lost=0,
        data="f" * 64,
        init_from=None,
    )
    return replace(point, **changes)


@pytest.fixture(scope="module")
def study() -> list[Point]:
    return [made_point(model, epochs) for model, epochs in product(MODELS, (0.5, 1, 2, 4, 8))]


def mini_job(core_hours: float) -> Job:
    return Job(core_hours, mfu=0.3, images=IMAGES, image_size=32, batch_size=64, num_classes=200)


@pytest.mark.parametrize(("run", "mfu"), [(published.RUNS[0], 0.29), (published.RUNS[1], 0.355)])
def test_the_papers_own_runs_come_out(run: published.Run, mfu: float) -> None:
    """F0 for 0.25 epochs at 400 core-hours and F7+ for 8 at 110k, given the utilisation of each."""
    plan = make_plan(Job(run.v4_core_hours, mfu=mfu))
    assert plan.model == run.model
    assert plan.epochs == pytest.approx(run.epochs, rel=0.02)
    assert plan.trials.rates == (1.6, 0.8)


def test_one_epoch_at_five_thousand_core_hours() -> None:
    plan = make_plan(Job(5000, cores=1024))
    assert plan.epochs == pytest.approx(1, rel=0.15)
    assert plan.model == "nfnet_f3"
    assert plan.steps == pytest.approx(plan.epochs * 4e9 / 4096, abs=1)
    assert plan.wall_hours == pytest.approx(5000 / 1024)
    text = describe(plan, price=3.0)
    assert "5,000 core-hours = 2,500 chip-hours = 7,500 at 3 a chip-hour of v4" in text
    assert (
        "try optim.peak_lr=0.1 and 0.05, per 256 rows (1.6 and 0.8 per batch)"
        "   (best at few epochs in the paper)"
    ) in text
    assert "unknown   (no runs were given, and the paper prints no losses)" in text


def test_rates_are_said_as_a_recipe_takes_them() -> None:
    """For optim.lr_batch rows, with the rate of the whole batch beside it."""
    optim = yaml.safe_load((CONF / "optim" / "pretrain.yaml").read_text())
    job = Job(5000, batch_size=1024)
    (line,) = [line for line in describe(make_plan(job)).splitlines() if "peak_lr" in line]
    each, rows, whole = re.findall(r"peak_lr=(\S+) and \S+, per (\d+) rows \((\S+) and", line)[0]
    assert int(rows) == optim["lr_batch"]
    assert float(each) * 1024 / optim["lr_batch"] == pytest.approx(float(whole))


def test_senseless_epochs_are_said() -> None:
    few, many = Job(5000, images=1_281_167), Job(5000)
    assert "far too many for so few images" in describe(make_plan(few))
    assert "far too many" not in describe(make_plan(many))


def test_size_and_epochs_grow_at_the_same_rate() -> None:
    """100 times the compute between sizes in the family: ten times each, within half a model."""
    small, large = make_plan(Job(600)), make_plan(Job(60_000))
    assert large.macs / small.macs == pytest.approx(10, rel=0.3)
    assert large.epochs / small.epochs == pytest.approx(10, rel=0.3)
    assert small.flops * 100 == pytest.approx(large.flops)


def test_only_models_of_the_runs_family_are_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """However near another one's cost is."""
    narrow = replace(VARIANTS["nfnet_mini_f0"], family="nfnet_micro", width=(16, 32, 96, 96))
    monkeypatch.setitem(VARIANTS, "nfnet_micro", narrow)
    size = macs_per_image("nfnet_micro", 32, 200)
    study = Study(IMAGES, image_size=32, batch_size=64, num_classes=200)
    for run, proposed in (
        ("nfnet_f1", "nfnet_f0"),
        ("nfnet_f1_plus", "nfnet_f0_plus"),
        ("nfnet_mini_f1", "nfnet_mini_f0"),
        ("nfnet_mini_f1_plus", "nfnet_mini_f0_plus"),
        ("nfnet_micro", "nfnet_micro"),
    ):
        assert nearest_model(size, study, [made_point(run, 1)])[0] == proposed


def test_a_planted_study_is_planned_by_its_own_fit(study: list[Point]) -> None:
    """The chosen model has the lowest planted loss of all at that compute, within 1 %."""
    job = mini_job(3e-4)
    plan = make_plan(job, study)
    losses = {}
    for model in MODELS:
        epochs = plan.flops / train_flops(macs_per_image(model, 32, 200), IMAGES)
        losses[model] = made_point(model, epochs).loss
    chosen = made_point(plan.model, plan.epochs).loss
    assert chosen <= min(losses.values()) * 1.01
    assert plan.because["model"].startswith("fitted here: size ~ C^0.5")
    assert plan.loss is not None
    assert plan.loss.value == pytest.approx(chosen, rel=0.05)


def test_runs_too_few_for_a_fit_are_continued_at_the_papers_rate(study: list[Point]) -> None:
    few = [point for point in study if point.model in MODELS[:2] and point.epochs <= 1]
    plan = make_plan(mini_job(3e-5), few)
    assert plan.because["model"].startswith(
        "paper: size and epochs grow at the same rate; from the middle"
    )
    assert plan.model.startswith("nfnet_mini_")


def test_a_loss_far_from_the_runs_warns(study: list[Point]) -> None:
    with pytest.warns(Extrapolation, match="decades beyond"):
        make_plan(mini_job(1), study)


def test_rates_follow_the_runs(study: list[Point]) -> None:
    """If 0.05 was better for the smallest, larger runs continue from there, not from 0.1."""
    assert make_plan(mini_job(3e-4), study).trials.rates == (0.1, 0.05)
    better = made_point(MODELS[0], 0.5, 0.05, loss=1.0)
    others = [point for point in study if point.epochs > 0.5 or point.model != MODELS[0]]
    tried = [replace(point, peak_lr=0.05) for point in others]
    assert make_plan(mini_job(3e-4), [better, *tried]).trials.rates == (0.05, 0.025)


def test_every_rate_counts_that_was_tried(study: list[Point]) -> None:
    """One cell's best rate is an outlier, by a small margin; the cell's other rate shows it."""
    halves = [replace(p, run=p.run + "-half", peak_lr=0.05, loss=p.loss * 1.02) for p in study]
    first = halves[0]
    halves[0] = replace(first, loss=first.loss / 1.02 * 0.999)
    assert make_plan(mini_job(3e-4), [*study, *halves]).trials.rates == (0.1, 0.05)


def test_rates_of_runs_go_with_the_batch(study: list[Point]) -> None:
    """As the paper's rates scale with its batch."""
    same, four = (
        make_plan(replace(mini_job(3e-4), batch_size=batch), study).trials
        for batch in (study[0].batch_size, 4 * study[0].batch_size)
    )
    assert four.rates == tuple(4 * rate for rate in same.rates)
    assert four.because == f"{same.because}, for a batch of 64; in proportion to the batch"


def test_a_plan_far_from_its_runs_says_so(study: list[Point]) -> None:
    with pytest.warns(Extrapolation):
        plan = make_plan(mini_job(1), study)
    assert plan.because["mfu"].endswith("decades beyond the runs")
    assert "beyond" not in make_plan(mini_job(3e-4), study).because["mfu"]


def test_runs_whose_loss_does_not_go_with_size_leave_the_division_to_the_paper(
    study: list[Point],
) -> None:
    """The fit's best size would be 0: its exponent is 1, with a narrow interval."""
    flat = [replace(p, loss=1.5 + 1e2 * p.rows**-0.4) for p in study]
    plan = make_plan(mini_job(3e-4), flat)
    assert plan.because["model"].startswith(
        "paper: size and epochs grow at the same rate; from the middle"
    )


def test_a_smaller_run_than_all_begins_above_their_rates(study: list[Point]) -> None:
    """Rates do not rise: 0.1 was best for the smallest and shortest, so this rate is no lower."""
    plan = make_plan(mini_job(2e-6), study)
    assert plan.model == "nfnet_mini_f0"
    assert plan.epochs < 0.5
    assert plan.trials.rates == (0.2, 0.1)
    assert plan.because["rates"].endswith("; a smaller or shorter run's may be higher")


def test_passes_of_sam_are_paid_for(study: list[Point]) -> None:
    """The same compute pays for half the rows, divided as if each cost one pass."""
    sam = [replace(point, flops=2 * point.flops) for point in study]
    plain, twice = make_plan(mini_job(2e-4), study), make_plan(mini_job(4e-4), sam)
    assert (twice.model, twice.steps) == (plain.model, plain.steps)
    assert twice.epochs == pytest.approx(plain.epochs)
    assert twice.flops == 2 * plain.flops
    given = Job(model=plain.model, epochs=plain.epochs, **asdict_less(mini_job(1), "core_hours"))
    assert make_plan(given, sam).core_hours == pytest.approx(4e-4)


def asdict_less(job: Job, name: str) -> dict[str, Any]:
    return {key: value for key, value in vars(job).items() if key not in (name, "model", "epochs")}


def test_models_are_those_of_the_runs_kind(study: list[Point]) -> None:
    """+ models are wider, and the others' law does not cover them; models that were not run are
    named."""
    found = {make_plan(mini_job(hours), study).model for hours in np.geomspace(1e-4, 1e-3, 4)}
    assert not [name for name in found if name.endswith("_plus")]
    between = next(
        plan
        for hours in np.geomspace(1e-5, 1e-3, 12)
        if (plan := make_plan(mini_job(hours), study)).model not in MODELS
    )
    assert between.because["model"].endswith("; not among the runs")


def test_runs_on_other_held_out_images_are_refused(study: list[Point]) -> None:
    """Also if other models were run on them: losses on other images, or at another size, do not
    compare."""
    for name, values in ((HELD_OUT, ("a" * 12, "b" * 12)), ("data.eval_image_size", (32, 48))):
        pair = [replace(study[n], settings={name: values[n]}) for n in (0, 1)]
        other = replace(pair[1], model=MODELS[4])
        with pytest.raises(ValueError, match=f"2 different values of {name}"):
            best_of_study([pair[0], other])
        assert best_of_study([pair[0], replace(other, settings={})])  # an older record


def test_runs_of_two_studies_are_refused(study: list[Point]) -> None:
    other = replace(study[0], data="e" * 64)
    with pytest.raises(ValueError, match=r"2 different values of data \(eeeeeeeeeeee, ffffffff"):
        make_plan(mini_job(1), [*study, other])
    sigmoid = [replace(study[0], objective="sigmoid"), study[1]]
    with pytest.raises(ValueError, match="2 different values of objective"):
        best_of_study(sigmoid)
    adamw = [replace(study[0], optimizer="adamw"), study[1]]
    with pytest.raises(ValueError, match=r"2 different values of optimizer \(adamw, sgd\)"):
        best_of_study(adamw)
    sam = [replace(study[0], flops=1.2 * study[0].flops), study[1]]
    with pytest.raises(ValueError, match=r"2 different values of passes \(1.0, 1.2\)"):
        best_of_study(sam)
    repeated = [replace(study[0], repeats=4), study[1]]
    with pytest.raises(ValueError, match=r"2 different values of repeats \(1, 4\)"):
        best_of_study(repeated)
    decayed = [replace(study[n], settings={"optim.weight_decay": n}) for n in (0, 1)]
    with pytest.raises(ValueError, match=r"f0-0.5-0.1 and .* differ in optim.weight_decay \(0, 1"):
        best_of_study([decayed[0], replace(decayed[1], epochs=0.5)])
    assert len(best_of_study(decayed)) == 2  # of two cells
    assert best_of_study([decayed[0], replace(study[0], seed=1)])  # an older record lacks it
    peer = replace(study[0], model="vit_mini_d3_4", optimizer="adamw")
    assert best_of_study([peer, study[1]])
    with pytest.raises(ValueError, match="all of the pre-training runs diverged"):
        best_of_study([replace(study[0], loss=math.inf)])
    with pytest.raises(ValueError, match="of each rate of the runs at least one seed diverged"):
        best_of_study([study[0], replace(study[0], seed=1, loss=math.inf)])
    with pytest.raises(ValueError, match="2 different values of batch_size"):
        best_of_study([study[0], replace(study[1], batch_size=32)])
    with pytest.raises(ValueError, match="all of these runs are fine-tuned"):
        best_of_study([replace(study[0], init_from="x")])


def test_a_loss_that_the_runs_do_not_resolve_is_not_promised(study: list[Point]) -> None:
    flat = [replace(point, loss=3 + 0.01 * (index % 3)) for index, point in enumerate(study)]
    plan = make_plan(mini_job(3e-5), flat)
    assert plan.loss is None
    assert re.search(r"loss +unknown   \(.*(not resolved|needs at least)", describe(plan))


def test_cells_that_diverged_everywhere_are_named(study: list[Point]) -> None:
    """Their rates are not proposed again for a longer run."""
    longest = max(point.epochs for point in study)
    cell = [p for p in study if (p.model, p.epochs) == (MODELS[0], longest)]
    others = [point for point in study if point not in cell]
    lost = [replace(point, loss=math.inf, top1=math.nan) for point in cell]
    rates = sorted(point.peak_lr for point in lost)
    line = f"  {MODELS[0]} at {longest:g} epochs: left out, diverged at "
    assert line + ", ".join(f"{rate:g}" for rate in rates) in report([*others, *lost])
    job = Job(model=MODELS[0], epochs=2 * longest, mfu=0.3)
    trials = make_plan(job, [*others, *lost]).trials
    assert trials.rates == (rates[0] / 2, rates[0] / 4)
    assert trials.because.startswith(f"{rates[0]:g} diverged for {MODELS[0]} at {longest:g} epochs")
    assert make_plan(job, study).trials.rates[0] >= rates[0]


def test_other_runs_of_a_study_count_for_nothing(study: list[Point]) -> None:
    """A folder may also hold fine-tuned runs and peers, which have other rates and losses."""
    few = study[:4]
    tuned = [replace(p, run="t" + p.run, peak_lr=0.01, init_from=p.run) for p in few]
    peers = [replace(p, model="vit_mini_d3_4", peak_lr=1e-3, optimizer="adamw") for p in few]
    job = mini_job(3e-5)
    assert make_plan(job, [*peers, *tuned, *few]) == make_plan(job, few)
    assert report([*peers, *tuned, *few]) == report(few)
    for of in (lambda points: make_plan(job, points), report):
        with pytest.raises(ValueError, match=r"none of these 8 runs \(nfnet_mini_f0, .*vit_mini"):
            of([*tuned, *peers])


def test_a_job_is_for_the_images_of_the_runs(study: list[Point]) -> None:
    """Settings that are not given are the runs'; other images are refused."""
    plan = make_plan(Job(3e-4, mfu=0.3), study)
    assert replace(plan, job=mini_job(3e-4)) == make_plan(mini_job(3e-4), study)
    assert (plan.study.images, plan.study.batch_size) == (IMAGES, 64)
    for name, value in (("images", 4_000_000_000), ("image_size", 224), ("num_classes", 1000)):
        job = replace(Job(3e-4), **{name: value})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{name} is {value}, but .+ in the runs: "):
            make_plan(job, study)


def test_impossible_jobs_are_refused() -> None:
    with pytest.raises(ValueError, match="core_hours is 0; it must be finite and greater than 0"):
        make_plan(Job(0))
    with pytest.raises(ValueError, match="hardware is 'v9'"):
        make_plan(Job(1, hardware="v9"))
    with pytest.raises(ValueError, match="mfu is 36"):
        make_plan(Job(1, mfu=36))
