"""Two-pass SAM as github.com/davda54/sam does it, with its names: first_step, second_step."""

import torch
from torch import Tensor


class TwoPassSAM:
    """Perturbs in place, remembers the weights, restores them, steps with the second gradient."""

    def __init__(self, base: torch.optim.Optimizer, rho: float, adaptive: bool) -> None:
        self.base, self.rho, self.adaptive = base, rho, adaptive
        self.old: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def first_step(self) -> None:
        scale = self.rho / (self._grad_norm() + 1e-12)
        for parameter in self._parameters():
            assert parameter.grad is not None
            self.old[parameter] = parameter.data.clone()
            shape = parameter.square() if self.adaptive else 1.0
            parameter.add_(shape * parameter.grad * scale)
        self.base.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter in self._parameters():
            parameter.data = self.old[parameter]
        self.base.step()
        self.base.zero_grad()

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"]]

    def _grad_norm(self) -> Tensor:
        norms = []
        for parameter in self._parameters():
            assert parameter.grad is not None
            scale = parameter.abs() if self.adaptive else 1.0
            norms.append((scale * parameter.grad).norm(p=2))
        return torch.norm(torch.stack(norms), p=2)
