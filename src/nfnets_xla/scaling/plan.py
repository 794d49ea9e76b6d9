"""Plans for a given number of core-hours: model, epochs, learning rates, steps, hours, expected
loss. Or, for a given model and epochs, the cost and learning rates.

Without runs, plans follow arXiv 2310.16764: size and epochs grow at the same rate, about one epoch
of JFT-4B is best at 5k TPU-v4 core-hours (both section 2), and F7+ is the largest model. This
reproduces the paper's extremes, F0 for a quarter of an epoch and F7+ for eight, each at its
utilisation. With runs, the division is fitted to them if they resolve it, and the expected loss
comes from their frontier.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.scaling import account, published
from nfnets_xla.scaling.account import above, macs_per_image
from nfnets_xla.scaling.allocation import Allocation, parametric
from nfnets_xla.scaling.law import DECADES, Prediction, decades_beyond, fit_frontier, frontier
from nfnets_xla.scaling.rate import Trials, cells_of, two_trials
from nfnets_xla.scaling.runs import HELD_OUT, Point, best_per_cell, fitted_to, nfnets

LARGEST_MISMATCH = 2.0  # factor between best size and nearest model that is not mentioned
MOST_CORE_HOURS = 1e12  # more than all chips there are could do
MOST_EPOCHS = 100  # more are called far too many; the papers train 8 epochs of JFT
LR_BATCH = 256  # optim.lr_batch in the recipe pretrain: its optim.peak_lr is for 256 rows
WARMUP = 5000  # optim.warmup_steps of that recipe
SHORTER = "optim.warmup_steps=null optim.warmup_fraction=0.05"
HASTY = f"fewer than the {WARMUP:,} of the recipe's warm-up: give {SHORTER}"


@dataclass(frozen=True)
class Study:
    """The training set and batches."""

    images: int = published.JFT_IMAGES
    image_size: int = published.TRAIN_SIZE
    batch_size: int = published.BATCH
    num_classes: int = 1000


@dataclass(frozen=True)
class Job:
    """What is given: `core_hours`, to plan model and epochs; `core_hours` and a `model`, to plan
    the epochs; or a model and `epochs`, to plan the core-hours."""

    core_hours: float | None = None
    model: str | None = None
    epochs: float | None = None
    hardware: str = "v4"
    cores: int = 512  # on which it will run
    mfu: float | None = None  # None: measured in the runs, else the paper's
    images: int | None = None  # of the training set; None, as below: the runs', else the paper's
    image_size: int | None = None
    batch_size: int | None = None
    num_classes: int | None = None

    def check(self) -> None:
        optional = ("core_hours", "epochs", *(field.name for field in fields(Study)))
        for name in optional:
            if (value := getattr(self, name)) is not None:
                above(name, value)
        above("cores", self.cores)
        if self.core_hours is not None and self.core_hours > MOST_CORE_HOURS:
            raise ValueError(
                f"core-hours are {self.core_hours:g}; they must be at most {MOST_CORE_HOURS:g}"
            )
        asked = [self.core_hours is not None, self.model is not None, self.epochs is not None]
        if asked not in ([True, False, False], [True, True, False], [False, True, True]):
            raise ValueError(
                f"core-hours are {self.core_hours}, the model is {self.model} and epochs are "
                f"{self.epochs}: give core-hours, alone or with a model, or a model and epochs"
            )
        account.device(self.hardware)
        if self.cores % (together := account.cores_per_chip(self.hardware)):
            raise ValueError(
                f"cores is {self.cores}; it must be a multiple of {together}, which a chip of "
                f"{self.hardware} has"
            )


@dataclass(frozen=True)
class Plan:
    job: Job
    study: Study
    model: str
    macs: float
    epochs: float
    steps: int
    core_hours: float
    flops: float
    mfu: float
    wall_hours: float
    trials: Trials
    loss: Prediction | None
    because: dict[str, str]  # {field: the rule, fit or assumption it follows from}


def make_plan(job: Job, points: Sequence[Point] = ()) -> Plan:
    """`points` are runs of one study, on the same training images; only pre-training runs of NFNets
    count. ValueError if points are given but none of them counts, or if the job is for other
    images."""
    job.check()
    runs = fitted_to(points) if points else []
    points = best_of_study(runs)
    study = study_of(job, runs)
    passes = points[0].passes if points else 1.0
    mfu, mfu_because = utilisation_for(job, points)
    if job.core_hours is not None:
        flops = account.flops_in(job.core_hours, job.hardware, mfu=mfu)
        one_pass = flops / passes  # sizes are chosen by the compute of one pass
        model, model_because = chosen_model(one_pass, job, study, points)
        macs = macs_per_image(model, study.image_size, study.num_classes)
        rows = flops / (passes * account.train_flops(macs, 1))
        core_hours, epochs = job.core_hours, rows / study.images
    else:
        assert job.model is not None
        assert job.epochs is not None
        model, epochs, model_because = job.model, job.epochs, "given"
        macs = macs_per_image(model, study.image_size, study.num_classes)
        rows = epochs * study.images
        flops = passes * account.train_flops(macs, rows)
        core_hours = account.core_hours(flops, job.hardware, mfu=mfu)
    steps = math.ceil(rows / study.batch_size)
    trials = rates_for(study, macs, epochs, runs)
    loss, loss_because = expected_loss(flops, points)
    return Plan(
        job=job,
        study=study,
        model=model,
        macs=macs,
        epochs=epochs,
        steps=steps,
        core_hours=core_hours,
        flops=flops,
        mfu=mfu,
        wall_hours=core_hours / job.cores,
        trials=trials,
        loss=loss,
        because={
            "model": model_because + not_run(model, points),
            "epochs": "given" if job.epochs is not None else "spends the budget",
            "steps": HASTY if steps < WARMUP and not points else "",
            "mfu": mfu_because + far_from(points, flops),
            "rates": trials.because,
            "loss": loss_because,
        },
    )


def study_of(job: Job, runs: Sequence[Point]) -> Study:
    """The job's values, else the runs', else the paper's. ValueError if the job's images differ
    from those of the runs, whose losses, rates and epochs hold only for their own."""
    given = {field.name: getattr(job, field.name) for field in fields(Study)}
    given = {name: value for name, value in given.items() if value is not None}
    if not runs:
        return Study(**given)
    longest = max(runs, key=lambda point: point.rows)  # rows are rounded up to whole batches
    images = round(longest.rows / longest.epochs)
    if "images" in given and abs(given["images"] - images) * longest.epochs <= longest.batch_size:
        images = given["images"]
    own = Study(images, longest.image_size, longest.batch_size, longest.num_classes)
    for name in ("images", "image_size", "num_classes"):
        if name in given and given[name] != getattr(own, name):
            raise ValueError(
                f"{name} is {given[name]}, but {getattr(own, name)} in the runs: their losses, "
                f"rates and epochs hold only for their own images; leave out {name}, or --runs"
            )
    return replace(own, **given)


def best_of_study(points: Sequence[Point]) -> list[Point]:
    """For each model and number of epochs, the run at the best rate. ValueError for several
    studies: losses compare only with the same images, image size, batch size and loss function.
    NFNets must also share their recipe, as far as points show it: otherwise SAM would look like a
    seed."""
    pretrained = [point for point in points if not point.is_finetuned]
    if points and not pretrained:
        raise ValueError("all of these runs are fine-tuned; give pre-training runs")
    if points and all(point.diverged for point in pretrained):
        raise ValueError("all of the pre-training runs diverged: try lower rates")
    of_all = ("data", "num_classes", "image_size", "batch_size", "objective")
    of_nfnets = ("optimizer", "repeats", "passes")  # peers have their own
    for name in (*of_all, *of_nfnets):
        compared = nfnets(pretrained) if name in of_nfnets else pretrained
        one_value(name, {str(getattr(point, name))[:12] for point in compared})
    for name in (HELD_OUT, "data.eval_image_size"):  # where the record says them
        one_value(name, {str(p.settings[name]) for p in pretrained if name in p.settings})
    best = best_per_cell(pretrained)
    if pretrained and not best:
        raise ValueError(
            "of each rate of the runs at least one seed diverged: run more, or try lower rates"
        )
    return best


def one_value(name: str, found: set[str]) -> None:
    if len(found) > 1:
        raise ValueError(
            f"the runs have {len(found)} different values of {name} ({', '.join(sorted(found))}); "
            "give the folder of one study"
        )


# ---- the parts of a plan ----------------------------------------------------------------------


def utilisation_for(job: Job, points: Sequence[Point]) -> tuple[float, str]:
    if job.mfu is not None:
        return job.mfu, "assumed"
    measured = [mfu for point in points if (mfu := point.mfu(job.hardware)) is not None]
    if measured:
        return statistics.median(measured), f"median of {len(measured)} runs on {job.hardware}"
    return published.PAPER_MFU, "assumed: the paper's largest run; its smallest had 29%"


def rates_for(study: Study, macs: float, epochs: float, runs: Sequence[Point]) -> Trials:
    """Rates are scaled in proportion to the batch, both the runs' and the paper's."""
    if not runs:
        return two_trials(macs, epochs, batch_size=study.batch_size)
    cells = cells_of(runs)
    of_runs = runs[0].batch_size
    found = two_trials(macs, epochs, batch_size=of_runs, cells=cells, downwards=True)
    if of_runs == study.batch_size:
        return found
    high, low = (rate * study.batch_size / of_runs for rate in found.rates)
    because = f"{found.because}, for a batch of {of_runs}; in proportion to the batch"
    return Trials((high, low), because)


def far_from(points: Sequence[Point], flops: float) -> str:
    if not points:
        return ""
    run = [point.flops for point in points]
    beyond = decades_beyond(flops, (min(run), max(run)))
    return f"; {beyond:.1f} decades beyond the runs" if beyond > DECADES else ""


def best_size(flops: float, points: Sequence[Point]) -> tuple[float, str]:
    """Multiply-accumulates per image, and the rule used; `flops` are those of one pass."""
    if not points:
        at_one_epoch = account.flops_in(
            published.ONE_EPOCH_CORE_HOURS, "v4", mfu=published.PAPER_MFU
        )
        size = at_one_epoch / account.train_flops(1, published.JFT_IMAGES)
        because = "paper: size and epochs grow at the same rate, one epoch at 5k v4 core-hours"
        return size * math.sqrt(flops / at_one_epoch), because
    fitted = fitted_division(points)
    if fitted is not None:
        low, high = fitted.interval
        because = f"fitted here: size ~ C^{fitted.exponent:.2f} [{low:.2f}, {high:.2f}]"
        return fitted.size(flops), because
    kept = on_frontier(points)
    middle_size = statistics.geometric_mean(point.macs for point in kept)
    middle_flops = statistics.geometric_mean(point.flops / point.passes for point in kept)
    because = (
        "paper: size and epochs grow at the same rate; from the middle of the runs' frontier, "
        "which does not resolve it"
    )
    return middle_size * math.sqrt(flops / middle_flops), because


def fitted_division(points: Sequence[Point]) -> Allocation | None:
    """The division fitted to the runs; None if they are too few or do not resolve it."""
    macs, rows, loss = zip(*[(point.macs, point.rows, point.loss) for point in points], strict=True)
    try:
        fitted = parametric(macs, rows, loss)
    except ValueError:
        return None
    division = fitted.allocation()
    return division if division.resolved else None


def on_frontier(
    points: Sequence[Point], cost: Callable[[Point], float] = lambda point: point.flops
) -> list[Point]:
    """The points that no cheaper point beats."""
    kept = frontier([cost(point) for point in points], [point.loss for point in points])
    return [points[index] for index in kept]


def chosen_model(flops: float, job: Job, study: Study, points: Sequence[Point]) -> tuple[str, str]:
    """The model for `flops` of one pass, and why."""
    if job.model is not None:
        return job.model, "given"
    size, because = best_size(flops, points)
    model, mismatch = nearest_model(size, study, points)
    return model, because + mismatch


def nearest_model(size: float, study: Study, points: Sequence[Point]) -> tuple[str, str]:
    """The paper's, or the runs' family's, model of the nearest cost; and a note if it is far."""
    names: Sequence[str] = published.PAPER_MODELS
    if points:
        families = {VARIANTS[point.model].family for point in points}
        names = [name for name, variant in VARIANTS.items() if variant.family in families]
    costs = {name: macs_per_image(name, study.image_size, study.num_classes) for name in names}
    name = min(costs, key=lambda name: abs(math.log(costs[name] / size)))
    if max(costs[name] / size, size / costs[name]) <= LARGEST_MISMATCH:
        return name, ""
    extreme = "largest" if costs[name] < size else "smallest"
    return name, f"; {size / 1e9:.3g} GMACs would be best; this is the {extreme} model"


def not_run(model: str, points: Sequence[Point]) -> str:
    among = not points or model in {point.model for point in points}
    return "" if among else "; not among the runs"


def expected_loss(flops: float, points: Sequence[Point]) -> tuple[Prediction | None, str]:
    if not points:
        return None, "no runs were given, and the paper prints no losses"
    try:
        law = fit_frontier("power", [p.flops for p in points], [p.loss for p in points])
    except ValueError as error:
        return None, str(error)
    through = f"power law through the {law.points} runs on the frontier"
    if not law.resolved("b"):
        return None, f"the exponent of a {through} is not resolved"
    return law.predict(flops), f"fitted here: {through}"


# ---- in words ---------------------------------------------------------------------------------


def describe(plan: Plan, price: float | None = None) -> str:
    """The plan as a table, each choice with the rule it follows."""
    job, study = plan.job, plan.study
    chips = account.chip_hours(plan.core_hours, job.hardware)
    low, high = sorted(plan.trials.rates)
    share = LR_BATCH / study.batch_size
    senseless = ""
    if job.epochs is None and plan.epochs > MOST_EPOCHS:
        senseless = "; far too many for so few images: give fewer core-hours"
    hours = f"{plan.wall_hours:,.1f}" if plan.wall_hours >= 0.1 else f"{plan.wall_hours:.2g}"
    shown = ",.10g" if job.core_hours is not None else ",.4g"
    booked = f"{plan.core_hours:{shown}} core-hours = {chips:{shown}} chip-hours"
    if price is not None:
        cost = account.cost(plan.core_hours, job.hardware, price=price)
        booked += f" = {cost:,.0f} at {price:g} a chip-hour"
    lines = [
        ("budget", f"{booked} of {job.hardware}", ""),
        (
            "compute",
            f"{plan.flops:.3g} FLOPs at {100 * plan.mfu:.2g} % of the peak",
            plan.because["mfu"],
        ),
        ("model", f"{plan.model}, {plan.macs / 1e9:.4g} GMACs an image", plan.because["model"]),
        (
            "epochs",
            f"{plan.epochs:.3g} of {study.images:,} images",
            plan.because["epochs"] + senseless,
        ),
        ("steps", f"{plan.steps:,} of {study.batch_size} images", plan.because["steps"]),
        (
            "peak_lr",
            f"try optim.peak_lr={high * share:.4g} and {low * share:.4g}, per {LR_BATCH} rows "
            f"({high:.4g} and {low:.4g} per batch)",
            plan.because["rates"],
        ),
        ("wall clock", f"{hours} hours a trial on {job.cores} cores", "no restarts"),
        ("loss", "unknown" if plan.loss is None else str(plan.loss), plan.because["loss"]),
    ]
    return "\n".join(
        f"{name:11} {value}" + (f"   ({because})" if because else "")
        for name, value, because in lines
    )
