"""Names to models. `nfnet_f3` here is DeepMind's network, which timm calls `dm_nfnet_f3`.

A name may have a tag for its weights (`nfnet_f3.dm_in1k`); `timm/<name>` is any timm model, and
`local-dir:<folder>` a model that `nfnets-xla checkpoint card` has written.
"""

import difflib
import fnmatch
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nfnets_xla.models.card import SCHEME, has_its_own, read_card
from nfnets_xla.models.formats import read_weights
from nfnets_xla.models.names import classes_in, in_our_names
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.peers import PEERS, Peer, create_peer, is_peer
from nfnets_xla.models.pretrained import fetch_pretrained
from nfnets_xla.models.published import HAIKU_TAG, IMAGENET, TAG
from nfnets_xla.models.timm_names import sized_cfg, timm_cfg
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.models.weights import check_holds, load_checkpoint, load_into

Network = NFNet | Peer


def create_model(
    name: str,
    *,
    features_only: bool = False,
    out_indices: Sequence[int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> nn.Module:
    """Build a model by name; the other options are those of `create_network`.

    With `features_only` the model returns a list of feature maps, those at `out_indices`: by
    default all five of an NFNet, at strides 2, 4, 8, 16 and 32, and the last four of a peer.
    `device` defaults to torch's current one; on "meta" nothing is allocated.

    >>> create_model("nfnet_mini_f0", num_classes=10).num_features
    384
    >>> maps = create_model("nfnet_mini_f0", features_only=True, out_indices=(1, 3))
    >>> [tuple(map.shape) for map in maps(torch.zeros(1, 3, 64, 64))]
    [(1, 32, 16, 16), (1, 192, 4, 4)]
    """
    with torch.device(torch.get_default_device() if device is None else device):
        net: nn.Module = create_network(name, **options)
    if dtype is not None:
        net = net.to(dtype)
    if features_only:
        from timm.models._features import FeatureGetterNet

        inner = net.net if isinstance(net, Peer) else net
        cfg = inner.pretrained_cfg  # for timm.data's transforms
        if out_indices is None:
            number = len(inner.feature_info)
            out_indices = range(0 if inner is net else max(0, number - 4), number)
        net = FeatureGetterNet(inner, out_indices=list(out_indices))  # type: ignore[arg-type]
        net.pretrained_cfg = cfg  # type: ignore[assignment]
    return net


def create_network(
    name: str,
    *,
    pretrained: bool = False,
    checkpoint_path: str | Path | None = None,
    num_classes: int | None = None,
    in_chans: int | None = None,
    allow_new_head: bool = False,
    **options: Any,
) -> Network:
    """The network itself, typed for training: an NFNet, or a peer with the same interface.

    Its weights are random, public (`pretrained`) or from a file (`checkpoint_path`, weights.py).
    A file's classifier must have `num_classes`: with `allow_new_head` one of another size is
    replaced by a new one, and with 0 classes it is left out. Public weights always allow a new
    head, and their first convolution is adapted to `in_chans` as timm does it. The defaults are
    1000 classes and 3 channels. "local-dir:FOLDER" (card.py) loads that folder's weights; both
    default to theirs, and another `num_classes` gives a new head. Raises ValueError for an unknown
    name (suggesting the nearest), options out of range, and weights of another model.
    """
    if pretrained and checkpoint_path is not None:
        raise ValueError("pretrained=True and checkpoint_path are two sources of weights; give one")
    if name.startswith(SCHEME):
        return _of_card(name, num_classes, in_chans, pretrained or checkpoint_path, options)
    num_classes = 1000 if num_classes is None else num_classes
    in_chans = 3 if in_chans is None else in_chans
    if is_peer(name):
        net: Network = create_peer(
            name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **options
        )
    else:
        plain, tag = split_tag(name)
        net = NFNet(VARIANTS[plain], num_classes=num_classes, in_chans=in_chans, **options)
        net.pretrained_cfg = timm_cfg(plain, net.variant)  # for timm.data's transforms
        if pretrained:
            load_pretrained(net, plain, tag)
    if checkpoint_path is not None:
        weights = load_checkpoint(checkpoint_path)
        new_head = allow_new_head or num_classes == 0
        load_into(net, weights, source=str(checkpoint_path), allow_new_head=new_head)
    return net


def _of_card(
    name: str,
    num_classes: int | None,
    in_chans: int | None,
    other_weights: object,
    options: dict[str, Any],
) -> NFNet:
    card = read_card(name)
    its = card.options
    if other_weights:
        raise has_its_own(name, "pretrained and checkpoint_path")
    if in_chans not in (None, its["in_chans"]):
        raise ValueError(f"in_chans is {in_chans}; {name} has {its['in_chans']}")
    classes = its["num_classes"] if num_classes is None else num_classes
    chosen: dict[str, Any] = its | {"num_classes": classes} | options
    net = NFNet(VARIANTS[card.model], **chosen)
    net.pretrained_cfg = timm_cfg(card.model, net.variant) | sized_cfg(card.sizes)
    load_into(net, load_checkpoint(card.weights), source=name, allow_new_head=True)
    return net


def load_pretrained(net: NFNet, name: str, tag: str | None) -> bool:
    """Load public weights into `net`. If its classifier has another size, `net` keeps that, and
    the result is True."""
    check_holds(net, name)  # before anything is fetched
    path = fetch_pretrained(name, tag)
    state = dict(in_our_names(net, read_weights(path), str(path)))
    if net.in_chans != 3:
        from timm.models._manipulate import adapt_input_conv

        first = adapt_input_conv(net.in_chans, state["stem.0.weight"])
        state["stem.0.weight"] = first
    return load_into(net, state, source=str(path), allow_new_head=True)


def count_classes(name: str, state: Mapping[str, Tensor]) -> int:
    """The number of classes in a state dict of this model; 0 if it has no classifier."""
    if not is_peer(name):
        return classes_in(state)
    with torch.device("meta"):
        return classes_in(state, create_network(name).classifier_name)


def split_tag(name: str) -> tuple[str, str | None]:
    """`nfnet_f3.dm_in1k` to ("nfnet_f3", "dm_in1k"); None if untagged. ValueError if unknown."""
    plain, dot, tag = name.partition(".")
    plain = canonical_name(plain)
    if dot and is_peer(plain):
        raise ValueError(f"there are no public weights of {plain}; leave out .{tag}")
    if dot and tag not in (TAG, HAIKU_TAG):
        raise ValueError(f"there is no tag {tag!r}; give {plain}.{TAG} or {plain}.{HAIKU_TAG}")
    return plain, tag or None


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Model names that match a shell pattern, in natural order; `pretrained`: tagged names only.

    >>> list_models("nfnet_f[01]*")
    ['nfnet_f0', 'nfnet_f0_plus', 'nfnet_f1', 'nfnet_f1_plus']
    >>> list_models("*f[56]*", pretrained=True)
    ['nfnet_f5.dm_in1k', 'nfnet_f6.dm_in1k']
    """
    names = [f"{name}.{TAG}" for name in IMAGENET] if pretrained else [*VARIANTS, *PEERS]
    return sorted(fnmatch.filter(names, pattern), key=_natural)


def canonical_name(name: str) -> str:
    """Our name for what people write: `NFNet_F7+`, `F7+`, or timm's `dm_nfnet_f7`; a peer's is
    its own. ValueError if unknown, suggesting the nearest."""
    if is_peer(name):
        return name
    plain = name.lower().replace("-", "_").replace("+", "_plus")
    plain = plain.removeprefix("dm_").removeprefix("xla_")
    if re.fullmatch(r"(mini_)?f\d(_plus)?", plain):
        plain = f"nfnet_{plain}"
    if plain in VARIANTS:
        return plain
    near = difflib.get_close_matches(plain, [*VARIANTS, *PEERS], n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see `nfnets-xla models`"
    raise ValueError(f"there is no model {name!r}; {hint} (timm's are timm/<name>)")


def count_parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
