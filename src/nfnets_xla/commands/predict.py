"""Classify images with a model.

    nfnets-xla predict nfnet_f0.dm_in1k cat.jpg dog.png   # public weights
    nfnets-xla predict nfnet_f0 --weights RUN cat.jpg     # of a run or a file
    nfnets-xla predict local-dir:CARD cat.jpg             # by `checkpoint card`

An image is resized and cropped as in the run's evaluations, or in those of the public weights. The
model computes in float32.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nfnets_xla import sources
from nfnets_xla.arguments import Parser
from nfnets_xla.data.augment import eval_view
from nfnets_xla.data.decode import decode
from nfnets_xla.losses import probabilities
from nfnets_xla.models.card import SCHEME, has_its_own, read_card
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.peers import is_peer
from nfnets_xla.models.published import IMAGENET
from nfnets_xla.models.registry import Network, create_network, split_tag
from nfnets_xla.models.timm_names import Sizes, sizes_of_cfg
from nfnets_xla.sources import Weights
from nfnets_xla.task import MEAN_RGB, STDDEV_RGB


def main(arguments: Sequence[str]) -> None:
    given = parser().parse_args(arguments)
    if given.top < 1 or (given.size is not None and given.size < 32):
        raise ValueError(
            f"--top is {given.top} and --size {given.size}; they must be at least 1 and 32"
        )
    pictures = [(path, _read(path)) for path in given.image]  # refuse before weights are fetched
    net, sizes, loss = load(given.model, given.weights, given.ema, given.size)
    sizes = sizes._replace(test=given.size or sizes.test)
    names = class_names(net.num_classes)
    for path, pixels in pictures:
        print(path)
        for label, share in best(net, pixels, sizes, given.top, loss):
            print(f"  {share:6.1%}  {label}{f'  {names[label]}' if names else ''}")


def load(name: str, weights: str | None, ema: bool, size: int | None) -> tuple[Network, Sizes, str]:
    """The network in evaluation mode, its default image sizes, and its loss, which decides how
    logits become probabilities. The network must take images of `size`.

    ValueError for weights of another model, and for none.
    """
    sizes, loss = None, "softmax"
    if ema and weights is None:
        raise ValueError("--ema is for --weights RUN: these weights have no moving average")
    if name.startswith(SCHEME):
        if weights is not None:
            raise has_its_own(name, f"--weights {weights}")
        net, loss = create_network(name), read_card(name).loss
    elif weights is not None:
        found = sources.find_weights(weights, "ema" if ema else "raw")
        if ema and found.of is None:
            raise ValueError(f"--ema is for --weights RUN: {weights} is a file without an average")
        (net, sizes), loss = of_weights(name, found, size), found.loss
    elif is_peer(name):
        raise ValueError(f"{name} has no weights here: give --weights RUN")
    else:
        plain, tag = split_tag(name)
        if tag is None:
            public = f", or {plain}.dm_in1k" if plain in IMAGENET else ""
            raise ValueError(f"{name} has no weights of its own: give --weights RUN{public}")
        net = create_network(name, pretrained=True)
    if sizes is None:
        assert isinstance(net, NFNet)
        sizes = sizes_of_cfg(net.pretrained_cfg)
    return net.eval(), sizes, loss


def of_weights(name: str, found: Weights, size: int | None) -> tuple[Network, Sizes | None]:
    """The network with these weights, and the image sizes of their run, for which peers are
    built."""
    options = found.peer_options(name, size) if is_peer(name) else {}
    net = found.network(name, **options)
    if not net.num_classes:
        raise ValueError(f"{found.source} has no classifier: give weights that have one")
    return net, found.sizes


def best(
    net: Network, pixels: Any, sizes: Sizes, top: int, loss: str = "softmax"
) -> Iterator[tuple[int, float]]:
    """(class, probability), most probable first; with a sigmoid loss classes are independent."""
    view_HWC = torch.from_numpy(eval_view(pixels, size=sizes.test, margin=sizes.margin)).float()
    image_CHW = ((view_HWC - torch.tensor(MEAN_RGB)) / torch.tensor(STDDEV_RGB)).permute(2, 0, 1)
    with torch.inference_mode():
        (shares_K,) = probabilities(net(image_CHW[None]), loss)
    found = shares_K.topk(min(top, len(shares_K)))
    yield from zip(found.indices.tolist(), found.values.tolist(), strict=True)


def class_names(num_classes: int) -> list[str] | None:
    """ImageNet's, in timm's words, if there are as many classes."""
    from timm.data.imagenet_info import ImageNetInfo

    if num_classes != 1000:
        return None
    info = ImageNetInfo()
    return [info.index_to_description(number) for number in range(num_classes)]


def _read(path: str) -> Any:
    try:
        return decode(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parser() -> Parser:
    made = Parser(prog="nfnets-xla predict", description=__doc__)
    made.add_argument("model", help="a name of `nfnets-xla models`, or local-dir:FOLDER")
    made.add_argument("image", nargs="+", help="image file")
    made.add_argument("--weights", help="a run's folder, a checkpoint or a file of weights")
    made.add_argument(
        "--ema", action="store_true", help="use the moving average of a run's weights"
    )
    made.add_argument("--size", type=int, help="in pixels; default: that of the evaluations")
    made.add_argument("--top", type=int, default=5, help="number of classes to print")
    return made
