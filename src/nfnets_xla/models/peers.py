"""Other networks with the interface of an NFNet: any timm model, and the paper's ViTs.

A fair comparison needs the same data, loss, optimizer and cost accounting, so a peer has what the
trainer needs from an NFNet: logits in float32 from images in the compute dtype, keyed dropout on
the pooled features, and its cost. Randomness inside timm's layers is not keyed, so it is off.

Shape suffixes: B batch, C channels, H W pixels, N residual blocks (none here), F features.
"""

# pyright: reportUnknownMemberType=false
# torch types its own signatures in part.

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nfnets_xla.models.layers import PooledDropout, at_least_float32, without_autocast

TIMM = "timm/"
POSITIONS = "net.pos_embed"  # (1, tokens, F), in a ViT's state dict


class Encoder(NamedTuple):
    """A ViT without class token; its head takes the average or pools by attention. Sizes of
    patches and images in pixels."""

    width: int
    depth: int
    mlp_width: int
    heads: int
    pooling: str  # "avg", or "map": by attention
    patch: int = 14
    train_size: int = 224
    test_size: int = 518

    def make(self, *, size: int, **options: Any) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        net = VisionTransformer(
            img_size=size,
            patch_size=self.patch,
            embed_dim=self.width,
            depth=self.depth,
            num_heads=self.heads,
            mlp_ratio=self.mlp_width / self.width,
            class_token=False,
            global_pool=self.pooling,  # type: ignore[arg-type]
            fc_norm=False,
            dynamic_img_size=size % self.patch == 0,  # else timm raises
            **options,
        )
        net.pretrained_cfg = {"classifier": "head"}  # type: ignore[assignment]
        return net


# arXiv 2106.04560, Table 2, for g/14 (giant) and G/14 (gigantic); arXiv 2305.13035, Table 1, for
# SoViT. SoViT's 428M parameters include its attention-pooling head; g's 1011M and G's 1843M count
# only the encoder. The minis are our choice, for studies at 32 px: patches of 4 px, and the costs
# of nfnet_mini_f1 (1 % more) and nfnet_mini_f3 (7 % more).
VITS: dict[str, Encoder] = {
    "vit_giant_14": Encoder(1408, 40, 6144, 16, "avg"),
    "vit_gigantic_14": Encoder(1664, 48, 8192, 16, "avg"),
    "sovit_400m_14": Encoder(1152, 27, 4304, 16, "map"),
    "vit_mini_d3_4": Encoder(48, 3, 192, 3, "avg", 4, 32, 32),
    "vit_mini_d6_4": Encoder(48, 6, 192, 3, "avg", 4, 32, 32),
}


class Entry(NamedTuple):
    """A network of ours that is no NFNet: all that other modules know of it."""

    make: Callable[..., nn.Module]  # of size, num_classes and in_chans; its interface is timm's
    train_size: int  # pixels; it is made for these if no size is given
    test_size: int


PEERS: dict[str, Entry] = {
    name: Entry(vit.make, vit.train_size, vit.test_size) for name, vit in VITS.items()
}


class Peer(PooledDropout):
    """A timm model that trains as an NFNet does."""

    stochastic_depth_rates: tuple[float, ...] = ()

    def __init__(
        self,
        make: Callable[..., nn.Module],
        *,
        pretrained: bool = False,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        """`make(size=..., pretrained=...)` builds the timm model; `drop_rate` applies to the
        pooled features."""
        super().__init__(drop_rate)
        self.make, self.in_chans = make, in_chans
        self.net: Any = make(pretrained=pretrained)
        self.num_features = int(self.net.head_hidden_size)
        self.num_classes = int(self.net.num_classes)
        self.pretrained_cfg: dict[str, Any] = self.net.pretrained_cfg  # for timm.data's transforms

    @property
    def classifier_name(self) -> str:
        return "net." + str(self.net.pretrained_cfg["classifier"])

    def forward(
        self,
        images_BCHW: Tensor,
        keep_masks_BN: Tensor | None = None,
        dropout_keep_BF: Tensor | None = None,
    ) -> Tensor:
        """Logits in float32. For bfloat16 and float16 images, autocast casts the weights."""
        device, dtype = images_BCHW.device.type, images_BCHW.dtype
        lower = dtype in (torch.bfloat16, torch.float16)
        images_BCHW = images_BCHW.float() if lower else images_BCHW
        # For float32 images, the caller's autocast applies, if there is one.
        with torch.autocast(device, dtype) if lower else nullcontext():
            features = self.net.forward_features(images_BCHW)
            pooled_BF = self.net.forward_head(features, pre_logits=True)
        pooled_BF = pooled_BF.float() if lower else pooled_BF
        pooled_BF = self.drop(pooled_BF, dropout_keep_BF)
        head = self.net.get_classifier()
        weight = next(head.parameters(), pooled_BF)
        return at_least_float32(without_autocast(head, pooled_BF.to(weight.dtype)))

    def no_weight_decay(self) -> set[str]:
        """The names timm exempts from decay: a ViT's positions and tokens."""
        own = getattr(self.net, "no_weight_decay", set[str])()
        return {f"net.{name}" for name in own}

    def reset_classifier(self, num_classes: int) -> None:
        self.net.reset_classifier(num_classes)
        self.num_classes = num_classes

    def at_our_size(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` with a ViT's position embeddings (for square images) resized to our grid.

        timm interpolates them in 2D, bicubic (arXiv 2010.11929, section 3.2). A state without
        `pos_embed` is returned unchanged.
        """
        from timm.layers import pos_embed

        state, theirs, net = dict(state), state.get(POSITIONS), self.net
        grid = getattr(getattr(net, "patch_embed", None), "grid_size", None)
        prefix = getattr(net, "num_prefix_tokens", None)
        if theirs is None or theirs.ndim != 3 or grid is None or prefix is None:
            return state
        prefix = 0 if getattr(net, "no_embed_class", False) else prefix
        if (tokens := theirs.shape[1] - prefix) > 0 and isqrt(tokens) ** 2 == tokens:
            resample: Any = pos_embed.resample_abs_pos_embed  # pyright: ignore[reportUnknownVariableType]
            state[POSITIONS] = resample(theirs, list(grid), num_prefix_tokens=prefix)
        return state

    def flops(self, size: int) -> int:
        """Floating-point operations of a forward pass on one `size` x `size` image: twice `macs`.

        torch counts convolutions, linear layers and attention, on the meta device.
        """
        from torch.utils.flop_counter import FlopCounterMode

        with torch.device("meta"):
            net: Any = self.make(size=size)
            net.reset_classifier(self.num_classes)
            counter = FlopCounterMode(display=False)
            with counter:
                net.eval().requires_grad_(False)(torch.empty(1, self.in_chans, size, size))
        return counter.get_total_flops()

    def macs(self, size: int) -> int:
        return self.flops(size) // 2


def is_peer(name: str) -> bool:
    return name.startswith(TIMM) or name in PEERS


def create_peer(
    name: str,
    *,
    pretrained: bool = False,
    drop_rate: float = 0.0,
    image_size: int | None = None,
    eval_image_size: int | None = None,
    **options: Any,
) -> Peer:
    """`timm/<model>` with timm's options, or one of PEERS. ValueError for any other name.

    `image_size`, in pixels, matters for networks built for one size (ViTs), which then accept some
    other sizes too; ValueError if `eval_image_size` is not among those.
    """
    for option, rate in options.items():
        if "drop" in option and rate:
            raise ValueError(
                f"{option} is {rate} for {name}: timm's layers draw their own randomness, which is "
                "off here; leave it out, or make the network with timm.create_model"
            )
    if name in PEERS and pretrained:
        raise ValueError(f"{name} has no public weights; leave out pretrained")
    plain = name.removeprefix(TIMM)
    if name not in PEERS and not is_in_timm(plain):
        raise ValueError(f"timm has no model {plain!r}; see timm.list_models()")
    make = partial(_make, name, options, size=image_size)
    in_chans = options.get("in_chans", 3)
    peer = Peer(make, pretrained=pretrained, in_chans=in_chans, drop_rate=drop_rate)
    if not isinstance(head := peer.net.get_classifier(), nn.Linear | nn.Identity):
        raise ValueError(
            f"the classifier of {name} is a {type(head).__name__}, not one nn.Linear: networks of "
            "two heads, or with a convolution for one, are no peers here; choose another"
        )
    _without_randomness(peer.net)
    for size in (image_size, eval_image_size):
        if size is not None and (fault := _fault_of(make, in_chans, size)):
            sizes = "multiples of its patches" if hasattr(peer.net, "patch_embed") else "others"
            raise ValueError(
                f"{name} for images of {image_size} px does not take {size} px ({fault}): choose "
                f"{sizes} for data.image_size and data.eval_image_size"
            )
    return peer


def _make(
    name: str, options: dict[str, Any], *, size: int | None, pretrained: bool = False
) -> nn.Module:
    if name in PEERS:
        entry = PEERS[name]
        return entry.make(size=size or entry.train_size, **options)
    import timm

    model = partial(timm.create_model, name.removeprefix(TIMM), pretrained=pretrained, **options)
    try:
        return model() if size is None else model(img_size=size, dynamic_img_size=True)
    except TypeError:  # a network for images of any size
        return model()


def _fault_of(make: Callable[..., nn.Module], channels: int, size: int) -> str | None:
    """The network's error message for images of this size, if any; run on the meta device."""
    with torch.device("meta"), torch.no_grad():
        try:
            make().eval()(torch.empty(1, channels, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            return str(error).strip().split("\n")[-1]
    return None


def _without_randomness(net: nn.Module) -> None:
    """Turn dropout off: some timm networks drop paths by default (FocalNet: 0.1)."""
    from timm.layers.drop import DropPath

    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, DropPath):
            module.drop_prob = 0.0


def is_in_timm(name: str) -> bool:
    import timm

    return timm.is_model(name.partition(".")[0])
