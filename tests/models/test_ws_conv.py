"""The scaled weight-standardised convolution against its twin, its floor, and its derivatives."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from nfnets_xla.models.layers import EpsMode, WSConv2d, same_padding
from tests.reference.ws_conv import ws_conv_same


@pytest.mark.parametrize("size", [7, 8])
@pytest.mark.parametrize(
    ("kernel", "stride", "groups"),
    [(3, 1, 2), (3, 2, 1), (1, 1, 1), (3, 2, 4), (2, 1, 1), (5, 2, 1), (1, 2, 1)],
)
def test_convolution_equals_its_numpy_twin(
    size: int, kernel: int, stride: int, groups: int
) -> None:
    torch.manual_seed(0)
    conv = WSConv2d(8, 12, kernel, stride=stride, groups=groups)
    torch.nn.init.normal_(conv.gain)
    torch.nn.init.normal_(conv.bias)  # pyright: ignore[reportArgumentType]
    x = torch.randn(2, 8, size, size + 1)
    weight, gain, bias = (p.detach().numpy() for p in (conv.weight, conv.gain, conv.bias))  # type: ignore[union-attr]
    expected = ws_conv_same(x.numpy(), weight, gain, bias, stride=stride, groups=groups)
    np.testing.assert_allclose(conv(x).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (5, 1), (1, 5)])
def test_along_one_pixel_the_gradient_in_bfloat16_is_that_of_float32(size: tuple[int, int]) -> None:
    """On a CPU with AVX-512 torch 2.9 left memory uninitialised here; the test fills it: 1e4."""
    torch.manual_seed(0)
    conv = WSConv2d(96, 96, 3, stride=2, groups=6)
    x = torch.randn(16, 96, *size)
    found: dict[torch.dtype, list[Tensor]] = {torch.float32: [], torch.bfloat16: []}
    for number in range(10):
        for dtype, gradients in found.items():
            left = [torch.full((size,), 1e4) for size in range(100, 50_000, 500 + number)]
            del left
            conv(x.to(dtype)).float().square().mean().backward()
            assert conv.weight.grad is not None
            gradients.append(conv.weight.grad)
            conv.zero_grad()
    (expected, *_), rounded = found.values()
    assert all(torch.equal(rounded[0], gradient) for gradient in rounded)
    torch.testing.assert_close(
        rounded[0], expected, rtol=0, atol=0.02 * float(expected.abs().max())
    )


def test_two_numbers_for_two_axes_are_refused() -> None:
    for options in ({"kernel_size": (3, 5)}, {"kernel_size": 3, "stride": (1, 2)}):
        with pytest.raises(ValueError, match="it must be one number, for both axes"):
            WSConv2d(3, 4, **options)  # type: ignore[arg-type]


def test_padding_is_tensorflows() -> None:
    """TensorFlow's formula uses the output's size; ours uses a remainder, for compilers."""
    for size, kernel, stride in product(range(1, 300), range(1, 8), range(1, 6)):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        if stride == 1:
            total = kernel - 1
        assert same_padding(size, kernel, stride) == (total // 2, total - total // 2)


def test_images_that_are_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input is torch\.uint8; it must be of floating point"):
        WSConv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_timms_eps_is_added_to_the_variance() -> None:
    """Timm's formula, on weights whose variance equals eps: half of what the floor gives."""
    conv = WSConv2d(8, 6, 3, eps_mode="add").double()
    with torch.no_grad():
        centred = conv.weight - conv.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = conv.weight.std(dim=(1, 2, 3), correction=0, keepdim=True)
        conv.weight.copy_(centred / std * 1e-5**0.5)
    expected = conv.weight / (2e-5 * 72) ** 0.5
    torch.testing.assert_close(conv.standardised_weight(), expected, atol=1e-9, rtol=1e-9)


def test_small_variance_meets_a_floor_not_an_addend() -> None:
    """The twin covers the formula; here variance * fan-in is 1e-6, below the floor of 1e-4."""
    conv = WSConv2d(8, 6, 3, groups=2).double()
    fan_in = conv.weight[0].numel()
    with torch.no_grad():
        centred = conv.weight - conv.weight.mean(dim=(1, 2, 3), keepdim=True)
        std = conv.weight.std(dim=(1, 2, 3), correction=0, keepdim=True)
        conv.weight.copy_(centred / std * (1e-6 / fan_in) ** 0.5 + 0.3)
    expected = (conv.weight - 0.3) * 100  # 1 / sqrt(1e-4)
    torch.testing.assert_close(conv.standardised_weight(), expected, atol=1e-9, rtol=1e-9)


# Newer releases of torch script their own forward mode, which they call deprecated.
FORWARD_MODE = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")


@FORWARD_MODE
@pytest.mark.parametrize("variance_times_fan_in", [1.0, 1e-6])
def test_gradients_of_the_convolution_are_right(variance_times_fan_in: float) -> None:
    """In float64, against finite differences, on both sides of the floor."""
    torch.manual_seed(0)
    conv = WSConv2d(4, 6, 3, stride=2, groups=2).double()
    with torch.no_grad():
        conv.weight *= variance_times_fan_in**0.5
    values = dict(conv.named_parameters())

    def convolve(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(values, parameters, strict=True))
        return torch.func.functional_call(conv, named, (x,))

    x = torch.randn(1, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    # The step shrinks with the weights, so that it never crosses the floor.
    eps = 1e-6 * variance_times_fan_in**0.5
    inputs = (x, *values.values())
    assert torch.autograd.gradcheck(convolve, inputs, eps=eps, atol=1e-4, check_forward_ad=True)


@FORWARD_MODE
@pytest.mark.parametrize("eps_mode", ["floor", "add"])
def test_gradients_per_sample_and_second_derivatives_are_right(eps_mode: EpsMode) -> None:
    """A hand-written derivative must support torch.func and second derivatives."""
    torch.manual_seed(0)
    conv = WSConv2d(4, 6, 3, eps_mode=eps_mode).double()
    values: dict[str, Tensor] = dict(conv.named_parameters())
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)

    def loss(values: dict[str, Tensor], x_CHW: Tensor) -> Tensor:
        return torch.func.functional_call(conv, values, (x_CHW[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(values, x)
    for number, x_CHW in enumerate(x):
        one = torch.autograd.grad(loss(values, x_CHW), list(values.values()))
        for name, gradient in zip(values, one, strict=True):
            torch.testing.assert_close(per_sample[name][number], gradient)

    def convolve(*parameters: Tensor) -> Tensor:
        named = dict(zip(values, parameters, strict=True))
        return torch.func.functional_call(conv, named, (x[:1],))

    parameters = tuple(values.values())
    assert torch.autograd.gradgradcheck(convolve, parameters, check_fwd_over_rev=True)


@FORWARD_MODE
@pytest.mark.parametrize("eps_mode", ["floor", "add"])
def test_second_derivatives_in_forward_and_reverse_mode_agree_in_any_order(
    eps_mode: EpsMode,
) -> None:
    """Hessian-vector products, by torch.func, of a loss in all parameters of a convolution."""
    torch.manual_seed(0)
    conv = WSConv2d(4, 6, 3, eps_mode=eps_mode).double()
    values: dict[str, Tensor] = dict(conv.named_parameters())
    along = {name: torch.randn_like(value) for name, value in values.items()}
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(conv, values, (x,)).pow(3).sum()

    def slope(values: dict[str, Tensor]) -> Tensor:
        return torch.func.jvp(loss, (values,), (along,))[1]

    def slope_by_reverse(values: dict[str, Tensor]) -> Tensor:
        gradient = torch.func.grad(loss)(values)
        return torch.stack([(gradient[name] * along[name]).sum() for name in along]).sum()

    wanted = torch.func.grad(slope_by_reverse)(values)
    torch.testing.assert_close(
        torch.func.jvp(torch.func.grad(loss), (values,), (along,))[1], wanted
    )
    torch.testing.assert_close(torch.func.grad(slope)(values), wanted)
    curvature = torch.stack([(wanted[name] * along[name]).sum() for name in along]).sum()
    torch.testing.assert_close(torch.func.jvp(slope, (values,), (along,))[1], curvature)


def test_standardised_weight_has_mean_0_and_fan_in_variance() -> None:
    conv = WSConv2d(16, 8, 3)
    weight = conv.standardised_weight().flatten(1)
    torch.testing.assert_close(weight.mean(1), torch.zeros(8), atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.var(1, correction=0), torch.full((8,), 1 / (16 * 9)))
