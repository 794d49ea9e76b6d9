"""Depth as a loop: a stage's identical blocks become one block with stacked parameters.

A stage is a projecting block and a tail of identical blocks. `stack` joins each parameter of the
tail's blocks along a new leading axis, and runs the tail as a loop over that axis. Under XLA the
loop is one operation, so that tracing, graph size and compilation do not grow with depth. `unstack`
is the inverse. Both forms compute the same and save the same: in both, state dicts have the names
of single blocks, `stages.2.3.conv0.weight`.

Shape suffixes: as in nfnet.py, and D blocks of a tail.
"""

# pyright: reportUnknownMemberType=false, reportPrivateUsage=false
# torch types its own signatures in part.

import re
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call  # pyright: ignore[reportUnknownVariableType]

from nfnets_xla.models.blocks import NFBlock, Recompute, Stage
from nfnets_xla.models.layers import GELU_GAIN
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.variants import Variant

# stages.2.tail.conv0.weight holds stages.2.1.conv0.weight and those of the blocks after it.
_STACKED_NAME = re.compile(r"((?:.*\.)?)tail\.(.+)")

Slices = tuple[dict[str, Tensor], dict[str, Tensor]]  # with gradient, without


class Body(Protocol):
    """One step of a loop: the next carry, from the current one and a slice of each tensor."""

    def __call__(self, carry: Tensor, slices: Slices) -> Tensor: ...


class Scan(Protocol):
    """Loops over the first axis of `stacked`, returns the last carry; `checkpoint` recomputes."""

    def __call__(
        self, body: Body, carry: Tensor, stacked: Slices, checkpoint: Recompute | None
    ) -> Tensor: ...


def loop(body: Body, carry: Tensor, stacked: Slices, checkpoint: Recompute | None) -> Tensor:
    """A plain Python loop, for devices that run operations eagerly."""
    if carry.device.type == "xla":
        raise ValueError(
            "a stacked network on an XLA device was given no scan, and its slices would compile "
            "longer than single blocks do: use stack(net, scan=xla.scan)"
        )
    learned, given = ({name: x.unbind() for name, x in part.items()} for part in stacked)
    for index in range(len(next(iter((stacked[0] | stacked[1]).values())))):
        slices = _at(learned, index), _at(given, index)
        carry = checkpoint(body, carry, slices) if checkpoint else body(carry, slices)
    return carry


def _at(unbound: Mapping[str, Sequence[Tensor]], index: int) -> dict[str, Tensor]:
    return {name: parts[index] for name, parts in unbound.items()}


class StackedBlocks(NFBlock):
    """NFBlock with a leading axis on every parameter; only StackedStage can run it."""

    is_stack = True  # tells optim/roles.py that the first axis counts blocks

    def __init__(self, variant: Variant, blocks: Sequence[NFBlock]) -> None:
        channels = blocks[0].conv2.out_channels
        with torch.device("meta"):  # all of it is replaced below
            super().__init__(variant, channels, channels, stride=1, beta=0.0)
        for name in [name for name, _ in self.named_parameters()]:
            try:
                parts = [block.get_parameter(name) for block in blocks]
            except AttributeError:  # torch.nn.utils has put something in its place
                raise ValueError(
                    f"{name!r} of a block is no parameter (pruned, or parametrised): stack first"
                ) from None
            if len({part.requires_grad for part in parts}) > 1:
                raise ValueError(
                    f"{name!r} is frozen in some blocks of a stage and not in others, and a stack "
                    "is frozen as one: freeze all but a stage's first block alike, or do not stack"
                )
            value = torch.stack([part.detach() for part in parts])
            _set_parameter(self, name, value, requires_grad=parts[0].requires_grad)
        self.betas = [block.beta for block in blocks]
        self.register_buffer("gains_D", self._gains_D(), persistent=False)

    @property
    def input_gain(self) -> Tensor:
        """The gain of one block: functional_call puts its slice in place of `gains_D`."""
        return self.gains_D

    def _gains_D(self) -> Tensor:
        gains, like = [GELU_GAIN * beta for beta in self.betas], self.skip_gain
        wide = torch.promote_types(like.dtype, torch.float32)  # as precise as in a single block
        return torch.tensor(gains, dtype=wide, device=like.device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> "StackedBlocks":
        """Recomputes `gains_D`, which a lower precision would round and `to_empty` would lose."""
        super()._apply(fn, recurse)
        self.gains_D = self._gains_D()
        return self

    def blocks(self, variant: Variant) -> list[NFBlock]:
        """The single blocks, with copies of their parameters."""
        channels = self.conv2.out_channels
        with torch.device("meta"):
            blocks = [
                NFBlock(variant, channels, channels, stride=1, beta=beta) for beta in self.betas
            ]
        for name, stacked in self.named_parameters():
            for block, part in zip(blocks, stacked.detach().unbind(), strict=True):
                _set_parameter(block, name, part.clone(), requires_grad=stacked.requires_grad)
        return blocks


def _set_parameter(module: nn.Module, name: str, value: Tensor, *, requires_grad: bool) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=requires_grad))


@dataclass(eq=False)  # a scan caches its trace by the identity of the body
class _OneBlock:
    """The body of a tail's loop: runs `tail` with the parameters of one block."""

    tail: StackedBlocks

    def __call__(self, carry: Tensor, slices: Slices) -> Tensor:
        values = slices[0] | slices[1]
        keep_B = values.pop("keep", None)
        return functional_call(self.tail, values, (carry, keep_B))


class StackedStage(Stage):
    """A stage of two parts: "0", the projecting block, and "tail", all others."""

    def __init__(self, variant: Variant, stage: Stage, scan: Scan) -> None:
        first, *others = (block for block in stage if isinstance(block, NFBlock))
        super().__init__([first])
        self.tail = StackedBlocks(variant, others)
        self.checkpoint = stage.checkpoint
        self.scan = scan
        self._body = _OneBlock(self.tail)
        self.register_state_dict_post_hook(_save)
        self.register_load_state_dict_pre_hook(_load)

    def forward(self, x_BCHW: Tensor, keep_masks_BN: Tensor | None = None) -> Tensor:
        """As Stage: N counts blocks."""
        first_B = None if keep_masks_BN is None else keep_masks_BN[:, 0]
        x_BCHW = self.run(self[0], x_BCHW, first_B)
        learned: dict[str, Tensor] = {}
        given: dict[str, Tensor] = dict(self.tail.named_buffers())
        for name, parameter in self.tail.named_parameters():
            (learned if parameter.requires_grad else given)[name] = parameter
        if keep_masks_BN is not None:
            given["keep"] = keep_masks_BN[:, 1:].t().to(x_BCHW.dtype)
        checkpoint = self.checkpoint if torch.is_grad_enabled() else None
        return self.scan(self._body, x_BCHW, (learned, given), checkpoint)


def stack(net: NFNet, *, scan: Scan = loop) -> NFNet:
    """Turn `net` into its stacked form, in place; returns it. `xla.scan` is the `scan` for XLA.

    Call it before the network moves to its device and before its optimizer is made. A tail of one
    block is not stacked. Raises ValueError if the network is stacked already, or if its blocks are
    partly frozen, have hooks or are parametrised: a stack would lose that.
    """
    for number, stage in enumerate(net.stages):
        assert isinstance(stage, Stage)
        if isinstance(stage, StackedStage):
            raise ValueError(f"stage {number} is stacked already; call unstack first")
        if len(stage) > 2:
            if any(_has_hooks(module) for block in stage[1:] for module in block.modules()):
                raise ValueError(f"a block of stage {number} has hooks: stack first")
            net.stages[number] = StackedStage(net.variant, stage, scan).train(stage.training)
    return net


def _has_hooks(module: nn.Module) -> bool:
    return any((*module._forward_hooks, *module._forward_pre_hooks, *module._backward_hooks))


def unstack(net: NFNet) -> NFNet:
    """The inverse of `stack`, in place."""
    for number, stage in enumerate(net.stages):
        if isinstance(stage, StackedStage):
            blocks = Stage([stage[0], *stage.tail.blocks(net.variant)])
            blocks.checkpoint = stage.checkpoint
            net.stages[number] = blocks
    return net


def is_stacked(net: nn.Module) -> bool:
    return any(isinstance(module, StackedStage) for module in net.modules())


def output_axes(net: nn.Module) -> dict[str, int]:
    """{parameter name: the axis that counts its outputs}, for matrices and convolutions.

    Parameters are sharded over devices along this axis: a unit of AGC then stays on one device, and
    a stack, whose loop needs one block at a time, is not cut along its blocks. Vectors are left
    out: they hold a thousandth of the weights, and each would cost a message.
    """
    axes = {name: int(bool(_STACKED_NAME.fullmatch(name))) for name, _ in net.named_parameters()}
    return {name: axis for name, axis in axes.items() if net.get_parameter(name).ndim > axis + 1}


# ---- names ------------------------------------------------------------------------------------


def per_block(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters, or tensors shaped like them, under the names of single blocks.

    Stacked tensors become views of their slices, made on the host if they are on an XLA device,
    where each slice would be a graph to compile. Tensors that are not stacked pass unchanged.
    """
    result: dict[str, Tensor] = {}
    tails: dict[str, dict[str, Tensor]] = {}
    for name, tensor in named.items():
        match = _STACKED_NAME.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            on_xla = tensor.device.type == "xla"
            tails.setdefault(match[1], {})[match[2]] = tensor.cpu() if on_xla else tensor
    for stage, leaves in tails.items():
        for place in range(len(next(iter(leaves.values())))):
            result |= {f"{stage}{place + 1}.{leaf}": value[place] for leaf, value in leaves.items()}
    return result


def as_in(net: nn.Module, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `per_block`: tensors under the names of `net`, stacked or not.

    Raises ValueError if a block of one of `net`'s stacks is missing.
    """
    result = dict(named)
    for name, stage in cast("Iterator[tuple[str, nn.Module]]", net.named_modules()):
        if isinstance(stage, StackedStage):
            for missing in _stack_names(stage, f"{name}." if name else "", result):
                raise ValueError(f"there is no {missing!r}: the tensors are of another model")
    return result


def _stack_names(stage: StackedStage, prefix: str, named: MutableMapping[str, Any]) -> list[str]:
    """Replace single blocks' tensors in `named` by stacks; returns the names that are missing."""
    missing: list[str] = []
    for leaf, own in stage.tail.named_parameters():
        names = [f"{prefix}{place + 1}.{leaf}" for place in range(len(own))]
        absent = [name for name in names if name not in named]
        missing += absent
        if not absent:
            named[f"{prefix}tail.{leaf}"] = torch.stack([named.pop(name) for name in names])
    return missing


def _save(
    stage: nn.Module, state: MutableMapping[str, Any], prefix: str, _metadata: dict[str, Any]
) -> None:
    """Unstack the tensors that `stage` has put into `state`."""
    stacked = {name: state.pop(name) for name in list(state) if name.startswith(f"{prefix}tail.")}
    state.update(per_block(stacked))


def _load(
    stage: nn.Module, state: MutableMapping[str, Any], prefix: str, *_of_no_use: object
) -> None:
    """Stack the tensors that `stage` takes from `state`; torch reports what is missing."""
    assert isinstance(stage, StackedStage)
    _stack_names(stage, prefix, state)
