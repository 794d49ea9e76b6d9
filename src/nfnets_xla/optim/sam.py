"""Sharpness-aware minimisation (arXiv 2010.01412) around any optimizer.

One step has two passes: the first ascends from w along the gradient to w + e, |e| = rho; the second
computes the gradient there, and the update applies it to w. The ascent uses the raw gradient, with
one norm over all parameters; clipping and weight decay belong to the wrapped optimizer, which sees
only the second gradient.

Three options change e:

- the ascent may use only some of the rows (arXiv 2102.06171, A.4: a fifth of the same batch costs
  20-40 % of a step instead of 100 %). The closure does that; see `SAM.ascending`;
- `microbatches` (m-sharpness, section 4.1): each part of the batch has its own e;
- `adaptive` (ASAM, arXiv 2102.11600): e is relative to the size of each weight.
"""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false
# torch._foreach_*: as in torch's own optimizers, one call for a list of tensors.

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nfnets_xla.optim import roles as role
from nfnets_xla.optim.agc import gradient, vector_norm, wider
from nfnets_xla.optim.by_role import checked_hyperparameter

NORM_FLOOR = 1e-12  # big_vision's gsam.py: a gradient of zeros leaves the weights where they are


class SAM(torch.optim.Optimizer):
    """`SAM(SGD_AGC(...), rho=0.05)`: the wrapped optimizer's groups and state, two passes a step.

    Both objects share `param_groups` and `state`, whichever of them loads a state dict. Give
    torch.distributed.checkpoint the `base_optimizer`, since it calls `step` to make the state.
    While `step` calls its closure, `ascending` and `microbatch` say for which pass.
    """

    _step_supports_amp_scaling = True  # makes a GradScaler call `step`, which refuses it

    def __init__(
        self,
        base_optimizer: torch.optim.Optimizer,
        *,
        rho: float | Tensor,
        adaptive: bool = False,
        microbatches: int = 1,
    ) -> None:
        """`rho` is the length of the ascent step; see `set_rho`.

        With `adaptive`, e = rho * w^2 g / |w g|, elementwise, as davda54/sam has it: a weight of 0
        stays 0, and rho is about ten times larger. Raises ValueError for less than 1 microbatch.
        """
        if microbatches < 1:
            raise ValueError(f"microbatches is {microbatches}; it must be 1 (one ascent) or more")
        parameters = [p for group in base_optimizer.param_groups for p in group["params"]]
        super().__init__(parameters, {})
        self.base_optimizer = base_optimizer
        self.adaptive = adaptive
        self.microbatches = microbatches
        self.ascending = False
        self.microbatch = 0
        self._kept: list[tuple[Tensor, Tensor]] = []  # (parameter, its weight) while perturbed
        self.set_rho(rho)
        self._follow()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: torch's state has only `defaults`, `state` and `param_groups`."""
        own = (
            "base_optimizer",
            "adaptive",
            "microbatches",
            "ascending",
            "microbatch",
            "_kept",
            "rho",
        )
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow()

    def _follow(self) -> None:
        self._share_state()
        # load_state_dict replaces both containers instead of filling them.
        self.base_optimizer.register_load_state_dict_post_hook(lambda _: self._share_state())

    def _share_state(self) -> None:
        self.defaults = self.base_optimizer.defaults
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds it to the wrapped optimizer, which may refuse it."""
        if hasattr(self, "base_optimizer"):
            self.base_optimizer.add_param_group(param_group)
        else:
            super().add_param_group(param_group)

    def set_rho(self, rho: float | Tensor) -> None:
        """A float, or a `(1,)` tensor of the parameters' dtype and device (as `SGD_AGC.set_lr`).

        With 0 the step equals the wrapped optimizer's bit for bit, at twice the cost.
        """
        like = self.param_groups[0]["params"][0]
        self.rho: float | Tensor = checked_hyperparameter("rho", rho, like)

    @torch._disable_dynamo  # as ByRole's
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Call `closure` twice per microbatch, update once; returns the first, unperturbed result.

        The closure sets the gradients to zero, computes the loss, calls backward and returns the
        loss. Randomness (dropout, stochastic depth) must be the same in both calls: masks are made
        before `step`. With several microbatches the closure uses the rows of microbatch number
        `self.microbatch`, and its losses outside the ascent add up to that of the whole batch.
        """
        if hasattr(self, "found_inf"):  # a GradScaler sets it
            raise ValueError(
                "SAM.step was called by a GradScaler, which knows of one gradient and SAM has two: "
                "train in bfloat16 or float32, without a scaler"
            )
        if closure is None:
            raise ValueError(
                "SAM.step needs a closure, because it runs forward and backward twice: "
                "call step(closure), where closure() zeroes the gradients, calls backward and "
                "returns the loss (and give torch.distributed.checkpoint its base_optimizer)"
            )
        loss = None
        descent: dict[Tensor, Tensor] = {}  # gradients found at w + e, summed over microbatches
        try:
            for microbatch in range(self.microbatches):
                self.microbatch = microbatch
                first = self._ascend(closure)
                loss = first if microbatch == 0 else loss
                with torch.enable_grad():
                    closure()
                self._restore()
                self._take_gradients(descent)
        finally:
            # Also after an error or interrupt, so that a checkpoint saved then holds the weights w.
            self._restore()
            self.ascending, self.microbatch = False, 0
        for parameter, grad in descent.items():
            parameter.grad = grad
        self.base_optimizer.step()
        return loss

    def _ascend(self, closure: Callable[[], Any]) -> Any:
        """Compute a gradient, move to w + e (section 3, p = 2); one norm, in float32 or wider."""
        self.ascending = True
        with torch.enable_grad():
            loss = closure()
        self.ascending = False
        ascended = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not ascended:
            raise ValueError(
                "SAM's closure left no gradient; it must call backward() on its loss, and must not "
                "zero the gradients after it"
            )
        kept = [(parameter, parameter.clone()) for parameter in ascended]
        directions = [wider(gradient(parameter)) for parameter in ascended]
        if self.adaptive:
            directions = torch._foreach_mul(directions, [weight.abs() for _, weight in kept])
        norms = torch._foreach_norm(directions)
        if self.adaptive:
            directions = torch._foreach_mul(directions, [weight.abs() for _, weight in kept])
        # Multiplied by the reciprocal, as torch does for float / tensor: same bits for both kinds.
        norm = vector_norm(torch.stack(norms))
        scale = norm.clamp(min=NORM_FLOOR).reciprocal() * self.rho
        steps = torch._foreach_mul(directions, scale.reshape(()))
        self._kept = kept
        torch._foreach_add_(ascended, steps)
        return loss

    def _restore(self) -> None:
        """Copies w back, because (w + e) - e is not w in floating point."""
        if self._kept:
            parameters, weights = zip(*self._kept, strict=True)
            if any(role.is_dtensor(parameter) for parameter in parameters):
                for parameter, weight in self._kept:  # torch 2.9 has no rule for lists of DTensors
                    parameter.copy_(weight)
            else:
                torch._foreach_copy_(parameters, weights)
            self._kept = []

    def _take_gradients(self, total: dict[Tensor, Tensor]) -> None:
        """Move the parameters' gradients into `total`, adding to what is there."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            grad, parameter.grad = parameter.grad, None
            if grad is None:
                continue
            if parameter in total:
                total[parameter] = total[parameter] + grad
            else:  # with DDP it may view a bucket, which the next microbatch overwrites
                total[parameter] = grad.clone() if self.microbatches > 1 else grad

    @contextmanager
    @torch.no_grad()
    def unperturbed(self) -> Generator[None, None, None]:
        """Inside, the parameters are w even in the middle of a step; afterwards as before.

        For a signal handler that saves a checkpoint, and may run between the two passes.
        """
        kept = self._kept
        perturbed = [parameter.clone() for parameter, _ in kept]
        for parameter, weight in kept:
            parameter.copy_(weight)
        try:
            yield
        finally:
            for (parameter, _), value in zip(kept, perturbed, strict=True):
                parameter.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's: SAM itself keeps nothing between steps."""
        return self.base_optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.base_optimizer.load_state_dict(state_dict)
