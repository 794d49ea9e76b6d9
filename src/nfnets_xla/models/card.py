"""A folder that is a model: weights, a config that timm reads, and a card for people.

`create_model("local-dir:FOLDER")` loads it here, and `timm.create_model("local-dir:FOLDER",
pretrained=True)` there. A model that timm has (dm_nfnet_f0 to f6) is written with timm's parameter
names, so that timm loads it without this library; its logits then differ by a few per cent, since
timm uses another eps and another GELU. The others are `xla_nfnet_*`, which timm knows once
`nfnets_xla` is imported.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from nfnets_xla.models.names import to_timm
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.timm_names import PREFIX, Sizes, sized_cfg, sizes_of_cfg, timm_cfg
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.models.weights import describe, save_tensors

SCHEME = "local-dir:"
# The options of NFNet that change what the same weights compute, with their defaults.
HOW = {"plus_bottleneck": "code", "gelu": "tanh", "eps_mode": "floor"}
CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "card.md"
OF_TIMM = {f"nfnet_f{number}": f"dm_nfnet_f{number}" for number in range(7)}


def has_its_own(name: str, left_out: str) -> ValueError:
    """The error for a card given together with other weights."""
    return ValueError(f"{name} has its own weights: leave out {left_out}")


def write_card(
    net: NFNet,
    name: str,
    folder: Path,
    facts: Mapping[str, Any],
    provenance: str,
    sizes: Sizes | None = None,
    loss: str = "softmax",
) -> None:
    """Write the whole folder or nothing. `facts` are rows of the card for people; `sizes` are the
    run's (by default the variant's); `loss` is what the logits were trained with. ValueError if
    `folder` exists."""
    if folder.exists():
        raise ValueError(f"{folder} exists: name a folder that does not")
    if not folder.parent.is_dir():
        raise ValueError(f"{folder.parent} is not a folder; make it first")
    in_timm = name in OF_TIMM and not net.variant.dense_remainder
    sizes = sizes or Sizes(net.variant.train_size, net.variant.test_size)
    cfg = timm_cfg(name, net.variant) | sized_cfg(sizes)
    cfg["num_classes"] = net.num_classes
    for key in ("input_size", "test_input_size"):
        cfg[key] = (net.in_chans, *cfg[key][1:])
    for key in ("hf_hub_id", "license"):  # describe the public weights, not these
        cfg.pop(key, None)
    if in_timm:
        cfg |= {"first_conv": "stem.conv1", "classifier": "head.fc"}
    architecture = OF_TIMM[name] if in_timm else PREFIX + name
    config = {
        "architecture": architecture,
        "num_classes": net.num_classes,
        "num_features": net.num_features,
        "pretrained_cfg": cfg,
        **({} if in_timm else {"model_args": made_otherwise(net)}),
        "nfnets_xla": {
            "model": name,
            "in_chans": net.in_chans,
            "loss": loss,
            **made_otherwise(net),
        },
    }
    state = to_timm(net) if in_timm else net.state_dict()
    made = folder.with_name(f".{folder.name}.{uuid4().hex}")
    made.mkdir()
    try:
        tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        save_tensors(tensors, made / WEIGHTS, describe(net, name, provenance))
        (made / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        (made / CARD).write_text(_page(name, architecture, facts, sizes), encoding="utf-8")
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def made_otherwise(net: NFNet) -> dict[str, str]:
    """The options in `HOW` whose values are not the defaults."""
    its = {
        "plus_bottleneck": "paper" if net.variant.dense_remainder else "code",
        "gelu": net.variant.gelu,
        "eps_mode": net.variant.eps_mode,
    }
    return {name: value for name, value in its.items() if value != HOW[name]}


class Card(NamedTuple):
    model: str
    options: dict[str, Any]
    weights: Path
    sizes: Sizes
    loss: str  # "softmax" or "sigmoid": turns logits into probabilities


def read_card(name: str) -> Card:
    """The card at "local-dir:FOLDER". ValueError if FOLDER is not one that `write_card` wrote."""
    folder = Path(name.removeprefix(SCHEME))
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        ours = config["nfnets_xla"]
        model = ours["model"]
        options = {"num_classes": int(config["num_classes"]), "in_chans": int(ours["in_chans"])}
        options |= {name: ours[name] for name in HOW if name in ours}
        sizes, loss = sizes_of_cfg(config["pretrained_cfg"]), ours.get("loss", "softmax")
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"it has no {CONFIG}" if isinstance(error, OSError) else f"{CONFIG}: {error}"
        raise ValueError(
            f"{folder} is not a folder that `nfnets-xla checkpoint card` wrote: {why}"
        ) from None
    if model not in VARIANTS:
        raise ValueError(f"{folder} is of model {model!r}, which this release does not have")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} holds no {WEIGHTS}: write it anew")
    return Card(model, options, folder / WEIGHTS, sizes, loss)


def _page(name: str, architecture: str, facts: Mapping[str, Any], sizes: Sizes) -> str:
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""# {name}

| | |
|---|---|
{rows}

    import nfnets_xla
    net = nfnets_xla.create_model("local-dir:THIS_FOLDER")

    import timm, nfnets_xla
    net = timm.create_model("local-dir:THIS_FOLDER", pretrained=True)   # {architecture}

Images: RGB, both sides resized to {sizes.test + sizes.margin} px, {sizes.test} px cropped in
the centre, normalised with ImageNet's mean and deviation;
`timm.data.resolve_model_data_config(net, use_test_size=True)` has the numbers.
"""
