"""Recall and precision of matches between copies and the pictures they were copied from."""

from typing import NamedTuple

import numpy as np

LEAST_PRECISION = 0.999


class Scores(NamedTuple):
    """Distances between queries and references; infinite for pairs that were not found near."""

    distance_QR: np.ndarray
    query_picture_Q: np.ndarray
    query_kind_Q: np.ndarray
    counted_QR: np.ndarray

    @property
    def right_QR(self) -> np.ndarray:
        return self.query_picture_Q[:, None] == np.arange(self.distance_QR.shape[1])

    def of_kind(self, number: int) -> "Scores":
        """Only the queries that were copied by transformation `number`."""
        chosen = self.query_kind_Q == number
        return Scores(*(values[chosen] for values in self))

    def wrong(self, threshold: float) -> int:
        return int(((self.distance_QR <= threshold) & ~self.right_QR & self.counted_QR).sum())

    def hit_Q(self, threshold: float) -> np.ndarray:
        """For each query whose original is a reference: whether it is matched with that."""
        has = self.query_picture_Q < self.distance_QR.shape[1]
        rows = np.flatnonzero(has)
        return self.distance_QR[rows, self.query_picture_Q[rows]] <= threshold

    def precision(self, threshold: float) -> tuple[int, int]:
        right = int(self.hit_Q(threshold).sum())
        return right, right + self.wrong(threshold)

    def best_threshold(self) -> float:
        """The largest threshold at which precision is at least LEAST_PRECISION; -1 if there is
        none."""
        best = -1.0
        for threshold in np.unique(self.distance_QR[self.distance_QR <= 30]):
            right, total = self.precision(float(threshold))
            if right >= LEAST_PRECISION * total:
                best = float(threshold)
        return best


def wilson(right: int, total: int, deviations: float = 1.96) -> float:
    """Lower bound of Wilson's confidence interval for a share."""
    share, square = right / total, deviations**2
    spread = deviations * (share * (1 - share) / total + square / (4 * total**2)) ** 0.5
    return (share + square / (2 * total) - spread) / (1 + square / total)
