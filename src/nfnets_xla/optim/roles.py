"""The role of each parameter in the optimizer, derived from the module tree.

Moving a module to an XLA device makes new Parameter objects without the old ones' attributes, so
roles are kept by parameter name.
"""

# pyright: reportUnknownMemberType=false
# torch types its own signatures in part.

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor, nn

CONV = "conv"  # weight of a convolution, (O, I / groups, H, W)
LINEAR = "linear"  # weight of an nn.Linear, (O, I)
VECTOR = "vector"  # gain, bias, norm scale, a table of tokens: one unit, and not decayed
SCALAR = "scalar"  # 0-d: a skip gain
CLASSIFIER_WEIGHT = "classifier_weight"
CLASSIFIER_BIAS = "classifier_bias"
ROLES = {CONV, LINEAR, VECTOR, SCALAR, CLASSIFIER_WEIGHT, CLASSIFIER_BIAS}
STACKED = "stacked "  # in front of a role: the first axis counts parameters of that role


def parameter_roles(module: nn.Module, classifier: str | None) -> dict[str, str]:
    """{name in `module.named_parameters()`: role}, in that order.

    `classifier` is the name of the nn.Linear, e.g. "head", whose weight is exempt from clipping, or
    None. Parameters of a submodule whose `is_stack` is true have one more leading axis and a role
    such as "stacked conv". Raises ValueError for a classifier that is not an nn.Linear of this
    module, and for a parameter that fits no role, such as a shard of a weight.
    """
    if classifier is not None:
        _check_classifier(module, classifier)
    stacks = tuple(
        f"{n}." for n, child in _modules(module).items() if getattr(child, "is_stack", False)
    )
    roles: dict[str, str] = {}
    for name, parameter in module.named_parameters():
        check_whole(name, parameter)
        stacked = name.startswith(stacks)
        shape = parameter.shape[1:] if stacked else parameter.shape
        roles[name] = (STACKED if stacked else "") + _role(module, name, shape, classifier)
    return roles


def checked_parameters(
    named_parameters: Iterable[tuple[str, Tensor]], roles: Mapping[str, str]
) -> dict[str, Tensor]:
    """{name: parameter}. ValueError for a parameter without a role, or not fit to optimise."""
    known = ROLES | {STACKED + name for name in ROLES}
    named: dict[str, Tensor] = {}
    names_by_id: dict[int, str] = {}
    for name, parameter in in_pairs(named_parameters):
        check_whole(name, parameter)
        if name in named:
            raise ValueError(f"parameter {name!r} is given twice; names must be unique")
        if id(parameter) in names_by_id:
            raise ValueError(
                f"parameters {names_by_id[id(parameter)]!r} and {name!r} are one tensor; give it "
                "once, as module.named_parameters() does"
            )
        if name not in roles:
            raise ValueError(
                f"roles differ in {name}: a parameter without a role; take both from one module"
            )
        if roles[name] not in known:
            raise ValueError(
                f"the role of {name!r} is {roles[name]!r}; it must be one of "
                f"{', '.join(sorted(known))}"
            )
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"parameter {name!r} is {parameter.dtype}; master weights must be torch.float32: "
                "call module.float() and cast in the forward pass instead"
            )
        named[name] = parameter
        names_by_id[id(parameter)] = name
    absent = [name for name in roles if name not in named]
    if absent:
        raise ValueError(
            f"roles differ in {absent[0]} (and {len(absent) - 1} more): no such parameter was "
            "given; to freeze a parameter give it all the same and call requires_grad_(False)"
        )
    if not named:
        raise ValueError("there are no parameters; give at least one")
    return named


def in_pairs(named_parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the pairs; ValueError for bare tensors, as `parameters()` gives."""
    for pair in named_parameters:
        if isinstance(pair, Tensor):
            raise ValueError(
                "parameters were given without names: give module.named_parameters(), not "
                "module.parameters()"
            )
        yield pair


def check_whole(name: str, parameter: Tensor) -> None:
    """ValueError for a DTensor, as `fully_shard` makes: its `shape` hides that it is a shard."""
    if is_dtensor(parameter):
        raise _cut(f"parameter {name!r} is a DTensor, a shard of the whole")


def is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "placements")  # importing DTensor takes a second


def _cut(what: str) -> ValueError:
    return ValueError(
        f"{what}: it is sharded or flattened, e.g. by FSDP; take the roles of the whole network, "
        "and leave its parameters whole"
    )


def _modules(module: nn.Module) -> dict[str, nn.Module]:
    return dict(cast("Iterator[tuple[str, nn.Module]]", module.named_modules()))


def _check_classifier(module: nn.Module, classifier: str) -> None:
    named = _modules(module)
    if not isinstance(named.get(classifier), nn.Linear):
        there = f"has no submodule {classifier!r}"
        if classifier in named:
            there = f"has a {type(named[classifier]).__name__} there"
        linears = [name for name, child in named.items() if isinstance(child, nn.Linear)]
        raise ValueError(
            f"classifier is {classifier!r}, but {type(module).__name__} {there}; name an nn.Linear "
            f"(its last is {linears[-1] if linears else None!r}), or None if it has no classifier"
        )


def _role(module: nn.Module, name: str, shape: torch.Size, classifier: str | None) -> str:
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    axes = {nn.Conv2d: 4, nn.Linear: 2}
    for layer, needed in axes.items():
        if isinstance(owner, layer) and leaf == "weight" and len(shape) < needed:
            raise _cut(
                f"parameter {name!r} of a {type(owner).__name__} has shape {tuple(shape)}, where "
                f"{needed} axes are needed to tell its units"
            )
    if owner_name == classifier and leaf in ("weight", "bias"):
        return CLASSIFIER_WEIGHT if leaf == "weight" else CLASSIFIER_BIAS
    if isinstance(owner, nn.Conv2d) and leaf == "weight":
        return CONV
    if isinstance(owner, nn.Linear) and leaf == "weight":
        return LINEAR
    if not shape:
        return SCALAR
    # optim.py:446-459 of the reference squeezes, so a (C, 1, 1, 1) gain is a vector, too.
    if sum(size > 1 for size in shape) <= 1:
        return VECTOR
    # (1, tokens, C): a ViT's positions, tokens or queries, which have no output axis either.
    if len(shape) == 3 and shape[0] == 1:
        return VECTOR
    raise ValueError(
        f"parameter {name!r} belongs to a {type(owner).__name__}, shape {tuple(shape)}; "
        "only weights of nn.Conv2d and nn.Linear may have several axes, because nothing tells "
        "which axis of another is the output's: use those layers, or give SGD_AGC your own roles"
    )
