"""Parameter names and layouts: ours, DeepMind's, timm's. Explicit tables; nothing is guessed.

ours      stages.0.1.conv0.weight         (O, I, H, W), gains (O,), linears (O, I)
DeepMind  NFNet.nf_block_1.conv0.w        (H, W, I, O), gains (O,), linears (I, O)
timm      stages.0.1.conv1.weight         (O, I, H, W), gains (O, 1, 1, 1), squeeze-excite 1x1 convs
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from nfnets_xla.models.nfnet import NFNet

CONVOLUTION = {"w": "weight", "gain": "gain", "bias": "bias"}
LINEAR = {"w": "weight", "b": "bias"}
TIMM_PARTS = {
    "conv0": "conv1",
    "conv1": "conv2",
    "conv1b": "conv2b",
    "conv2": "conv3",
    "conv_shortcut": "downsample.conv",
    "squeeze_excite.reduce": "attn_last.fc1",
    "squeeze_excite.expand": "attn_last.fc2",
    "skip_gain": "skipinit_gain",
}
HEAD = ("head.weight", "head.bias")
NFNETS = "stages.0.0.conv1.gain"  # a name only NFNets have, in our names and in timm's
PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel's, torch.compile's


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` without the prefixes and entries of torch's wrappers. If it is of a module that
    contains exactly one NFNet, only that network's entries."""
    rest = dict(state)
    rest.pop("n_averaged", None)  # torch.optim.swa_utils.AveragedModel adds it beside "module."
    for prefix in (*PREFIXES, *PREFIXES):  # the wrappers may be nested in either order
        if all(name.startswith(prefix) for name in rest):
            rest = {name.removeprefix(prefix): tensor for name, tensor in rest.items()}
    # A training module prefixes its network's names with an attribute, as Lightning's "model.".
    around = {name.removesuffix(NFNETS) for name in rest if name.endswith(NFNETS)}
    if len(around) == 1 and (prefix := around.pop()).endswith("."):
        inside = {name: tensor for name, tensor in rest.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): tensor for name, tensor in inside.items()}
    return rest


def haiku_names(net: NFNet) -> dict[str, str]:
    """{name in our state dict: DeepMind's flattened name}, e.g.
    {"stages.0.1.conv0.weight": "NFNet.nf_block_1.conv0.w"}; DeepMind numbers blocks across stages.

    Includes the classifier even if `net` has none."""
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
    add("head", "NFNet.linear", LINEAR)
    return names


def timm_names(net: NFNet) -> dict[str, str]:
    """The same for timm's names, e.g. {"stem.0.gain": "stem.conv1.gain"}."""
    names: dict[str, str] = {}
    for ours in haiku_names(net):
        place, _, leaf = ours.rpartition(".")
        if ours.startswith("stem."):
            names[ours] = f"stem.conv{int(place.removeprefix('stem.')) + 1}.{leaf}"
        elif ours.startswith("stages."):
            _, stage, block, part = ours.split(".", 3)
            part, dot, leaf = (part, "", "") if part == "skip_gain" else part.rpartition(".")
            names[ours] = f"stages.{stage}.{block}.{TIMM_PARTS[part]}{dot}{leaf}"
        else:
            names[ours] = ours.replace("head.", "head.fc.")
    return names


def from_haiku(net: NFNet, theirs: Mapping[str, np.ndarray | Tensor]) -> dict[str, Tensor]:
    """A state dict (float32, on the CPU) for `net`; shapes are not checked.

    `theirs` are Haiku's parameters under flattened names. Raises ValueError unless the names are
    those of `net`'s variant, with or without a classifier.
    """
    names = _checked(haiku_names(net), theirs)
    return {ours: _from_haiku_layout(theirs[name]) for ours, name in names.items()}


def to_haiku(net: NFNet) -> dict[str, np.ndarray]:
    """The inverse of `from_haiku`, for the weights `net` holds."""
    state = net.state_dict()
    names = haiku_names(net)
    return {names[ours]: _to_haiku_layout(value) for ours, value in state.items()}


def from_timm(net: NFNet, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for `net` from a timm dm_nfnet's; raises ValueError as `from_haiku` does."""
    names = _checked(timm_names(net), theirs)
    return {ours: _from_timm_layout(ours, theirs[name]) for ours, name in names.items()}


def to_timm(net: NFNet) -> dict[str, Tensor]:
    """The inverse of `from_timm`, for the weights `net` holds."""
    names = timm_names(net)
    state = net.state_dict()
    return {names[ours]: _to_timm_layout(ours, value) for ours, value in state.items()}


def in_our_names(net: NFNet, state: Mapping[str, Tensor], source: str) -> Mapping[str, Tensor]:
    """`state` with our names, from anybody's. ValueError for timm's own nfnet, another network."""
    try:
        if any(name.startswith("NFNet.") for name in state):
            return from_haiku(net, state)
        if "stem.conv1.weight" in state:
            if any(name.endswith("skipinit_gain") for name in state):
                return from_timm(net, state)
            raise ValueError(
                "it holds timm's own nfnet, a different network (no skip gain, other padding, "
                "gains inside the convolutions): only DeepMind's (timm's dm_nfnet) are the NFNets "
                "of this library"
            )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    return state


def classes_in(state: Mapping[str, Tensor], classifier: str = "head") -> int:
    """The number of classes in a state dict, in anybody's names; 0 if it has no classifier.

    `classifier` is the network's name for it: "head" in NFNets, many others in peers."""
    biases = (f"{classifier}.bias", "head.fc.bias", "NFNet.linear.b")
    return next((state[name].numel() for name in biases if name in state), 0)


def _checked(names: dict[str, str], theirs: Mapping[str, object]) -> dict[str, str]:
    """`names`, less the classifier if `theirs` has none. ValueError for any other difference."""
    present = {ours: name for ours, name in names.items() if ours not in HEAD or name in theirs}
    wanted = set(present.values())
    for verb, wrong in (("lack", wanted - theirs.keys()), ("also hold", theirs.keys() - wanted)):
        if wrong:
            raise ValueError(
                f"the parameters {verb} {min(wrong)!r} ({len(wrong)} such names): they are of "
                "another model; give the name of the one they were made for"
            )
    return present


def _from_haiku_layout(value: np.ndarray | Tensor) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float32)
    axes = {4: (3, 2, 0, 1), 2: (1, 0)}.get(tensor.ndim)
    return tensor.clone() if axes is None else tensor.permute(axes).contiguous()


def _to_haiku_layout(value: Tensor) -> np.ndarray:
    array = value.detach().cpu().float().numpy()
    axes = {4: (2, 3, 1, 0), 2: (1, 0)}.get(array.ndim)
    return array.copy() if axes is None else np.ascontiguousarray(array.transpose(axes))


def _from_timm_layout(ours: str, value: Tensor) -> Tensor:
    if ours.endswith(".gain"):
        return value.flatten()
    return value.flatten(1) if ".squeeze_excite." in ours and value.ndim == 4 else value


def _to_timm_layout(ours: str, value: Tensor) -> Tensor:
    if ours.endswith(".gain"):
        return value[:, None, None, None]
    if ".squeeze_excite." in ours and value.ndim == 2:
        return value[:, :, None, None]
    return value
