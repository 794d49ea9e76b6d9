"""The distance of pictures by a model: 1 - the cosine of their features.

For `shards dedup --model`: instead of comparing pixels, if copies have been altered too much for
that. A feature is the mean over a picture and its mirror image, so that mirroring does not matter.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nfnets_xla import sources
from nfnets_xla.data.augment import eval_view
from nfnets_xla.data.decode import decode
from nfnets_xla.data.dedup import Matches, opener
from nfnets_xla.data.jobs import Progress
from nfnets_xla.models.card import SCHEME
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.peers import PEERS, is_peer
from nfnets_xla.models.registry import Network, create_network
from nfnets_xla.models.timm_names import sizes_of_cfg
from nfnets_xla.task import MEAN_RGB, STDDEV_RGB

SIZE = 224  # pixels, of models that do not say what they are tested at
REMEMBERED = 4096  # features: a picture has several matches, one after another


class Model(NamedTuple):
    """A network without its head, and the size and colours of its images."""

    net: Network
    size: int
    mean_rgb: Sequence[float] = MEAN_RGB
    stddev_rgb: Sequence[float] = STDDEV_RGB


def compared(matches: Matches, model: Model, on_progress: Progress | None = None) -> Matches:
    """`matches` with distances of features instead of pixels."""
    opened = opener(matches)

    @lru_cache(REMEMBERED)
    def feature(is_reference: bool, shard: int, row: int) -> Tensor:
        return embedded(model, opened(is_reference, shard).read(0, row))

    distance_M = np.zeros_like(matches.distance_M)
    pairs = zip(matches.sample_M2.tolist(), matches.reference_M2.tolist(), strict=True)
    for number, (sample, reference) in enumerate(pairs):
        distance_M[number] = 1 - float(feature(False, *sample) @ feature(True, *reference))
        if on_progress:
            on_progress(number + 1, len(distance_M))
    return matches._replace(distance_M=distance_M)


def load(name: str, weights: str | None) -> Model:
    """ValueError for weights of another model, and for none.

    Weights of a run take pictures as its evaluations do. A timm model otherwise takes the size that
    it is made for, and with timm's weights timm's colours."""
    sizes = None
    if weights is None:
        own = name.startswith(SCHEME)
        net = create_network(name, pretrained=not own, num_classes=0)
    else:
        found = sources.find_weights(weights, "raw")
        sizes = found.sizes
        of_one_size = name in PEERS or (is_peer(name) and sizes is not None)
        options = found.peer_options(name) if of_one_size else {}
        net = found.network(name, headless=True, **options)
    net.eval()
    if isinstance(net, NFNet):
        return Model(net, (sizes or sizes_of_cfg(net.pretrained_cfg)).test)
    cfg = net.net.pretrained_cfg
    size = sizes.test if sizes else cfg.get("input_size", (3, SIZE, SIZE))[-1]
    if weights is not None:
        return Model(net, size)
    mean_rgb, stddev_rgb = ([255 * part for part in cfg[name]] for name in ("mean", "std"))
    return Model(net, size, mean_rgb, stddev_rgb)


@torch.inference_mode()
def embedded(model: Model, data: bytes) -> Tensor:
    """The feature of an image file, normalised to length 1."""
    view_HWC = torch.from_numpy(eval_view(decode(data), size=model.size, margin=0)).float()
    mean_C, stddev_C = torch.tensor(model.mean_rgb), torch.tensor(model.stddev_rgb)
    image_CHW = ((view_HWC - mean_C) / stddev_C).permute(2, 0, 1)
    features_2F = model.net(torch.stack([image_CHW, image_CHW.flip(2)])).flatten(1)
    return torch.nn.functional.normalize(features_2F.mean(0), dim=0)
