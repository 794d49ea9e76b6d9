"""The network against DeepMind's numbers, its published sizes, and its essential properties."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nfnets_xla.models.blocks import NFBlock
from nfnets_xla.models.layers import SqueezeExcite, WSConv2d, gelu, scaled_gelu
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.variants import VARIANTS, Variant, betas
from tests.fixtures import deepmind
from tests.models.networks import trained

# Parameters with 1000 classes; then multiply-accumulates in 1e9, at the variant's train and test
# size and at 224, 256, 384 and 480 px. Computed from DeepMind's definition; arXiv 2102.06171, Table
# 3, prints the parameters and the test sizes of F0-F6.
SIZES = {
    "nfnet_f0": (71_489_284, 6.98, 12.38, 9.49, 12.38, 27.83, 43.48),
    "nfnet_f1": (132_634_256, 17.44, 35.54, 17.44, 22.76, 51.16, 79.90),
    "nfnet_f2": (193_779_228, 33.14, 62.59, 25.39, 33.14, 74.48, 116.33),
    "nfnet_f3": (254_924_200, 67.94, 114.76, 33.34, 43.52, 97.80, 152.76),
    "nfnet_f4": (316_069_172, 121.12, 215.24, 41.29, 53.89, 121.12, 189.19),
    "nfnet_f5": (377_214_144, 169.50, 289.76, 49.24, 64.27, 144.44, 225.62),
    "nfnet_f6": (438_359_116, 228.29, 377.28, 57.19, 74.65, 167.77, 262.05),
    "nfnet_f7": (499_504_088, 298.48, 478.78, 65.14, 85.03, 191.09, 298.48),
    "nfnet_f0_plus": (118_824_516, 11.00, 19.52, 14.96, 19.52, 43.87, 68.52),
    "nfnet_f1_plus": (220_357_008, 27.21, 55.45, 27.21, 35.51, 79.80, 124.65),
    "nfnet_f2_plus": (321_889_500, 51.51, 97.28, 39.46, 51.51, 115.74, 180.78),
    "nfnet_f3_plus": (423_421_992, 105.38, 177.99, 51.72, 67.50, 151.68, 236.91),
    "nfnet_f4_plus": (524_954_484, 187.62, 333.39, 63.97, 83.50, 187.62, 293.04),
    "nfnet_f5_plus": (626_486_976, 262.33, 448.43, 76.23, 99.49, 223.56, 349.17),
    "nfnet_f6_plus": (728_019_468, 353.10, 583.52, 88.48, 115.49, 259.50, 405.31),
    "nfnet_f7_plus": (829_551_960, 461.44, 740.16, 100.74, 131.48, 295.43, 461.44),
}


def count(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def mini(**options: float) -> NFNet:
    torch.manual_seed(0)
    return NFNet(VARIANTS["nfnet_mini_f0"], num_classes=10, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_macs_equal_the_published_ones(name: str) -> None:
    parameters, *gmacs = SIZES[name]
    variant = VARIANTS[name]
    with torch.device("meta"):
        net = NFNet(variant)
    assert count(net) == parameters
    sizes = (variant.train_size, variant.test_size, 224, 256, 384, 480)
    assert [round(net.macs(size) / 1e9, 2) for size in sizes] == gmacs


def test_the_papers_bottleneck_gives_the_printed_f4_plus() -> None:
    with torch.device("meta"):
        net = NFNet(VARIANTS["nfnet_f4_plus"], plus_bottleneck="paper")
    assert round(count(net) / 1e6, 2) == 527.03  # Table 5 prints 527M
    assert round(net.macs(512) / 1e9, 2) == 367.41  # the table prints 367B
    first = net.get_submodule("stages.0.0.conv1")
    assert isinstance(first, WSConv2d)
    assert (first.in_channels, first.groups) == (192, 1)


def test_macs_of_blocks_are_what_recomputing_adds() -> None:
    def flops(recomputed: bool) -> int:
        net = mini()
        net.set_grad_checkpointing(recomputed)
        with FlopCounterMode(display=False) as counter:
            net(torch.randn(1, 3, 32, 32)).sum().backward()
        return counter.get_total_flops()

    assert flops(True) - flops(False) == 2 * mini().macs(32, blocks_only=True)


def test_a_forward_on_meta_tensors_touches_no_values() -> None:
    """On meta tensors, every branch on a tensor's value, and every .item(), raises."""
    with torch.device("meta"):
        net = NFNet(VARIANTS["nfnet_mini_f0"]).train()
        keep_BN, keep_BF = torch.ones(2, 12), torch.ones(2, net.num_features)
        images = torch.empty(2, 3, 32, 32)
        assert net(images, keep_BN, keep_BF).shape == (2, 1000)
        assert net(images).shape == (2, 1000)


PROJECTING = ("conv0", "conv1", "conv1b", "conv2", "conv_shortcut")


def test_names_in_the_state_dict_are_these() -> None:
    """Every checkpoint has these names: changing one orphans all checkpoints."""
    convolutions = [f"stem.{i}" for i in range(4)] + ["final_conv"]
    linears, skip_gains = ["head"], []
    for stage, depth in enumerate((1, 2, 6, 3)):
        for number in range(depth):
            block = f"stages.{stage}.{number}"
            convolutions += [
                f"{block}.{c}" for c in (PROJECTING if number == 0 else PROJECTING[:4])
            ]
            linears += [f"{block}.squeeze_excite.reduce", f"{block}.squeeze_excite.expand"]
            skip_gains.append(f"{block}.skip_gain")
    expected = {f"{c}.{leaf}" for c in convolutions for leaf in ("weight", "gain", "bias")}
    expected |= {f"{linear}.{leaf}" for linear in linears for leaf in ("weight", "bias")}
    state = mini().state_dict()
    assert set(state) == expected | set(skip_gains)
    assert {state[name].shape for name in skip_gains} == {torch.Size([])}
    assert all(state[name].ndim == 1 for name in expected if name.endswith(("gain", "bias")))


@torch.no_grad()
def test_logits_and_pooled_features_equal_deepminds() -> None:
    net = deepmind.network().eval()
    images = torch.from_numpy(deepmind.ARRAYS["x_NHWC"]).permute(0, 3, 1, 2)
    pooled = net.forward_features(images).mean(dim=(2, 3))
    assert_relative(pooled, deepmind.ARRAYS["pool"], 1e-4)
    assert_relative(net(images), deepmind.ARRAYS["logits"], 1e-4)


@torch.no_grad()
def test_signal_statistics_equal_deepminds_at_every_block() -> None:
    """Mean over channels of the squared mean and of the variance, over batch and pixels."""
    net = deepmind.network().eval()
    blocks = [module for module in net.modules() if isinstance(module, NFBlock)]
    inputs: list[Tensor] = []
    branches: list[Tensor] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        block.squeeze_excite.register_forward_hook(
            lambda _, args, gates: branches.append(args[0] * gates * 2)
        )
    net.final_conv.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    net(torch.from_numpy(deepmind.ARRAYS["x_NHWC"]).permute(0, 3, 1, 2))
    arrays = deepmind.ARRAYS
    for place, x in enumerate(inputs):
        mean, variance = x.mean(dim=(0, 2, 3)), x.var(dim=(0, 2, 3), correction=0)
        assert_relative((mean**2).mean(), arrays[f"signal_avg_sq_mean_{place}"], 1e-4)
        assert_relative(variance.mean(), arrays[f"signal_avg_var_{place}"], 1e-4)
    for place, x in enumerate(branches):
        variance = x.var(dim=(0, 2, 3), correction=0)
        assert_relative(variance.mean(), arrays[f"signal_res_avg_var_{place}"], 1e-4)


def assert_relative(ours: Tensor, theirs: np.ndarray, tolerance: float) -> None:
    """Largest difference relative to the largest value."""
    difference = np.abs(ours.numpy() - theirs).max()
    assert difference <= tolerance * np.abs(theirs).max()


def test_initial_scales() -> None:
    """Within 3 %: with at least 9,000 draws the standard error is below 0.8 %."""
    torch.manual_seed(0)
    conv = WSConv2d(32, 32, 3)
    assert conv.weight.std().item() == pytest.approx(288**-0.5, rel=0.03)
    gates = SqueezeExcite(256).reduce
    # A normal distribution truncated at two standard deviations, without rescaling, has a standard
    # deviation of 0.87962566.
    assert gates.weight.std().item() == pytest.approx(256**-0.5 * 0.8796, rel=0.03)
    assert gates.weight.abs().max() <= 2 * 256**-0.5
    net = NFNet(VARIANTS["nfnet_mini_f0"], num_classes=100)
    assert isinstance(net.head, torch.nn.Linear)
    assert net.head.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert not net.head.bias.any()
    assert not gates.bias.any()
    assert torch.equal(conv.gain, torch.ones(32))


def test_f0_beta_schedule() -> None:
    stages = betas((1, 2, 6, 3))
    assert stages[0] == [1.0]
    np.testing.assert_allclose(stages[1], [0.98058, 0.98058], atol=1e-5)
    np.testing.assert_allclose(
        stages[2], [0.96225, 0.98058, 0.96225, 0.94491, 0.92848, 0.91287], atol=1e-5
    )
    np.testing.assert_allclose(stages[3], [0.89803, 0.98058, 0.96225], atol=1e-5)


def test_stochastic_depth_rates_rise_by_block_and_spare_the_first() -> None:
    net = mini(drop_path_rate=0.24)
    np.testing.assert_allclose(net.stochastic_depth_rates, [0.02 * i for i in range(12)])


def test_a_new_tail_block_is_the_identity() -> None:
    block = NFBlock(VARIANTS["nfnet_mini_f0"], 64, 64, stride=1, beta=0.9)
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(block(x), x)


def test_a_dropped_row_keeps_only_its_shortcut_and_the_others_are_untouched() -> None:
    block = NFBlock(VARIANTS["nfnet_mini_f0"], 64, 64, stride=1, beta=0.9)
    torch.nn.init.ones_(block.skip_gain)
    x = torch.randn(3, 64, 8, 8)
    out = block(x, torch.tensor([1, 0, 1], dtype=torch.uint8))
    assert torch.equal(out[1], x[1])
    torch.testing.assert_close(out[[0, 2]], block(x)[[0, 2]])
    assert not torch.equal(out[0], x[0])


def test_a_dropped_rows_branch_gets_no_gradient_and_another_rows_does() -> None:
    block = NFBlock(VARIANTS["nfnet_mini_f0"], 64, 64, stride=1, beta=0.9)
    torch.nn.init.ones_(block.skip_gain)
    x = torch.randn(2, 64, 8, 8, requires_grad=True)
    block(x, torch.tensor([0, 1])).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[0], torch.ones(64, 8, 8))  # derivative of the identity
    assert not torch.equal(x.grad[1], torch.ones(64, 8, 8))
    block.zero_grad()
    block(x, torch.tensor([0, 0])).sum().backward()
    gradients = [parameter.grad for parameter in block.parameters()]
    assert all(grad is not None and not grad.any() for grad in gradients)


def test_column_n_of_the_masks_is_for_block_n_of_the_network() -> None:
    """Dropping block n equals a skip gain of 0 there; blocks are numbered through all stages."""
    net = mini(drop_path_rate=0.0).eval()
    blocks = [module for module in net.modules() if isinstance(module, NFBlock)]
    for block in blocks:
        torch.nn.init.ones_(block.skip_gain)
    images = torch.randn(2, 3, 32, 32)
    for number in (0, 1, 4, 11):
        keep_BN = torch.ones(2, 12, dtype=torch.uint8)
        keep_BN[:, number] = 0
        masked = net(images, keep_BN)  # given masks apply in evaluation mode, too
        torch.nn.init.zeros_(blocks[number].skip_gain)
        assert torch.equal(masked, net(images))
        torch.nn.init.ones_(blocks[number].skip_gain)
        assert not torch.equal(masked, net(images))


def test_masks_of_another_shape_are_refused() -> None:
    net = mini().eval()
    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(ValueError, match=r"keep_masks_BN is \(2, 13\).* must be \(2, 12\)"):
        net(images, torch.ones(2, 13))
    with pytest.raises(ValueError, match=r"dropout_keep_BF is \(2, 1\).* must be \(2, 384\)"):
        net(images, None, torch.ones(2, 1))


def test_given_masks_make_training_deterministic_and_own_masks_follow_torchs_seed() -> None:
    net = mini(drop_path_rate=0.5, drop_rate=0.5).train()
    for module in net.modules():
        if isinstance(module, NFBlock):
            torch.nn.init.ones_(module.skip_gain)
    images = torch.randn(4, 3, 32, 32)
    keep, features = torch.ones(4, 12), torch.ones(4, net.num_features)
    torch.testing.assert_close(net(images, keep, features), net(images, keep, features))
    torch.manual_seed(1)
    first = net(images)
    assert not torch.equal(first, net(images))
    torch.manual_seed(1)
    assert torch.equal(first, net(images))


def test_dropout_is_inverted_with_the_models_rate() -> None:
    net = mini(drop_path_rate=0.0, drop_rate=0.5).eval()
    images = torch.randn(2, 3, 32, 32)
    kept = net(images, None, torch.ones(2, net.num_features))
    torch.testing.assert_close(kept, net(images) * 2, rtol=1e-4, atol=1e-5)  # the head's bias is 0


def test_compute_dtype_follows_the_images_and_logits_are_float32() -> None:
    net = mini().eval()
    seen: list[torch.dtype] = []
    for module in net.modules():
        if isinstance(module, WSConv2d):
            module.register_forward_hook(lambda _, args, out: seen.append(out.dtype))
    logits = net(torch.randn(2, 3, 32, 32).bfloat16())
    assert set(seen) == {torch.bfloat16}
    assert logits.dtype == torch.float32
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("dtype", "logits_dtype"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
)
def test_a_network_cast_as_a_whole_still_runs(
    dtype: torch.dtype, logits_dtype: torch.dtype
) -> None:
    net = mini().eval().to(dtype)
    net.reset_classifier(4)
    assert isinstance(net.head, nn.Linear)
    assert net.head.weight.dtype == dtype
    images = torch.randn(2, 3, 32, 32, dtype=dtype)
    assert net(images).dtype == logits_dtype
    head = nn.Linear(net.num_features, 5, dtype=dtype)
    setattr(net, "head", head)  # noqa: B010  # anyone's, which casts nothing
    assert (net(images).dtype, net(images).shape) == (logits_dtype, (2, 5))


def test_what_is_small_in_bfloat16_is_computed_in_float32() -> None:
    """The standardised weights of a bfloat16 network, and the mean over the map's pixels."""
    conv = WSConv2d(8, 16, 3)
    conv.weight.data = conv.weight.data.bfloat16()
    exact = WSConv2d(8, 16, 3)
    exact.load_state_dict({name: value.float() for name, value in conv.state_dict().items()})
    assert torch.equal(conv.standardised_weight(), exact.standardised_weight())
    net = mini().eval()
    map_BFHW = torch.randn(2, net.num_features, 7, 7).bfloat16()
    pooled_BF = net.forward_head(map_BFHW, pre_logits=True)
    assert torch.equal(pooled_BF, map_BFHW.float().mean(dim=(2, 3)))


def test_blocks_are_dropped_at_their_rates() -> None:
    """nfnet.py:97: the rate grows with the share of blocks before; the first is never dropped."""
    net = mini(drop_path_rate=0.6).train()
    torch.manual_seed(0)
    masks = net._stage_masks(torch.empty(20_000, 3, 1, 1), None)
    kept_N = torch.cat([mask for mask in masks if mask is not None], 1).float().mean(0)
    rates_N = torch.tensor(net.stochastic_depth_rates)
    assert kept_N[0] == 1
    torch.testing.assert_close(kept_N, 1 - rates_N, rtol=0, atol=0.015)  # 4 sigma


def test_pooling_shortcut_leaves_the_padding_out_of_the_mean() -> None:
    """3x3 pixels, 2x2 windows: windows in the last row and column have 2, 2 and 1 pixels."""
    block = NFBlock(VARIANTS["nfnet_mini_f0"], 64, 64, stride=2, beta=1.0)
    assert block.conv_shortcut is not None
    seen: list[Tensor] = []
    block.conv_shortcut.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(1, 64, 3, 3)
    block(x)
    a = gelu(x)
    corners = [
        a[..., r, c].mean(dim=(2, 3))
        for r in (slice(0, 2), slice(2, 3))
        for c in (slice(0, 2), slice(2, 3))
    ]
    torch.testing.assert_close(seen[0].flatten(2), torch.stack(corners, dim=2))


def test_activation_keeps_unit_variance() -> None:
    x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    assert abs(float(scaled_gelu(x).var()) - 1) < 0.01


@pytest.mark.parametrize("size", [33, 47])
def test_odd_sizes_and_other_channels(size: int) -> None:
    net = NFNet(VARIANTS["nfnet_mini_f0"], num_classes=0, in_chans=5)
    assert net(torch.randn(1, 5, size, size)).shape == (1, net.num_features)


def test_an_image_by_itself_is_refused() -> None:
    net = NFNet(VARIANTS["nfnet_mini_f0"])
    with pytest.raises(ValueError, match=r"the input is \(3, 32, 32\); it must be \(B, C, H, W\)"):
        net(torch.ones(3, 32, 32))
    with pytest.raises(ValueError, match="in_channels is 0; it must be at least 1"):
        NFNet(VARIANTS["nfnet_mini_f0"], in_chans=0)


def test_bad_options_are_refused() -> None:
    variant: Variant = VARIANTS["nfnet_mini_f0"]
    with pytest.raises(ValueError, match=r"drop_path_rate is 1\.5"):
        NFNet(variant, drop_path_rate=1.5)
    with pytest.raises(ValueError, match="plus_bottleneck is 'wide'"):
        NFNet(variant, plus_bottleneck="wide")
    with pytest.raises(ValueError, match="num_classes is -1"):
        NFNet(variant, num_classes=-1)


@torch.no_grad()
def test_memory_layout_and_half_precision_change_only_rounding() -> None:
    net: Any = trained().eval()
    images, last = torch.randn(2, 3, 32, 32), torch.channels_last
    logits = net(images)
    torch.testing.assert_close(net.to(memory_format=last)(images.to(memory_format=last)), logits)
    torch.testing.assert_close(net(images.half()), logits, atol=5e-3, rtol=2e-2)
    torch.testing.assert_close(net(images.bfloat16()), logits, atol=4e-2, rtol=0.1)
