"""Losses without dense targets, against dense targets in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nfnets_xla.losses import LOSSES, target_of

ROWS, CLASSES = 6, 11


def rows(*, several: bool, mixes: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}
    for whose in ("", "mix_"):
        # Distinct within a row, except the last, which repeats the heaviest with weight 0.
        order_BK = torch.rand(ROWS, CLASSES, generator=generator).argsort(dim=1)
        found[f"{whose}labels_B"] = order_BK[:, 0]
        if several:
            found[f"{whose}labels_BL"] = torch.cat([order_BK[:, :3], order_BK[:, :1]], dim=1)
            weights_B3 = 1.4 * torch.rand(ROWS, 3, generator=generator)
            found[f"{whose}label_weights_BL"] = torch.cat([weights_B3, torch.zeros(ROWS, 1)], dim=1)
    if mixes:
        found["mix_ratio_B"] = torch.rand(ROWS, generator=generator)
    return found


def written_out(given: dict[str, Tensor], loss: str, whose: str) -> Tensor:
    target_BK = torch.zeros(ROWS, CLASSES, dtype=torch.float64)
    for row in range(ROWS):
        if "labels_BL" not in given:
            target_BK[row, given[f"{whose}labels_B"][row]] = 1
            continue
        weights_L = given[f"{whose}label_weights_BL"][row].double()
        weights_L = weights_L.clamp(max=1) if loss == "sigmoid" else weights_L / weights_L.sum()
        for label, weight in zip(given[f"{whose}labels_BL"][row], weights_L, strict=True):
            target_BK[row, label] += weight
    return target_BK


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_losses_and_gradients_are_those_of_the_target_written_out(
    loss: str, several: bool, mixes: bool, smoothing: float
) -> None:
    """Mixed, then smoothed (experiment.py:230-250 of the reference)."""
    given = rows(several=several, mixes=mixes)
    logits_BK = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1)) * 4
    logits_BK.requires_grad_()
    losses_B = LOSSES[loss](logits_BK, *target_of(given, loss), smoothing)
    losses_B.sum().backward()

    twin_BK = logits_BK.detach().double().requires_grad_()
    target_BK = written_out(given, loss, "")
    if mixes:
        ratio_B1 = given["mix_ratio_B"].double()[:, None]
        target_BK = ratio_B1 * target_BK + (1 - ratio_B1) * written_out(given, loss, "mix_")
    target_BK = (1 - smoothing) * target_BK + smoothing / CLASSES
    if loss == "softmax":
        expected_B = -(target_BK * twin_BK.log_softmax(dim=1)).sum(dim=1)
    else:
        each = F.binary_cross_entropy_with_logits(twin_BK, target_BK, reduction="none")
        expected_B = each.sum(dim=1)
    expected_B.sum().backward()
    torch.testing.assert_close(losses_B.double(), expected_B, rtol=1e-5, atol=1e-5)
    assert logits_BK.grad is not None
    assert twin_BK.grad is not None
    torch.testing.assert_close(logits_BK.grad.double(), twin_BK.grad, rtol=1e-5, atol=1e-6)


class Largest(TorchDispatchMode):
    """The size in bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.numel() * leaf.element_size())
        return result


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_30_000_classes_need_nothing_larger_than_the_logits(loss: str) -> None:
    given = rows(several=True, mixes=True)
    logits_BK = torch.randn(ROWS, 30_000, requires_grad=True)
    with Largest() as largest:
        LOSSES[loss](logits_BK, *target_of(given, loss), 0.1).mean().backward()
    assert largest.bytes == logits_BK.numel() * 4
    with Largest() as dense:  # what a dense target in float64 would count
        F.one_hot(given["labels_B"], 30_000)
    assert dense.bytes == 2 * largest.bytes


def test_extreme_logits_stay_finite() -> None:
    logits_BK = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    labels_B1, shares_B1 = torch.tensor([[1]]), torch.ones(1, 1)
    for loss in LOSSES.values():
        value = loss(logits_BK, labels_B1, shares_B1, 0.1)
        value.sum().backward()
        assert bool(value.isfinite().all())
        assert logits_BK.grad is not None
        assert bool(logits_BK.grad.isfinite().all())


def test_a_bias_of_minus_10_starts_the_sigmoid_loss_near_its_labels_alone() -> None:
    """30,000 classes at p = 4.5e-5: 10 from the one label and 1.4 from all others; at bias 0:
    20,794."""
    labels_B1, shares_B1 = torch.tensor([[7]]), torch.ones(1, 1)
    biased = LOSSES["sigmoid"](torch.full((1, 30_000), -10.0), labels_B1, shares_B1, 0.0)
    plain = LOSSES["sigmoid"](torch.zeros(1, 30_000), labels_B1, shares_B1, 0.0)
    torch.testing.assert_close(biased, torch.tensor([11.362]), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(plain, torch.tensor([20794.4]), rtol=1e-4, atol=0.0)
