"""SGD with Nesterov momentum, coupled weight decay and adaptive gradient clipping (AGC).

arXiv 2102.06171, section 4.1 and appendix A.1; reference: deepmind-research/nfnets at f5de0ed,
optim.py:446-499 (clipping) and 256-272 (update).
"""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nfnets_xla.optim.by_role import ByRole
from nfnets_xla.optim.guard import Guard


class SGD_AGC(ByRole):
    """Per parameter: clip the gradient, add weight decay, then a step of Nesterov momentum.

        g = agc(g);  g = g + weight_decay * w;  v = momentum * v + g
        w = w - lr * (g + momentum * v)         (w - lr * v without nesterov)

    which is `torch.optim.SGD(nesterov=True)` after the clipping.
    """

    SLOTS = ("momentum",)

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        roles: Mapping[str, str],
        *,
        lr: float | Tensor,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 2e-5,
        clipping: float | None = 0.01,
        clipping_eps: float = 1e-3,
        guard: Guard | None = None,
    ) -> None:
        """See `ByRole`."""
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; it must be in [0, 1)")
        super().__init__(
            named_parameters,
            roles,
            lr=lr,
            weight_decay=weight_decay,
            clipping=clipping,
            clipping_eps=clipping_eps,
            guard=guard,
            momentum=momentum,
            nesterov=nesterov,
        )

    def _update_fused(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        group: Mapping[str, Any],
        holds: Tensor | None,
    ) -> None:
        moving = group["momentum"] > 0
        torch._fused_sgd_(
            params,
            grads,
            [self.state[p]["momentum"] for p in params] if moving else [],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=group["nesterov"] and moving,
            maximize=False,
            is_first_step=False,
            found_inf=holds,  # if 1, the kernel changes nothing
        )

    def _after(
        self,
        parameter: Tensor,
        grad: Tensor,
        state: Sequence[Tensor],
        group: Mapping[str, Any],
        scales: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        if group["weight_decay"]:
            grad = grad + parameter * group["weight_decay"]
        moving = state[0] * group["momentum"] + grad
        update = grad + moving * group["momentum"] if group["nesterov"] else moving
        # A 0-d parameter's update times a (1,) rate is (1,).
        return parameter - (update * group["lr"]).reshape(parameter.shape), moving
