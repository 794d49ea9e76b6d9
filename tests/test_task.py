"""The loss of a batch, against targets written out; top-k of samples with several labels."""

import pytest
import torch
import torch.nn.functional as F

from nfnets_xla.config import OptimConfig
from nfnets_xla.models.registry import create_network
from nfnets_xla.task import Classification, _rank, _targets

ROWS, CLASSES = 6, 11


def task(label_smoothing: float) -> Classification:
    optim = OptimConfig(
        epochs=1,
        peak_lr=0.1,
        warmup_steps=0,
        momentum=0.9,
        weight_decay=0.0,
        clipping=None,
        label_smoothing=label_smoothing,
        accumulation=1,
        sam_rho=None,
        sam_ascent_fraction=1.0,
        sam_microbatches=1,
        sam_adaptive=False,
        ema_decay=None,
    )
    net = create_network("nfnet_mini_f0", num_classes=CLASSES)
    return Classification(net, optim, total_steps=1, compute_dtype=torch.float32, fetch=dict)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixes", [False, True])
def test_the_loss_is_that_of_mixed_and_then_smoothed_targets(smoothing: float, mixes: bool) -> None:
    """As in the reference (experiment.py:230-250); rows count by weight."""
    torch.manual_seed(0)
    logits_BK = torch.randn(ROWS, CLASSES)
    own_B, other_B = torch.randint(CLASSES, (2, ROWS))
    ratio_B = torch.rand(ROWS) if mixes else torch.ones(ROWS)
    weight_B = torch.tensor([1.0, 1, 0, 1, 1, 0])
    batch = {"labels_B": own_B, "weight_B": weight_B}
    if mixes:
        batch |= {"mix_labels_B": other_B, "mix_ratio_B": ratio_B}

    own_BK, other_BK = (F.one_hot(labels_B, CLASSES).double() for labels_B in (own_B, other_B))
    targets_BK = ratio_B[:, None] * own_BK + (1 - ratio_B[:, None]) * other_BK
    targets_BK = (1 - smoothing) * targets_BK + smoothing / CLASSES
    torch.testing.assert_close(targets_BK.sum(dim=1), torch.ones(ROWS).double())
    losses_B = -(targets_BK * logits_BK.double().log_softmax(dim=1)).sum(dim=1)
    expected = losses_B[weight_B > 0].mean()
    losses_B = task(smoothing)._losses(logits_BK, batch)
    loss = (losses_B * weight_B).sum() / weight_B.sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


LOGITS = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
BATCH = {
    "labels_B": torch.tensor([4, 2, 0]),
    "labels_BL": torch.tensor([[4, 1, 4], [2, 2, 2], [0, 1, 2]]),
    "label_weights_BL": torch.tensor([[3.0, 1, 0], [1, 0, 0], [1, 1, 2]]),
}
SHARES = torch.tensor([[0, 0.25, 0, 0, 0.75], [0, 0, 1, 0, 0], [0.25, 0.25, 0.5, 0, 0]])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mixture_of_the_labels_losses(smoothing: float) -> None:
    targets_BK = _targets(BATCH, 5)
    torch.testing.assert_close(targets_BK, SHARES)
    losses = F.cross_entropy(LOGITS, targets_BK, reduction="none", label_smoothing=smoothing)
    each = torch.stack(
        [
            F.cross_entropy(
                LOGITS, torch.full((3,), k), reduction="none", label_smoothing=smoothing
            )
            for k in range(5)
        ],
        dim=1,
    )
    torch.testing.assert_close(losses, (SHARES * each).sum(dim=1))


def test_the_best_ranked_of_the_labels_counts() -> None:
    logits_BK = torch.tensor([[5.0, 4, 3, 2, 1], [5, 4, 3, 2, 1], [float("nan")] * 5])
    assert _rank(logits_BK, BATCH).tolist() == [1, 2, 5]
    alone = {"labels_B": BATCH["labels_B"]}
    assert _targets(alone, 5) is BATCH["labels_B"]
    assert _rank(logits_BK, alone).tolist() == [4, 2, 5]
