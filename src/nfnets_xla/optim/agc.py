"""Adaptive gradient clipping (AGC): bounds each unit's gradient norm by a share of its weight norm.

arXiv 2102.06171, section 4.1, eq. 3; reference: deepmind-research/nfnets at f5de0ed,
optim.py:446-499. The optimizers in by_role.py clip in their step; with any other optimizer, call
`agc_` before its step.

Shape suffixes: P parameters, U the units of all parameters, E the elements of all vectors.
"""

# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
# pyright: reportUnknownMemberType=false, reportUntypedFunctionDecorator=false

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from nfnets_xla.optim import roles as role

NORM_FLOOR = 1e-6  # optim.py:497: of the gradient's norm, against division by 0

vector_norm: Callable[..., Tensor] = torch.linalg.vector_norm  # pyright: ignore[reportUnknownVariableType]


@torch.no_grad()
def agc_(
    named_parameters: Iterable[tuple[str, Tensor]],
    roles: Mapping[str, str],
    *,
    clipping: float = 0.01,
    eps: float = 1e-3,
) -> dict[str, Tensor]:
    """Clip `.grad` of the parameters in place; call it between `backward` and an optimizer's step.

    `roles` come from `parameter_roles`: the classifier's weight is exempt. Returns, for every other
    parameter with a gradient, the share of its units that were clipped: 0-d, on its device, in
    float32 or wider, without synchronising. Raises ValueError for a parameter without a role, and
    for `clipping` or `eps` that are not greater than 0.

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten())
    >>> net(torch.ones(1, 3, 3, 3)).sum().mul(1e6).backward()
    >>> from nfnets_xla.optim import parameter_roles
    >>> agc_(net.named_parameters(), parameter_roles(net, classifier=None))
    {'0.weight': tensor(1.), '0.bias': tensor(1.)}
    """
    check_clipping(clipping, eps)
    shares: dict[str, Tensor] = {}
    clipped: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}  # whether stacked
    for name, parameter in role.in_pairs(named_parameters):
        role.check_whole(name, parameter)
        if name not in roles:
            raise ValueError(f"parameter {name!r} has no role; take both from one module")
        moves = parameter.grad is not None and parameter.numel() > 0
        if moves and roles[name] != role.CLASSIFIER_WEIGHT:
            clipped[roles[name].startswith(role.STACKED)][name] = parameter
    for stacked, named in clipped.items():
        for alike in by_form(named):
            params = [*alike.values()]
            grads = [gradient(parameter) for parameter in params]
            share_P = clip_together_(params, grads, clipping, eps=eps, stacked=stacked)
            shares |= dict(zip(alike, share_P.unbind(), strict=True))
    return shares


def by_form(named: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Groups of parameters with the same device and dtype, which one call can handle."""
    alike: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}
    for name, parameter in named.items():
        alike.setdefault((parameter.device, parameter.dtype), {})[name] = parameter
    return [*alike.values()]


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def check_clipping(clipping: float | None, eps: float) -> None:
    if clipping is not None and not 0 < clipping < math.inf:
        raise ValueError(
            f"clipping is {clipping}; it must be greater than 0, or None for no clipping"
        )
    if not 0 < eps < math.inf:
        raise ValueError(f"eps is {eps}; it must be greater than 0, or zeros could never move")


def clip_together_(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    clipping: float,
    *,
    eps: float,
    stacked: bool,
) -> Tensor:
    """Clip many gradients in place: all units' factors are computed in one vector.

    There is at least one gradient, and all have the same device and dtype. Returns `(P,)`, the
    shares of clipped units. For devices that run operations eagerly; where they are traced, joining
    the norms into one vector only adds copies: see `clip_adaptively`.
    """
    shapes = [unit_shape(weight.shape, stacked=stacked) for weight in weights]
    counts = [math.prod(shape) for shape in shapes]
    # Most parameters are one unit, and small: they come first, and take one call per operation.
    whole = [place for place, count in enumerate(counts) if count == 1]
    parted = [place for place, count in enumerate(counts) if count > 1]
    norm_U, weight_norm_U = (
        _norms([x[p] for p in whole], [x[p] for p in parted], stacked=stacked)
        for x in (gradients, weights)
    )
    factor_U = clip_factor(norm_U, weight_norm_U, clipping, eps)
    of_whole, *of_parted = torch.split(factor_U, [len(whole), *(counts[p] for p in parted)])
    if whole:
        _multiply_vectors_([gradients[p] for p in whole], of_whole)
    if parted:
        shaped = [
            factor.view(shapes[p] + (1,) * (gradients[p].ndim - len(shapes[p])))
            for factor, p in zip(of_parted, parted, strict=True)
        ]
        torch._foreach_mul_([gradients[p] for p in parted], shaped)
    return _shares(factor_U, [*whole, *parted], counts)


def _shares(factor_U: Tensor, places: Sequence[int], counts: Sequence[int]) -> Tensor:
    """(P,), in the order of `counts`; `places` says where each part of `factor_U` is in it."""
    clipped_U = (factor_U < 1).to(factor_U.dtype)
    lengths_P = _on(factor_U.device, *(counts[place] for place in places))
    # unsafe: checking the lengths, which are right, would synchronise with the GPU.
    share_P = torch.segment_reduce(clipped_U, "mean", lengths=lengths_P, unsafe=True)
    parts = sorted(range(len(places)), key=places.__getitem__)
    return share_P[_on(factor_U.device, *parts)]


def _on(device: torch.device, *numbers: int) -> Tensor:
    """Uploaded once, since an upload makes a GPU wait. Not cached under a dispatch mode such as
    FakeTensorMode, whose tensors cannot be used outside it, nor others inside it."""
    if _len_torch_dispatch_stack():
        return torch.tensor(numbers, device=device)
    return _uploaded(device, *numbers)


@lru_cache(maxsize=64)
def _uploaded(device: torch.device, *numbers: int) -> Tensor:
    return torch.tensor(numbers, device=device)


def _norms(whole: Sequence[Tensor], parted: Sequence[Tensor], *, stacked: bool) -> Tensor:
    """(U,): first the norms of the one-unit tensors, then those of the others' units."""
    dtype = wide((*whole, *parted)[0].dtype)
    of_whole = [torch.stack(torch._foreach_norm([*whole], dtype=dtype))] if whole else []
    of_parted = [unitwise_norm(x, stacked=stacked, keepdim=False) for x in parted]
    return torch.cat([*of_whole, *(of.flatten() if stacked else of for of in of_parted)])


def _multiply_vectors_(vectors: Sequence[Tensor], factor_P: Tensor) -> None:
    """Multiply each vector by its factor, one call per operation. Vectors are not reshaped: views
    would take half of the time."""
    lengths = [vector.numel() for vector in vectors]
    lengths_P = _on(vectors[0].device, *lengths)
    factor_E = factor_P.repeat_interleave(lengths_P, output_size=sum(lengths))
    flat = [vector if vector.ndim == 1 else vector.reshape(-1) for vector in vectors]
    products = torch.split(torch.cat(flat).mul_(factor_E), lengths)
    shaped = [
        product if vector.ndim == 1 else product.view(vector.shape)
        for product, vector in zip(products, vectors, strict=True)
    ]
    torch._foreach_copy_([*vectors], shaped)


def clip_adaptively(
    grad: Tensor, weight: Tensor, clipping: float, eps: float, *, stacked: bool = False
) -> tuple[Tensor, Tensor]:
    """Eq. 3: scale each unit of `grad` down to `clipping` times the norm of that unit of `weight`.

    Returns the clipped gradient, where units within the bound are unchanged bit for bit, and the
    units' factors.
    """
    norm = unitwise_norm(grad, stacked=stacked)
    factor = clip_factor(norm, unitwise_norm(weight, stacked=stacked), clipping, eps)
    return grad * factor, factor


def clipped_shares(factors: Sequence[Tensor]) -> Tensor:
    """(P,): the share of each parameter's factors below 1. One-unit parameters take one call."""
    if all(factor.numel() == 1 for factor in factors):
        factor_P = torch.stack([factor.reshape(()) for factor in factors])
        return (factor_P < 1).to(factor_P.dtype)
    return torch.stack([(factor < 1).to(factor.dtype).mean() for factor in factors])


def clip_factor(norm: Tensor, weight_norm: Tensor, clipping: float, eps: float) -> Tensor:
    """The factor for each unit's gradient: exactly 1 within the bound, however small it is."""
    largest = weight_norm.clamp(min=eps) * clipping
    factor = (largest / norm.clamp(min=NORM_FLOOR)).clamp(max=1)
    if clipping * eps >= NORM_FLOOR:  # with any sensible settings: no bound is below the floor
        return factor
    return torch.where(norm > largest, factor, 1.0)


def wider(x: Tensor) -> Tensor:
    """`x` in float32 or wider, as all arithmetic here."""
    return x.to(wide(x.dtype))


@cache  # promote_types is a torch operator: uncached, one call for each parameter
def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def unit_shape(shape: torch.Size, *, stacked: bool) -> tuple[int, ...]:
    """The leading axes of a parameter that count its units: () if it is one unit.

    A unit is the weights of one output: a filter of an OIHW convolution, a row of torch's (O, I)
    linear weight. A tensor with at most one axis longer than 1 is one unit (optim.py:446-459). The
    first axis of a stacked parameter counts tensors: stacked (D, C) and (D,) have D units.
    """
    own = shape[1:] if stacked else shape
    return tuple(shape[: int(stacked) + int(sum(size > 1 for size in own) > 1)])


def unitwise_norm(x: Tensor, *, stacked: bool = False, keepdim: bool = True) -> Tensor:
    """L2 norm of every unit of a parameter or gradient, in float32 or wider (float16 ends at
    65,504). With `keepdim` it broadcasts against `x`, else the summed axes are gone."""
    kept = len(unit_shape(x.shape, stacked=stacked))
    x = wider(x)
    if kept == x.ndim > 0:  # stacked scalars: an empty list of axes would mean all axes
        return x.abs()
    axes = tuple(range(kept, x.ndim))
    if x.device.type == "xla":  # there, vector_norm becomes two powers and an absolute value
        return (x * x).sum(dim=axes, keepdim=keepdim and kept > 0).sqrt()
    return vector_norm(x, dim=axes or None, keepdim=keepdim and kept > 0)
