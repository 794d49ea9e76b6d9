"""The smallest NFNet with every kind of block: five blocks, where the mini F0 has twelve.

Runs on XLA spend most of their time compiling; the runs they are compared with are as shallow.
"""

from dataclasses import replace

from nfnets_xla.models.variants import VARIANTS
from tests.models.networks import DEPTH

SHALLOW = ["model.name=nfnet_shallow"]


def register_shallow() -> None:
    """Register it in the calling process only: tests of the registry see what users see."""
    VARIANTS["nfnet_shallow"] = replace(VARIANTS["nfnet_mini_f0"], depth=DEPTH)
