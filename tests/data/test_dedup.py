"""Copies are found however altered, other pictures are not, and no work is repeated."""

import resource
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy.fft import dctn

from nfnets_xla.cli import main
from nfnets_xla.data import dedup, references
from nfnets_xla.data.dedup import Matches, Settings, doubles, exclusion_lines, find
from nfnets_xla.data.exclude import read_pairs, without
from nfnets_xla.data.holdout import choose, hold_out
from nfnets_xla.data.index import build_index
from nfnets_xla.data.likeness import likeness
from nfnets_xla.data.pack import Sample, pack_samples
from nfnets_xla.data.perceptual import WHOLE, View, codes, mirrored, views
from nfnets_xla.data.references import build_references, load_references
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.data.thumbnail import SIDE, thumbnails, trimmed
from tests.data.copied import COPIES, jpeg, picture
from tests.data.images import encoded

MOST = 0.2


def packed(folder: Path, samples: list[Sample], per_shard: int = 8) -> ShardIndex:
    pack_samples(samples, folder, samples_per_shard=per_shard)
    return build_index(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 references; their copies among 12 unrelated pictures, and a file that does not decode."""
    folder = tmp_path_factory.mktemp("dedup")
    packed(folder / "eval", [(f"e{n}", jpeg(picture(n)), "jpg", 0) for n in range(10)], 4)
    train: list[Sample] = [
        (f"{name.replace(' ', '-')}-e{n}", jpeg(alter(picture(n)), 60), "jpg", 0)
        for k, (name, alter) in enumerate(COPIES.items())
        for n in (k % 10, (k + 3) % 10)
    ]
    train += [(f"stranger-{n}", jpeg(picture(100 + n)), "jpg", 0) for n in range(12)]
    packed(folder / "train", [*train, ("broken", b"\xff\xd8rubbish", "jpg", 0)])
    return folder


@pytest.fixture(scope="module")
def indexes(folder: Path) -> tuple[ShardIndex, ShardIndex]:
    return ShardIndex.load(folder / "train"), ShardIndex.load(folder / "eval")


@pytest.fixture(scope="module")
def matches(folder: Path, indexes: tuple[ShardIndex, ShardIndex]) -> Matches:
    return find([indexes[0]], [indexes[1]], folder / "out", Settings())


def lines(matches: Matches, most: float = MOST) -> list[tuple[str, str, float]]:
    rows = [
        line.rstrip("\n").split("\t") for line in exclusion_lines(matches, doubles(matches, most))
    ]
    return [(one.partition("/")[2], other.partition("/")[2], float(d)) for one, other, d in rows]


def test_every_copy_is_found_and_nothing_else(matches: Matches) -> None:
    found = lines(matches)
    assert [one.rpartition("-")[2] for one, _, _ in found] == [other for _, other, _ in found]
    assert len(found) == 2 * len(COPIES)
    assert matches.undecodable == 1


def test_the_same_picture_is_at_distance_0(
    indexes: tuple[ShardIndex, ShardIndex], tmp_path: Path
) -> None:
    """`--distance 0` selects such pairs; fitting light and contrast left about 1e-4."""
    samples: list[Sample] = [(f"again-{n}", jpeg(picture(n)), "jpg", 0) for n in range(10)]
    again = packed(tmp_path / "again", samples)
    found = lines(find([again], [indexes[1]], tmp_path / "out", Settings()), most=0.0)
    assert [(one, other) for one, other, _ in found] == [(f"again-{n}", f"e{n}") for n in range(10)]


def test_what_is_listed_is_excluded(
    matches: Matches, indexes: tuple[ShardIndex, ShardIndex], tmp_path: Path
) -> None:
    path = tmp_path / "duplicates.txt"
    path.write_text("".join(exclusion_lines(matches, doubles(matches, MOST))))
    left = without(indexes[0], path)
    names = {left.sample_id(s, r) for s in range(left.num_shards) for r in range(left.counts[s])}
    assert {name.partition("/")[2].partition("-")[0] for name in names} == {"stranger", "broken"}


def test_nothing_is_done_twice(
    folder: Path,
    indexes: tuple[ShardIndex, ShardIndex],
    matches: Matches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not by repeating the command, nor with another threshold; only new shards are read."""
    monkeypatch.setattr(ShardIndex, "read", None)
    again = find([indexes[0]], [indexes[1]], folder / "out", Settings())
    for before, now in zip(matches[2:], again[2:], strict=True):
        np.testing.assert_array_equal(before, now)
    monkeypatch.undo()
    read: list[str] = []
    monkeypatch.setattr(
        ShardIndex, "read", lambda self, shard, row: read.append(self.name(shard)) or b""
    )
    other = packed(folder / "more", [("new", jpeg(picture(500)), "jpg", 0)])
    find([indexes[0], other], [indexes[1]], folder / "out", Settings())
    assert read == ["shard-000000.tar"]


def test_damaged_files_are_made_again_or_named(
    folder: Path, indexes: tuple[ShardIndex, ShardIndex], tmp_path: Path
) -> None:
    train, against = indexes
    first = find([train], [against], tmp_path, Settings())
    for file in (tmp_path / dedup.THUMBNAILS).iterdir():
        file.write_bytes(file.read_bytes()[:100])
    for file in (tmp_path / dedup.MATCHES).iterdir():
        file.unlink()
    assert lines(find([train], [against], tmp_path, Settings())) == lines(first)
    damaged = next((tmp_path / dedup.MATCHES).iterdir())
    for data in (b"rubbish", bytes(999)):
        damaged.write_bytes(data)
        with pytest.raises(ValueError, match=f"{damaged.name} is damaged, or .* format: delete it"):
            find([train], [against], tmp_path, Settings())


def test_within_a_set_the_first_of_each_group_stays(folder: Path, tmp_path: Path) -> None:
    shown = [("a", picture(1)), ("b", picture(2)), ("c", ImageOps.mirror(picture(1)))]
    shown += [("d", picture(1).crop((20, 5, 228, 161))), ("e", picture(3)), ("f", picture(2))]
    index = packed(tmp_path / "s", [(key, jpeg(image), "jpg", 0) for key, image in shown], 2)
    found = lines(find([index], [], tmp_path / "out", Settings()))
    assert [(one, other) for one, other, _ in found] == [("c", "a"), ("d", "a"), ("f", "b")]
    # The result does not depend on the number of shards.
    whole = packed(tmp_path / "t", [(key, jpeg(image), "jpg", 0) for key, image in shown], 9)
    assert lines(find([whole], [], tmp_path / "out", Settings())) == found


def test_a_picture_that_recurs_is_searched_for_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A web site's placeholder, say: every pair of its copies used to take memory and time."""
    framed = jpeg(COPIES["framed"](picture(3)))  # two thumbnails of one sample
    shown = [jpeg(picture(n)) for n in (9, 1, 1, 2, 1)] + [framed, framed, jpeg(picture(1))]
    samples: list[Sample] = [(f"{n}", data, "jpg", 0) for n, data in enumerate(shown)]
    searched: list[int] = []
    search = references.References.search

    def counted(self: references.References, pictures: np.ndarray, bits: int) -> references.Found:
        searched.append(len(pictures))
        return search(self, pictures, bits)

    monkeypatch.setattr(references.References, "search", counted)
    same = find([packed(tmp_path / "s", samples, 3)], [], tmp_path / "out", Settings())
    found = lines(same)
    assert found == [("2", "1", 0.0), ("4", "1", 0.0), ("6", "5", 0.0), ("7", "1", 0.0)]
    assert (same.bits_M.dtype, same.distance_M.dtype) == (np.int64, np.float32)
    assert sum(searched) == 5
    (kept,) = (tmp_path / "out").glob("*.pictures")
    assert kept.stat().st_size == 5 * SIDE * SIDE


def test_a_picture_of_one_colour_matches_none(tmp_path: Path) -> None:
    plain = [jpeg(Image.new("RGB", (240, 180), (n, n, 90))) for n in (30, 30, 200)]
    samples: list[Sample] = [(f"{n}", data, "jpg", 0) for n, data in enumerate(plain)]
    alone = packed(tmp_path / "plain", samples)
    mixed = packed(tmp_path / "mixed", [*samples, ("a", jpeg(picture(1)), "jpg", 0)])
    for train, against, rows in ([alone], [mixed], []), ([mixed], [mixed], [3]), ([mixed], [], []):
        found = find(train, against, tmp_path / "out", Settings())
        assert found.sample_M2[:, 1].tolist() == rows
        assert found.undecodable == 0
    for train, against in ([mixed], [alone]), ([alone], []):
        with pytest.raises(ValueError, match="no reference shows anything: give shards of whole"):
            find(train, against, tmp_path / "out", Settings())


def test_a_chain_is_one_group() -> None:
    pairs = np.array([[[0, 4], [0, 3]], [[0, 3], [0, 1]], [[0, 7], [0, 6]]])
    distance = np.array([0.1, 0.2, 0.3], np.float32)
    shards: list[ShardIndex] = []
    chain = Matches(shards, shards, pairs[:, 0], pairs[:, 1], np.zeros(3, int), distance, 0)
    found = [(d.sample[1], d.matched[1], round(d.distance, 3)) for d in doubles(chain, 0.2)]
    assert found == [(3, 1, 0.1), (4, 1, 0.1)]


def test_groups_never_straddle_the_held_out_split(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = ShardIndex.load(folder / "train")
    path = tmp_path / "duplicates.txt"
    same = find([index], [], folder / "out", Settings())
    path.write_text("".join(exclusion_lines(same, doubles(same, MOST))))
    pairs = read_pairs(path)
    assert len(pairs) == 12
    straddling = 0
    for samples in range(2, 30):
        ids = {index.sample_id(*place) for place in choose(index, samples)}
        straddling += any((one in ids) != (other in ids) for one, other in pairs)
        ids = {index.sample_id(*place) for place in choose(index, samples, alike=pairs)}
        assert samples - 3 <= len(ids) <= samples
        assert all((one in ids) == (other in ids) for one, other in pairs)
    assert straddling > 20
    held = hold_out(index, tmp_path / "held", samples=9, alike=pairs)
    assert set(held) == {index.sample_id(*place) for place in choose(index, 9, alike=pairs)}
    # A list made for other shards would split groups silently.
    command = ["shards", "holdout", str(folder / "train"), str(tmp_path / "new"), "--samples", "9"]
    for stranger in ("other-000000/a", "shard-000000/nobody"):
        (tmp_path / "other.txt").write_text(f"{index.sample_id(0, 0)}\t{stranger}\n")
        with pytest.raises(SystemExit):
            main([*command, "--alike", str(tmp_path / "other.txt")])
        said = capsys.readouterr().err
        assert f"'{stranger}' is in a group of near-duplicates, but not a sample of" in said
    assert not (tmp_path / "new").exists()
    (tmp_path / "ids.txt").write_text("shard-000000/a\n")
    with pytest.raises(ValueError, match="is no list of pairs: give one of `nfnets-xla shards ded"):
        read_pairs(tmp_path / "ids.txt")


# ---- the parts --------------------------------------------------------------------------------


def some(count: int) -> np.ndarray:
    return np.concatenate([thumbnails(jpeg(picture(n), 90)) for n in range(count)])


def test_a_hash_is_the_signs_of_the_lowest_frequencies() -> None:
    for given in some(5):
        small = given - given.mean()
        waves = np.asarray(dctn(np.clip(small, -1.5 * small.std(), 1.5 * small.std())))
        places = sorted(
            product(range(SIDE), repeat=2), key=lambda at: (at[0] ** 2 + at[1] ** 2, at)
        )
        wanted = np.array([waves[row, column] > 0 for row, column in places[1:129]])
        assert (wanted != np.unpackbits(codes(given[None]))).sum() <= 1  # from rounding


def test_the_hash_of_a_mirror_image_is_known() -> None:
    pictures = some(8)
    differing = np.unpackbits(codes(pictures[:, :, ::-1]) ^ mirrored(codes(pictures)), axis=-1)
    assert differing.sum() == 0


def test_the_hash_of_a_crop_is_that_of_the_crop_cut_out() -> None:
    """The crop is 24 of 48 pixels; the thumbnail enlarges each to two."""
    pictures = some(20)
    cut = np.repeat(np.repeat(pictures[:, 6:30, 12:36], 2, axis=1), 2, axis=2)
    windowed = codes(pictures, [View(6 / 48, 12 / 48, 0.5)])
    differing = np.unpackbits(windowed ^ codes(cut), axis=-1).sum(axis=-1)
    assert np.median(differing) <= 8  # means and deviations are those of the whole picture
    assert differing.max() <= 24


def test_crops_are_near_one_of_the_views() -> None:
    of = views(0.7)
    sides = sorted({view.side for view in of if not view.turn})
    assert sides[0] == pytest.approx(0.7**0.5)
    assert max(np.diff(sides)) <= 0.06
    for side in sides:
        lefts = sorted({view.left for view in of if view.side == side and not view.turn})
        assert lefts[0] == 0
        assert lefts[-1] == pytest.approx(1 - side)
        assert max(np.diff(lefts), default=0) <= 0.042
    assert of[0] == WHOLE
    assert len(views(0.5)) > len(of) > len(views(1.0)) == 9
    for crop in (0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="it must be a share of a picture's area"):
            views(crop)


def test_multi_index_hashing_finds_what_comparing_with_all_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures, rng = some(40), np.random.default_rng(0)
    rows = np.stack([np.zeros(40, int), np.arange(40)], axis=1)
    parts = [(pictures[:25], rows[:25]), (pictures[25:], rows[25:])]
    build_references(tmp_path / "r.faiss", parts, 0.7)
    known = load_references(tmp_path / "r.faiss", 0.7)
    noisy = (pictures + rng.normal(0, 25, pictures.shape)).clip(0, 255).astype(np.uint8)
    found = known.search(noisy, 32)
    own = codes(pictures, known.views)
    wanted: dict[tuple[int, int], int] = {}
    upright = codes(noisy)[:, 0]
    for query, sides in enumerate(zip(upright, mirrored(upright), strict=True)):
        bits = np.minimum(*(np.unpackbits(own ^ side, axis=-1).sum(axis=-1) for side in sides))
        wanted |= {(query, int(n)): int(bits[n].min()) for n in np.flatnonzero(bits.min(1) <= 32)}
    pairs = zip(found.query_C.tolist(), found.reference_C.tolist(), strict=True)
    got = dict(zip(pairs, found.bits_C.tolist(), strict=True))
    assert len(wanted) >= 40
    assert len(got) >= 0.95 * len(wanted)
    assert {pair: wanted[pair] for pair in got} == got
    assert {(n, n) for n in range(40)} <= set(got)
    monkeypatch.setattr(references, "SEARCHED", 1000)  # searched together, or in blocks
    for blocks, together in zip(found, known.search(noisy, 32), strict=True):
        np.testing.assert_array_equal(blocks, together)


def test_a_full_disk_leaves_no_part_of_an_index(tmp_path: Path) -> None:
    """faiss' error is not an OSError, which the command line would report in one line."""
    pictures, rows = some(60), np.stack([np.zeros(60, int), np.arange(60)], axis=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, hard))
    try:
        with pytest.raises(OSError, match=r"r\.faiss could not be written: .*write error"):
            build_references(tmp_path / "r.faiss", [(pictures, rows)], 0.7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".npy", ".pictures"]


@pytest.mark.parametrize("suffix", [".faiss", ".pictures", ".samples.npy"])
def test_damaged_references_are_called_so(tmp_path: Path, suffix: str) -> None:
    """In our words: for zeros, numpy reports a pickle, and how to execute it."""
    rows = np.stack([np.zeros(4, int), np.arange(4)], axis=1)
    build_references(tmp_path / "r.faiss", [(some(4), rows)], 0.7)
    (tmp_path / f"r{suffix}").write_bytes(bytes(100))
    with pytest.raises(
        ValueError, match=r"/r\.faiss or a file beside it is damaged: delete .*/r\.\*"
    ):
        load_references(tmp_path / "r.faiss", 0.7)


@pytest.mark.parametrize("name", ["framed", "barred"])
def test_borders_are_seen(name: str) -> None:
    small = thumbnails(jpeg(COPIES[name](picture(3)), 40))
    assert len(small) == 2
    plain = thumbnails(jpeg(picture(3)))
    assert len(plain) == 1
    differing = np.unpackbits(codes(small[1:]) ^ codes(plain)).sum()
    assert differing < 24 < np.unpackbits(codes(small[:1]) ^ codes(plain)).sum()
    assert trimmed(np.full((60, 80), 9, np.uint8)) is None


def test_likeness_is_that_of_the_part_shown() -> None:
    whole = some(6)
    cut = np.concatenate([thumbnails(jpeg(COPIES["cropped"](picture(n)), 50)) for n in range(6)])
    place = View(6 / 180, 25 / 240, 0.83)  # the crop keeps 200 of 240 and 150 of 180 pixels
    assert likeness(cut, whole, [place] * 6).min() > 0.9
    assert likeness(cut, np.roll(whole, 1, axis=0), [place] * 6).max() < 0.3
    assert likeness(cut[:0], whole[:0], []).shape == (0,)
    flat = np.full((1, SIDE, SIDE), 100, np.uint8)
    assert likeness(flat, flat, [WHOLE]).max() < 0.1  # pictures without contrast are not alike


def test_skies_are_told_by_their_light_and_shade() -> None:
    """A picture without detail has nothing else; noise from JPEG does not count as likeness."""
    rows, columns = np.mgrid[:240, :320] / 240
    skies = [
        90 + 80 * np.sin(a + 2 * rows + b * columns) * np.exp(-c * columns)
        for a, b, c in ((0, 1, 0.5), (1, -2, 0.2), (2, 0.5, 1.0), (3, 1.5, 0.1))
    ]
    images = [Image.fromarray(sky.astype(np.uint8)).convert("RGB") for sky in skies]
    whole = np.concatenate([thumbnails(jpeg(image, 95)) for image in images])
    copies = np.concatenate([thumbnails(jpeg(image, 40)) for image in images])
    assert likeness(copies, whole, [WHOLE] * 4).min() > 1 - MOST
    assert likeness(copies, np.roll(whole, 1, axis=0), [WHOLE] * 4).max() < 0.5


def test_thumbnails_do_not_depend_on_the_format() -> None:
    (of_jpeg,) = thumbnails(jpeg(picture(4), 95))
    for ending in ("PNG", "WEBP"):
        (other,) = thumbnails(encoded(picture(4), ending))
        assert np.abs(of_jpeg.astype(int) - other).mean() < 3
    with pytest.raises(ValueError, match="do not decode as an image"):
        thumbnails(b"\xff\xd8rubbish")


def test_settings_out_of_range_are_refused(
    indexes: tuple[ShardIndex, ShardIndex], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="bits is 45; it must be 0 to 44 of 128"):
        find([indexes[0]], [], tmp_path, Settings(most_bits=45))
    assert not list(tmp_path.iterdir())
