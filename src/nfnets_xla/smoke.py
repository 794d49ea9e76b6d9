"""`nfnets-xla smoke`: checks in a minute, without data, that everything works on this machine.

Packs fractals, trains a mini NFNet on them with SAM, saves it, loads and evaluates it: the loss
must equal that of the last evaluation during training. Uses the device that a run would use.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nfnets_xla.backend import open_backend
from nfnets_xla.config import Run
from nfnets_xla.data.fractals import fractal_samples
from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.display import Display, Lines
from nfnets_xla.evaluate import evaluate
from nfnets_xla.exits import Failed
from nfnets_xla.preempt import Preemption
from nfnets_xla.record import read_record
from nfnets_xla.train import train

CLASSES, PER_CLASS, HELD_OUT = 4, 64, 16
TOLERANCE = 1e-5  # relative, of the loss: same graph and weights, but compiled again


def smoke(
    run: Run, display: Display | None = None, preemption: Preemption | None = None
) -> dict[str, Any]:
    """Returns the evaluation. ValueError if `run_dir` is not set; Failed if the losses differ."""
    if run.run_dir is None:
        raise ValueError("run_dir is not set; it must name a folder for what this leaves")
    hosts, folder = open_backend(run.trainer).hosts, Path(run.run_dir)
    display = display or Lines()
    if not hosts.writes:
        display = Lines(lambda _: None)
    train_shards, held_out = folder / "shards" / "train", folder / "shards" / "held-out"

    def pack() -> None:
        _pack(train_shards, PER_CLASS, 0, run.data.image_size)
        _pack(held_out, HELD_OUT, PER_CLASS, run.data.image_size)

    hosts.by_writer(pack)
    data = replace(run.data, shards=str(train_shards), eval_shards=str(held_out))
    run = replace(run, data=data)
    train(run, display, preemption)
    # Other hosts wait here until host 0 has saved; they may not see its record yet.
    saved_loss = hosts.gather(_last_loss(folder) if hosts.writes else None)[0]
    loaded = replace(run.model, init_from=str(folder))
    found = evaluate(replace(run, model=loaded, run_dir=None), say=display.say)
    _same(found["loss"], saved_loss, display.say)
    return found


def _last_loss(folder: Path) -> float:
    rows = [row for row in read_record(folder).of_kind("eval") if row["weights"] == "raw"]
    return rows[-1]["loss"]


def _same(loaded: float, saved: float, say: Callable[[str], None]) -> None:
    if not abs(loaded - saved) <= TOLERANCE * abs(saved):
        raise Failed(f"the loaded weights have loss {loaded:.7f}, but had {saved:.7f} when saved")
    say("smoke: passed; the loaded weights have the loss of the saved ones")


def _pack(folder: Path, per_class: int, first: int, size: int) -> None:
    if not folder.is_dir():  # created as a whole: packing may be interrupted
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        samples = fractal_samples(CLASSES, per_class, size=size, seed=0, first_instance=first)
        pack_samples(samples, part, samples_per_shard=32)
        part.rename(folder)
    build_index(folder)
