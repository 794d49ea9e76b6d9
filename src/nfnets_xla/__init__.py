"""NFNets for PyTorch, and the training at scale of arXiv 2310.16764."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nfnets_xla.models.timm_names import register_with_timm
from nfnets_xla.version import __version__ as __version__

if TYPE_CHECKING:
    from nfnets_xla.models.deploy import fuse as fuse
    from nfnets_xla.models.layers import WSConv2d as WSConv2d
    from nfnets_xla.models.nfnet import NFNet as NFNet
    from nfnets_xla.models.registry import create_model as create_model
    from nfnets_xla.models.registry import list_models as list_models

HOMES = {
    "NFNet": "nfnet",
    "WSConv2d": "layers",
    "create_model": "registry",
    "fuse": "deploy",
    "list_models": "registry",
}
__all__ = ["NFNet", "WSConv2d", "__version__", "create_model", "fuse", "list_models"]

register_with_timm()


def __getattr__(name: str) -> Any:
    """Import these names, and torch, on first use: plans and `--help` need no torch."""
    if name in HOMES:
        return getattr(import_module(f"nfnets_xla.models.{HOMES[name]}"), name)
    raise AttributeError(f"module 'nfnets_xla' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
