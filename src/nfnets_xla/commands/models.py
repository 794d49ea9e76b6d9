"""List models with their parameters and cost; describe those named in full."""

import torch

from nfnets_xla.arguments import Parser
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.peers import PEERS, TIMM, is_peer
from nfnets_xla.models.published import IMAGENET, TAG, TIMM_TOP1, TRANSFERRED
from nfnets_xla.models.registry import (
    Network,
    count_parameters,
    create_network,
    list_models,
    split_tag,
)

PHOTOGRAPHS = (224, 256, 384, 480)  # pixels: sizes at which models are compared, but for the minis


def main(arguments: list[str]) -> None:
    parser = Parser(prog="nfnets-xla models", description=__doc__)
    parser.add_argument("pattern", nargs="*", help="a name, or a pattern like 'nfnet_f7*'")
    for pattern in parser.parse_args(arguments).pattern or ["*"]:
        names = list_models(pattern)
        if names in ([], [pattern]):
            print(full_card(one_model(pattern)))
        else:
            print(*map(card, names), sep="\n")


def one_model(name: str) -> str:
    """The model that runs and other commands take by this name; ValueError for none."""
    try:
        return name if is_peer(name) else split_tag(name)[0]
    except ValueError:
        near = list_models(f"*{name.strip('*')}*")
        if not near:
            raise
        raise ValueError(f"no model matches {name!r}: there are {', '.join(near)}") from None


def card(name: str) -> str:
    """One line on a model: parameters, and multiply-accumulates at its two resolutions."""
    net, sizes = _on_paper(name)
    costs = (f"{_counted(net.macs(size), 'MACs')} at {size} px" for size in dict.fromkeys(sizes))
    return f"{name:22} {count_parameters(net) / 1e6:8.2f}M parameters  {'  '.join(costs)}"


def full_card(name: str) -> str:
    """All that is known of one model, in lines."""
    net, (train, test) = _on_paper(name)
    others = PHOTOGRAPHS if train > 100 and not name.startswith(TIMM) else ()
    sizes = sorted({train, test, *others})
    lines = [name, f"  parameters     {count_parameters(net):,} with {net.num_classes} classes"]
    if isinstance(net, NFNet):
        variant = net.variant
        lines += [
            f"  blocks         {' + '.join(map(str, variant.depth))} of "
            f"{', '.join(map(str, variant.width))} channels, then {net.num_features}",
            f"  resolution     trained at {train} px, evaluated at {test} px "
            f"(both sides resized to {test + 32}, centre cropped)",
            f"  regularisation dropout {variant.drop_rate}, stochastic depth 0.25 (from scratch)",
        ]
    lines += [
        f"  at {size:3} px     {_counted(net.macs(size), 'MACs')}, "
        f"{_counted(net.flops(size), 'FLOPs')} (2 per MAC)"
        for size in sizes
    ]
    return "\n".join([*lines, *_accuracy(name)])


def _counted(number: int, unit: str) -> str:
    """In billions, or below one in millions."""
    power, prefix = (1e9, "G") if number >= 1e9 else (1e6, "M")
    return f"{number / power:8.2f} {prefix}{unit}"


def _accuracy(name: str) -> list[str]:
    lines: list[str] = []
    if name in IMAGENET:
        found = IMAGENET[name]
        remark = f" ({found.remark})" if found.remark else ""
        lines += [
            f"  ImageNet       {found.top1} top-1, {found.top5} top-5{remark}: "
            "arXiv 2102.06171, Table 3",
            f"                 {TIMM_TOP1[name]:.2f} top-1 of these weights, by timm's results",
            f"  weights        {name}.{TAG}",
        ]
    elif name.startswith(TIMM):
        lines.append("  weights        timm's, if it has any: create_model(..., pretrained=True)")
    else:
        lines.append("  weights        none are public")
    if name in TRANSFERRED:
        lines.append(f"  pre-trained    {TRANSFERRED[name]}; those weights are not public")
    return lines


def _on_paper(name: str) -> tuple[Network, tuple[int, int]]:
    """The model without its tensors, and its sizes for training and testing."""
    with torch.device("meta"):
        net = create_network(name, num_classes=0 if name in PEERS else 1000)
    if isinstance(net, NFNet):
        return net, (net.variant.train_size, net.variant.test_size)
    if name in PEERS:
        return net, (PEERS[name].train_size, PEERS[name].test_size)
    cfg = net.pretrained_cfg
    train = cfg["input_size"]
    test = cfg.get("test_input_size") or train
    return net, (train[-1], test[-1])
