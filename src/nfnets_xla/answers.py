"""An evaluation class by class and image by image: accuracies, confusions, the surest errors.

Shape suffixes: N rows of the held-out set in the order of its index, A columns of task.ANSWERS,
K classes.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nfnets_xla.data.batches import EvalBatches
from nfnets_xla.hosts import Hosts
from nfnets_xla.record import finite
from nfnets_xla.sheet import draw_sheet

CONFUSIONS = 100  # pairs in the file, the most frequent first
TILES, COLUMNS = 48, 8  # of the sheet of the most confident errors


@dataclass(frozen=True)
class Answers:
    """One row per evaluated image, without those that could not be decoded and without padding."""

    sample_N: np.ndarray  # numbers of the samples
    label_N: np.ndarray  # each sample's first label
    predicted_N: np.ndarray
    probability_N: np.ndarray  # of the predicted class
    rank_N: np.ndarray  # number of classes ranked above the sample's best label: 0 is correct

    def per_class(self) -> list[dict[str, Any]]:
        """For every class with images: their number, top-1 and top-5 accuracy."""
        images_K, first_K, five_K = (
            np.bincount(self.label_N, weights=weights)
            for weights in (None, self.rank_N < 1, self.rank_N < 5)
        )
        return [
            {
                "class": int(number),
                "images": int(images_K[number]),
                "top1": float(first_K[number] / images_K[number]),
                "top5": float(five_K[number] / images_K[number]),
            }
            for number in np.flatnonzero(images_K)
        ]

    def confusions(self) -> list[dict[str, int]]:
        """Which class was predicted as which other, and how often; the most frequent first."""
        wrong = self.rank_N > 0
        pairs = zip(self.label_N[wrong].tolist(), self.predicted_N[wrong].tolist(), strict=True)
        counted = Counter(pairs).most_common(CONFUSIONS)
        return [{"class": a, "taken_for": b, "images": n} for (a, b), n in counted]

    def surest_errors(self, number: int) -> np.ndarray:
        """The rows of the most confident errors, most confident first."""
        wrong = np.flatnonzero(self.rank_N > 0)
        return wrong[np.argsort(-self.probability_N[wrong], kind="stable")][:number]


def gathered(answers_NA: np.ndarray, dataset: EvalBatches, hosts: Hosts) -> Answers:
    """Join the hosts' answers and look up the labels: rows are ordered by sample number."""
    if hosts.count > 1 and len(answers_NA) < dataset.num_steps * dataset.order.unique_per_step:
        parts = [np.array(part, np.float32) for part in hosts.gather(answers_NA.tolist())]
        by_step = [part.reshape(dataset.num_steps, -1, part.shape[1]) for part in parts]
        answers_NA = np.concatenate(by_step, axis=1).reshape(-1, answers_NA.shape[1])
    sample_N = np.flatnonzero(answers_NA[:, 3] > 0)
    predicted_N, probability_N, rank_N, _ = answers_NA[sample_N].T
    places = [dataset.samples.place(int(number)) for number in sample_N]
    label_N = np.array([dataset.samples.labels(*place)[0][0] for place in places], np.int64)
    predicted_N, rank_N = predicted_N.astype(np.int64), rank_N.astype(np.int64)
    return Answers(sample_N, label_N, predicted_N, probability_N, rank_N)


def write(
    folder: Path,
    attempt: int,
    answers: Answers,
    dataset: EvalBatches,
    about: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """evaluation-<attempt>.json and, if there are errors, errors-<attempt>.png."""
    file = folder / f"evaluation-{attempt}.json"
    confusions = answers.confusions()
    found = about | {"per_class": answers.per_class(), "confusions": confusions}
    file.write_text(json.dumps(finite(found), indent=1, allow_nan=False), encoding="utf-8")
    say(f"{file}: every class, and the {len(confusions)} most frequent confusions")
    rows = answers.surest_errors(TILES)
    if len(rows):
        tiles = [tile(answers, int(row), dataset) for row in rows]
        draw_sheet(tiles, COLUMNS).save(folder / f"errors-{attempt}.png", "PNG")
        say(f"{folder / f'errors-{attempt}.png'}: the {len(tiles)} surest errors")


def tile(answers: Answers, row: int, dataset: EvalBatches) -> tuple[np.ndarray, str, str]:
    """An image as the model saw it, a caption with label and prediction, and the sample's id."""
    number, share = int(answers.sample_N[row]), answers.probability_N[row]
    words = f"{answers.label_N[row]}, not {answers.predicted_N[row]} ({share:.0%})"
    return dataset.seen(number), words, dataset.samples.name(number)
