"""NFNets for PyTorch, and the training at scale of arXiv 2310.16764."""

from importlib.util import find_spec

from nfnets_xla.version import __version__ as __version__

if find_spec("torch") is not None:  # accounts, laws and plans (scaling/) work without it
    from nfnets_xla.models import NFNet as NFNet
    from nfnets_xla.models import WSConv2d as WSConv2d
    from nfnets_xla.models import create_model as create_model
    from nfnets_xla.models import fuse as fuse
    from nfnets_xla.models import list_models as list_models
    from nfnets_xla.models.timm_names import register_with_timm

    register_with_timm()
