"""NFNets: the networks, their names, their weights. Needs torch and nothing of the trainer."""

from nfnets_xla.models.deploy import fuse as fuse
from nfnets_xla.models.layers import WSConv2d as WSConv2d
from nfnets_xla.models.nfnet import NFNet as NFNet
from nfnets_xla.models.registry import create_model as create_model
from nfnets_xla.models.registry import list_models as list_models
