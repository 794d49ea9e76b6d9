"""Load and save a network's weights: from a file or an address, in anybody's names."""

import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from nfnets_xla.models.download import download, is_address
from nfnets_xla.models.formats import read_weights
from nfnets_xla.models.layers import uncompiled
from nfnets_xla.models.names import in_our_names, unwrapped
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.peers import Peer


def load_checkpoint(source: str | Path) -> dict[str, Tensor]:
    """The tensors in a file of weights (formats.py), or at an http(s) address (then cached).

    The names are the file's; `load_into` translates them. Raises ValueError for a file that is
    absent or broken, or that holds anything but tensors.
    """
    return read_weights(download(str(source)) if is_address(source) else Path(source))


def load_into(
    net: NFNet | Peer, state: Mapping[str, Tensor], *, source: str, allow_new_head: bool = False
) -> bool:
    """Copy `state` into `net`; every name and shape must agree. Returns whether the head is new.

    DeepMind's and timm's names are translated first, and a ViT's position embeddings resized. With
    `allow_new_head`, if the classifiers differ in size or one side has none, `net` keeps its own
    (for fine-tuning). Messages call the weights `source`. Raises ValueError, changing nothing, if
    the weights are of another model or not all finite.
    """
    net = uncompiled(net)
    if not isinstance(net, (NFNet, Peer)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(
            f"load_into was given a {type(net).__name__}: give the network that create_model made, "
            "before it is wrapped, fused or cut down to feature maps"
        )
    check_holds(net, source)
    state = unwrapped(state)
    state = in_our_names(net, state, source) if isinstance(net, NFNet) else net.at_our_size(state)
    expected = net.state_dict()
    _check_body(state, expected, source)
    head = {f"{net.classifier_name}.{leaf}" for leaf in ("weight", "bias")}
    new_head = any(_shape(state, name) != _shape(expected, name) for name in head)
    theirs, ours = (
        _length(tensors, f"{net.classifier_name}.bias") for tensors in (state, expected)
    )
    if theirs != ours and not allow_new_head:
        raise ValueError(
            f"{source} has a classifier of {theirs} classes, expected {ours}: give "
            f"num_classes={theirs}, or allow_new_head=True to leave that classifier out"
        )
    skipped: set[str] = head if new_head and allow_new_head else set()
    for name in sorted((expected.keys() | state.keys()) - skipped):
        if _shape(state, name) != _shape(expected, name):
            raise ValueError(
                f"{source} is of another model: {name!r} is {_shape(state, name) or 'absent'} "
                f"there, expected {_shape(expected, name) or 'absent'}"
            )
    wanted = {name: state[name] for name in expected.keys() - skipped}
    for name in sorted(wanted):
        if not wanted[name].is_floating_point():
            raise ValueError(
                f"{source} has {wanted[name].dtype} in {name!r}: weights are of floating point"
            )
        if not torch.isfinite(wanted[name]).all():
            raise ValueError(
                f"{source} has values in {name!r} that are not finite: it is of no use"
            )
    net.load_state_dict({**expected, **wanted})
    return bool(expected.keys() & skipped)


def check_holds(net: NFNet | Peer, source: str) -> None:
    """ValueError for a network on the meta device, where loading weights silently does nothing."""
    if any(parameter.is_meta for parameter in net.parameters()):
        raise ValueError(
            f"the network is on the meta device, which keeps no values, so that {source} cannot be "
            "loaded: make it on another device, or with to_empty(device=...) first"
        )


def save_weights(net: nn.Module, path: Path, about: Mapping[str, str]) -> None:
    """Write `net`'s state dict as .safetensors with metadata `about`; all of it or nothing."""
    state = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    save_tensors(state, path, about)


def save_tensors(state: dict[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """Replaces the file at `path` only when all is written; OSError if it cannot be."""
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        save_file(state, temporary, metadata=dict(about))
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:  # of a full disk, too
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def describe(net: NFNet, name: str, provenance: str) -> dict[str, str]:
    """The metadata for a file of `net`'s weights."""
    return {
        "model": name,
        "num_classes": str(net.num_classes),
        "in_chans": str(net.in_chans),
        "plus_bottleneck": "paper" if net.variant.dense_remainder else "code",
        "provenance": provenance,
    }


def _shape(state: Mapping[str, Tensor], name: str) -> str | None:
    """The shape as a string; None if absent (a 0-d shape as a tuple would be false, too)."""
    return str(tuple(state[name].shape)) if name in state else None


def _length(state: Mapping[str, Tensor], name: str) -> int:
    return state[name].numel() if name in state else 0


def _check_body(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """If depths or widths differ, the message names those, not the first parameter that differs."""
    theirs, ours = _body(state), _body(expected)
    if theirs != ours:
        raise ValueError(
            f"{source} is of another model: {theirs}, expected {ours}; give the name of the model "
            "it was made with"
        )


def _body(state: Mapping[str, Tensor]) -> str:
    """E.g. "stages of 1, 2, 6, 3 blocks and 256, 512, 1536, 1536 channels"."""
    matches = (re.fullmatch(r"stages\.(\d+)\.\d+\.conv2\.gain", name) for name in state)
    depth = Counter(int(match[1]) for match in matches if match)
    if not depth:
        return "no stages"
    widths = [_length(state, f"stages.{stage}.0.conv2.gain") for stage in sorted(depth)]
    blocks = ", ".join(str(depth[stage]) for stage in sorted(depth))
    return f"stages of {blocks} blocks and {', '.join(map(str, widths))} channels"
