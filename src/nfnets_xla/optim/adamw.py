"""AdamW, with adaptive gradient clipping or without: for networks that SGD trains badly.

Loshchilov and Hutter, arXiv 1711.05101, algorithm 2. NFNets are trained with SGD (sgd_agc.py):
Adam did worse on them. ViTs were trained with Adafactor with momentum (arXiv 2106.04560, section
3), which is closer to AdamW than to SGD.
"""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
# pyright: reportUntypedFunctionDecorator=false

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nfnets_xla.optim.by_role import ByRole
from nfnets_xla.optim.guard import Guard


class AdamW_AGC(ByRole):
    """Per parameter: clip the gradient, then a step of AdamW.

        g = agc(g);  m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g^2
        w = w - lr * weight_decay * w
        w = w - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    which is `torch.optim.AdamW` after the clipping. t counts the updates made: not those that the
    guard skips, nor steps without gradients. All parameters share one t, while torch keeps one for
    each: here a parameter that is unfrozen late moves about 3 times as far at first.
    """

    SLOTS = ("first_moment", "second_moment")
    ONCE = ("updates",)

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        roles: Mapping[str, str],
        *,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        clipping: float | None = None,
        clipping_eps: float = 1e-3,
        guard: Guard | None = None,
    ) -> None:
        """See `ByRole`."""
        for name, beta in zip(("beta1", "beta2"), betas, strict=True):
            if not 0 <= beta < 1:
                raise ValueError(f"{name} is {beta}; it must be in [0, 1)")
        if not 0 < eps < math.inf:
            raise ValueError(f"eps is {eps}; it must be greater than 0")
        super().__init__(
            named_parameters,
            roles,
            lr=lr,
            weight_decay=weight_decay,
            clipping=clipping,
            clipping_eps=clipping_eps,
            guard=guard,
            betas=betas,
            eps=eps,
        )
        self._set_updates(0)

    @property
    def updates_1(self) -> Tensor:
        return self.state[self._first]["updates"]

    def _set_updates(self, updates: float) -> None:
        # float32, as torch's kernels need it: exact up to 16.7 million updates.
        count_1 = torch.full((1,), float(updates))
        self.state[self._first]["updates"] = count_1.to(self._first.device)

    def _count(self, holds: Tensor | None) -> None:
        made = torch.ones_like(self.updates_1) if holds is None else 1 - holds
        self.updates_1.copy_(self.updates_1 + made)

    def _update_fused(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        group: Mapping[str, Any],
        holds: Tensor | None,
    ) -> None:
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            params,
            grads,
            [self.state[p]["first_moment"] for p in params],
            [self.state[p]["second_moment"] for p in params],
            [],
            [self.updates_1.reshape(())] * len(params),
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=holds,  # if 1, the kernel changes nothing
        )

    def _scales(self, group: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """1 - beta^t for both betas, 0-d, without cancellation.

        Never 0, even if t is 0: an update that the guard skips is computed, though not used.
        """
        tiny = torch.finfo(self.updates_1.dtype).tiny
        logs = (math.log(max(beta, tiny)) for beta in group["betas"])
        powers = (torch.expm1(self.updates_1 * log).reshape(()) for log in logs)
        return tuple(-power.clamp(max=-tiny) for power in powers)

    def _after(
        self,
        parameter: Tensor,
        grad: Tensor,
        state: Sequence[Tensor],
        group: Mapping[str, Any],
        scales: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        beta1, beta2 = group["betas"]
        first = state[0] * beta1 + grad * (1 - beta1)
        second = state[1] * beta2 + grad * grad * (1 - beta2)
        of_first, of_second = scales
        update = first / of_first / ((second / of_second).sqrt() + group["eps"])
        if group["weight_decay"]:
            update = update + parameter * group["weight_decay"]
        # A 0-d parameter's update times a (1,) rate is (1,).
        return parameter - (update * group["lr"]).reshape(parameter.shape), first, second

    def load_slots(self, slots: Mapping[str, Mapping[str, Tensor]], *, updates: int) -> None:
        super().load_slots(slots, updates=updates)
        self._set_updates(updates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # A copy, in float32: torch keeps the given tensor, cast to the weights' dtype.
        self.state[self._first]["updates"] = self.updates_1.to(torch.float32, copy=True)
