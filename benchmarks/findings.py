"""The recipes' own comparisons in miniature: python benchmarks/findings.py [FOLDER]

For each seed nfnet_mini_f0 is pre-trained on fractals and then fine-tuned on few handwritten
digits, through the command line, in five ways: with SAM; from scratch; with SGD for as many epochs;
with SGD for twice as many, which costs what SAM does; with SAM on 4 views of each image in a batch,
at equal compute. The settings were chosen before the first run; rates and clipping were those of
the demo at the time. The report gives the mean and each seed, and the differences seed by seed with
Student's interval. FOLDER keeps the runs; the script continues from those that are there.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scipy.stats import ttest_1samp

from _digits import TRAIN_DIGITS, digit_samples
from _turns import Report
from nfnets_xla.data.fractals import fractal_samples
from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import Sample, pack_samples
from nfnets_xla.record import read_record
from nfnets_xla.scaling.runs import read_point

SIZE, SEEDS = 40, (0, 1, 2)
FRACTAL_CLASSES, PER_CLASS = 16, 192
DIGITS = 1797
EPOCHS = 12.0
CPU = ["trainer.device=cpu", "trainer.virtual_devices=null", "trainer.tensorboard=false"]
QUIET = ["trainer.trace_samples=false", "trainer.ledger=false", "trainer.log_every=50"]
RATE = ["optim.peak_lr=0.1", "optim.clipping=0.04"]
ONLY_END = ["trainer.eval_every=null", "trainer.checkpoint_every=1000"]

WAYS: dict[str, list[str]] = {
    "SAM": [],
    "SAM, from scratch": ["model.init_from=null"],
    "SGD, equal epochs": ["optim.sam_rho=null"],
    "SGD, equal compute": ["optim.sam_rho=null", f"optim.epochs={2 * EPOCHS}"],
    "SAM, 4 views": ["data.repeats=4", "data.num_streams=8"],
}


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "findings-run")
    shards = folder / "shards"
    pack(shards)
    found: dict[str, list[Any]] = {name: [] for name in WAYS}
    for seed in SEEDS:
        pretrained = folder / f"pretrain-{seed}"
        words = ["pretrain_demo", "data=demo_fractals", *data(shards, "fractals"), "optim.epochs=2"]
        nfnets_xla([*words, *RATE, f"run_dir={pretrained}", f"seed={seed}"])
        for name, options in WAYS.items():
            run_dir = folder / f"{name.replace(', ', '-').replace(' ', '_')}-{seed}"
            words = ["finetune_sam_demo", *data(shards, "digits"), f"model.init_from={pretrained}"]
            words += [
                f"optim.epochs={EPOCHS}",
                "optim.warmup_steps=20",
                "optim.ema_decay=0.99",
                *RATE,
            ]
            nfnets_xla([*words, f"run_dir={run_dir}", f"seed={seed}", *options])
            found[name].append((evaluated(run_dir, shards), read_point(read_record(run_dir), name)))
    report = Report(
        "findings",
        f"python benchmarks/findings.py: nfnet_mini_f0, float32, CPU; {TRAIN_DIGITS} digits to "
        f"train, {DIGITS - TRAIN_DIGITS} held out, {len(SEEDS)} seeds, held-out "
        "numbers of the moving average",
    )
    errors = {name: [1 - scores["top1"] for scores, _ in runs] for name, runs in found.items()}
    for name, runs in found.items():
        losses = [scores["loss"] for scores, _ in runs]
        flops = statistics.fmean(point.flops for _, point in runs)
        report.say(
            f"{name:20} error {spread(errors[name], '.1%')}   loss {spread(losses, '.3f')}   "
            f"{flops:.2e} FLOPs"
        )
    for name in list(WAYS)[1:]:
        differences = [a - b for a, b in zip(errors["SAM"], errors[name], strict=True)]
        each = spread(differences, "+.1%")
        report.say(f"error, SAM minus {name:20} {each}   {interval(differences)}")
    report.save()


def evaluated(run_dir: Path, shards: Path) -> dict[str, float]:
    folder = run_dir.with_name(f"{run_dir.name}-evaluated")
    if not (folder / "evaluation-1.json").exists():
        words = ["evaluate_demo", f"model.init_from={run_dir}", "model.init_weights=ema"]
        nfnets_xla([*words, data(shards, "digits")[1], f"run_dir={folder}"])
    return json.loads((folder / "evaluation-1.json").read_text())


def spread(values: list[float], form: str) -> str:
    shown = " ".join(format(value, form) for value in values)
    return f"{format(statistics.fmean(values), form)} ({shown})"


def interval(differences: list[float]) -> str:
    """Student's 95 % interval for the mean of the differences."""
    found = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    verdict = ": not resolved" if found.low <= 0 <= found.high else ""
    return f"[{found.low:+.1%}, {found.high:+.1%}]{verdict}"


def data(shards: Path, name: str) -> list[str]:
    return [f"data.shards={shards / name}", f"data.eval_shards={shards / f'{name}-held-out'}"]


def nfnets_xla(words: list[str]) -> None:
    print("nfnets-xla", " ".join(words), flush=True)
    command = [sys.executable, "-m", "nfnets_xla", *words, *CPU, *QUIET, *ONLY_END]
    subprocess.run(command, check=True)


def pack(shards: Path) -> None:
    if (shards / "digits-held-out").is_dir():
        return
    digits = list(digit_samples(SIZE))
    for name, samples in (
        ("fractals", fractals(PER_CLASS, 0)),
        ("fractals-held-out", fractals(16, PER_CLASS)),
        ("digits", digits[:TRAIN_DIGITS]),
        ("digits-held-out", digits[TRAIN_DIGITS:]),
    ):
        pack_samples(samples, shards / name, samples_per_shard=60)
        build_index(shards / name)


def fractals(per_class: int, first: int) -> Iterator[Sample]:
    return fractal_samples(FRACTAL_CLASSES, per_class, size=SIZE, seed=0, first_instance=first)


if __name__ == "__main__":
    main()
