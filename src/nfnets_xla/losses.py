"""Classification losses for targets that name a few classes, mixed and smoothed.

A target t is given by its labels and their shares, never as a dense vector over classes. Both
losses are a function of the logits minus sum_k t_k z_k, which needs only the labels' logits and,
with smoothing, the mean logit; so even with 30,000 classes no tensor is larger than the logits.
Smoothing comes after mixing, as in deepmind-research/nfnets, experiment.py:230-250.

Shape suffixes: B rows, K classes, L labels of a row.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def softmax_losses(
    logits_BK: Tensor, labels_BL: Tensor, shares_BL: Tensor, smoothing: float
) -> Tensor:
    """Cross-entropy of each row, (B,): -sum_k t_k log softmax(z)_k, for t that sums to 1.

    float32 logits and shares, int64 labels. t is (1 - smoothing) * shares + smoothing / K.
    """
    return logits_BK.logsumexp(dim=1) - _along_target(logits_BK, labels_BL, shares_BL, smoothing)


def sigmoid_losses(
    logits_BK: Tensor, labels_BL: Tensor, shares_BL: Tensor, smoothing: float
) -> Tensor:
    """Binary cross-entropies of each row, summed over its classes, (B,).

    -sum_k t_k log s(z_k) + (1 - t_k) log(1 - s(z_k)) = sum_k softplus(z_k) - t_k z_k, with t as
    above, but the shares are in [0, 1] and need not sum to 1. This is big_vision's sigmoid_xent
    (utils.py), with which arXiv 2106.04560 trained its ViTs.
    """
    along_B = _along_target(logits_BK, labels_BL, shares_BL, smoothing)
    return F.softplus(logits_BK).sum(dim=1) - along_B


LOSSES: Mapping[str, Loss] = {"softmax": softmax_losses, "sigmoid": sigmoid_losses}


def probabilities(logits_BK: Tensor, loss: str) -> Tensor:
    """(B, K): of mutually exclusive classes, or with "sigmoid" of each class independently."""
    return logits_BK.sigmoid() if loss == "sigmoid" else logits_BK.softmax(dim=1)


def _along_target(
    logits_BK: Tensor, labels_BL: Tensor, shares_BL: Tensor, smoothing: float
) -> Tensor:
    """sum_k t_k z_k, (B,). A label that appears twice counts twice."""
    along_B = (logits_BK.gather(1, labels_BL) * shares_BL).sum(dim=1)
    if smoothing:
        along_B = (1 - smoothing) * along_B + smoothing * logits_BK.mean(dim=1)
    return along_B


def target_of(rows: Mapping[str, Tensor], loss: str) -> tuple[Tensor, Tensor]:
    """Labels (B, L) and their shares of the target, for the rows of a batch (data/loader.py).

    The shares of weighted labels are weight / sum for softmax, and for sigmoid, where labels are
    independent, min(weight, 1). In a mixed row the first half of the labels are the row's own and
    the second half its partner's, with shares in the proportion of the mix.
    """
    labels_BL, shares_BL = _of_one_image(rows, "", loss)
    if "mix_ratio_B" not in rows:
        return labels_BL, shares_BL
    ratio_B1 = rows["mix_ratio_B"][:, None]
    partners_BL, theirs_BL = _of_one_image(rows, "mix_", loss)
    shares = torch.cat([ratio_B1 * shares_BL, (1 - ratio_B1) * theirs_BL], dim=1)
    return torch.cat([labels_BL, partners_BL], dim=1), shares


def _of_one_image(rows: Mapping[str, Tensor], whose: str, loss: str) -> tuple[Tensor, Tensor]:
    """`whose` is "" for the rows themselves, "mix_" for their partners."""
    if "labels_BL" not in rows:
        labels_B1 = rows[f"{whose}labels_B"][:, None]
        return labels_B1, torch.ones_like(labels_B1, dtype=torch.float32)
    labels_BL, weights_BL = rows[f"{whose}labels_BL"], rows[f"{whose}label_weights_BL"]
    if loss == "sigmoid":
        return labels_BL, weights_BL.clamp(max=1)
    return labels_BL, weights_BL / weights_BL.sum(dim=1, keepdim=True)
