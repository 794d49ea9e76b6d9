"""The network for inference: the same function, made of parts that any tool knows."""

import io
from typing import Any

import pytest
import torch
from timm.data.config import resolve_model_data_config
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from nfnets_xla import create_model, fuse
from nfnets_xla.models.layers import WSConv2d
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.registry import create_network
from tests.models.networks import trained


@pytest.mark.parametrize("size", [32, 47])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"name": "nfnet_mini_f1_plus", "plus_bottleneck": "paper"},
        {"num_classes": 0, "in_chans": 5},
        {"num_classes": 0, "global_pool": ""},
        {"gelu": "erf", "eps_mode": "add"},
    ],
)
@torch.no_grad()
def test_fusing_keeps_the_logits(options: dict[str, Any], size: int) -> None:
    net = trained(**options).eval()
    images = torch.randn(3, net.in_chans, size, size)
    before = images.clone()
    torch.testing.assert_close(fuse(net)(images), net(images), atol=1e-5, rtol=1e-4)
    assert torch.equal(images, before)


def test_fusing_leaves_the_network_as_it_is_and_shares_nothing_with_it() -> None:
    net = trained()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    fused = fuse(net)
    own = {parameter.data_ptr() for parameter in net.parameters()}
    assert not own & {parameter.data_ptr() for parameter in fused.parameters()}
    for parameter in fused.parameters():
        assert not parameter.requires_grad
        parameter.data.zero_()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


@torch.no_grad()
def test_a_state_dict_is_the_whole_network() -> None:
    net, other = trained(), trained()
    for parameter in other.parameters():
        parameter.add_(0.1)
    fused, fresh = fuse(net), fuse(other)
    fresh.load_state_dict(fused.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh(images), fused(images))


@torch.no_grad()
def test_what_is_pruned_or_parametrised_is_fused_as_it_computes() -> None:
    """Convolutions and linears alike, although their weights are no parameters then."""
    for put in (lambda module: prune.l1_unstructured(module, "weight", 0.5), weight_norm):
        net = trained().eval()
        for module in list(net.modules()):
            if isinstance(module, WSConv2d | nn.Linear):
                put(module)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(fuse(net)(images), net(images), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_what_is_pruned_is_fused_with_the_weights_it_has_now() -> None:
    """Pruning applies its mask just before a weight is used."""
    one, other = (trained().eval() for _ in range(2))
    for net in (one, other):
        prune.l1_unstructured(net.get_submodule("stages.0.0.conv1"), "weight", 0.5)
    weight = other.get_parameter("stages.0.0.conv1.weight_orig")
    weight.copy_(torch.randn_like(weight))
    one.load_state_dict(other.state_dict())
    images = torch.randn(2, 3, 32, 32)
    fused = fuse(one)
    torch.testing.assert_close(fused(images), one(images), atol=1e-5, rtol=1e-4)


def test_a_network_without_its_end_is_refused() -> None:
    net = trained()
    net.prune_intermediate_layers([2])
    with pytest.raises(ValueError, match="ends after 2 stages: fuse the whole network"):
        fuse(net)


@torch.no_grad()
def test_sizes_a_compiler_takes_for_unknown_are_computed_right() -> None:
    """Even sizes, then odd ones, which are padded differently: a graph for the first gave wrong
    logits for the second while gains and rates were bare floats of the modules. It takes half a
    minute; with padding whose terms grew from layer to layer it had not ended after 20."""
    torch.compiler.reset()
    net = trained(drop_rate=0.5).train()
    masks = [torch.rand(2, count) < 0.5 for count in (net.num_blocks, net.num_features)]
    compiled: Any = torch.compile(net, backend="eager", dynamic=True, fullgraph=True)
    for size in ((32, 48), (33, 47)):
        images = torch.randn(2, 3, *size)
        torch.testing.assert_close(compiled(images, *masks), net(images, *masks))


@torch.no_grad()
def test_a_block_is_compiled_by_itself() -> None:
    torch.compiler.reset()
    block = trained().stages[1].get_submodule("0")
    compiled: Any = torch.compile(block, backend="eager", fullgraph=True)
    for size in (8, 9, 16, 11):
        x = torch.randn(2, block.get_parameter("conv0.weight").shape[1], size, size)
        torch.testing.assert_close(compiled(x), block(x))


def test_other_networks_are_refused() -> None:
    """A features-only network, and a peer; a compiled network is fused like its original."""
    for other in (
        create_model("nfnet_mini_f0", features_only=True),
        create_model("timm/test_vit", num_classes=5),
    ):
        with pytest.raises(ValueError, match=f"is a {type(other).__name__}; only an NFNet can be"):
            fuse(other)  # type: ignore[arg-type]
    net, images = trained().eval(), torch.randn(2, 3, 32, 32)
    compiled: Any = torch.compile(net)
    assert torch.equal(fuse(compiled)(images), fuse(net)(images))


def test_it_is_evaluated_as_the_network_was() -> None:
    """And so is a features-only network: timm's transforms for both are the original's."""
    net = create_network("nfnet_mini_f0")
    assert isinstance(net, NFNet)
    maps = create_model("nfnet_mini_f0", features_only=True)
    for other in (fuse(net), maps):
        assert resolve_model_data_config(other) == resolve_model_data_config(net)
    assert resolve_model_data_config(net)["crop_mode"] == "squash"


def test_nothing_is_left_to_standardise() -> None:
    kinds = {type(module) for module in fuse(trained()).modules()}
    assert nn.Conv2d in kinds
    assert WSConv2d not in kinds


@torch.no_grad()
def test_a_fused_network_runs_in_bfloat16() -> None:
    net = trained().eval()
    images = torch.randn(2, 3, 32, 32)
    logits = fuse(net.bfloat16())(images.bfloat16())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, net.float()(images), atol=0.02, rtol=0.1)


@torch.no_grad()
def test_under_autocast_logits_are_float32_too() -> None:
    images = torch.randn(2, 3, 32, 32)
    net = trained().eval()
    for one in (net, fuse(net)):
        with torch.autocast("cpu", torch.bfloat16):
            assert one.forward_features(images).dtype == torch.bfloat16
            logits = one(images)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, net(images), atol=4e-2, rtol=0.1)
    assert trained().to("meta")(images.to("meta")).dtype == torch.float32  # meta has no autocast


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*quantization.* is deprecated")
@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")  # 2.15's
def test_a_fused_network_quantises_dynamically() -> None:
    """With torch's own class, which its squeeze-excites' layers have; the head stays the same."""
    net = trained().eval()
    quantised = torch.ao.quantization.quantize_dynamic(fuse(net), {nn.Linear}, dtype=torch.qint8)
    layers = [layer for block in quantised.blocks for layer in block.squeeze_excite.children()]
    assert {type(layer).__module__ for layer in layers} == {
        "torch.ao.nn.quantized.dynamic.modules.linear"
    }
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(quantised(images), net(images), atol=4e-2, rtol=0.1)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # a trace is for one size
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch's load
@torch.no_grad()
def test_traced_and_exported_graphs_give_the_same_logits(fused: bool) -> None:
    net: nn.Module = trained().eval()
    net = fuse(trained()) if fused else net
    images = torch.randn(2, 3, 32, 32)
    logits = net(images)
    more = torch.randn(5, 3, 32, 32)

    program = torch.export.export(
        net, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    torch.testing.assert_close(again(images), logits)
    torch.testing.assert_close(again(more), net(more))

    traced: Any = torch.jit.trace(net, images)
    torch.testing.assert_close(traced(images), logits)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside torch's exporter
@torch.no_grad()
def test_the_onnx_file_gives_the_same_logits(fused: bool, tmp_path: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    net: nn.Module = fuse(trained()) if fused else trained().eval()
    images = torch.randn(2, 3, 32, 32)
    path = tmp_path / "net.onnx"
    torch.onnx.export(net, (images,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), net(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fused", [pytest.param(False, marks=pytest.mark.slow), True])
@torch.no_grad()
def test_compiled_networks_give_the_same_logits(fused: bool) -> None:
    net: nn.Module = fuse(trained()) if fused else trained().eval()
    images = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(images), net(images), atol=1e-5, rtol=1e-4)
