"""Top-k of samples with several labels."""

import torch

from nfnets_xla.task import _rank

BATCH = {
    "labels_B": torch.tensor([4, 2, 0]),
    "labels_BL": torch.tensor([[4, 1, 4], [2, 2, 2], [0, 1, 2]]),
    "label_weights_BL": torch.tensor([[3.0, 1, 0], [1, 0, 0], [1, 1, 2]]),
}


def test_the_best_ranked_of_the_labels_counts() -> None:
    logits_BK = torch.tensor([[5.0, 4, 3, 2, 1], [5, 4, 3, 2, 1], [float("nan")] * 5])
    assert _rank(logits_BK, BATCH).tolist() == [1, 2, 5]
    alone = {"labels_B": BATCH["labels_B"]}
    assert _rank(logits_BK, alone).tolist() == [4, 2, 5]
