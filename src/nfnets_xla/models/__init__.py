"""NFNets: the networks, their names, their weights. Needs nothing of the trainer.

Torch is loaded with the first name that is asked for. The table of variants, which is what accounts
and plans need, is there without.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
__all__ = ["NFNet", "WSConv2d", "create_model", "fuse", "list_models"]


def __getattr__(name: str) -> Any:
    if name in HOMES:
        return getattr(import_module(f"nfnets_xla.models.{HOMES[name]}"), name)
    raise AttributeError(f"module 'nfnets_xla.models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
