"""The smallest NFNet with every kind of block, a third as deep as the mini F0.

A third of the graph is compiled in a third of the time, and what it is compared with is as shallow.
"""

from dataclasses import replace

from nfnets_xla.models.registry import register
from nfnets_xla.models.variants import VARIANTS

register("nfnet_shallow", replace(VARIANTS["nfnet_mini_f0"], depth=(1, 2, 1, 1)))
SHALLOW = ["model.name=nfnet_shallow"]
