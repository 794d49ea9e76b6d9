"""NFNets: the networks, their names, their weights. Needs nothing of the trainer.

Without torch there is the table of variants alone, which is what accounts and plans need.
"""

from importlib.util import find_spec

if find_spec("torch") is not None:
    from nfnets_xla.models.deploy import fuse as fuse
    from nfnets_xla.models.layers import WSConv2d as WSConv2d
    from nfnets_xla.models.nfnet import NFNet as NFNet
    from nfnets_xla.models.registry import create_model as create_model
    from nfnets_xla.models.registry import list_models as list_models
