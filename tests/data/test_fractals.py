"""The stand-in for JFT: deterministic, varied, and learnable from the picture alone."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfnets_xla.commands.shards import main as shards
from nfnets_xla.data.fractals import class_system, filled_share, fractal, fractal_samples
from nfnets_xla.data.shards import ShardIndex


def test_the_same_key_gives_the_same_picture_and_others_differ() -> None:
    first = fractal(0, 3, 5, 24)
    assert first.shape == (24, 24, 3)
    assert first.dtype == np.uint8
    assert (fractal(0, 3, 5, 24) == first).all()
    for other in (fractal(1, 3, 5, 24), fractal(0, 4, 5, 24), fractal(0, 3, 6, 24)):
        assert (other != first).any()


def test_pictures_have_structure_and_colour() -> None:
    for label in range(12):
        picture = fractal(0, label, 0, 32).astype(float)
        assert picture.std(axis=(0, 1)).max() > 10
        assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_a_class_is_recognised_by_its_shape() -> None:
    """Nearest neighbours on edges alone are right three times as often as chance (1 in 8)."""
    rng = np.random.default_rng(0)
    assert filled_share(rng.random((20_000, 2))) > 0.9
    features, labels = [], []
    for label in range(8):
        for instance in range(24):
            grey = fractal(0, label, instance, 32).astype(float).mean(axis=2)
            across, down = np.diff(grey, axis=1)[:-1], np.diff(grey, axis=0)[:, :-1]
            spectrum = np.abs(np.fft.rfft2(np.hypot(across, down)))[:10, :10]
            features.append(np.log1p(spectrum).ravel())
            labels.append(label)
    data, target = np.array(features), np.array(labels)
    held_out = np.arange(len(data)) % 3 == 0
    distances = ((data[held_out][:, None] - data[~held_out][None]) ** 2).sum(axis=2)
    guessed = target[~held_out][distances.argmin(axis=1)]
    assert (guessed == target[held_out]).mean() > 3 / 8


def test_samples_are_mixed_and_held_out_ones_are_others() -> None:
    train = list(fractal_samples(4, 5, size=16, seed=0))
    test = list(fractal_samples(4, 2, size=16, seed=0, first_instance=5))
    assert sorted(label for *_, label in train) == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert [label for *_, label in train] != sorted(label for *_, label in train)
    assert {key for key, *_ in train}.isdisjoint(key for key, *_ in test)
    assert Image.open(io.BytesIO(train[0][1])).size == (16, 16)
    assert class_system(0, 0).shape[1:] == (2, 3)


def test_the_command_packs_two_sets_of_the_same_classes(tmp_path: Path) -> None:
    options = ["--classes", "3", "--size", "16", "--samples-per-shard", "10"]
    train, held_out = tmp_path / "train", tmp_path / "held-out"
    assert shards(["pack", "fractals", str(train), *options, "--per-class", "5"]) == 0
    shards(["pack", "fractals", str(held_out), *options, "--per-class", "2", "--first", "5"])
    index = ShardIndex.load(train)
    assert (index.num_samples, index.num_shards, index.num_classes) == (15, 2, 3)
    assert ShardIndex.load(held_out).num_samples == 6
    with pytest.raises(ValueError, match=r"--per-class is 0; it must be 1 or more"):
        shards(["pack", "fractals", str(tmp_path / "none"), "--per-class", "0"])
    assert not (tmp_path / "none").exists()
