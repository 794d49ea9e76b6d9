"""Which two learning rates to train a model with next: commands/two_trials.py has the rule."""

from dataclasses import dataclass
from pathlib import Path

import torch

from nfnets_xla.config import Run
from nfnets_xla.inputs import count_classes, open_shards, untrained
from nfnets_xla.scaling.rate import cells_of, two_trials
from nfnets_xla.scaling.runs import find_points, pretrained


@dataclass(frozen=True)
class Pair:
    """Two values of `optim.peak_lr` to try, and why."""

    model: str
    epochs: float
    rates: tuple[str, str]
    because: str

    def __str__(self) -> str:
        return f"{self.model} at {self.epochs:g} epochs: {' and '.join(self.rates)}; {self.because}"


def size(run: Run) -> float:
    """Multiply-accumulates of one training image."""
    with torch.device("meta"):
        return untrained(run, _classes(run)).macs(run.data.image_size)


def next_pair(run: Run) -> Pair:
    """The pair for the model and epochs of `run`, from the finished runs below its `run_dir`.

    Runs of the same model and epochs are ignored, so that the same sweep, given again, gets the
    same pair. Records have the rates actually used; `optim.peak_lr` is for `optim.lr_batch` rows.
    """
    if run.run_dir is None:
        raise ValueError("run_dir is not set; it must name the folder of the sweep's runs")
    folder = Path(run.run_dir)
    points = find_points(folder)[0] if folder.is_dir() else []
    index, _ = open_shards(run)
    image_size, batch_size = run.data.image_size, run.data.batch_size
    known = [
        point
        for point in pretrained(points)
        if (point.data, point.image_size, point.batch_size, point.optimizer, point.objective)
        == (index.fingerprint, image_size, batch_size, run.optim.optimizer, run.optim.loss)
        and (point.model, point.epochs) != (run.model.name, run.optim.epochs)
    ]
    found = two_trials(size(run), run.optim.epochs, batch_size=batch_size, cells=cells_of(known))
    scale = 1.0 if run.optim.lr_batch is None else batch_size / run.optim.lr_batch
    high, low = (f"{rate / scale:.6g}" for rate in found.rates)
    return Pair(run.model.name, run.optim.epochs, (high, low), found.because)


def _classes(run: Run) -> int:
    return count_classes(run, *open_shards(run))
