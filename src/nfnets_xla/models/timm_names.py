"""Registers our networks with timm: `timm.create_model("xla_nfnet_f7_plus")`.

timm calls DeepMind's networks `dm_nfnet_*` and has others under `nfnet_*`; ours are `xla_nfnet_*`.
`import nfnets_xla` calls `register_with_timm`, which waits until timm is imported: timm takes as
long to import as torch, and a data worker needs no models.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from nfnets_xla.models.published import IMAGENET, TAG
from nfnets_xla.models.variants import VARIANTS, Variant

if TYPE_CHECKING:  # torch is timm's to load
    from torch import Tensor, nn

    from nfnets_xla.models.nfnet import NFNet

PREFIX = "xla_"
TIMM = "timm.models"
# ImageNet's channels, from 0 to 1 (dataset.py:34-35 of the reference).
MEAN, STDDEV = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MARGIN = 32  # pixels: DeepMind resizes both sides to size + 32 for evaluation


class Sizes(NamedTuple):
    """Image sizes, in pixels, at which a network is trained and evaluated."""

    train: int
    test: int
    margin: int = MARGIN  # both sides are resized to test + margin, then cropped

    @classmethod
    def of_run(cls, data: Mapping[str, Any]) -> "Sizes":
        """From the `data` section of a run's configuration."""
        return cls(data["image_size"], data["eval_image_size"], data["eval_margin"])


default_cfgs: dict[str, Any] = {}  # timm's registry reads this name in this module


def register_with_timm() -> None:
    """Register now if timm is imported already, else as soon as it is."""
    if TIMM in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterTimm())


class _AfterTimm(importlib.abc.MetaPathFinder):
    """Registers our networks right after timm.models is imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TIMM:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from timm.models import generate_default_cfgs, register_model

    for name, variant in VARIANTS.items():
        tagged = f"{PREFIX}{name}.{TAG}" if name in IMAGENET else PREFIX + name
        cfg = timm_cfg(name, variant)
        default_cfgs.update(generate_default_cfgs({tagged: cfg}))  # pyright: ignore[reportUnknownArgumentType]
        register_model(_entrypoint(name))


def timm_cfg(name: str, variant: Variant) -> dict[str, Any]:
    """timm's pretrained_cfg: sizes, preprocessing, and where classifier and weights are."""
    from nfnets_xla.models.nfnet import NFNet

    found = {"hf_hub_id": f"timm/dm_{name}.{TAG}", "license": "apache-2.0"}
    return {
        **(found if name in IMAGENET else {}),
        "architecture": PREFIX + name,
        "num_classes": 1000,
        **sized_cfg(Sizes(variant.train_size, variant.test_size)),
        "crop_mode": "squash",
        "interpolation": "bicubic",
        "mean": MEAN,
        "std": STDDEV,
        "first_conv": "stem.0",
        "classifier": NFNet.classifier_name,
    }


def sized_cfg(sizes: Sizes) -> dict[str, Any]:
    """The entries of timm's pretrained_cfg that depend on the image sizes."""
    return {
        "input_size": (3, sizes.train, sizes.train),
        "test_input_size": (3, sizes.test, sizes.test),
        "pool_size": (-(-sizes.train // 32),) * 2,
        "crop_pct": _crop_share(sizes.train, sizes.margin),
        "test_crop_pct": _crop_share(sizes.test, sizes.margin),
    }


def sizes_of_cfg(cfg: Mapping[str, Any]) -> Sizes:
    """The inverse of `sized_cfg`."""
    train, test = int(cfg["input_size"][-1]), int(cfg["test_input_size"][-1])
    return Sizes(train, test, int(test / cfg["test_crop_pct"]) - test)


def _crop_share(size: int, margin: int) -> float:
    """The share of the resized side that the crop keeps. Slightly less, since timm divides by it
    and rounds down to get the resized side."""
    return size / (size + margin) * (1 - 1e-9)


def _entrypoint(name: str) -> "Callable[..., nn.Module]":
    def build(pretrained: bool = False, **options: Any) -> "nn.Module":
        from timm.models import build_model_with_cfg  # pyright: ignore[reportUnknownVariableType]

        from nfnets_xla.models.nfnet import NFNet

        return build_model_with_cfg(
            partial(NFNet, VARIANTS[name]),
            PREFIX + name,
            pretrained,
            feature_cfg={"feature_cls": "getter"},
            pretrained_filter_fn=_in_our_names,
            **options,
        )

    build.__name__ = build.__qualname__ = PREFIX + name
    build.__module__ = __name__
    build.__doc__ = f"DeepMind's {name} as nfnets_xla has it."
    return build


def _in_our_names(state: "Mapping[str, Tensor]", net: "NFNet") -> "dict[str, Tensor]":
    from nfnets_xla.models.names import in_our_names

    return dict(in_our_names(net, state, "the file"))
