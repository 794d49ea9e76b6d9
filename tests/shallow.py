"""The smallest NFNet with every kind of block: five of them, where the mini F0 has twelve.

Runs on XLA take most of their time to compile, and what they are compared with is as shallow.
"""

from dataclasses import replace

from nfnets_xla.models.variants import VARIANTS
from tests.models.networks import DEPTH

SHALLOW = ["model.name=nfnet_shallow"]


def register_shallow() -> None:
    """In the process that runs it only: tests of the registry see what users see."""
    VARIANTS["nfnet_shallow"] = replace(VARIANTS["nfnet_mini_f0"], depth=DEPTH)
