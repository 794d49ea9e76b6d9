"""The NFNet family F0 ... F7 and F0+ ... F7+ (arXiv 2102.06171), as DeepMind's code has it.

Reference: deepmind-research/nfnets, nfnet.py and base.py at f5de0ed; where the paper's text differs
(the squeeze-excite's activation), the code holds. Parameter counts and multiply-accumulates of all
16 equal the reference's.

Shape suffixes: B batch, C channels, H W pixels, N residual blocks, F pooled features, K classes.
"""

# pyright: reportUnknownMemberType=false
# torch types its own signatures in part.

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nfnets_xla.models.blocks import NFBlock, Recompute, Stage, recompute
from nfnets_xla.models.layers import (
    GELU_GAIN,
    Linear,
    PooledDropout,
    WSConv2d,
    at_least_float32,
    check_mask,
    check_rate,
    gelu,
    scaled_gelu,
    without_autocast,
)
from nfnets_xla.models.variants import (
    STAGE_STRIDES,
    STEM_STRIDES,
    EpsMode,
    Gelu,
    Variant,
    betas,
)

OWN_HEADS: tuple[type[nn.Module], ...] = (Linear, nn.Identity)  # take any dtype
TAPPED = STEM_STRIDES.index(2, 1)  # how many of the stem's convolutions are at stride 2


class NFNet(PooledDropout):
    """The network: stem, four stages, a convolution to twice the width, pooling, head.

    Parameters are named by place, e.g. `stages.2.0.conv1b.gain`: stage, block in it, convolution.
    It has the methods of a timm model (`forward_intermediates`, `feature_info`, `group_matcher`,
    ...), so that timm's tools work on it.
    """

    classifier_name = "head"
    pretrained_cfg: dict[str, Any]  # set by the registries

    def __init__(
        self,
        variant: Variant,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float | None = None,
        drop_path_rate: float = 0.25,
        plus_bottleneck: str = "code",
        gelu: Gelu = "tanh",
        eps_mode: EpsMode = "floor",
    ) -> None:
        """`drop_rate=None` takes the variant's; `num_classes=0` returns pooled features.

        `plus_bottleneck="paper"` keeps 192 dense channels in a "+" model's first stage.
        `gelu="erf"` with `eps_mode="add"` computes what timm's dm_nfnet does. `global_pool=""`,
        with no classes, leaves the features unpooled. Raises ValueError for rates outside [0, 1)
        and for any other value of these options.
        """
        super().__init__(variant.drop_rate if drop_rate is None else drop_rate)
        check_rate("drop_path_rate", drop_path_rate)
        _check_option("plus_bottleneck", plus_bottleneck, ("code", "paper"))
        _check_option("gelu", gelu, ("tanh", "erf"))
        _check_option("eps_mode", eps_mode, ("floor", "add"))
        if plus_bottleneck == "paper":
            variant = replace(variant, dense_remainder=True)
        self.variant = variant = replace(variant, gelu=gelu, eps_mode=eps_mode)
        self.num_blocks = sum(variant.depth)
        self.stochastic_depth_rates = tuple(  # nfnet.py:97: the first block is never dropped
            drop_path_rate * block / self.num_blocks for block in range(self.num_blocks)
        )
        self.in_chans = in_chans
        channels = [in_chans, *variant.stem, variant.width[0] // 2]
        self.stem = nn.ModuleList(
            WSConv2d(into, out, 3, stride=stride, eps_mode=variant.eps_mode)
            for into, out, stride in zip(channels, channels[1:], STEM_STRIDES, strict=False)
        )
        self.stages = nn.ModuleList()
        into = channels[-1]
        plan = zip(variant.width, STAGE_STRIDES, betas(variant.depth), strict=True)
        for width, stride, (first_beta, *tail_betas) in plan:
            stage = Stage([NFBlock(variant, into, width, stride=stride, beta=first_beta)])
            for beta in tail_betas:
                stage.append(NFBlock(variant, width, width, stride=1, beta=beta))
            self.stages.append(stage)
            into = width
        self.num_features = self.head_hidden_size = 2 * into
        final_conv = WSConv2d(into, self.num_features, 1, eps_mode=variant.eps_mode)
        self.final_conv: WSConv2d | nn.Identity = final_conv
        self.global_pool: str = "avg"
        self.head: Linear | nn.Identity = nn.Identity()
        self.reset_classifier(num_classes, global_pool)

    # ---- forward ------------------------------------------------------------------------------

    def forward(
        self,
        images_BCHW: Tensor,
        keep_masks_BN: Tensor | None = None,
        dropout_keep_BF: Tensor | None = None,
    ) -> Tensor:
        """Logits `(B, K)` in float32; the convolutions compute in the images' dtype.

        A trainer with keyed randomness passes both masks (any dtype; 1 keeps), which then apply in
        train and eval mode alike. Without them the model draws masks from torch's generator in
        train mode and drops nothing in eval mode. Raises ValueError for a mask of another shape.
        float64 images give float64 logits.
        """
        features_BFHW = self.forward_features(images_BCHW, keep_masks_BN)
        return self.forward_head(features_BFHW, dropout_keep_BF=dropout_keep_BF)

    def forward_features(self, images_BCHW: Tensor, keep_masks_BN: Tensor | None = None) -> Tensor:
        """The last activation, `(B, F, H / 32, W / 32)` rounded up, in the images' dtype."""
        x = self._stem(images_BCHW)[1]
        stage_masks = self._stage_masks(images_BCHW, keep_masks_BN)
        for stage, masks_BN in zip(self.stages, stage_masks, strict=True):
            x = stage(x, masks_BN)
        return scaled_gelu(self.final_conv(x), self.variant.gelu)

    def forward_head(
        self,
        features_BFHW: Tensor,
        pre_logits: bool = False,
        *,
        dropout_keep_BF: Tensor | None = None,
    ) -> Tensor:
        """From `forward_features`' result to the logits, or with `pre_logits` to `(B, F)`."""
        if self.global_pool == "":
            return features_BFHW
        pooled_BF = self.drop(at_least_float32(features_BFHW).mean(dim=(2, 3)), dropout_keep_BF)
        if pre_logits:
            return pooled_BF
        head: nn.Module = self.head
        if not isinstance(head, OWN_HEADS):  # set by the user: may not cast its input
            pooled_BF = pooled_BF.to(next(head.parameters(), pooled_BF).dtype)
        return at_least_float32(without_autocast(head, pooled_BF))

    def forward_intermediates(
        self,
        images_BCHW: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Maps before activation, at `indices` of `feature_info` (None: all; n: the last n).

        Returns (the result of `forward_features`, maps), or only the maps with
        `intermediates_only`. `stop_early` computes no stage after the last map wanted, and returns
        that map as the first element. `norm` has no effect: there is no norm layer. Raises
        ValueError for any `output_fmt` but "NCHW".
        """
        from timm.models._features import feature_take_indices

        _check_option("output_fmt", output_fmt, ("NCHW",))
        wanted, last = feature_take_indices(len(self.stages) + 1, indices)  # type: ignore[arg-type]
        tap, x = self._stem(images_BCHW)
        maps = [tap] if 0 in wanted else []
        stages = self.stages[:last] if stop_early or intermediates_only else self.stages
        x = x if stages else tap
        stage_masks = self._stage_masks(images_BCHW, None)
        for place, (stage, masks_BN) in enumerate(zip(stages, stage_masks, strict=False), start=1):
            x = stage(x, masks_BN)
            if place == len(STAGE_STRIDES):
                x = self.final_conv(x)
            if place in wanted:
                maps.append(x)
        if intermediates_only:
            return maps
        return (scaled_gelu(x, self.variant.gelu) if len(stages) == len(STAGE_STRIDES) else x), maps

    def _stem(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Two maps before activation: the last at stride 2, and the output at stride 4."""
        x = self.stem[0](images_BCHW)
        for conv in self.stem[1:TAPPED]:
            x = conv(gelu(x, self.variant.gelu), GELU_GAIN)
        tap = x
        for conv in self.stem[TAPPED:]:
            x = conv(gelu(x, self.variant.gelu), GELU_GAIN)
        return tap, x

    def _stage_masks(
        self, images_BCHW: Tensor, keep_masks_BN: Tensor | None
    ) -> Sequence[Tensor | None]:
        """One `(B, blocks)` mask per stage: the given ones, drawn ones in training, or None."""
        batch, device = images_BCHW.shape[0], images_BCHW.device
        if keep_masks_BN is None and self.training and any(self.stochastic_depth_rates):
            rates_N = torch.tensor(self.stochastic_depth_rates, device=device)
            keep_masks_BN = torch.rand(batch, self.num_blocks, device=device) >= rates_N
        if keep_masks_BN is None:
            return [None] * len(self.stages)
        check_mask("keep_masks_BN", keep_masks_BN, (batch, self.num_blocks))
        return torch.split(keep_masks_BN, [*self.variant.depth[: len(self.stages)]], dim=1)

    # ---- what timm's tools ask for ------------------------------------------------------------

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head: weight N(0, 0.01**2), bias 0; none for 0 classes. ValueError below 0."""
        if num_classes < 0:
            raise ValueError(f"num_classes is {num_classes}; it must be 0 (no head) or more")
        global_pool = self.global_pool if global_pool is None else global_pool
        _check_option("global_pool", global_pool, ("avg", ""))
        if num_classes and not global_pool:
            raise ValueError(f"global_pool is '' with {num_classes} classes: a head needs 'avg'")
        self.num_classes, self.global_pool = num_classes, global_pool
        self.head = nn.Identity()
        if num_classes:
            head = Linear(self.num_features, num_classes)
            nn.init.normal_(head.weight, std=0.01)
            nn.init.zeros_(head.bias)
            self.head = head.to(next(self.parameters()))  # device and dtype

    def get_classifier(self) -> nn.Module:
        return self.head

    def set_grad_checkpointing(
        self, enable: bool = True, checkpoint: Recompute = recompute
    ) -> None:
        """Keep only each block's input; the backward pass then computes the block again."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.checkpoint = checkpoint if enable else None

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The maps that `forward_intermediates` can return: channels, stride, and module name."""
        maps = [(self.variant.stem[-1], "stem.2")]
        maps += [(width, f"stages.{stage}") for stage, width in enumerate(self.variant.width)]
        maps[-1] = (2 * self.variant.width[-1], "final_conv")
        return [
            {"num_chs": channels, "reduction": 2 ** (place + 1), "module": module}
            for place, (channels, module) in enumerate(maps)
        ]

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers that the maps at `indices` do not need; returns the indices from 0."""
        from timm.models._features import feature_take_indices

        wanted, last = feature_take_indices(len(self.stages) + 1, indices)  # type: ignore[arg-type]
        pruned = last < len(self.stages)
        if pruned:
            self.stages = self.stages[:last]
            if last == 0:
                self.stem = self.stem[:TAPPED]
            self.num_blocks = sum(self.variant.depth[:last])
            self.stochastic_depth_rates = self.stochastic_depth_rates[: self.num_blocks]
            self.final_conv = nn.Identity()
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if pruned or prune_head:
            self.reset_classifier(0, "")
        return wanted

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by depth, for timm's layer-wise learning rates; a stacked tail is one layer."""
        blocks = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"
        tails, last = (r"^stages\.(\d+)\.tail", (1,)), (r"^final_conv", (99999,))
        return {"stem": r"^stem", "blocks": [(blocks, None), tails, last]}

    def no_weight_decay(self) -> set[str]:
        """Gains and biases, as DeepMind has it (experiment_nfnets.py:107-111)."""
        return {name for name, _ in self.named_parameters() if name.endswith(("gain", "bias"))}

    # ---- cost ---------------------------------------------------------------------------------

    def flops(self, size: int) -> int:
        """Floating-point operations of a forward pass: twice `macs`; the unit of the ViT papers."""
        return 2 * self.macs(size)

    def macs(self, size: int, blocks_only: bool = False) -> int:
        """Multiply-accumulates of one `size` x `size` image, forward. What NF calls "FLOPs".

        Counted as the reference does (nfnet.py:154-173): convolutions, squeeze-excites, classifier.
        With `blocks_only`, only the blocks: what gradient checkpointing computes twice.
        """
        outside = blocks = 0
        for conv in self.stem:
            assert isinstance(conv, WSConv2d)
            size = -(-size // conv.stride[0])
            outside += _conv_macs(conv, size)
        for block in (block for stage in self.stages for block in stage.children()):
            assert isinstance(block, NFBlock)
            blocks += _conv_macs(block.conv0, size)
            size = -(-size // block.stride)
            for conv in (block.conv1, block.conv1b, block.conv2, block.conv_shortcut):
                blocks += 0 if conv is None else _conv_macs(conv, size)
            gates = block.squeeze_excite
            blocks += gates.reduce.weight.numel() + gates.expand.weight.numel()
        if isinstance(self.final_conv, WSConv2d):
            outside += _conv_macs(self.final_conv, size)
        return blocks + (0 if blocks_only else outside + self.num_features * self.num_classes)


def _conv_macs(conv: WSConv2d, out_size: int) -> int:
    return conv.weight.numel() * out_size**2


def _check_option(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}")
