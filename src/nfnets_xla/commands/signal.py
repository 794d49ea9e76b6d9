"""Plot how a signal goes through a network: mean square and variance after every block.

Signal propagation plots of arXiv 2101.08692, section 3, for NFNets. In theory a block adds ALPHA**2
to the variance of its input, and the first block of a stage begins again at 1 + ALPHA**2; the
network divides by what the theory expects (`variants.betas`). On independent pixels a stage that
halves the map begins at a quarter: it averages four of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nfnets_xla import sources
from nfnets_xla.arguments import Parser
from nfnets_xla.models.blocks import NFBlock
from nfnets_xla.models.card import SCHEME, has_its_own
from nfnets_xla.models.layers import SqueezeExcite
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.registry import create_network
from nfnets_xla.models.variants import ALPHA, betas


@dataclass(frozen=True)
class BlockSignal:
    """After one block; averages over its channels of statistics over rows and pixels."""

    name: str  # "stages.2.0"
    mean_square: float  # of the channels' means: what shifts the activations
    variance: float
    branch_variance: float  # of what ALPHA and the skip gain are about to scale down
    expected: float  # the variance that the network's own scaling supposes


@torch.inference_mode()
def signals(net: nn.Module, images_BCHW: Tensor) -> list[BlockSignal]:
    """One for each residual block, in order, in evaluation mode; the mode is put back.

    Raises ValueError for a network that is not an NFNet of unrolled blocks.
    """
    if not isinstance(net, NFNet) or any(getattr(m, "is_stack", False) for m in net.modules()):
        raise ValueError(f"the network is a {type(net).__name__}; it must be an unrolled NFNet")
    blocks = {name: m for name, m in net.named_modules() if isinstance(m, NFBlock)}
    expected = [
        (1.0 if number == 0 else beta**-2) + ALPHA**2
        for stage in betas(net.variant.depth)
        for number, beta in enumerate(stage)
    ]
    of_blocks = zip(blocks, expected, strict=True)
    maps: dict[str, Tensor] = {}  # of the current block
    found: list[BlockSignal] = []

    def remember(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        maps["gates" if isinstance(module, SqueezeExcite) else "branch"] = output

    def measure(_block: nn.Module, _inputs: Any, out: Tensor) -> None:
        branch = 2 * maps["gates"] * maps["branch"]
        mean_square = float(out.mean(dim=(0, 2, 3)).square().mean())
        name, supposed = next(of_blocks)
        found.append(BlockSignal(name, mean_square, _variance(out), _variance(branch), supposed))

    handles = []
    for block in blocks.values():
        parts = (block.conv2, block.squeeze_excite)
        handles += [part.register_forward_hook(remember) for part in parts]
        handles.append(block.register_forward_hook(measure))
    was_training = net.training
    try:
        net.eval()(images_BCHW)
    finally:
        net.train(was_training)
        for handle in handles:
            handle.remove()
    return found


def _variance(x_BCHW: Tensor) -> float:
    return float(x_BCHW.var(dim=(0, 2, 3), correction=0).mean())


def open_branches(net: nn.Module) -> None:
    """Skip gains to 1. They are 0 in a new network, whose blocks then add nothing."""
    for name, parameter in net.named_parameters():
        if name.endswith("skip_gain"):
            nn.init.ones_(parameter)


def table(found: Sequence[BlockSignal]) -> str:
    lines = [f"{'block':12}{'mean square':>13}{'variance':>11}{'expected':>11}{'branch':>11}"]
    lines += [
        f"{s.name:12}{s.mean_square:13.4f}{s.variance:11.4f}{s.expected:11.4f}{s.branch_variance:11.4f}"
        for s in found
    ]
    return "\n".join(lines)


def draw(found: Sequence[BlockSignal], path: Path, title: str) -> None:
    """A PNG of three panels, as the paper's figure 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    blocks = range(1, len(found) + 1)
    panels = figure.subplots(1, 3)
    panels[0].plot(blocks, [s.mean_square for s in found], marker=".")
    panels[0].set_title("squared mean of channels")
    panels[1].plot(blocks, [s.variance for s in found], marker=".", label="measured")
    expected = [s.expected for s in found]
    panels[1].plot(blocks, expected, ls="--", lw=1, color="grey", label="expected by the scaling")
    panels[1].set_title("variance")
    panels[1].legend(fontsize=8)
    panels[2].plot(blocks, [s.branch_variance for s in found], marker=".")
    panels[2].set_title("variance of the residual branch")
    starts = [place for place, s in zip(blocks, found, strict=True) if s.name.endswith(".0")]
    for panel in panels:
        panel.set_xlabel("residual block")
        if panel is panels[0]:
            panel.set_ylim(bottom=0)
        else:
            panel.set_yscale("log")
        for start in starts:  # of stages
            panel.axvline(start, color="grey", lw=0.4)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


# ---- nfnets-xla signal --------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """Prints and draws the table. Bad arguments are refused before the network is built."""
    given = parser().parse_args(arguments)
    if given.batch < 1 or (given.size is not None and given.size < 1):
        raise ValueError(
            f"--batch is {given.batch} and --size {given.size}; they must be 1 or more"
        )
    is_card = given.name.startswith(SCHEME)
    out = given.out or Path(f"{Path(given.name.removeprefix(SCHEME)).name}-signal.png")
    if out.suffix != ".png":
        raise ValueError(f"--out is {out}; it has to end in .png")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out is {out}: there is no folder {out.parent}")
    if find_spec("matplotlib") is None:
        raise ValueError("plots need matplotlib: pip install 'nfnets_xla[scaling]'")
    if given.weights is not None and is_card:
        raise has_its_own(given.name, f"--weights {given.weights}")
    torch.manual_seed(given.seed)
    if given.weights is None:
        net = create_network(given.name)
        if not is_card:
            open_branches(net)
    else:
        net = sources.find_weights(given.weights, "raw").network(given.name)
    whose = "its weights" if is_card else given.weights or "new weights, skip gains 1"
    title = f"{given.name}, {whose}, Gaussian noise"
    size = given.size or getattr(getattr(net, "variant", None), "train_size", 224)
    found = signals(net, torch.randn(given.batch, 3, size, size))
    print(table(found))
    draw(found, out, f"{title}, {given.batch} x {size} px")
    print(f"{out}: {len(found)} blocks")


def parser() -> Parser:
    made = Parser(prog="nfnets-xla signal", description=__doc__)
    made.add_argument("name", help="a name of `nfnets-xla models`")
    made.add_argument("--out", type=Path, help="PNG to write; default: NAME-signal.png")
    made.add_argument("--size", type=int, help="in pixels; default: the model's training size")
    made.add_argument("--batch", type=int, default=8, help="images of noise")
    made.add_argument("--weights", help="a run's folder, a checkpoint or a file; default: new ones")
    made.add_argument("--seed", type=int, default=0, help="seed of new weights and of the noise")
    return made
