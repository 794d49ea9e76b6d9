"""Convert a file of weights: reads any known format and naming, writes the naming asked for."""

# pyright: reportUnknownMemberType=false
# torch types its own signatures in part.

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from nfnets_xla.models.download import download, is_address
from nfnets_xla.models.formats import read_metadata, read_weights
from nfnets_xla.models.names import HEAD, in_our_names, to_haiku, to_timm
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.registry import canonical_name
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.models.weights import describe, load_into, save_tensors

TARGETS = ("ours", "timm", "haiku")


def convert_weights(
    source: str,
    target: Path,
    *,
    model: str,
    to: str = "ours",
    plus_bottleneck: str = "code",
    force: bool = False,
) -> str:
    """Rewrite weights of an NFNet as .safetensors: in our names, timm's, or DeepMind's.

    Every name, shape and value is checked against the model first. With DeepMind's names the arrays
    have DeepMind's layouts. Returns one line to print. Raises ValueError, writing nothing, for
    weights of another model, a target with another suffix, or one that exists (without `force`).
    """
    check_target(target, force)
    name = canonical_name(model)
    if name not in VARIANTS:
        raise ValueError(f"model is {name}; it must be an NFNet: no others are converted")
    path = download(source) if is_address(source) else Path(source)
    with torch.device("meta"):
        net = NFNet(VARIANTS[name], plus_bottleneck=plus_bottleneck)
    state = in_our_names(net, read_weights(path), source)
    classes, in_chans = _sizes(state)
    net = NFNet(
        VARIANTS[name], num_classes=classes, in_chans=in_chans, plus_bottleneck=plus_bottleneck
    )
    load_into(net, state, source=source)
    origin = read_metadata(path).get("provenance") or source.rsplit("/", 1)[-1]
    save_tensors(_named(net, to), target, describe(net, name, origin) | {"names": to})
    whose = {"ours": "our", "timm": "timm's", "haiku": "DeepMind's"}[to]
    return f"{target}: {name}, {classes} classes, in {whose} names, from {source}"


def check_target(target: Path, force: bool) -> None:
    """ValueError for a file that is not to be written."""
    if target.suffix != ".safetensors":
        raise ValueError(f"{target} has to end in .safetensors, which is what is written")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; give the name of a file")
    if target.exists() and not force:
        raise ValueError(f"{target} exists; give --force to overwrite it")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is not a folder; make it first")


def _sizes(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Numbers of classes and of input channels, from the shapes of the weights."""
    bias, stem = state.get(HEAD[1]), state.get("stem.0.weight")
    classes = 0 if bias is None else len(bias)
    return classes, stem.shape[1] if stem is not None and stem.ndim == 4 else 3


def _named(net: NFNet, to: str) -> dict[str, Tensor]:
    if to == "timm":
        return {name: value.contiguous() for name, value in to_timm(net).items()}
    if to == "haiku":
        return {name: torch.from_numpy(array) for name, array in to_haiku(net).items()}
    return dict(net.state_dict())
