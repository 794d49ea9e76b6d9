"""How far apart a model finds pictures: 1 less the cosine of their features.

For `shards dedup --model`: instead of pixels, where copies have been altered more than pixels
allow. A feature is the mean of a picture's and its mirror image's, so that mirroring costs nothing.
"""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from nfnets_xla import checkpoint
from nfnets_xla.data.augment import eval_view
from nfnets_xla.data.decode import decode
from nfnets_xla.data.dedup import Matches
from nfnets_xla.data.jobs import Progress
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.models.registry import Network, create_network
from nfnets_xla.models.weights import load_into
from nfnets_xla.task import MEAN_RGB, STDDEV_RGB

SIZE = 224  # pixels, of models that do not say what they are tested at
OPENED = 64  # shards
REMEMBERED = 4096  # features: a picture has several matches, one after another


def compared(
    matches: Matches, name: str, weights: str | None, on_progress: Progress | None = None
) -> Matches:
    """The matches with distances of features."""
    net = load(name, weights)
    size = getattr(getattr(net, "variant", None), "test_size", SIZE)

    @lru_cache(OPENED)  # an index keeps its file open: copies go, those of the matches stay
    def opened(is_reference: bool, shard: int) -> ShardIndex:
        return replace((matches.against if is_reference else matches.train)[shard])

    @lru_cache(REMEMBERED)
    def feature(is_reference: bool, shard: int, row: int) -> Tensor:
        return embedded(net, opened(is_reference, shard).read(0, row), size)

    distance_M = np.zeros_like(matches.distance_M)
    pairs = zip(matches.sample_M2.tolist(), matches.reference_M2.tolist(), strict=True)
    for number, (sample, reference) in enumerate(pairs):
        distance_M[number] = 1 - float(feature(False, *sample) @ feature(True, *reference))
        if on_progress:
            on_progress(number + 1, len(distance_M))
    return matches._replace(distance_M=distance_M)


def load(name: str, weights: str | None) -> Network:
    """The network without its head. ValueError for weights of another model, and for none."""
    if weights is None:
        own = name.startswith("local-dir:")
        net = create_network(name, pretrained=not own, num_classes=0)
    else:
        state, source = checkpoint.weights(weights, "raw")
        net = create_network(name, num_classes=0)
        load_into(net, state, source=source, allow_new_head=True)
    return net.eval()


@torch.inference_mode()
def embedded(net: Network, data: bytes, size: int) -> Tensor:
    """Of length 1."""
    view_HWC = torch.from_numpy(eval_view(decode(data), size=size, margin=0)).float()
    image_CHW = ((view_HWC - torch.tensor(MEAN_RGB)) / torch.tensor(STDDEV_RGB)).permute(2, 0, 1)
    features_2F = net(torch.stack([image_CHW, image_CHW.flip(2)])).flatten(1)
    return torch.nn.functional.normalize(features_2F.mean(0), dim=0)
