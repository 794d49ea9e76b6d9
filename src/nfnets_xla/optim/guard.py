"""Leaves out the updates that would spoil the weights; on the device, where nobody waits for it.

An update whose loss or gradient is not finite is left out: weights, momentum and average stay as
they are, and training goes on from them with the next batch. At one more than `allowed` the guard
freezes: from then on every update is left out, so that the device keeps the state from before that
step for as long as it takes the host to come to know.

Shape suffixes: G the guard's numbers: updates left out so far; steps since it froze, that step
among them (0: it has not); then of each of the latest steps, the last of them last, whether its
loss or gradient was not finite.
"""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
# pyright: reportUntypedFunctionDecorator=false

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Guard:
    """Asked by an optimizer before it changes anything; tensors on one device, float32."""

    def __init__(
        self, device: torch.device, *, allowed: int, left_out: int = 0, memory: int = 1
    ) -> None:
        """`left_out` updates have been before; of `memory` steps it is known which were bad."""
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
        """The coming update is left out unless these, too, are finite: its losses."""
        self._watched.append(numbers.detach().sum())

    @torch.no_grad()
    def judge(self, gradients: Sequence[Tensor]) -> Tensor:
        """`holds`, for the update that these gradients would make.

        Finite means that their norm is, in the gradients' dtype, as for torch's `clip_grad_norm_`.
        """
        watched, self._watched = self._watched, []
        sums = [*_squares(gradients), *watched]
        # A dot, not a sum: XLA would copy a sum of hundreds into the update of every parameter, and
        # compile four times as long.
        each = torch.stack([number.to(sums[0]) for number in sums])
        total = torch.dot(each, torch.ones_like(each)).reshape(1)
        bad = ~(total.abs() < math.inf)  # so written, NaN is bad, too
        left_out, frozen, latest = self.numbers_G[0:1], self.numbers_G[1:2], self.numbers_G[2:]
        freezes = (frozen > 0) | (bad & (left_out >= self.allowed))
        skips = bad & ~freezes
        # Counted with numbers, not chosen by them: additions of 0 and 1 are exact.
        now = [left_out + skips, frozen + freezes, latest[1:], bad]
        self.numbers_G.copy_(torch.cat([number.to(left_out) for number in now]))
        self.holds = (bad | freezes).to(left_out)
        return self.holds


def _squares(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Of each gradient a number that is finite if its norm is."""
    if gradients[0].device.type == "xla":
        return [(gradient * gradient).sum() for gradient in gradients]
    return torch._foreach_norm([*gradients])
