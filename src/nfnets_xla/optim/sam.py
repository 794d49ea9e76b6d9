"""Sharpness-aware minimisation (arXiv 2010.01412) around any optimizer.

One step is two passes: from w along the gradient to w + rho * g / |g|, and from w again with the
gradient found there. The ascent takes the raw gradient, with one norm over all parameters;
clipping and weight decay belong to the wrapped optimizer and see the second gradient only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nfnets_xla.optim.sgd_agc import checked_hyperparameter

NORM_FLOOR = 1e-12  # big_vision's gsam.py: a gradient of zeros leaves the weights where they are


class SAM(torch.optim.Optimizer):
    """`SAM(SGD_AGC(...), rho=0.05)`: the wrapped optimizer's groups and state, two passes a step.

    Both objects show the same `param_groups` and `state`, whichever of them loads a state dict.
    """

    def __init__(self, base_optimizer: torch.optim.Optimizer, *, rho: float | Tensor) -> None:
        """`rho` is the length of the ascent step; see `set_rho`."""
        parameters = [p for group in base_optimizer.param_groups for p in group["params"]]
        super().__init__(parameters, {})
        self.base_optimizer = base_optimizer
        self._share_state()
        # load_state_dict replaces both containers instead of filling them.
        base_optimizer.register_load_state_dict_post_hook(lambda _: self._share_state())
        self.set_rho(rho)

    def _share_state(self) -> None:
        self.defaults = self.base_optimizer.defaults
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def set_rho(self, rho: float | Tensor) -> None:
        """A float, or a `(1,)` tensor of the parameters' dtype and device (as `SGD_AGC.set_lr`).

        With 0 the step is the wrapped optimizer's, bit for bit, at twice the cost.
        """
        like = self.param_groups[0]["params"][0]
        self.rho: float | Tensor = checked_hyperparameter("rho", rho, like)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call `closure` twice and update once; returns what the first, unperturbed pass returned.

        The closure sets the gradients to zero, computes the loss, calls backward and returns the
        loss. Randomness (dropout, stochastic depth) must be the same in both calls: the closure
        takes its masks as inputs. Raises ValueError without a closure, or if it leaves no gradient.
        """
        if closure is None:
            raise ValueError(
                "SAM.step needs a closure, because it runs forward and backward twice: "
                "call step(closure), where closure() zeroes the gradients, calls backward and "
                "returns the loss"
            )
        with torch.enable_grad():
            loss = closure()
        ascended = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not ascended:
            raise ValueError(
                "SAM's closure left no gradient; it must call backward() on its loss, and must not "
                "zero the gradients after it"
            )
        kept = [parameter.clone() for parameter in ascended]
        try:
            self._ascend(ascended)
            with torch.enable_grad():
                closure()
        finally:
            # Copied back, because (w + e) - e is not w in floating point; and also after an error,
            # so that a checkpoint written on the way out holds weights and not their neighbours.
            for parameter, weight in zip(ascended, kept, strict=True):
                parameter.copy_(weight)
        self.base_optimizer.step()
        return loss

    def _ascend(self, parameters: list[Tensor]) -> None:
        """w + rho * g / |g| (section 3, p = 2), one norm, in float32 or wider, over all of g."""
        grads = [parameter.grad for parameter in parameters]
        squares = torch.stack([_wide(grad).square().sum() for grad in grads if grad is not None])
        # Times the reciprocal: that is how torch divides a float, but not a tensor, by a tensor.
        scale = squares.sum().sqrt().clamp(min=NORM_FLOOR).reciprocal() * self.rho
        for parameter, grad in zip(parameters, grads, strict=True):
            assert grad is not None
            # A 0-d gradient times a (1,) scale is (1,).
            parameter.add_((grad * scale).reshape(parameter.shape))

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's: SAM itself keeps nothing between steps."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
