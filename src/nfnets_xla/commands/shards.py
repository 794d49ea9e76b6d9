"""`nfnets-xla shards ...`: pack, index, check, count, split and exclude, one subcommand each."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nfnets_xla.arguments import Parser
from nfnets_xla.bar import progress
from nfnets_xla.data.jobs import ENGINES
from nfnets_xla.display import plural

# Commands with modules of their own, beside this one.
ELSEWHERE = {
    "show": "draw the training views of a recipe, with labels and ids",
    "dedup": "list near-duplicates of another set, or within a set",
}
Run = Callable[[Any], int | None]  # of a subcommand's arguments; returns the exit code
# What `pack` reads, what that is, and the function of data/sources.py that packs it.
SOURCES = {
    "folder": ("images in SOURCE/<class>/", "folder", "pack_image_folder"),
    "table": (
        "images listed in columns path and label of a .csv or .parquet file",
        "file",
        "pack_table",
    ),
}
IMAGENET = "ImageNet's archives in SOURCE, into DIR/train, DIR/val and DIR/val-real"


def main(arguments: Sequence[str]) -> int | None:
    """Returns the exit code: 1 if `lint` found faults."""
    if arguments and arguments[0] in ELSEWHERE:
        return import_module(f"nfnets_xla.commands.{arguments[0]}").main(arguments[1:])
    given = parser().parse_args(arguments)
    return given.run(given) or 0


def parser() -> Parser:
    top = Parser(
        prog="nfnets-xla shards",
        description="WebDataset shards: folders of *.tar. DIR may be an address, gs://bucket/folder.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)

    def add(name: str, run: Run, purpose: str, parent: Any = commands) -> Any:
        command = parent.add_parser(name, help=purpose, description=purpose)
        command.set_defaults(run=run)
        return command

    index = add("index", run_index, "scan every shard once and write the index beside it")
    index.add_argument("dir", help="folder, or its address")
    index.add_argument("--force", action="store_true", help="scan again shards that have an index")
    lint = add("lint", run_lint, "decode all images, and list every fault with its byte offset")
    lint.add_argument("dir", help="folder, or its address")
    stats = add("stats", run_stats, "print statistics of indexed shards")
    stats.add_argument("dir", help="folder, or its address")
    hold = add("holdout", run_holdout, "copy a held-out split, by hash of the key, into new shards")
    hold.add_argument("dir", help="folder, or its address")
    hold.add_argument("out", type=Path, help="folder to write, new or empty")
    hold.add_argument("--samples", type=int, required=True, help="number of samples to hold out")
    hold.add_argument(
        "--alike", type=Path, help="list of `shards dedup --within`, whose groups stay together"
    )
    for command in (index, lint, stats, hold):
        command.add_argument("--engine", choices=ENGINES, default="local", help="where jobs run")
        command.add_argument(
            "--jobs", type=int, default=-1, help="jobs at a time; -1: one per core"
        )
    exclude = add("exclude", run_exclude, "look up a long list of ids once, for all runs")
    exclude.add_argument("dir", help="folder, or its address")
    exclude.add_argument(
        "ids", type=Path, nargs="+", help="text files, one id (shard/key) per line"
    )
    exclude.add_argument("list", type=Path, help="file to write, FILE.npz, for data.exclude")
    add_pack(add, commands)
    for name, purpose in ELSEWHERE.items():
        commands.add_parser(name, help=purpose, add_help=False)
    return top


def add_pack(add: Callable[..., Any], commands: Any) -> None:
    purpose = "pack images into indexed shards"
    pack = commands.add_parser("pack", help=purpose, description=purpose)
    kinds = pack.add_subparsers(required=True, metavar="KIND", parser_class=Parser)
    for name, (purpose, what, function) in SOURCES.items():
        kind = add(name, run_pack, purpose, kinds)
        kind.set_defaults(function=function)
        kind.add_argument("source", type=Path, help=f"{what} to read")
        kind.add_argument("dir", type=Path, help="folder to write, new or empty")
        kind.add_argument("--samples-per-shard", type=int, default=1000, help="maximum")
        kind.add_argument(
            "--shard-bytes",
            type=float,
            default=float("inf"),
            help="end a shard with the sample that reaches this many bytes of images and labels",
        )
    imagenet = add("imagenet", run_pack_imagenet, IMAGENET, kinds)
    imagenet.add_argument("source", type=Path, help="folder to read")
    imagenet.add_argument("dir", type=Path, help="folder to write, new or empty")
    imagenet.add_argument("--samples-per-shard", type=int, default=1000, help="maximum")
    purpose = "any number of labelled images drawn from formulas, to try things with"
    fractals = add("fractals", run_pack_fractals, purpose, kinds)
    fractals.add_argument("dir", type=Path, help="folder to write, new or empty")
    fractals.add_argument("--classes", type=int, default=8, help="number of classes")
    fractals.add_argument("--per-class", type=int, default=128, help="images per class")
    fractals.add_argument("--first", type=int, default=0, help="index of each class's first image")
    fractals.add_argument("--size", type=int, default=64, help="image size in pixels")
    fractals.add_argument("--seed", type=int, default=0, help="seed of the classes' shapes")
    fractals.add_argument("--samples-per-shard", type=int, default=1000, help="maximum")


# ---- subcommands ------------------------------------------------------------------------------


def run_index(given: Any) -> None:
    index_folder(given.dir, engine=given.engine, jobs=given.jobs, force=given.force)


def index_folder(folder: str | Path, **options: Any) -> None:
    from nfnets_xla.data.index import build_index

    index = build_index(folder, on_progress=progress("indexed"), **options)
    print(
        f"{folder}: {plural(index.num_samples, 'sample')} in {plural(index.num_shards, 'shard')}, "
        f"{plural(index.num_classes, 'class')}, fingerprint {index.fingerprint[:16]}"
    )


def run_lint(given: Any) -> int:
    from nfnets_xla.data.lint import lint

    bar = progress("checked")
    faults = lint(given.dir, engine=given.engine, jobs=given.jobs, on_progress=bar)
    for fault in faults:
        print(fault)
    print(f"{given.dir}: {plural(len(faults), 'fault')}")
    return 1 if faults else 0


def run_stats(given: Any) -> None:
    from nfnets_xla.data.lint import stats
    from nfnets_xla.data.shards import ShardIndex

    index, bar = ShardIndex.load(given.dir), progress("read")
    found = stats(index, engine=given.engine, jobs=given.jobs, on_progress=bar)
    for name, value in found.items():
        print(f"{name:18} {value}")


def run_holdout(given: Any) -> None:
    from nfnets_xla.data.exclude import read_pairs
    from nfnets_xla.data.holdout import IDS, hold_out
    from nfnets_xla.data.shards import ShardIndex

    ids = hold_out(
        ShardIndex.load(given.dir),
        given.out,
        samples=given.samples,
        alike=read_pairs(given.alike) if given.alike else (),
        engine=given.engine,
        jobs=given.jobs,
        on_progress=progress("hashed"),
    )
    index_folder(given.out)
    print(
        f"held out {plural(len(ids), 'sample')}: train with data.shards={given.dir} "
        f"data.exclude={given.out / IDS} data.eval_shards={given.out}"
    )


def run_exclude(given: Any) -> None:
    from nfnets_xla.data.exclude import check_output, read_ids, resolve, save_exclusions
    from nfnets_xla.data.shards import ShardIndex

    check_output(given.list)
    index = ShardIndex.load(given.dir)
    ids = [sample_id for path in given.ids for sample_id in read_ids(path)]
    exclusions = resolve(index, ids, ", ".join(map(str, given.ids)))
    save_exclusions(given.list, index, exclusions)
    print(f"{given.list}: excludes {len(exclusions.rows):,} of {index.num_samples:,} samples")


def run_pack(given: Any) -> None:
    pack = getattr(import_module("nfnets_xla.data.sources"), given.function)
    pack(
        given.source,
        given.dir,
        samples_per_shard=given.samples_per_shard,
        shard_bytes=given.shard_bytes,
        on_progress=progress("packed"),
    )
    index_folder(given.dir)


def run_pack_imagenet(given: Any) -> None:
    from nfnets_xla.data.imagenet import pack_imagenet

    bars = {name: progress(f"packed {name}") for name in ("train", "val", "val-real")}
    folders = pack_imagenet(
        given.source,
        given.dir,
        samples_per_shard=given.samples_per_shard,
        on_progress=lambda name, *counts: bars[name](*counts),
    )
    for folder in folders:
        index_folder(folder)


def run_pack_fractals(given: Any) -> None:
    from nfnets_xla.data.fractals import fractal_samples
    from nfnets_xla.data.pack import pack_samples

    for name, least in (("classes", 1), ("per_class", 1), ("first", 0), ("size", 8), ("seed", 0)):
        if (value := getattr(given, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {least} or more")
    total, bar = given.classes * given.per_class, progress("drawn")
    pack_samples(
        fractal_samples(
            given.classes,
            given.per_class,
            size=given.size,
            seed=given.seed,
            first_instance=given.first,
        ),
        given.dir,
        samples_per_shard=given.samples_per_shard,
        on_progress=lambda done: bar(done, total),
    )
    index_folder(given.dir)
