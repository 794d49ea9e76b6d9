"""Exponential moving average of the weights, with TensorFlow 1's warm-up of the decay.

arXiv 2102.06171, appendix A.1; reference: deepmind-research/nfnets at f5de0ed, utils.py:73-76.
"""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
# pyright: reportUntypedFunctionDecorator=false

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from nfnets_xla.optim.agc import wide, wider
from nfnets_xla.optim.by_role import checked_hyperparameter, copies_like
from nfnets_xla.optim.roles import in_pairs


class EMA:
    """Averages of the parameters in `shadow`, float32 or wider, under the parameters' names.

    Make it after the module is on its device, and update it after each optimizer step. The module
    never holds the average; evaluate with it by

        torch.func.functional_call(module, ema.shadow, (images,))

    so that no weights have to be swapped back, even after an error.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; it must be in [0, 1)")
        self.decay = decay
        self._parameters = dict(in_pairs(named_parameters))
        if not self._parameters:
            raise ValueError("there are no parameters to average; give at least one")
        self.shadow: dict[str, Tensor] = {
            name: parameter.detach()
            .to("cpu", wide(parameter.dtype), copy=True)
            .to(parameter.device)
            for name, parameter in self._parameters.items()
        }

    @torch._disable_dynamo  # Inductor's minimum with a symbolic integer in it is 0 (torch 2.9)
    def decay_at(self, update: int) -> float:
        """The decay of update number `update`, counted from 0: 0.1 at first, rising to `decay`."""
        if update < 0:
            raise ValueError(f"update is {update}; updates are counted from 0")
        return min(self.decay, (1 + update) / (10 + update))

    @torch._disable_dynamo  # as ByRole.step; each decay would compile another graph
    @torch.no_grad()
    def update(self, decay: float | Tensor) -> None:
        """shadow += (1 - decay) * (parameter - shadow), with 1 - decay in `shadow`'s dtype.

        `decay` is a float, or a `(1,)` tensor of `shadow`'s dtype and device; the results are equal
        bit for bit, but on XLA a new value in a tensor compiles no new graph.
        """
        like = next(iter(self.shadow.values()))
        decay = checked_hyperparameter("decay", decay, like)
        if not isinstance(decay, Tensor):
            if decay > 1:
                raise ValueError(f"decay is {decay}; it must be in [0, 1]")
            decay = torch.tensor([decay], dtype=like.dtype).to(like.device)
        rest = 1 - decay
        shadows, parameters = [*self.shadow.values()], [*self._parameters.values()]
        if wide(parameters[0].dtype) != like.dtype:
            raise ValueError(
                f"the parameters are {parameters[0].dtype} and their average is {like.dtype}: "
                "convert the network first, then make its average"
            )
        if like.device.type == "cpu":  # where reading a value is free
            torch._foreach_lerp_(shadows, [wider(p) for p in parameters], float(rest))
        elif like.device.type == "cuda":
            steps = torch._foreach_sub([wider(p) for p in parameters], shadows)
            torch._foreach_mul_(steps, rest.reshape(()))
            torch._foreach_add_(shadows, steps)
        else:  # written out, for the compiler to fuse
            for shadow, parameter in zip(shadows, parameters, strict=True):
                step = rest * (wider(parameter) - shadow)
                shadow.add_(step.reshape(shadow.shape))  # 0-d shadow, (1,) step

    def load(self, averages: Mapping[str, Tensor]) -> None:
        """Replace `shadow` by copies of `averages` from any device; names and shapes must agree."""
        self.shadow = copies_like("averages", self.shadow, averages)
