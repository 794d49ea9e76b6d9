"""`shards dedup` beside imagehash and imagededup: python benchmarks/dedup.py [ROOT [PART ...]]

ROOT is the folder into which Debian's packages of photographs are unpacked (`_copies.py` names
them; "/" if they are installed). 20 copies are made of each of 500 photographs and 500 fractals:
20,000 pairs. All methods get the same files: these copies, and two copies each of 200 strangers,
which show none of the 500. A match is right if it names the picture that was copied. Other pairs of
tiles of one photograph are not counted: halves of a symmetrical building are mirror images.

Ours runs as the command does, on shards, with its defaults. Each of the others gets the largest
threshold at which at most 1 in 1,000 of its matches is wrong, chosen on this very data. Lower
bounds are Wilson's, of 95 %.

The benchmark then measures images per core-second from the file to the hash, in turns, and the cost
of a search. Each part can be run alone: photographs, fractals, speed.
"""

import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import faiss
import imagehash
import numpy as np
import torch
from imagededup.methods import PHash
from PIL import Image

from _copies import COPIES, Picture, copy, fractals, photographs, tiles
from _scores import Scores, wilson
from _turns import Report, medians
from nfnets_xla.commands.dedup import DISTANCE
from nfnets_xla.data.dedup import Settings, find
from nfnets_xla.data.index import build_index
from nfnets_xla.data.jobs import map_jobs
from nfnets_xla.data.likeness import likeness
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.perceptual import codes, mirrored, views
from nfnets_xla.data.references import build_references, load_references
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.data.sources import extension_of
from nfnets_xla.data.thumbnail import SIDE, thumbnails

REFERENCES, STRANGERS, ROUNDS = 500, 200, 7
SPEED_SIZE = (500, 375)  # pixels, of JPEGs of quality 90
PARTS = ["photographs", "fractals", "speed"]
NOISE_REFERENCES = 5_000  # number of references when the search is measured
OURS = f"ours, {Settings.most_bits} bits, distance {DISTANCE}"


def hash_by_imagededup(data: bytes) -> int:
    return int(_imagededup().encode_image(image_array=np.asarray(opened(data))), 16)


def _imagededup() -> PHash:
    if not _made:
        _made.append(PHash(verbose=False))
    return _made[0]


_made: list[PHash] = []
PEERS: dict[str, Callable[[bytes], int]] = {
    "imagehash pHash": lambda data: int(str(imagehash.phash(opened(data))), 16),
    "imagehash dHash": lambda data: int(str(imagehash.dhash(opened(data))), 16),
    "imagededup PHash": hash_by_imagededup,
}


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


class Made(NamedTuple):
    """Files made of one picture, and the peers' hashes of each, (files, peers)."""

    files: list[bytes]
    hashes: np.ndarray


class Set(NamedTuple):
    """Pictures of one kind; those after the first 500 are strangers."""

    kind: str
    of: list[str]  # name of the photograph or class of each picture
    originals: list[Made]
    copies: list[Made]

    def queries(self) -> tuple[np.ndarray, np.ndarray]:
        """For each query, the number of its picture and of its transformation."""
        pairs = [(n, k) for n, made in enumerate(self.copies) for k in range(len(made.files))]
        return np.array(pairs).T[0], np.array(pairs).T[1]


# ---- making -----------------------------------------------------------------------------------


def make(item: tuple[int, Picture]) -> tuple[Made, Made]:
    """The original and its copies: all transformations for the first 500, two for strangers."""
    number, (_, image) = item
    kinds = list(enumerate(COPIES))
    if number >= REFERENCES:
        kinds = [kinds[(2 * number + k) % len(kinds)] for k in range(2)]
    files = [copy(image, name, np.random.default_rng([number, k])) for k, name in kinds]
    return _hashed([as_jpeg(image, 95)]), _hashed(files)


def _hashed(files: list[bytes]) -> Made:
    hashes = [[compute(data) for compute in PEERS.values()] for data in files]
    return Made(files, np.array(hashes, np.uint64))


def make_set(kind: str, pictures: list[Picture]) -> Set:
    made = list(map_jobs(make, list(enumerate(pictures)), jobs=-1))
    names = [name for name, _ in pictures]
    return Set(kind, names, [one for one, _ in made], [copies for _, copies in made])


# ---- finding ----------------------------------------------------------------------------------


def of_peer(made: Set, peer: int) -> Scores:
    picture_Q, kind_Q = made.queries()
    query = np.concatenate([one.hashes[:, peer] for one in made.copies])
    reference = np.concatenate([one.hashes[:, peer] for one in made.originals[:REFERENCES]])
    distance_QR = np.bitwise_count(query[:, None] ^ reference).astype(np.float32)
    return Scores(distance_QR, picture_Q, kind_Q, counted(made))


def of_ours(made: Set, folder: Path) -> Scores:
    """Scores of `shards dedup`, run on shards."""
    picture_Q, kind_Q = made.queries()
    files = [data for one in made.copies for data in one.files]
    references = [one.files[0] for one in made.originals[:REFERENCES]]
    train, against = packed(files, folder / "train"), packed(references, folder / "against")
    matches = find([train], [against], folder / "dedup", Settings(), jobs=-1)
    query_M, reference_M = (
        np.array([int(of[s].sample_id(0, r).partition("/")[2]) for s, r in pairs.tolist()], int)
        for of, pairs in (
            (matches.train, matches.sample_M2),
            (matches.against, matches.reference_M2),
        )
    )
    distance_QR = np.full((len(files), len(references)), np.inf, np.float32)
    distance_QR[query_M, reference_M] = matches.distance_M
    return Scores(distance_QR, picture_Q, kind_Q, counted(made))


def packed(files: list[bytes], folder: Path) -> ShardIndex:
    # Shards cannot hold GIF: store its pixels without loss.
    files = [as_png(data) if data[:3] == b"GIF" else data for data in files]
    samples = ((f"{n:06d}", data, extension_of(data), 0) for n, data in enumerate(files))
    pack_samples(samples, folder, samples_per_shard=1000)
    return build_index(folder, jobs=-1)


def as_png(data: bytes) -> bytes:
    file = io.BytesIO()
    opened(data).save(file, "PNG")
    return file.getvalue()


def as_jpeg(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def counted(made: Set) -> np.ndarray:
    """Which pairs count as wrong when matched: all but those of one photograph."""
    picture_Q, _ = made.queries()
    of = np.array(made.of)
    return of[picture_Q][:, None] != of[:REFERENCES]


# ---- reporting --------------------------------------------------------------------------------


def report_set(report: Report, made: Set, folder: Path) -> None:
    peers = {name: of_peer(made, number) for number, name in enumerate(PEERS)}
    scores = {OURS: of_ours(made, folder)} | peers
    thresholds = {OURS: DISTANCE} | {name: of.best_threshold() for name, of in peers.items()}
    pairs = REFERENCES * len(COPIES)
    report.say()
    report.say(f"{made.kind}: {pairs:,} pairs; recall, and its lower bound, in %")
    report_kinds(report, scores, thresholds, found)
    report.say()
    report.say(f"{made.kind}: precision, its lower bound, in %, and the number of wrong matches")
    report_kinds(report, scores, thresholds, precise)
    report.say()
    for name, of in scores.items():
        right, total = of.precision(thresholds[name])
        text = f"precision {right / total:.5f} ({wilson(right, total):.5f})" if total else "none"
        report.say(
            f"{name}: threshold {thresholds[name]:g}, {total:,} matches, {total - right} wrong, "
            f"{text}"
        )
    ours = scores[OURS]
    near = int((np.isfinite(ours.distance_QR) & ~ours.right_QR & ours.counted_QR).sum())
    report.say(f"ours at other distances, of {int(ours.counted_QR.sum()):,} pairs that are none:")
    for distance in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5):
        right, wrong = int(ours.hit_Q(distance).sum()), ours.wrong(distance)
        report.say(f"  {distance:4}: recall {100 * right / pairs:5.1f} %, {wrong} wrong")
    report.say(f"  wrong pairs within {Settings.most_bits} bits and distance 0.7: {near}")


def report_kinds(
    report: Report,
    scores: dict[str, Scores],
    thresholds: dict[str, float],
    cell: Callable[[Scores, float], str],
) -> None:
    report.say(f"{'':44}" + "".join(f"{name.split(',')[0]:>20}" for name in scores))
    for number, kind in enumerate([*COPIES, "all"]):
        chosen = scores if kind == "all" else {n: of.of_kind(number) for n, of in scores.items()}
        cells = [cell(of, thresholds[name]) for name, of in chosen.items()]
        report.say(f"{kind:44}" + "".join(f"{text:>20}" for text in cells))


def found(of: Scores, threshold: float) -> str:
    hit_Q = of.hit_Q(threshold)
    bound = wilson(int(hit_Q.sum()), len(hit_Q))
    return f"{100 * hit_Q.mean():.1f} ({100 * bound:5.1f})"


def precise(of: Scores, threshold: float) -> str:
    right, total = of.precision(threshold)
    if total == 0:
        return "-"
    bound = wilson(right, total)
    return f"{100 * right / total:.2f} ({100 * bound:5.2f}) {total - right}"


def report_speed(report: Report, pictures: list[Picture], folder: Path) -> None:
    large = [image.resize(SPEED_SIZE, Image.Resampling.LANCZOS) for _, image in pictures[:64]]
    files = [as_jpeg(image, 90) for image in large]
    paths = [folder / f"{number}.jpg" for number in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    ours = "ours: thumbnail and hash"
    contestants: dict[str, Callable[[], object]] = {
        ours: lambda: codes(np.concatenate([thumbnails(path.read_bytes()) for path in paths])),
        "imagehash pHash": lambda: [imagehash.phash(Image.open(path)) for path in paths],
        "imagehash dHash": lambda: [imagehash.dhash(Image.open(path)) for path in paths],
        "imagededup PHash": lambda: [_imagededup().encode_image(path) for path in paths],
    }
    seconds = medians(contestants, ROUNDS, clock=time.process_time)
    mean = sum(map(len, files)) / len(files)
    report.say()
    report.say(
        f"images per core-second, from file to hash: {len(files)} JPEGs of "
        f"{SPEED_SIZE[0]} x {SPEED_SIZE[1]}, {mean / 1e3:.0f} kB, {ROUNDS} rounds in turns"
    )
    for name, value in seconds.items():
        ratio = "" if name == ours else f"   ours is {value / seconds[ours]:.2f} times as fast"
        report.say(f"{name:26}{len(files) / value:8.0f}{ratio}")


def report_search(report: Report, pictures: list[Picture], folder: Path) -> None:
    """Measure the search, with references made of noise that has the spectrum of photographs."""
    rng, of = np.random.default_rng(0), views(Settings.crop)
    noise = np.concatenate([clouds(rng, 500) for _ in range(NOISE_REFERENCES // 500)])
    rows = np.zeros((len(noise), 2), np.int64)
    start = time.process_time()
    build_references(folder / "noise.faiss", [(noise, rows)], Settings.crop)
    built = time.process_time() - start
    references = load_references(folder / "noise.faiss", Settings.crop)
    queries = np.concatenate([thumbnails(as_jpeg(image, 95)) for _, image in pictures])
    start = time.process_time()
    references.search(queries, Settings.most_bits)
    searched = (time.process_time() - start) / len(queries)
    start = time.process_time()
    likeness(queries, noise[: len(queries)], [of[0]] * len(queries))
    compared = (time.process_time() - start) / len(queries)
    flat = faiss.IndexBinaryFlat(128)
    flat.add(codes(noise, of).reshape(-1, 16))
    start = time.process_time()
    flat.range_search(codes(queries)[:, 0], Settings.most_bits + 1)
    by_all = 2 * (time.process_time() - start) / len(queries)  # the mirror image, too
    size = (folder / "noise.faiss").stat().st_size / len(noise)
    report.say()
    report.say(f"{len(noise):,} references of noise, {len(of)} views each, multi-index hashing:")
    report.say(
        f"  to build: {1e3 * built / len(noise):.2f} ms a reference; file {size:,.0f} bytes each"
    )
    report.say(
        f"  to search: {1e3 * searched:.2f} ms a picture ({1e3 * by_all:.2f} ms by all codes)"
    )
    report.say(f"  to compare two pictures: {1e3 * compared:.2f} ms; thumbnail {SIDE**2:,} bytes")


def report_chance(report: Report, pictures: list[Picture]) -> None:
    """How often the hashes of unrelated pictures are near."""
    chosen = dict(pictures)  # one of each photograph
    small = np.concatenate([thumbnails(as_jpeg(image, 95))[:1] for image in chosen.values()])
    signs_PVK = (
        np.unpackbits(codes(small, views(Settings.crop)), axis=-1).astype(np.float32) * 2 - 1
    )
    bits_PP = np.full((len(small), len(small)), np.inf)
    for queries in (codes(small), mirrored(codes(small))):
        query_PK = np.unpackbits(queries[:, 0], axis=-1).astype(np.float32) * 2 - 1
        bits_PP = np.minimum(bits_PP, ((128 - signs_PVK @ query_PK.T) / 2).min(axis=1))
    others = bits_PP[~np.eye(len(small), dtype=bool)]
    report.say()
    report.say(f"hashes that are near by chance, of {len(others):,} pairs of photographs:")
    for bits in (16, 20, 24, 28, 32, 36):
        report.say(f"  within {bits} bits: {(others <= bits).mean():.2e}")


def clouds(rng: np.random.Generator, number: int) -> np.ndarray:
    size = 2 * SIDE
    along = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    along[0, 0] = 1
    noise = np.fft.irfft2(np.fft.rfft2(rng.normal(size=(number, size, size))) / along**1.1)
    noise = noise[:, :SIDE, :SIDE]
    low, high = noise.min((1, 2), keepdims=True), noise.max((1, 2), keepdims=True)
    return ((noise - low) / (high - low) * 255).astype(np.uint8)


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1] if len(sys.argv) > 1 else "/")
    parts = sys.argv[2:] or PARTS
    name = "dedup" if parts == PARTS else "_".join(["dedup", *parts])
    report = Report(name, "Near-duplicates: `shards dedup` beside other hashes")
    libraries = ("faiss-cpu", "ImageHash", "imagededup", "pillow", "simplejpeg")
    report.say(", ".join(f"{name} {version(name)}" for name in libraries))
    report.say(f"{os.cpu_count()} cores, shared with other work")
    photos = some_photographs(report, root)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "photographs" in parts:
            report_set(report, make_set("photographs", photos), folder / "photographs")
        if "fractals" in parts:
            drawn = list(fractals(0, REFERENCES + STRANGERS))
            report_set(report, make_set("fractals", drawn), folder / "fractals")
        if "speed" in parts:
            report_speed(report, photos, folder)
            report_search(report, photos, folder)
            report_chance(report, photos)
    report.save()


def some_photographs(report: Report, root: Path) -> list[Picture]:
    """A random choice of the pictures that are cut from all photographs."""
    cut: list[Picture] = []
    packages: dict[str, list[int]] = {}
    for package, photograph in photographs(root):
        found = list(tiles(photograph))
        cut += found
        counts = packages.setdefault(package, [0, 0])
        counts[0], counts[1] = counts[0] + 1, counts[1] + len(found)
    report.say(
        "photographs, and pictures cut of them: "
        + ", ".join(f"{name} {n} ({tiles})" for name, (n, tiles) in packages.items())
    )
    chosen = np.random.default_rng(0).permutation(len(cut))[: REFERENCES + STRANGERS]
    return [cut[number] for number in chosen]


if __name__ == "__main__":
    main()
