"""Adaptive gradient clipping (AGC): every unit's gradient to at most a share of its weight's norm.

arXiv 2102.06171, section 4.1, eq. 3; reference: deepmind-research/nfnets at f5de0ed,
optim.py:446-499. by_role.py has it in its optimizers' step; `agc_` does it before any other's.

Shape suffixes: P parameters, U units of all of them, one after the other.
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

NORM_FLOOR = 1e-6  # optim.py:497: under the gradient's norm, against dividing by 0

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

    `roles` are `parameter_roles`' of them: the classifier's weight is exempt. Returns for every
    parameter that was looked at the share of its units that were clipped, 0-d, on its device, in
    float32 or wider, as norms are; nothing waits for it. Raises ValueError for a parameter without
    a role, and for `clipping` or `eps` that are not greater than 0.

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
    """Parameters that can be treated together: those of one device and one dtype."""
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
    """Clip many gradients in place: all units' factors come from one vector of norms.

    Of one device and dtype, and at least one. Returns `(P,)`, the shares of clipped units. For
    devices that run operation after operation. Where they are traced, the one vector would only be
    gathered from wherever its parts lie: see `clip_adaptively`.
    """
    shapes = [unit_shape(weight.shape, stacked=stacked) for weight in weights]
    counts = [math.prod(shape) for shape in shapes]
    # Those of one unit are the most, and small: they come first, and are treated in one call each.
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
    """(P,), in the order of `counts`; `places` are those of the parts of `factor_U`."""
    clipped_U = (factor_U < 1).to(factor_U.dtype)
    lengths_P = _on(factor_U.device, *(counts[place] for place in places))
    # Unchecked, or a GPU is waited for: the lengths are right.
    share_P = torch.segment_reduce(clipped_U, "mean", lengths=lengths_P, unsafe=True)
    parts = sorted(range(len(places)), key=places.__getitem__)
    return share_P[_on(factor_U.device, *parts)]


def _on(device: torch.device, *numbers: int) -> Tensor:
    """Uploaded once, since a GPU waits for numbers from the host; but what is made under a mode,
    such as FakeTensorMode, is of no use outside it, nor the reverse."""
    if _len_torch_dispatch_stack():
        return torch.tensor(numbers, device=device)
    return _uploaded(device, *numbers)


@lru_cache(maxsize=64)
def _uploaded(device: torch.device, *numbers: int) -> Tensor:
    return torch.tensor(numbers, device=device)


def _norms(whole: Sequence[Tensor], parted: Sequence[Tensor], *, stacked: bool) -> Tensor:
    """(U,): of tensors that are one unit each, and then of all units of the others."""
    dtype = wide((*whole, *parted)[0].dtype)
    of_whole = [torch.stack(torch._foreach_norm([*whole], dtype=dtype))] if whole else []
    of_parted = [unitwise_norm(x, stacked=stacked, keepdim=False) for x in parted]
    return torch.cat([*of_whole, *(of.flatten() if stacked else of for of in of_parted)])


def _multiply_vectors_(vectors: Sequence[Tensor], factor_P: Tensor) -> None:
    """Each by its own factor, in as few calls as there are steps. Views of views of vectors would
    be half of the time, so that none is made."""
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

    Returns the clipped gradient, in which units within the bound are as before, bit for bit, and
    the units' factors.
    """
    norm = unitwise_norm(grad, stacked=stacked)
    factor = clip_factor(norm, unitwise_norm(weight, stacked=stacked), clipping, eps)
    return grad * factor, factor


def clipped_shares(factors: Sequence[Tensor]) -> Tensor:
    """(P,): of each parameter's factors, the share that clips. Vectors are asked all at once."""
    if all(factor.numel() == 1 for factor in factors):
        factor_P = torch.stack([factor.reshape(()) for factor in factors])
        return (factor_P < 1).to(factor_P.dtype)
    return torch.stack([(factor < 1).to(factor.dtype).mean() for factor in factors])


def clip_factor(norm: Tensor, weight_norm: Tensor, clipping: float, eps: float) -> Tensor:
    """What to multiply units of gradients with: exactly 1 within the bound, however small."""
    largest = weight_norm.clamp(min=eps) * clipping
    factor = (largest / norm.clamp(min=NORM_FLOOR)).clamp(max=1)
    if clipping * eps >= NORM_FLOOR:  # as anywhere sensible: no bound is below the floor
        return factor
    return torch.where(norm > largest, factor, 1.0)


def wider(x: Tensor) -> Tensor:
    """In float32 or wider, as all arithmetic is."""
    return x.to(wide(x.dtype))


@cache  # torch's own is an operator, of which there would be one for each parameter
def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def unit_shape(shape: torch.Size, *, stacked: bool) -> tuple[int, ...]:
    """The leading axes of a parameter that count its units: () if it is one unit.

    A unit is what feeds one output: a filter of an OIHW convolution, a row of torch's (O, I) linear
    weight. A tensor with at most one axis longer than 1 is one unit (optim.py:446-459). The first
    axis of a stacked one counts tensors: (D, C) has D units, and so has (D,).
    """
    own = shape[1:] if stacked else shape
    return tuple(shape[: int(stacked) + int(sum(size > 1 for size in own) > 1)])


def unitwise_norm(x: Tensor, *, stacked: bool = False, keepdim: bool = True) -> Tensor:
    """L2 norm of every unit of a parameter (or of its gradient), shaped to broadcast against it, or
    without the axes that are summed over; in float32 or wider: float16 ends at 65,504."""
    kept = len(unit_shape(x.shape, stacked=stacked))
    x = wider(x)
    if kept == x.ndim > 0:  # stacked scalars; no axis to sum over would mean all of them
        return x.abs()
    axes = tuple(range(kept, x.ndim))
    if x.device.type == "xla":  # where vector_norm is two powers and an absolute value
        return (x * x).sum(dim=axes, keepdim=keepdim and kept > 0).sqrt()
    return vector_norm(x, dim=axes or None, keepdim=keepdim and kept > 0)
