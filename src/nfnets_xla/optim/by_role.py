"""The base class of our optimizers: groups by role, clipping in the step, no host syncs.

Groups: deepmind-research/nfnets at f5de0ed, experiment_nfnets.py:101-129.

Clipping is part of the step, not a hook before it, because SAM's ascent needs the raw gradient. The
whole step runs on the device: the host branches on no tensor's value, and settings that change
between steps may be tensors.

On a CPU or GPU a step is horizontally fused: few calls, each for many parameters, then torch's
fused kernel. Under XLA it is written out parameter by parameter, for the compiler to fuse.
"""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
# pyright: reportUntypedFunctionDecorator=false

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any, ClassVar

import torch
from torch import Tensor

from nfnets_xla.optim import roles as role
from nfnets_xla.optim.agc import (
    by_form,
    check_clipping,
    clip_adaptively,
    clip_together_,
    clipped_shares,
    gradient,
    unit_shape,
)
from nfnets_xla.optim.guard import Guard

# (roles, decayed, clipped), experiment_nfnets.py:107-129. The classifier's bias is clipped: only
# its weight is exempt.
GROUPS: tuple[tuple[tuple[str, ...], bool, bool], ...] = (
    ((role.CONV, role.LINEAR), True, True),
    ((role.VECTOR, role.SCALAR, role.CLASSIFIER_BIAS), False, True),
    ((role.CLASSIFIER_WEIGHT,), True, False),
)


FUSED_ON = ("cpu", "cuda")  # where torch has fused optimizer kernels


class ByRole(torch.optim.Optimizer):
    """An optimizer whose parameter groups follow from the roles of its parameters.

    Each row of GROUPS makes up to two groups, one of plain and one of stacked parameters. Where a
    row exempts them, "weight_decay" is 0 or "clipping" is None.

    After a step `clipped_P` holds, for each parameter in `clipped_names`, the share of its units
    that were clipped: a tensor on the device, not synchronised.

    A new optimizer needs SLOTS, `_update_fused`, `_after` and a constructor that takes `momentum`
    or, if it has a beta2, `betas`. Recipes can name it after a line in choice.py and one in
    OPTIMIZERS of config.py, which lists what else it is given; what no optimizer had before is also
    a field of OptimConfig, and null in conf/optim. A line in SETTINGS of tests/optim/network.py,
    and one in TOLERANCE of test_xla.py, bring the tests that every optimizer has to pass.
    """

    SLOTS: ClassVar[tuple[str, ...]]  # state kept per parameter, in the parameter's shape
    ONCE: ClassVar[tuple[str, ...]] = ()  # state kept once, with that of the first parameter

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, Tensor]],
        roles: Mapping[str, str],
        *,
        lr: float | Tensor,
        weight_decay: float,
        clipping: float | None,
        clipping_eps: float,
        guard: Guard | None,
        **own: Any,
    ) -> None:
        """`named_parameters` are on their device already; `roles` come from `parameter_roles`.

        Parameters and all arithmetic are float32 (or float64).

        `clipping` is the largest ratio of a unit's gradient norm to its weight norm, or None for no
        clipping; `clipping_eps` is a floor of the weight norm, so that zeros (a new skip gain) can
        move. For `lr` see `set_lr`. The `guard` decides whether each update is made. `own` are
        further entries of every group.
        """
        if not 0 <= weight_decay < math.inf:
            raise ValueError(f"weight_decay is {weight_decay}; it must be 0 (none) or more")
        check_clipping(clipping, clipping_eps)
        named = role.checked_parameters(named_parameters, roles)
        groups: list[dict[str, Any]] = []
        for (members, decayed, clipped), stacked in product(GROUPS, (False, True)):
            wanted = [role.STACKED + member if stacked else member for member in members]
            params = [(name, p) for name, p in named.items() if roles[name] in wanted]
            if params:
                groups.append(
                    {
                        "params": params,
                        "weight_decay": weight_decay if decayed else 0.0,
                        "clipping": clipping if clipped else None,
                        "stacked": stacked,
                    }
                )
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "clipping": clipping,
            "clipping_eps": clipping_eps,
            "stacked": False,
        }
        super().__init__(groups, defaults | own)
        self.set_lr(lr)
        # State is made here, not in the first step: on XLA a step that makes its buffers is another
        # graph than the next, compiled separately. It has the parameter's memory layout. The order
        # is that of load_slots: a graph returns its results in the order in which tensors were
        # made, so with another order a resumed run would miss its program in the cache.
        for slot in self.SLOTS:
            for _, parameter in self._named():
                zeros = torch.zeros_like(parameter.detach(), device="cpu")
                self.state[parameter][slot] = zeros.to(parameter.device)
        self.clipped_P: Tensor | None = None
        self.clipped_names: list[str] = []
        self.guard = guard

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: torch's state lacks our attributes. Hooks are not copied."""
        own = ("guard", "clipped_P", "clipped_names")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def set_lr(self, lr: float | Tensor) -> None:
        """Learning rate of the following steps, for all groups.

        A float, or a `(1,)` tensor of the parameters' dtype and device. On XLA a rate that changes
        should be the tensor: a float (or 0-d tensor) that is exactly 0 or 1 compiles another graph.
        """
        lr = checked_hyperparameter("lr", lr, self._first)
        for group in self.param_groups:
            group["lr"] = lr

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Only for the constructor; a later call is a ValueError."""
        if hasattr(self, "clipped_names"):
            raise ValueError(
                f"the groups of {type(self).__name__} follow from its parameters' roles, and none "
                "can be added: make a new optimizer with all parameters, frozen ones too"
            )
        super().add_param_group(param_group)

    @torch._disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update. A `closure` is called first, with gradients enabled; returns its result.

        torch.compile does not trace into it, and compiles the code around it.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        names: list[str] = []
        shares: list[Tensor] = []
        gradients = self._gradients()
        holds = self.guard.judge(gradients) if self.guard is not None and gradients else None
        if gradients:
            self._count(holds)
        for group in self.param_groups:
            named = dict(zip(group["param_names"], group["params"], strict=True))
            # No gradient: frozen or unused. Skipped, since decay and momentum alone would move it.
            moved = {n: p for n, p in named.items() if p.grad is not None and p.numel()}
            for alike in by_form(moved):
                fused = next(iter(alike.values())).device.type in FUSED_ON
                clip_and_update = (
                    self._clip_and_update_fused if fused else self._clip_and_update_apart
                )
                share_P = clip_and_update(alike, group, holds)
                if share_P is not None:
                    names += alike
                    shares.append(share_P)
        self.clipped_names = names
        self.clipped_P = torch.cat([share.to(shares[0]) for share in shares]) if shares else None
        return loss

    def _gradients(self) -> list[Tensor]:
        params = (parameter for group in self.param_groups for parameter in group["params"])
        return [gradient(parameter) for parameter in params if parameter.grad is not None]

    def _count(self, holds: Tensor | None) -> None:
        """Called once per update, before the groups; `holds` is 1 if it is skipped, else 0."""

    def _clip_and_update_fused(
        self, named: Mapping[str, Tensor], group: Mapping[str, Any], holds: Tensor | None
    ) -> Tensor | None:
        """For parameters of one device and dtype, together. Clips the gradients in place."""
        params = [*named.values()]
        self._check_dtype(*next(iter(named.items())))
        # The kernel ignores strides: gradient and state must have their parameter's memory layout,
        # even if the state was saved in another, or the network has been converted since.
        grads = [_laid_out_like(p, gradient(p)) for p in params]
        for parameter, slot in product(params, self.SLOTS):
            state = self.state[parameter]
            state[slot] = _laid_out_like(parameter, state[slot])
        share_P = None
        if group["clipping"] is not None:
            form = {"stacked": group["stacked"], "eps": group["clipping_eps"]}
            share_P = clip_together_(params, grads, group["clipping"], **form)
        self._update_fused(params, grads, group, holds)
        return share_P

    def _check_dtype(self, name: str, parameter: Tensor) -> None:
        made = self.state[parameter][self.SLOTS[0]].dtype
        if parameter.dtype != made:
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype} and was {made} when its "
                f"{type(self).__name__} was made: convert the network first, then make this"
            )

    @abstractmethod
    def _update_fused(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        group: Mapping[str, Any],
        holds: Tensor | None,
    ) -> None:
        """By a fused kernel of torch. Gradients are clipped; if `holds` is 1, nothing changes."""

    def _clip_and_update_apart(
        self, named: Mapping[str, Tensor], group: Mapping[str, Any], holds: Tensor | None
    ) -> Tensor | None:
        """One parameter after the other, for a compiler that fuses what it sees."""
        factors: list[Tensor] = []
        held = None if holds is None else holds.reshape(()) > 0
        scales = self._scales(group)
        for parameter in named.values():
            grad = gradient(parameter)
            if group["clipping"] is not None:
                form = {"stacked": group["stacked"], "eps": group["clipping_eps"]}
                grad, factor = clip_adaptively(grad, parameter, group["clipping"], **form)
                factors.append(factor)
            state = [self.state[parameter][slot] for slot in self.SLOTS]
            after = self._after(parameter, grad, state, group, scales)
            for tensor, result in zip([parameter, *state], after, strict=True):
                # where, not multiplication: NaN times 0 is NaN.
                tensor.copy_(result if held is None else torch.where(held, tensor, result))
        return clipped_shares(factors) if factors else None

    def _scales(self, group: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """What `_after` needs for every parameter alike, so that it is traced once."""
        del group
        return ()

    @abstractmethod
    def _after(
        self,
        parameter: Tensor,
        grad: Tensor,
        state: Sequence[Tensor],
        group: Mapping[str, Any],
        scales: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:
        """The new parameter and its new slots, as new tensors; `grad` is clipped already."""

    def units(self) -> dict[str, int]:
        """{parameter name: the number of its units}."""
        return {
            name: math.prod(unit_shape(parameter.shape, stacked=group["stacked"]))
            for group in self.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
        }

    def slots(self) -> dict[str, dict[str, Tensor]]:
        """{slot: {parameter name: tensor}}: the optimizer's own tensors, not copies."""
        return {
            slot: {name: self.state[parameter][slot] for name, parameter in self._named()}
            for slot in self.SLOTS
        }

    def load_slots(self, slots: Mapping[str, Mapping[str, Tensor]], *, updates: int) -> None:
        """Replace the state by copies of `slots`, which may be on any device, after `updates`.

        Names and shapes must agree (ValueError).
        """
        del updates
        if sorted(slots) != sorted(self.SLOTS):
            raise ValueError(
                f"an optimizer that keeps {', '.join(self.SLOTS)} was given "
                f"{', '.join(slots) or 'nothing'}: state of another optimizer"
            )
        own = self.slots()
        copies = {slot: copies_like(slot, own[slot], slots[slot]) for slot in self.SLOTS}
        for name, parameter in self._named():
            for slot in self.SLOTS:
                self.state[parameter][slot] = copies[slot][name]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's. ValueError for a state that lacks what this optimizer needs, or is of another
        model. Frozen parameters that torch.distributed.checkpoint left out keep their state.
        """
        # A scheduler adds its own keys to the groups, and a copy has some in its defaults.
        needed = self.param_groups[0].keys() & {"params", *self.defaults}
        kept: dict[int, Mapping[str, Any]] = {**state_dict["state"]}
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        first, named = next(iter(numbers), None), self._named()
        if len(numbers) == len(named):  # else torch raises below
            for number, (name, parameter) in zip(numbers, named, strict=True):
                if number not in kept and not parameter.requires_grad:
                    own = self.state[parameter]
                    kept[number] = {slot: own[slot] for slot in self.SLOTS}
                for slot in self.SLOTS:
                    check_shape(slot, name, parameter, kept.get(number, {}).get(slot, parameter))
        for group in state_dict["param_groups"]:
            missing = sorted(needed - group.keys())
            for parameter in group["params"]:
                wanted = self.SLOTS + (self.ONCE if parameter == first else ())
                missing += [name for name in wanted if name not in kept.get(parameter, {})]
            if missing:
                raise ValueError(
                    f"the state has no {missing[0]!r}, which {type(self).__name__} needs: it is of "
                    f"another optimizer; give what {type(self).__name__}.state_dict() returned"
                )
        super().load_state_dict({**state_dict, "state": kept})

    @property
    def _first(self) -> Tensor:
        return self.param_groups[0]["params"][0]

    def _named(self) -> list[tuple[str, Tensor]]:
        return [
            pair
            for group in self.param_groups
            for pair in zip(group["param_names"], group["params"], strict=True)
        ]


def _laid_out_like(parameter: Tensor, x: Tensor) -> Tensor:
    """`x`, copied if its strides are not the parameter's."""
    if x.stride() == parameter.stride():
        return x
    return torch.empty_like(parameter.detach()).copy_(x)


def checked_hyperparameter(name: str, value: float | Tensor, like: Tensor) -> Any:
    """`value`, if it is a float >= 0, or a `(1,)` tensor (not read) of `like`'s dtype and device.

    Raises ValueError otherwise. For settings that may change between steps: the learning rate here,
    rho in sam.py, the decay in ema.py.
    """
    if not isinstance(value, Tensor):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} is {value}; it must be 0 or more, and finite")
        return value
    if value.shape != (1,) or value.dtype != like.dtype or value.device != like.device:
        raise ValueError(
            f"{name} is a tensor of shape {tuple(value.shape)}, {value.dtype}, on {value.device}; "
            f"it must be a float, or of shape (1,), {like.dtype}, on {like.device} like the "
            "parameters: a slice [i:i + 1] of a vector uploaded once per step"
        )
    return value


def check_shape(what: str, name: str, own: Tensor, source: Tensor) -> None:
    """ValueError if they differ: torch accepts any, and its fused kernels write out of bounds."""
    if source.shape != own.shape:
        raise ValueError(
            f"{what} of another model: that of {name!r} has shape {tuple(source.shape)}, the "
            f"parameter here {tuple(own.shape)}"
        )


def copies_like(
    what: str, own: Mapping[str, Tensor], source: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Copies of `source` that replace `own`; names and shapes must agree (ValueError).

    New tensors, not copies into those of `own`: on XLA, writing a 0-d host tensor into one on the
    device compiles a graph.
    """
    for name in sorted(own.keys() ^ source.keys()):
        problem = "is missing" if name in own else "has no parameter"
        raise ValueError(f"{what} of another model: that of {name!r} {problem} here")
    for name, tensor in own.items():
        check_shape(what, name, tensor, source[name])
    return {
        name: source[name].detach().to("cpu", tensor.dtype, copy=True).to(tensor.device)
        for name, tensor in own.items()
    }
