"""A model's folder, loaded here and by timm; and predictions for pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

import nfnets_xla
from nfnets_xla import checkpoint
from nfnets_xla.cli import main
from nfnets_xla.commands.predict import best
from nfnets_xla.models.card import read_card, write_card
from nfnets_xla.models.names import to_timm
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.registry import create_network
from nfnets_xla.models.timm_names import Sizes, timm_cfg
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.models.weights import describe, save_weights

CLASSES = 6


def trained(name: str, **options: Any) -> NFNet:
    torch.manual_seed(0)
    net = NFNet(VARIANTS[name], num_classes=CLASSES, **options).eval()
    torch.nn.init.normal_(net.get_parameter("head.weight"), std=0.1)
    return net


@pytest.fixture
def picture(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def test_a_card_loads_here_and_in_timm(tmp_path: Path) -> None:
    net, images = trained("nfnet_mini_f0"), torch.randn(2, 3, 64, 64)
    write_card(net, "nfnet_mini_f0", tmp_path / "card", {"classes": CLASSES}, "a test")
    where = f"local-dir:{tmp_path / 'card'}"
    for theirs in (nfnets_xla.create_model(where), timm.create_model(where, pretrained=True)):
        assert torch.equal(theirs.eval()(images), net(images))
    new_head = nfnets_xla.create_model(where, num_classes=3).eval()
    assert new_head(images).shape == (2, 3)
    assert torch.equal(new_head.get_parameter("stem.0.weight"), net.get_parameter("stem.0.weight"))
    assert "| classes | 6 |" in (tmp_path / "card" / "card.md").read_text()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nfnet_mini_f0", {"gelu": "erf", "eps_mode": "add"}),
        ("nfnet_mini_f0_plus", {"plus_bottleneck": "paper", "in_chans": 1}),
    ],
)
def test_a_card_knows_how_its_network_was_made(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Options that change what the weights mean, and the number of channels, which timm needs."""
    net = trained(name, **options)
    write_card(net, name, tmp_path / "card", {"classes": CLASSES}, "a test")
    where, images = f"local-dir:{tmp_path / 'card'}", torch.randn(2, net.in_chans, 64, 64)
    channels: dict[str, Any] = {"in_chans": net.in_chans}  # timm passes it to all its models
    theirs = timm.create_model(where, pretrained=True, **channels)
    for other in (nfnets_xla.create_model(where), theirs):
        assert torch.equal(other.eval()(images), net.eval()(images))


@pytest.mark.slow
def test_timm_alone_loads_what_it_has(tmp_path: Path) -> None:
    """In timm's own network, without any code of this library."""
    net, images = trained("nfnet_f0"), torch.randn(1, 3, 64, 64)
    write_card(net, "nfnet_f0", tmp_path / "card", {}, "a test")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'card'}", pretrained=True).eval()
    assert type(theirs).__module__ == "timm.models.nfnet", type(theirs)
    # With timm's GELU and eps our logits are timm's; with DeepMind's these weights differ by 3 %.
    where = f"local-dir:{tmp_path / 'card'}"
    as_timm = nfnets_xla.create_model(where, gelu="erf", eps_mode="add").eval()
    logits, expected = theirs(images), as_timm(images)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
    ours = nfnets_xla.create_model(f"local-dir:{tmp_path / 'card'}").eval()
    assert torch.equal(ours(images), net(images))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_card_of_a_run(
    tmp_path: Path, picture: str, loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    net = trained("nfnet_mini_f0")
    data = {"image_size": 32, "eval_image_size": 64, "eval_margin": 8, "batch_size": 8}
    identity = {"model": {"name": "nfnet_mini_f0"}, "num_classes": CLASSES, "seed": 0}
    identity |= {"data": data, "shards": "f" * 64, "optim": {"loss": loss}}
    state = {"identity": identity, "seconds": 1.0}
    checkpoint.save(tmp_path / "run", 5, {"model": dict(net.state_dict())}, state)
    main(["checkpoint", "card", str(tmp_path / "run"), str(tmp_path / "card")])
    assert "nfnet_mini_f0, 6 classes" in capsys.readouterr().out
    loaded = nfnets_xla.create_model(f"local-dir:{tmp_path / 'card'}").eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), net(images))
    config = json.loads((tmp_path / "card" / "config.json").read_text())
    assert config["architecture"] == "xla_nfnet_mini_f0"
    theirs = timm.create_model(f"local-dir:{tmp_path / 'card'}", pretrained=True)
    for seen in (loaded, theirs):  # evaluated like the run, not like its variant
        found = resolve_model_data_config(seen, use_test_size=True)
        assert tuple(found["input_size"]) == (3, 64, 64)
        assert int(64 / found["crop_pct"]) == 64 + 8
        assert tuple(resolve_model_data_config(seen)["input_size"]) == (3, 32, 32)
    page = (tmp_path / "card" / "card.md").read_text()
    assert "resized to 72 px, 64 px cropped" in page
    assert "resolve_model_data_config(net, use_test_size=True)` has the numbers" in page
    main(["predict", f"local-dir:{tmp_path / 'card'}", picture])
    said = capsys.readouterr().out
    main(["predict", "nfnet_mini_f0", picture, "--weights", str(tmp_path / "run")])
    assert capsys.readouterr().out == said
    with Image.open(picture) as image:
        pixels = np.array(image)
    shares = [*best(net, pixels, Sizes(32, 64, 8), CLASSES, loss)]
    assert (sum(share for _, share in shares) == pytest.approx(1)) == (loss == "softmax")
    shown = [f"{share:6.1%}  {label}" for label, share in shares[:5]]
    assert [line.strip() for line in said.splitlines()[1:]] == [line.strip() for line in shown]
    with pytest.raises(SystemExit):  # never overwrites another folder
        main(["checkpoint", "card", str(tmp_path / "run"), str(tmp_path / "card")])
    assert "exists" in capsys.readouterr().err


def test_predictions_are_the_models(
    tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    net = trained("nfnet_mini_f0")
    save_weights(net, tmp_path / "net.safetensors", describe(net, "nfnet_mini_f0", "a test"))
    write_card(net, "nfnet_mini_f0", tmp_path / "card", {}, "a test")
    size = ["--size", "64", "--top", "2"]
    main(["predict", "nfnet_mini_f0", picture, "--weights", f"{tmp_path}/net.safetensors", *size])
    one = capsys.readouterr().out
    main(["predict", f"local-dir:{tmp_path / 'card'}", picture, *size])
    assert capsys.readouterr().out == one
    torch.save(to_timm(net), tmp_path / "timm.pt")  # in timm's names, with as many classes as `net`
    main(["predict", "nfnet_mini_f0", picture, "--weights", f"{tmp_path}/timm.pt", *size])
    assert capsys.readouterr().out == one
    transform: Any = create_transform(
        input_size=(3, 64, 64), crop_pct=64 / 96, crop_mode="squash", interpolation="bicubic",
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    with Image.open(picture) as image, torch.no_grad():
        image_CHW = transform(image)
        assert isinstance(image_CHW, torch.Tensor)
        shares = net(image_CHW[None])[0].softmax(0)
    lines = one.splitlines()
    assert lines[0] == picture
    assert [int(line.split()[1]) for line in lines[1:]] == shares.topk(2).indices.tolist()
    assert float(lines[1].split()[0].rstrip("%")) == pytest.approx(
        100 * float(shares.max()), abs=1.0
    )


def test_a_peer_of_a_run_says_what_it_sees(
    tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the run's two sizes; the first decides its position embeddings."""
    name = "vit_mini_d3_4"
    net = create_network(name, num_classes=CLASSES, image_size=64, eval_image_size=48).eval()
    identity = {"model": {"name": name}, "num_classes": CLASSES}
    identity |= {"data": {"image_size": 64, "eval_image_size": 48, "eval_margin": 8}}
    identity |= {"optim": {"loss": "softmax"}}
    tensors = dict(net.state_dict())
    checkpoint.save(tmp_path / "run", 5, {"model": tensors}, {"identity": identity})
    main(["predict", name, picture, "--weights", str(tmp_path / "run")])
    lines = capsys.readouterr().out.splitlines()[1:]
    with Image.open(picture) as image:
        shares = best(net, np.array(image), Sizes(64, 48, 8), 5)
    assert [int(line.split()[1]) for line in lines] == [label for label, _ in shares]
    torch.save(tensors, tmp_path / "net.pt")
    for words, part in (
        ([], f"{name} has no weights here: give --weights RUN"),
        (["--weights", f"{tmp_path}/net.pt"], f"does not say for which size of images {name} was"),
        (["--weights", f"{tmp_path}/run", "--size", "50"], f"{name} for images of 64 px does not"),
    ):
        with pytest.raises(SystemExit):
            main(["predict", name, picture, *words])
        assert part in capsys.readouterr().err


def test_mistakes_are_one_line(
    tmp_path: Path, picture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    for words, part in (
        (["nfnet_f7", picture], "nfnet_f7 has no weights of its own: give --weights RUN\n"),
        (
            ["f0", picture],
            "f0 has no weights of its own: give --weights RUN, or nfnet_f0.dm_in1k\n",
        ),
        (["nfnet_f0", str(tmp_path / "text.jpg")], "text.jpg: 10 bytes do not decode"),
        (["nfnet_f0", str(tmp_path / "absent.jpg")], "absent.jpg"),
        ([f"local-dir:{tmp_path}", picture], "checkpoint card` wrote: it has no config.json"),
        (["nfnet_f0", picture, "--top", "0"], "--top is 0"),
        (["nfnet_f0", picture, "--ema"], "--ema is for --weights RUN: these weights have no mov"),
        (["local-dir:X", picture, "--weights", "R"], "its own weights: leave out --weights R"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["predict", *words])
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert part in error
        assert error.count("\n") == 1
    for model, why in (("x", "is of model 'x', which"), ("nfnet_f0", "holds no model.safetensors")):
        config = {"num_classes": 3, "nfnets_xla": {"model": model, "in_chans": 3}}
        config |= {"pretrained_cfg": timm_cfg("nfnet_f0", VARIANTS["nfnet_f0"])}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=why):
            read_card(f"local-dir:{tmp_path}")
