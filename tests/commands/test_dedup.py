"""`nfnets-xla shards dedup` from the command line, and over two nodes of Ray."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nfnets_xla import checkpoint
from nfnets_xla.cli import main
from nfnets_xla.commands.doubles_sheet import EXCLUDED, KEPT, at_border, histogram
from nfnets_xla.commands.embedding import compared, embedded, load
from nfnets_xla.data.augment import eval_view
from nfnets_xla.data.decode import decode
from nfnets_xla.data.dedup import Settings, find
from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.registry import create_network
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.models.weights import describe, save_weights
from tests.data.copied import COPIES, jpeg, picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of two pictures in two folders of shards, and unrelated pictures."""
    folder = tmp_path_factory.mktemp("shards")
    for name, numbers in (("eval", [0, 1, 2]), ("one", [0, 30]), ("two", [1, 40, 41])):
        alter = COPIES["cropped"] if name != "eval" else COPIES["grey"]
        samples = ((f"{name}{n}", jpeg(alter(picture(n))), "jpg", 0) for n in numbers)
        pack_samples(samples, folder / name, samples_per_shard=2, prefix=name)
        build_index(folder / name)
    return folder


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    code = 0
    try:
        main(["shards", "dedup", *map(str, arguments)])
    except SystemExit as error:
        code = int(error.code or 0)
    said = capsys.readouterr()
    return code, said.out if code == 0 else said.err


def test_lists_and_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    shards = [folder / "one", folder / "two", "--against", folder / "eval"]
    code, said = run(capsys, *shards, "--out", out, "--jobs", 1)
    assert code == 0
    lists = [(out / f"duplicates-{n}.txt").read_text().split("\t")[:2] for n in (1, 2)]
    assert lists == [
        ["one-000000/one0", "eval-000000/eval0"],
        ["two-000000/two1", "eval-000000/eval1"],
    ]
    assert f"{out}/duplicates-2.txt: 1 of 3 samples; train with data.shards={folder}/two" in said
    with Image.open(out / "report.png") as report:
        assert report.format == "PNG"
        assert report.width > 1000
    # Another threshold, with the matches found before.
    code, said = run(capsys, *shards, "--out", out, "--jobs", 1, "--distance", 0)
    assert (out / "duplicates-1.txt").read_text() == ""
    # --within: no two pictures in this folder are alike.
    code, said = run(capsys, folder / "two", "--within", "--out", out, "--jobs", 1)
    assert f"{out}/duplicates.txt: 0 of 3 samples" in said


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[NFNet, Path]:
    torch.manual_seed(0)
    net = NFNet(VARIANTS["nfnet_mini_f0"], num_classes=10)
    path = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    save_weights(net, path, describe(net, "nfnet_mini_f0", "a test"))
    return net.eval(), path


def test_a_model_may_compare(
    folder: Path, saved: tuple[NFNet, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net, weights = saved
    arguments = [folder / "one", "--against", folder / "eval", "--out", tmp_path / "out"]
    model = ["--model", "nfnet_mini_f0", "--weights", weights, "--jobs", 1, "--distance", 0.7]
    code, said = run(capsys, *arguments, *model)
    assert code == 0, said
    (line,) = (tmp_path / "out" / "duplicates.txt").read_text().splitlines()
    ids, distance = line.rsplit("\t", 1)
    assert ids == "one-000000/one0\teval-000000/eval0"
    shards = [ShardIndex.load(folder / name) for name in ("one", "eval")]
    copy, original = (features(net, index.read(0, 0)) for index in shards)
    expected = 1 - float(copy @ original / (copy.norm() * original.norm()))
    assert expected > 1e-3
    assert abs(float(distance) - expected) < 6e-4  # the list has three decimals


@torch.inference_mode()
def features(net: NFNet, data: bytes) -> torch.Tensor:
    """Features of a picture and its mirror image, in the plainest code."""
    size = VARIANTS["nfnet_mini_f0"].test_size
    image_HWC = torch.from_numpy(eval_view(decode(data), size=size, margin=0)) / 255
    image_HWC = image_HWC - torch.tensor([0.485, 0.456, 0.406])
    image_HWC = image_HWC / torch.tensor([0.229, 0.224, 0.225])
    both_BCHW = torch.stack([image_HWC, image_HWC.flip(1)]).permute(0, 3, 1, 2)
    return net.forward_features(both_BCHW).mean((0, 2, 3))


def test_a_timm_model_sees_pictures_of_its_own_size(tmp_path: Path) -> None:
    """This ViT takes 160 px and no other size; a mistake ends the command before any work."""
    net = create_network("timm/test_vit", num_classes=0)
    save_weights(net, tmp_path / "vit.safetensors", {})
    model = load("timm/test_vit", str(tmp_path / "vit.safetensors"))
    assert model.size == 160
    assert float(embedded(model, jpeg(picture(0))).norm()) == pytest.approx(1)


def test_weights_of_a_run_see_pictures_as_its_evaluations_do(tmp_path: Path) -> None:
    """A ViT is made for one size, which its weights do not reveal."""
    made: dict[str, dict[str, Any]] = {
        "nfnet_mini_f0": {},
        "vit_mini_d3_4": {"image_size": 64, "eval_image_size": 48},
    }
    for name, options in made.items():
        net = create_network(name, num_classes=3, **options)
        identity = {"model": {"name": name}, "num_classes": 3, "optim": {"loss": "softmax"}}
        identity |= {"data": {"image_size": 64, "eval_image_size": 48, "eval_margin": 8}}
        tensors = {key: value.contiguous() for key, value in net.state_dict().items()}
        checkpoint.save(tmp_path / name, 5, {"model": tensors}, {"identity": identity})
        model = load(name, str(tmp_path / name / "step-00000005"))
        assert model.size == 48
        assert float(embedded(model, jpeg(picture(0))).norm()) == pytest.approx(1)
    save_weights(create_network("vit_mini_d3_4"), tmp_path / "net.safetensors", {})
    with pytest.raises(ValueError, match="does not say for which size of images vit_mini_d3_4 was"):
        load("vit_mini_d3_4", str(tmp_path / "net.safetensors"))


def test_a_comparison_leaves_no_shard_open(
    folder: Path, saved: tuple[NFNet, Path], tmp_path: Path
) -> None:
    """A data set may have more shards than a process may have open files."""

    def opened() -> set[str]:
        links = Path("/proc/self/fd").iterdir()
        return {name for name in map(os.path.realpath, links) if name.startswith(f"{folder}/")}

    train, against = (ShardIndex.load(folder / name) for name in ("one", "eval"))
    matches = find([train], [against], tmp_path, Settings())
    assert len(matches.distance_M) > 0
    assert not opened()
    compared(matches, load("nfnet_mini_f0", str(saved[1])))
    assert not opened()


def test_mistakes_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, against = folder / "one", ["--against", folder / "eval"]
    for arguments, said in (
        ([one], "give either --against SHARDS, for duplicates of those, or --within"),
        ([one, *against, "--within"], "give either --against SHARDS"),
        ([one, one, "--within"], "a folder is given twice: give each once"),
        ([one, *against, "--distance", 0.8], "--distance is 0.8; it must be 0 to 0.7"),
        ([one, *against, "--bits", 60], "bits is 60; it must be 0 to 44 of 128"),
        ([one, *against, "--crop", 2], "crop is 2.0; it must be a share of a picture's area"),
        ([one, *against, "--engine", "spark"], "invalid choice: 'spark'"),
        ([one, *against, "--weights", "x"], "--weights are those of a --model: give its name"),
        ([one, "--against", tmp_path], f"{tmp_path} has no index.npz; run `nfnets-xla shards ind"),
        ([], "the following arguments are required"),
    ):
        code, error = run(capsys, *arguments, "--out", tmp_path / "out")
        assert (code, error.count("\n")) == (2, 1)
        assert said in error
    assert not (tmp_path / "out").exists()


def test_the_report_shows_both_sides_of_the_threshold() -> None:
    distance = np.linspace(0, 0.69, 200).astype(np.float32)[::-1]
    shown = np.sort(distance[at_border(distance, 0.25)])
    assert len(shown) == 24
    assert (shown <= 0.25).sum() == 12
    assert (np.diff(distance[at_border(distance, 0.25)]) > 0).all()
    # If one side has few, more come from the other; if both have few, all.
    assert len(at_border(distance[distance > 0.25], 0.25)) == 24
    assert len(at_border(distance[distance < 0.25], 0.25)) == 24
    assert len(at_border(distance[:5], 0.25)) == 5
    assert len(at_border(distance[:0], 0.25)) == 0
    colours = {colour for _, colour in histogram(distance, 0.25, 900).getcolors(2**16) or []}
    assert {tuple(bytes.fromhex(colour[1:])) for colour in (EXCLUDED, KEPT)} <= colours
    assert histogram(distance[:0], 0.25, 900).size == (900, 220)


@pytest.mark.slow
def test_two_nodes_of_ray_find_the_same(tmp_path: Path) -> None:
    """Run in its own process, whose end also ends the nodes."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.two_nodes", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "the same, on 2 nodes"
