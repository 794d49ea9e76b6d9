"""List near-duplicates, in files for `data.exclude`.

    nfnets-xla shards dedup JFT --against IN/train --against IN/val --out dedup
    nfnets-xla shards dedup JFT --within --out dedup

Writes to the folder `--out`: duplicates.txt (for each sample to exclude its id, the id that it
matches, and their distance, from 0 to 1), report.png (how many pairs have which distance, and pairs
on either side of the threshold, to judge it by), and the findings for each shard: with them the
same command continues where it was stopped, and another --distance takes seconds. The comparisons
of a --model are not kept: it compares again each time.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nfnets_xla.arguments import Parser
from nfnets_xla.bar import progress
from nfnets_xla.commands.doubles_sheet import draw_report
from nfnets_xla.data.dedup import (
    FARTHEST,
    Double,
    Matches,
    Settings,
    doubles,
    exclusion_lines,
    find,
)
from nfnets_xla.data.jobs import ENGINES
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.data.storage import Folder

DISTANCE = 0.2  # of pixels; benchmarks/dedup.py says what it finds
COSINE_DISTANCE = 0.1  # of features: a beginning, look at the report


def main(arguments: Sequence[str]) -> None:
    given = parser().parse_args(arguments)
    if bool(given.against) == given.within:
        raise ValueError("give either --against SHARDS, for duplicates of those, or --within")
    if given.weights is not None and given.model is None:
        raise ValueError("--weights are those of a --model: give its name")
    names = list_names(given.dir)
    default = DISTANCE if given.model is None else COSINE_DISTANCE
    most = default if given.distance is None else given.distance
    if not 0 <= most <= FARTHEST:
        raise ValueError(f"--distance is {most}; it must be 0 to {FARTHEST}")
    compared = None
    if given.model is not None:  # before hours of work that it might end
        from nfnets_xla.commands import embedding

        compared = partial(embedding.compared, model=embedding.load(given.model, given.weights))
    settings = Settings(given.crop, given.bits, compare=given.model is None)
    matches = find(
        [ShardIndex.load(folder) for folder in given.dir],
        [ShardIndex.load(folder) for folder in given.against],
        given.out,
        settings,
        engine=given.engine,
        jobs=given.jobs,
        on_progress=progress,
    )
    if compared is not None:
        matches = compared(matches, on_progress=progress("compared"))
    found = doubles(matches, most)
    write_lists(matches, found, names, Path(given.out))
    draw_report(matches, most, Path(given.out) / "report.png")
    print(f"{Path(given.out) / 'report.png'}: check it before you exclude these samples")


def parser() -> Parser:
    command = Parser(prog="nfnets-xla shards dedup", description=__doc__)
    command.add_argument("dir", nargs="+", help="indexed shards to look through: folder or address")
    command.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="DIR",
        help="evaluation set; may be repeated",
    )
    command.add_argument(
        "--within", action="store_true", help="search in DIR itself; keep the first of each group"
    )
    command.add_argument("--out", default="dedup", help="folder to write")
    command.add_argument(
        "--crop",
        type=float,
        default=Settings.crop,
        help="smallest share of an image's area that a copy may show",
    )
    command.add_argument(
        "--bits",
        type=int,
        default=Settings.most_bits,
        help="how many of 128 bits may differ between two hashes",
    )
    command.add_argument(
        "--distance",
        type=float,
        help=f"largest between duplicates; default: {DISTANCE}, or {COSINE_DISTANCE} with --model",
    )
    command.add_argument("--model", help="model whose features to compare, instead of pixels")
    command.add_argument("--weights", help="of the model: a run or a file; default: public ones")
    command.add_argument("--engine", choices=ENGINES, default="local", help="where jobs run")
    command.add_argument("--jobs", type=int, default=-1, help="jobs at a time; -1: one per core")
    return command


def list_names(folders: Sequence[str]) -> dict[str, str]:
    """The list of each folder of shards: ids are those of one."""
    where = [str(ShardIndex.load(folder).folder) for folder in folders]
    if len(set(where)) < len(where):
        raise ValueError("a folder is given twice: give each once")
    if len(where) == 1:
        return {where[0]: "duplicates.txt"}
    return {folder: f"duplicates-{n}.txt" for n, folder in enumerate(where, start=1)}


def write_lists(
    matches: Matches, found: Sequence[Double], names: dict[str, str], out: Path
) -> None:
    texts: dict[str, list[str]] = {folder: [] for folder in names}
    for double, line in zip(found, exclusion_lines(matches, found), strict=True):
        texts[str(matches.train[double.sample[0]].folder)].append(line)
    for folder, listed in texts.items():
        Folder(out).write(names[folder], "".join(listed).encode())
        of = sum(shard.num_samples for shard in matches.train if str(shard.folder) == folder)
        exclude = f" data.exclude={out / names[folder]}" if listed else ""
        print(
            f"{out / names[folder]}: {len(listed):,} of {of:,} samples; train with "
            f"data.shards={folder}{exclude}"
        )
    if matches.undecodable:
        print(f"{matches.undecodable:,} samples cannot be decoded, and were left out")
