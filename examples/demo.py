"""The main job at toy size: pack, pre-train, be killed, resume, fine-tune with SAM, evaluate.

    make demo          (python examples/demo.py FOLDER)

Every stage is a command as a user would give it, run as its own process on XLA:CPU with four
virtual devices. The final table and the figure are made from the records that the runs leave.
"""

import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import Sample, pack_samples
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.record import RunRecord, read_record

matplotlib.use("Agg")
from matplotlib import pyplot

SIZE = 40  # pixels of the packed images; training crops are resized to 32
LETTERS = "ABCDEFGHJKLMNPRT"  # none that looks like a digit
PER_CLASS, HELD_OUT_PER_CLASS = 96, 16
KILL_AFTER = 0.4  # share of pre-training: the kill comes at a random step between this and twice it


def main() -> None:
    started = time.monotonic()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-run")
    if folder.exists():
        if not (folder / "shards").is_dir() and any(folder.iterdir()):
            sys.exit(f"demo: {folder} exists and is not an earlier demo: name another folder")
        shutil.rmtree(folder)
    shards, runs = folder / "shards", folder / "runs"
    say("packing drawn letters and handwritten digits")
    pack_all(shards)

    say("pre-training, until killed")
    letters = ["pretrain_demo", f"data.shards={shards}/letters"]
    letters += [f"data.eval_shards={shards}/letters-held-out", f"run_dir={runs}/pretrain"]
    kill_once(letters, runs / "pretrain")
    say("pre-training, resumed")
    nfnets_xla(letters)
    for name, weights in (("finetune", f"{runs}/pretrain"), ("from-scratch", "null")):
        say(f"fine-tuning on digits with SAM: {name}")
        nfnets_xla(
            [
                "finetune_sam_demo",
                f"model.init_from={weights}",
                f"data.shards={shards}/digits",
                f"data.eval_shards={shards}/digits-held-out",
                f"run_dir={runs}/{name}",
            ]
        )
    say("evaluating the fine-tuned weights")
    digits = [f"model.init_from={runs}/finetune", f"data.eval_shards={shards}/digits-held-out"]
    nfnets_xla(["evaluate_demo", *digits, f"run_dir={runs}/evaluate"])

    records = {path.name: read_record(path) for path in sorted(runs.iterdir())}
    prove_once_per_epoch(records["pretrain"], ShardIndex.load(shards / "letters"))
    table = summary(records) + f"\nwhole demo: {(time.monotonic() - started) / 60:.1f} minutes\n"
    (folder / "summary.txt").write_text(table)
    draw(records, folder / "curves.png")
    print(f"\n{table}curves: {folder / 'curves.png'}")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


# ---- data ----------------------------------------------------------------------------------------


def pack_all(shards: Path) -> None:
    """Pack letters and scikit-learn's digits, each with its own held-out part."""
    digits = list(digit_samples())
    cut = len(digits) // 5
    for name, samples, per_shard in (
        ("letters", letter_samples(PER_CLASS), 150),
        ("letters-held-out", letter_samples(HELD_OUT_PER_CLASS, first=PER_CLASS), 128),
        ("digits", digits[cut:], 200),
        ("digits-held-out", digits[:cut], 200),
    ):
        pack_samples(samples, shards / name, samples_per_shard=per_shard)
        index = build_index(shards / name)
        print(f"{name}: {index.num_samples} images in {index.num_shards} shards")


def letter_samples(per_class: int, first: int = 0) -> Iterator[Sample]:
    """`per_class` drawings of each letter, from number `first` on, in random order."""
    mixed = np.random.default_rng(first).permutation(len(LETTERS) * per_class)
    for place in mixed:
        label, number = divmod(int(place), per_class)
        file = io.BytesIO()
        Image.fromarray(letter(label, first + number)).save(file, "PNG")
        yield f"{LETTERS[label]}-{first + number:05d}", file.getvalue(), "png", label


def letter(label: int, number: int) -> np.ndarray:
    """(SIZE, SIZE, 3), a letter of random size, weight, slant and blur, light on dark."""
    rng = np.random.default_rng([label, number])
    mask = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(mask).text(
        tuple(SIZE / 2 + rng.normal(0, 1.5, 2)),
        LETTERS[label],
        fill=255,
        font=ImageFont.load_default(size=rng.uniform(26, 42)),
        anchor="mm",
        stroke_width=int(rng.integers(3)),
    )
    angle, shear = rng.normal(0, 0.15, 2)
    turn = np.array(
        [[np.cos(angle), shear - np.sin(angle)], [np.sin(angle), np.cos(angle)]],
    )
    shift = SIZE / 2 - turn @ [SIZE / 2, SIZE / 2]
    rows = [*turn[0], shift[0], *turn[1], shift[1]]
    mask = mask.transform((SIZE, SIZE), Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)
    ink = np.asarray(mask.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.8))))[..., None] / 255
    paint, paper = rng.uniform(140, 255, 3), rng.uniform(0, 110, 3)
    pixels = paper + (paint - paper) * ink + rng.normal(0, rng.uniform(0, 12), (SIZE, SIZE, 1))
    return pixels.clip(0, 255).astype(np.uint8)


def digit_samples() -> Iterator[Sample]:
    """The 1,797 handwritten 8x8 digits that come with scikit-learn, enlarged, in a fixed order."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    for number in np.random.default_rng(0).permutation(len(data.target)):
        pixels = (data.images[number] * 255 / 16).round().astype(np.uint8)
        image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.convert("RGB").save(file, "JPEG", quality=95)
        yield f"{number:05d}", file.getvalue(), "jpg", int(data.target[number])


# ---- processes -----------------------------------------------------------------------------------


def environment(arguments: list[str]) -> dict[str, str]:
    """XLA:CPU at a low optimisation level, as these runs are short: it compiles faster, and steps
    are slower. SAM's graph is twice as large, so there the lowest level pays off."""
    level = 1 if arguments[0] == "pretrain_demo" else 0
    return {"XLA_FLAGS": f"--xla_backend_optimization_level={level}", **os.environ}


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "nfnets_xla", *arguments]


def nfnets_xla(arguments: list[str]) -> None:
    if subprocess.run(command(arguments), env=environment(arguments), check=False).returncode:
        sys.exit(f"demo: nfnets-xla {' '.join(arguments)} failed")


def kill_once(arguments: list[str], run_dir: Path) -> None:
    """Start a run and SIGKILL it at a random step, as when its machine is pre-empted."""
    process = subprocess.Popen(command(arguments), env=environment(arguments))
    steps = None
    while process.poll() is None:
        time.sleep(0.2)
        record = read_record(run_dir) if (run_dir / "run-1.jsonl").exists() else None
        if record is None or not record.headers:
            continue
        if steps is None:
            total = record.headers[0]["num_steps"]
            steps = int(total * random.uniform(KILL_AFTER, 2 * KILL_AFTER))
        reached = max((row["step"] for row in record.rows), default=0)
        if reached >= steps:
            process.send_signal(signal.SIGKILL)
            process.wait()
            print(f"killed (SIGKILL) after step {reached}", flush=True)
            return
    sys.exit(f"demo: nfnets-xla {' '.join(arguments)} ended before it could be killed")


# ---- what came out -------------------------------------------------------------------------------


def prove_once_per_epoch(record: RunRecord, index: ShardIndex) -> None:
    """Check, by the ids in the batches of both starts: every sample was shown once per epoch."""
    epochs = record.headers[0]["config"]["optim"]["epochs"]
    shown: dict[int, list[str]] = {epoch: [] for epoch in range(int(epochs))}
    for row in record.of_kind("samples"):
        for epoch, sample in zip(row["epochs"], row["ids"], strict=True):
            shown[epoch].append(sample)
    everything = {
        index.sample_id(shard, row)
        for shard, count in enumerate(index.counts)
        for row in range(count)
    }
    for epoch, samples in shown.items():
        if len(samples) != len(everything) or set(samples) != everything:
            sys.exit(f"demo: epoch {epoch} did not show every sample once")
    print(f"\nevery one of {index.num_samples} samples was shown once in each of {epochs:g} epochs")


def summary(records: dict[str, RunRecord]) -> str:
    head = ("run", "steps", "top-1", "top-5", "loss", "images/s", "compilations", "steps lost")
    rows: list[tuple[str, ...]] = [head]
    for name, record in records.items():
        final = record.of_kind("eval")[-1]
        speeds = [row["images_per_second"] for row in record.of_kind("train")]
        compilations = record.of_kind("end")[-1]["compilations"]
        rows.append(
            (
                name,
                str(final["step"] or "-"),
                f"{100 * final['top1']:.1f} %",
                f"{100 * final['top5']:.1f} %",
                f"{final['loss']:.3f}",
                f"{np.median(speeds):.0f}" if speeds else "-",
                str(compilations),
                str(record.steps_lost),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    notes = (
        "(held-out images; fine-tuned runs by their moving average; compilations of the last start)"
    )
    return "\n".join([*lines, notes])


def draw(records: dict[str, RunRecord], path: Path) -> None:
    """Left: pre-training, with the kill; right: fine-tuning, pre-trained and from scratch."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    curve(left, records["pretrain"], "pre-training", "tab:blue")
    for header in records["pretrain"].headers[1:]:
        left.axvline(
            header["resumed_from"], color="tab:red", linestyle=":", label="killed, resumed"
        )
    curve(right, records["finetune"], "from the pre-trained weights", "tab:blue")
    curve(right, records["from-scratch"], "from scratch", "tab:orange")
    left.set(title="Pre-training on letters", xlabel="step", ylabel="loss")
    right.set(title="Fine-tuning on digits with SAM", xlabel="step")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def curve(axes: Any, record: RunRecord, label: str, colour: str) -> None:
    train, held_out = record.of_kind("train"), record.of_kind("eval")
    axes.plot([r["step"] for r in train], [r["loss"] for r in train], color=colour, label=label)
    axes.plot(
        [row["step"] for row in held_out],
        [row["loss"] for row in held_out],
        "o",
        color=colour,
        label=f"{label}, held out",
    )


if __name__ == "__main__":
    main()
