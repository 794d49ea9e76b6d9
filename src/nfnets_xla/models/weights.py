"""Reading weights, and DeepMind's names for them.

Every name is mapped by an explicit table; nothing is guessed. Files that can run code when they are
opened (pickles) are not read.
"""

import pickle
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nfnets_xla.models.nfnet import NFNet

CONVOLUTION = {"w": "weight", "gain": "gain", "bias": "bias"}
LINEAR = {"w": "weight", "b": "bias"}


def haiku_names(net: NFNet) -> dict[str, str]:
    """{name in our state dict: DeepMind's flattened name}, e.g.
    {"stages.0.1.conv0.weight": "NFNet.nf_block_1.conv0.w"}; blocks are numbered through there."""
    names: dict[str, str] = {}

    def add(ours: str, theirs: str, leaves: Mapping[str, str]) -> None:
        names.update({f"{ours}.{leaf}": f"{theirs}.{haiku}" for haiku, leaf in leaves.items()})

    for number in range(len(net.stem)):
        add(f"stem.{number}", f"NFNet.stem_conv{number}", CONVOLUTION)
    number = 0
    for stage, depth in enumerate(net.variant.depth):
        for place in range(depth):
            ours = f"stages.{stage}.{place}"
            theirs = "NFNet.nf_block" + (f"_{number}" if number else "")
            for conv in ("conv0", "conv1", "conv1b", "conv2"):
                add(f"{ours}.{conv}", f"{theirs}.{conv}", CONVOLUTION)
            if place == 0:
                add(f"{ours}.conv_shortcut", f"{theirs}.conv_shortcut", CONVOLUTION)
            add(f"{ours}.squeeze_excite.reduce", f"{theirs}.squeeze_excite.linear", LINEAR)
            add(f"{ours}.squeeze_excite.expand", f"{theirs}.squeeze_excite.linear_1", LINEAR)
            names[f"{ours}.skip_gain"] = f"{theirs}.skip_gain"
            number += 1
    add("final_conv", "NFNet.final_conv", CONVOLUTION)
    if net.num_classes:
        add("head", "NFNet.linear", LINEAR)
    return names


def from_haiku(net: NFNet, arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """A state dict (float32, on the CPU) for `net`, whose shapes it does not check.

    `arrays` are Haiku's parameters under flattened names; HWIO becomes OIHW, IO becomes OI. Raises
    ValueError unless their names are exactly `net`'s.
    """
    names = haiku_names(net)
    theirs = set(names.values())
    for verb, wrong in (("lack", theirs - arrays.keys()), ("also hold", arrays.keys() - theirs)):
        if wrong:
            raise ValueError(
                f"the parameters {verb} {min(wrong)!r} ({len(wrong)} such names): they are of "
                "another model, or its names are not flattened"
            )
    return {ours: torch.from_numpy(_transposed(arrays[theirs])) for ours, theirs in names.items()}


def to_haiku(net: NFNet) -> dict[str, np.ndarray]:
    """The inverse of `from_haiku`, for the weights `net` holds."""
    state = net.state_dict()
    return {
        theirs: _transposed(state[ours].detach().cpu().numpy(), inverse=True)
        for ours, theirs in haiku_names(net).items()
    }


def _transposed(array: np.ndarray, *, inverse: bool = False) -> np.ndarray:
    if array.ndim == 4:
        array = array.transpose((2, 3, 1, 0) if inverse else (3, 2, 0, 1))
    elif array.ndim == 2:
        array = array.T
    return np.array(array, np.float32, order="C")


def load_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .pt / .pth file read without running its code.

    Raises ValueError for a file that is absent, broken, or not a plain state dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no weights file {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole .safetensors file: {error}") from error
    if path.suffix in (".pt", ".pth"):
        return _load_torch(path)
    if path.suffix == ".npz":  # nfnets/utils.py:111-115 of the reference reads it with dill
        raise ValueError(
            f"{path} is .npz: DeepMind's are pickles by another name, which can run code when they "
            "are opened, so none is read; weights are .safetensors or .pt"
        )
    raise ValueError(
        f"{path} is {path.suffix or 'without a suffix'}; weights are .safetensors or .pt"
    )


def _load_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:  # refused, or broken
        raise ValueError(
            f"{path} is not a file of tensors alone, and nothing else is read, since unpickling "
            "can run code: save the state dict by itself, best as .safetensors"
        ) from error
    if isinstance(state, dict) and all(isinstance(value, Tensor) for value in state.values()):
        return state
    raise ValueError(f"{path} is not a plain state dict of tensors: save only that")


def load_into(
    net: NFNet, state: Mapping[str, Tensor], *, source: str, allow_new_head: bool = False
) -> bool:
    """Copy `state` into `net`; every name and shape must agree. Returns whether the head is new.

    With `allow_new_head` a classifier of another size (or none, on either side) is left out, and
    `net` keeps its own: fine-tuning. `source` is what messages call the weights. Raises ValueError,
    changing nothing, if the weights are of another model.
    """
    _refuse_timm(state, source)
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
    skipped = head if new_head and allow_new_head else set()
    for name in sorted((expected.keys() | state.keys()) - skipped):
        if _shape(state, name) != _shape(expected, name):
            raise ValueError(
                f"{source} is of another model: {name!r} is {_shape(state, name) or 'absent'} "
                f"there, expected {_shape(expected, name) or 'absent'}"
            )
    net.load_state_dict({**expected, **{name: state[name] for name in expected.keys() - skipped}})
    return bool(expected.keys() & skipped)


def _shape(state: Mapping[str, Tensor], name: str) -> str | None:
    """As a message prints it, so that the 0-d shape `()` is not taken for absence."""
    return str(tuple(state[name].shape)) if name in state else None


def _length(state: Mapping[str, Tensor], name: str) -> int:
    return state[name].numel() if name in state else 0


def _check_body(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """Another member of the family is told by its depths and widths, not by a parameter of it."""
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


def _refuse_timm(state: Mapping[str, Tensor], source: str) -> None:
    """timm's two families share their stem's names; only dm_nfnet has skip gains."""
    if "stem.conv1.weight" not in state:
        return
    if any(name.endswith("skipinit_gain") for name in state):
        raise ValueError(f"{source} has timm's names (dm_nfnet), which are not converted yet")
    raise ValueError(
        f"{source} holds timm's own nfnet, a different network (no skip gain, other padding, gains "
        "inside the convolutions): only DeepMind's (timm's dm_nfnet) are the NFNets of this library"
    )
