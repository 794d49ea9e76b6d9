"""Names to models. `nfnet_f3` here is DeepMind's network, which timm calls `dm_nfnet_f3`."""

import difflib
import fnmatch
import re
from pathlib import Path

import torch

from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.variants import VARIANTS, Variant
from nfnets_xla.models.weights import load_checkpoint, load_into


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    checkpoint_path: str | Path | None = None,
    in_chans: int = 3,
    drop_rate: float | None = None,
    drop_path_rate: float = 0.25,
    plus_bottleneck: str = "code",
) -> NFNet:
    """Build a model by name, with random weights or those of `checkpoint_path` (see weights.py).

    `drop_rate=None` takes the variant's. The weights' classifier must have `num_classes`, except
    that 0 asks for none and leaves theirs out; to fine-tune to other classes, use
    `weights.load_into`. Raises ValueError for an unknown name (with the nearest ones), for options
    out of range and for weights of another model.

    >>> create_model("nfnet_mini_f0", num_classes=10).num_features
    384
    """
    net = NFNet(
        VARIANTS[canonical_name(name)],
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        plus_bottleneck=plus_bottleneck,
    )
    if checkpoint_path is not None:
        weights = load_checkpoint(checkpoint_path)
        load_into(net, weights, source=str(checkpoint_path), allow_new_head=num_classes == 0)
    return net


def list_models(pattern: str = "*") -> list[str]:
    """Names that match a shell pattern, in natural order.

    >>> list_models("nfnet_f[01]*")
    ['nfnet_f0', 'nfnet_f0_plus', 'nfnet_f1', 'nfnet_f1_plus']
    """
    return sorted(fnmatch.filter(VARIANTS, pattern), key=_natural)


def register(name: str, variant: Variant) -> None:
    """Add a variant of your own. A name that is taken is a ValueError."""
    if name in VARIANTS:
        raise ValueError(f"model name {name!r} is taken; choose another")
    VARIANTS[name] = variant


def canonical_name(name: str) -> str:
    """Accepts what people write: `NFNet_F7+`, `F7+`, and timm's `dm_nfnet_f7`."""
    plain = name.lower().replace("-", "_").replace("+", "_plus").removeprefix("dm_")
    if re.fullmatch(r"(mini_)?f\d(_plus)?", plain):
        plain = f"nfnet_{plain}"
    if plain in VARIANTS:
        return plain
    if name in VARIANTS:
        return name
    near = difflib.get_close_matches(plain, VARIANTS, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "see `nfnets-xla models`"
    raise ValueError(f"there is no model {name!r}; {hint}")


def card(name: str) -> str:
    """One line on a model: parameters, and multiply-accumulates at its two resolutions."""
    variant = VARIANTS[canonical_name(name)]
    with torch.device("meta"):
        net = NFNet(variant)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    train, test = variant.train_size, variant.test_size
    return (
        f"{name:22} {parameters / 1e6:7.2f}M parameters  "
        f"{net.macs(train) / 1e9:7.2f} GMACs at {train} px  "
        f"{net.macs(test) / 1e9:7.2f} GMACs at {test} px"
    )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", name)]
