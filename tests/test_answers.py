"""An evaluation's report on classes and images, against torchmetrics on the predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from nfnets_xla.answers import Answers
from nfnets_xla.cli import main
from nfnets_xla.data.batches import EvalBatches
from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import pack_samples
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.registry import create_network
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.models.weights import describe, save_weights
from nfnets_xla.task import MEAN_RGB, STDDEV_RGB
from tests.data.images import samples
from tests.runs import as_hosts, start

CLASSES, SIZE = 7, 32
SIZES = [f"data.eval_image_size={SIZE}", "data.eval_margin=4", "data.eval_batch_size=8"]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 images, which is no multiple of the batch of 8; one of them is broken."""
    folder = tmp_path_factory.mktemp("held-out")
    made = list(samples(29))
    key, _, kind, label = made[11]
    made[11] = (key, b"\xff\xd8 no picture", kind, label)
    pack_samples(((k, b, e, n % CLASSES) for n, (k, b, e, _) in enumerate(made)), folder,
                 samples_per_shard=10)  # fmt: skip
    build_index(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    net = NFNet(VARIANTS["nfnet_mini_f0"], num_classes=CLASSES)
    torch.nn.init.normal_(net.get_parameter("head.weight"), std=0.5)
    file = tmp_path_factory.mktemp("weights") / "net.safetensors"
    save_weights(net, file, describe(net, "nfnet_mini_f0", "made for a test"))
    return file


def command(weights: Path, held_out: Path, run_dir: Path) -> list[str]:
    given = [f"model.init_from={weights}", f"data.eval_shards={held_out}", f"run_dir={run_dir}"]
    cpu = ["trainer.device=cpu", "data.workers=0", "data.max_missed=0.1"]
    return ["evaluate", "model.name=nfnet_mini_f0", *given, *SIZES, *cpu]


def predicted(weights: Path, held_out: Path) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Logits, labels and numbers of the samples that can be decoded."""
    net = NFNet(VARIANTS["nfnet_mini_f0"], num_classes=CLASSES).eval()
    net.load_state_dict(load_file(weights))
    index = ShardIndex.load(held_out)
    batches = EvalBatches(index, num_classes=CLASSES, batch_size=1, image_size=SIZE, margin=4)
    shown = [(n, batches[n]) for n in range(29) if batches[n]["weight_B"].item()]
    images_BHWC = torch.cat([batch["images_BHWC"] for _, batch in shown]).float()
    images_BCHW = ((images_BHWC - torch.tensor(MEAN_RGB)) / torch.tensor(STDDEV_RGB)).permute(
        0, 3, 1, 2
    )
    with torch.no_grad():
        logits = net(images_BCHW)
    return logits, torch.cat([batch["labels_B"] for _, batch in shown]), [n for n, _ in shown]


def test_classes_and_confusions_are_torchmetrics(
    weights: Path, held_out: Path, tmp_path: Path
) -> None:
    main(command(weights, held_out, tmp_path / "run"))
    found = json.loads((tmp_path / "run" / "evaluation-1.json").read_text())
    logits, labels, numbers = predicted(weights, held_out)
    assert numbers == [n for n in range(29) if n != 11]
    assert found["images"] == len(labels) == 28
    for name, k in (("top1", 1), ("top5", 5)):
        each = MulticlassAccuracy(CLASSES, average=None, top_k=k)(logits, labels)
        ours = [row[name] for row in found["per_class"]]
        assert ours == pytest.approx(each.tolist(), abs=1e-6)
        overall = np.average(ours, weights=[row["images"] for row in found["per_class"]])
        assert found[name] == pytest.approx(overall, abs=1e-6)
    matrix = MulticlassConfusionMatrix(CLASSES)(logits, labels)
    matrix.fill_diagonal_(0)
    ours = torch.zeros_like(matrix)
    for row in found["confusions"]:
        ours[row["class"], row["taken_for"]] = row["images"]
    assert torch.equal(ours, matrix)
    assert matrix.sum() > 0
    frequencies = [row["images"] for row in found["confusions"]]
    assert frequencies == sorted(frequencies, reverse=True)
    with Image.open(tmp_path / "run" / "errors-1.png") as sheet:
        assert sheet.width == 8 * (128 + 4)


def test_a_loss_that_is_not_finite_is_json_still(
    weights: Path, held_out: Path, tmp_path: Path
) -> None:
    """Strict JSON readers do not accept NaN."""
    state = load_file(weights)
    state["head.weight"] = torch.full_like(state["head.weight"], 3e38)
    save_file(state, tmp_path / "net.safetensors")
    main(command(tmp_path / "net.safetensors", held_out, tmp_path / "run"))
    text = (tmp_path / "run" / "evaluation-1.json").read_text()
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["loss"] is None
    assert found["images"] == 28


def test_nothing_is_overwritten(weights: Path, held_out: Path, tmp_path: Path) -> None:
    for _ in range(2):
        main(command(weights, held_out, tmp_path))
    assert {file.name for file in tmp_path.glob("evaluation-*")} == {
        "evaluation-1.json",
        "evaluation-2.json",
    }


@pytest.mark.slow
def test_hosts_join_their_answers(weights: Path, held_out: Path, tmp_path: Path) -> None:
    words = command(weights, held_out, tmp_path / "one")
    assert start(words, tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()
    words[words.index(f"run_dir={tmp_path / 'one'}")] = f"run_dir={tmp_path / 'two'}"
    running = [start(words, tmp_path / "log", **variables) for variables in as_hosts(2)]
    assert [process.wait() for process in running] == [0, 0], (tmp_path / "log").read_text()
    assert (tmp_path / "log").read_text().count("net.safetensors: loss") == 2  # each run once
    one, two = (
        json.loads((tmp_path / name / "evaluation-1.json").read_text()) for name in ("one", "two")
    )
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert (two["per_class"], two["confusions"]) == (one["per_class"], one["confusions"])


def test_the_surest_errors_come_first() -> None:
    answers = Answers(
        sample_N=np.arange(4),
        label_N=np.array([0, 1, 2, 2]),
        predicted_N=np.array([0, 2, 1, 1]),
        probability_N=np.array([0.99, 0.3, 0.8, 0.5]),
        rank_N=np.array([0, 1, 2, 5]),
    )
    assert answers.surest_errors(2).tolist() == [2, 3]
    assert answers.confusions()[0] == {"class": 2, "taken_for": 1, "images": 2}
    assert answers.per_class()[2] == {"class": 2, "images": 2, "top1": 0.0, "top5": 0.5}


def test_a_peers_classes_are_those_of_its_weights(
    held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many as its weights were trained with; the held-out labels may lack the last."""
    name = "vit_mini_d3_4"
    net = create_network(name, num_classes=CLASSES + 5, image_size=SIZE)
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    main([*command(tmp_path / "net.safetensors", held_out, tmp_path / "run"), f"model.name={name}"])
    assert "net.safetensors: loss" in capsys.readouterr().out
