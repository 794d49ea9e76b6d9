"""Check a run's settings, and estimate its steps, cost and memory; starts nothing.

Reads the recipe and the shards' manifests, and builds the network without memory for its weights.
The rest is arithmetic (`scaling/account.py`).
"""

from dataclasses import dataclass

import torch

from nfnets_xla.arguments import Parser
from nfnets_xla.config import Run
from nfnets_xla.data.batches import check_evaluation_room, check_mixing, check_window_room
from nfnets_xla.data.order import Order
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.devices import GIB, check_uncut, smallest_fsdp
from nfnets_xla.display import plural
from nfnets_xla.inputs import check_cache, count_classes, make_order, open_shards, untrained
from nfnets_xla.models.registry import Network
from nfnets_xla.scaling import account, published
from nfnets_xla.steps import (
    ascent_share,
    describe_ascent,
    kept_copies,
    make_passes,
    make_schedule,
    saved_copies,
)

FLOAT32 = 4  # bytes of each number that is kept
CHIPS_OF_A_HOST = 4
IN_ONE_HOST = {"v5e": 8, "v6e": 8}  # at most, of which larger slices have 4 in each, too


@dataclass(frozen=True)
class Terms:
    """Where it would run, and for how much."""

    hardware: str = "v4"
    mfu: float = published.PAPER_MFU  # its F0 had 29 %, and its fine-tuning with whole-batch SAM
    chips: int = 1
    price: float | None = None  # of a chip-hour

    def __post_init__(self) -> None:
        account.device(self.hardware)
        account.flops_in(0.0, self.hardware, mfu=self.mfu)
        account.at_least("chips", self.chips, 1)
        if self.price is not None:
            account.at_least("price", self.price, 0)


Line = tuple[str, str]  # what, how much


def main(arguments: list[str]) -> None:
    parser = Parser(prog="nfnets-xla check", description=__doc__)
    parser.add_argument("recipe", help="a recipe of `nfnets-xla --help`")
    parser.add_settings()
    parser.add_argument("--hardware", default=Terms.hardware, help="accelerator: v4, v5e, H100 ...")
    parser.add_argument(
        "--mfu", type=float, default=Terms.mfu, help="assumed share of the peak FLOPs"
    )
    parser.add_argument(
        "--chips",
        type=int,
        default=Terms.chips,
        help="number of chips; their devices must divide both batch sizes and have enough memory",
    )
    parser.add_argument("--price", type=float, help="price of a chip-hour, in any currency")
    given = parser.parse_intermixed_args(arguments)
    terms = Terms(given.hardware, given.mfu, given.chips, given.price)
    from nfnets_xla.compose import composed, to_run

    run = to_run(composed(given.recipe, ["run_dir=null", *given.overrides], given.config_dir))
    for what, how_much in forecast(run, terms):
        print(f"{what:12} {how_much}")


def forecast(run: Run, terms: Terms) -> list[Line]:
    """In the order in which a person asks. Raises ValueError for what cannot run."""
    if run.job != "train":
        raise ValueError(f"the recipe's job is {run.job!r}; check is for what trains")
    check_cache(run)
    index, held_out = open_shards(run)
    num_classes = count_classes(run, index, held_out)
    order = make_order(run, index)
    schedule, passes = make_schedule(run, order), make_passes(run, order)
    check_devices(run, terms)
    check_streams(run, terms, order)
    check_cached(run, terms, index, held_out)
    with torch.device("meta"):
        net = untrained(run, num_classes)
    parameters = sum(parameter.numel() for parameter in net.parameters())
    rows, size = order.num_steps * run.data.batch_size, run.data.image_size
    read = account.images_drawn(rows, run.data.repeats)
    share = ascent_share(run, passes)
    training = account.train_flops(net.macs(size), rows, sam_fraction=share)
    evaluating = evaluation_flops(run, net, order.num_steps, held_out and held_out.num_samples)
    sam = "" if run.optim.sam_rho is None else f"; SAM ascends on {describe_ascent(passes)}"
    return [
        ("model", f"{run.model.name}, {parameters:,} parameters, {num_classes} classes"),
        ("shards", f"{index.num_samples:,} images in {index.num_shards:,} of {index.folder}"),
        ("reads", reads(index, held_out, read)),
        (
            "steps",
            f"{order.num_steps:,} of {run.data.batch_size:,} rows; warm-up to a rate of "
            f"{schedule.peak:g} in {plural(schedule.warmup_steps, 'step')}",
        ),
        (
            "epochs",
            f"{run.optim.epochs:g} in views; {read:,.0f} images read for {run.data.repeats} "
            "views of each",
        ),
        ("training", f"{training:.4g} FLOPs, {net.macs(size) / 1e9:.3f} GMACs a view{sam}"),
        ("evaluation", f"{evaluating:.4g} FLOPs" if held_out else "none without data.eval_shards"),
        *price_of(training + evaluating, terms),
        *memory(run, parameters, terms),
    ]


def reads(index: ShardIndex, held_out: ShardIndex | None, images: float) -> str:
    """Shards and bytes that come from the disk or the network; evaluations read theirs again."""
    size = int(index.manifest.bytes_S.sum()) / GIB
    passes = images / index.num_samples
    files = f"{plural(index.num_shards, 'shard')}, {size:,.3f} GiB in all, {passes:g} times"
    if held_out is None:
        return files
    kept = int(held_out.manifest.bytes_S.sum()) / GIB
    return f"{files}; at each evaluation {held_out.num_shards:,}, {kept:,.3f} GiB in all"


def devices_of(terms: Terms) -> int:
    """The number of devices that PyTorch sees: chips, but on v2, v3 and v7 their cores."""
    cores = account.cores_per_chip(terms.hardware) // account.device(terms.hardware).cores
    return terms.chips * cores


def check_devices(run: Run, terms: Terms) -> None:
    devices = devices_of(terms)
    for key in ("batch_size", "eval_batch_size"):
        if (rows := getattr(run.data, key)) % devices:
            raise ValueError(
                f"data.{key} is {rows}; it must be a multiple of the {devices} devices of "
                f"{terms.chips} {terms.hardware} chips (--chips)"
            )


def hosts_of(terms: Terms) -> int:
    """The number of processes: one per host of a TPU slice, or one per GPU."""
    if not terms.hardware.startswith("v"):
        return terms.chips
    if terms.chips <= IN_ONE_HOST.get(terms.hardware, CHIPS_OF_A_HOST):
        return 1
    return -(-terms.chips // CHIPS_OF_A_HOST)


def check_streams(run: Run, terms: Terms, order: Order) -> None:
    """ValueError if hosts cannot share the streams, or have no partners for mixing."""
    if order.num_streams % (hosts := hosts_of(terms)):
        raise ValueError(
            f"data.num_streams is {order.num_streams}; it must be a multiple of the {hosts} hosts "
            f"of {terms.chips} {terms.hardware} chips (--chips)"
        )
    if run.data.mix == "mixup_cutmix":
        check_mixing(order)


def check_cached(run: Run, terms: Terms, index: ShardIndex, held_out: ShardIndex | None) -> None:
    """A cache, `data.cache_dir`, has to hold what a host reads of a batch."""
    streams = run.data.num_streams // hosts_of(terms)
    check_window_room(index, streams, run.data.window_shards)
    if held_out is not None:
        check_evaluation_room(held_out)


def price_of(flops: float, terms: Terms) -> list[Line]:
    hours = account.core_hours(flops, terms.hardware, mfu=terms.mfu)
    booked = account.chip_hours(hours, terms.hardware)
    assumed = f"of {terms.hardware} at an assumed MFU of {terms.mfu:.0%} (--mfu)"
    lines = [
        ("core-hours", f"{hours:,.4g} {assumed}"),
        (
            "wall-clock",
            f"{booked / terms.chips:,.4g} hours on {plural(terms.chips, 'chip')} (--chips)",
        ),
    ]
    if terms.price is not None:
        money = account.cost(hours, terms.hardware, price=terms.price)
        lines.append(("cost", f"{money:,.2f} at {terms.price:g} a chip-hour"))
    return lines


def evaluation_flops(run: Run, net: Network, steps: int, held_out: int | None) -> float:
    """FLOPs of all evaluations: one after the last step, and one every `trainer.eval_every`."""
    if held_out is None:
        return 0.0
    every = run.trainer.eval_every or steps
    times = -(-steps // every)
    forms = 1 if run.optim.ema_decay is None else 2  # weights, and their average
    return account.FLOPS_PER_MAC * net.macs(run.data.eval_image_size) * held_out * times * forms


def memory(run: Run, parameters: int, terms: Terms) -> list[Line]:
    """What is kept of the parameters, cut as `trainer.fsdp` says."""
    copies = kept_copies(run.optim)
    hardware, devices, cut = account.device(terms.hardware), devices_of(terms), run.trainer.fsdp
    kept = copies * FLOAT32 * parameters
    if not terms.hardware.startswith("v"):
        check_uncut(cut, terms.hardware)
        cut = 1
    parts = smallest_fsdp(kept, hardware, devices) if cut == "auto" else int(cut)
    if devices % parts:
        raise ValueError(f"trainer.fsdp is {parts}; it must divide the {devices} devices (--chips)")
    if kept / parts > hardware.memory:
        have = f"{terms.hardware} has {hardware.memory / GIB:.0f}"
        raise ValueError(
            f"{copies} copies of the parameters, sharded over {parts}, are "
            f"{kept / parts / GIB:.1f} GiB a device, and {have}: "
            "shard them over more, or use a larger one"
        )
    saved = saved_copies(run.optim) * FLOAT32 * parameters
    return [
        (
            "memory",
            f"{kept / parts / GIB:.3f} of {hardware.memory / GIB:.0f} GiB a device for {copies} "
            f"copies of the parameters, sharded over {parts}; activations are extra",
        ),
        ("checkpoint", f"{saved / GIB:.3f} GiB, of which {run.trainer.keep_checkpoints} are kept"),
    ]
