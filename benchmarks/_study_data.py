"""Data of the scaling study: fractals of many classes, and a few handwritten digits."""

from pathlib import Path
from shutil import rmtree

from joblib import Parallel, delayed

from _digits import TRAIN_DIGITS, digit_samples
from nfnets_xla.data.fractals import fractal_samples
from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import pack_samples

CLASSES, PER_CLASS, HELD_OUT_PER_CLASS = 200, 240, 20
STORED_SIZE = 40  # pixels; training crops and evaluation use 32
PARTS = 10  # packed in parallel; a fixed number, so that the shards do not depend on `jobs`


def pack_data(folder: Path, jobs: int) -> None:
    """Pack `fractals`, `fractals-held-out`, `digits` and `digits-held-out` into `folder`, once."""
    per_part = PER_CLASS // PARTS
    parts = [(f"part{n}", folder / "fractals", per_part, n * per_part) for n in range(PARTS)]
    parts += [("shard", folder / "fractals-held-out", HELD_OUT_PER_CLASS, PER_CLASS)]
    Parallel(n_jobs=jobs)(delayed(pack_fractals)(*part) for part in parts)
    digits = list(digit_samples(STORED_SIZE))
    for name, samples in (
        ("digits", digits[:TRAIN_DIGITS]),
        ("digits-held-out", digits[TRAIN_DIGITS:]),
    ):
        if not any((folder / name).glob("*.tar")):
            pack_samples(samples, folder / name, samples_per_shard=60)
    for name in ("fractals", "fractals-held-out", "digits", "digits-held-out"):
        build_index(folder / name)


def pack_fractals(prefix: str, folder: Path, per_class: int, first: int) -> None:
    """Write the shards of `prefix` into `folder`: all of them, or none if it is interrupted."""
    if any(folder.glob(f"{prefix}-*.tar")):
        return
    samples = fractal_samples(CLASSES, per_class, size=STORED_SIZE, seed=0, first_instance=first)
    aside = folder.with_name(f"{folder.name}-{prefix}")
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(pack_samples(samples, aside, samples_per_shard=480, prefix=prefix)):
        path.rename(folder / path.name)
    rmtree(aside)
