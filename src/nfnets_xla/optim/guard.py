"""Skips the updates that would spoil the weights, on the device and without synchronising.

An update whose loss or gradient is not finite is skipped: weights, momentum and average do not
change, and training continues with the next batch. At the first one beyond `allowed` the guard
freezes: it skips every update from then on, so that the device keeps the state from before that
step until the host learns of it.

Shape suffixes: G the guard's numbers: updates skipped so far; steps since it froze, including the
one at which it did (0: not frozen); then for each of the latest steps, oldest first, 1 if its loss
or gradient was not finite, else 0.
"""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
# pyright: reportUntypedFunctionDecorator=false

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Guard:
    """An optimizer asks it before each update. Its tensors are float32, on one device."""

    def __init__(
        self, device: torch.device, *, allowed: int, left_out: int = 0, memory: int = 1
    ) -> None:
        """`left_out` updates were skipped before; the last `memory` steps are remembered."""
        if allowed < 0:
            raise ValueError(f"allowed is {allowed}; it must be 0 (freeze at the first) or more")
        if memory < 1:
            raise ValueError(f"memory is {memory}; it must be 1 step or more")
        self.allowed = allowed
        numbers = torch.zeros(2 + memory)
        numbers[0] = left_out
        self.numbers_G = numbers.to(device)
        self.holds: Tensor | None = None  # (1,): 1 if the latest update was left out, else 0
        self._watched: list[Tensor] = []

    def watch(self, numbers: Tensor) -> None:
        """Skip the next update also if these numbers, its losses, are not all finite."""
        self._watched.append(numbers.detach().sum())

    @torch.no_grad()
    def judge(self, gradients: Sequence[Tensor]) -> Tensor:
        """`holds` for the update with these gradients.

        Gradients are finite if their norm is, in their dtype, as in torch's `clip_grad_norm_`.
        """
        watched, self._watched = self._watched, []
        sums = [*_squares(gradients), *watched]
        # A dot product: XLA would duplicate a sum of hundreds of terms in every parameter's update,
        # and take four times as long to compile.
        each = torch.stack([number.to(sums[0]) for number in sums])
        total = torch.dot(each, torch.ones_like(each)).reshape(1)
        bad = ~(total.abs() < math.inf)  # negated, so that NaN is bad, too
        left_out, frozen, latest = self.numbers_G[0:1], self.numbers_G[1:2], self.numbers_G[2:]
        freezes = (frozen > 0) | (bad & (left_out >= self.allowed))
        skips = bad & ~freezes
        # Adds booleans instead of selecting with them: adding 0 or 1 is exact.
        now = [left_out + skips, frozen + freezes, latest[1:], bad]
        self.numbers_G.copy_(torch.cat([number.to(left_out) for number in now]))
        self.holds = (bad | freezes).to(left_out)
        return self.holds


def _squares(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """For each gradient, a number that is finite if the gradient's norm is."""
    if gradients[0].device.type == "xla":
        return [(gradient * gradient).sum() for gradient in gradients]
    return torch._foreach_norm([*gradients])
