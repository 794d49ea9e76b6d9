"""Which networks a run trains, and which of their weights are new."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nfnets_xla import network
from nfnets_xla.backend import Backend, open_backend
from nfnets_xla.compose import composed, to_run
from nfnets_xla.config import TrainerConfig
from nfnets_xla.models import registry
from nfnets_xla.models.names import to_timm
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.network import initial_weights, make_model, put_on_device


def made(num_classes: int, *settings: str) -> tuple[Any, list[str]]:
    given = ["data.shards=S", "run_dir=R", "optim.epochs=1", "model.compute_dtype=float32"]
    said: list[str] = []
    run = to_run(composed("pretrain", [*given, *settings]))
    return make_model(run, num_classes, initial_weights(run), said.append), said


def test_running_statistics_are_refused() -> None:
    small = ["model.drop_path_rate=0", "data.image_size=32", "data.eval_image_size=32"]
    with pytest.raises(ValueError, match=r"timm/test_resnet keeps running statistics \(net\."):
        made(5, "model.name=timm/test_resnet", *small)
    made(5, "model.name=timm/test_vit", *small)


def test_a_bias_is_given_to_a_new_classifier_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "VARIANTS", {"nfnet_f0": VARIANTS["nfnet_mini_f0"]})
    public = NFNet(VARIANTS["nfnet_mini_f0"])
    torch.nn.init.normal_(public.get_parameter("head.bias"))
    save_file(to_timm(public), tmp_path / "public.safetensors")
    monkeypatch.setattr(registry, "fetch_pretrained", lambda *_: tmp_path / "public.safetensors")
    pretrained = ["model.name=nfnet_f0", "model.pretrained=dm_in1k", "model.head_bias=-10"]
    kept, said = made(1000, *pretrained)
    assert torch.equal(kept.head.bias, public.get_parameter("head.bias"))
    assert said == ["public weights nfnet_f0.dm_in1k"]
    new, said = made(5, *pretrained)
    assert new.head.bias.tolist() == [-10] * 5
    assert torch.equal(new.final_conv.weight, public.get_parameter("final_conv.weight"))
    assert said == ["public weights nfnet_f0.dm_in1k (new classifier)"]


def test_an_evaluation_asks_the_devices_for_what_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters once, and its own batch: its 8 rows fit on 4 devices; training's 18 do not."""
    asked: list[int] = []

    def four(trainer: TrainerConfig, kept_bytes: int) -> Backend:
        asked.append(kept_bytes)
        return replace(open_backend(trainer), num_devices=4)

    monkeypatch.setattr(network, "open_backend", four)
    given = ["model.name=nfnet_mini_f0", "model.init_from=W", "data.eval_shards=S"]
    batches = ["data.batch_size=18", "data.eval_batch_size=8", "trainer.device=cpu"]
    run = to_run(composed("evaluate", [*given, *batches]))
    net = NFNet(VARIANTS["nfnet_mini_f0"])
    put_on_device(net, run, trains=False)
    assert asked == [4 * sum(p.numel() for p in net.parameters())]
    with pytest.raises(ValueError, match=r"data\.batch_size is 18"):
        put_on_device(net, run)
    run.data.eval_batch_size = 18
    with pytest.raises(ValueError, match=r"data\.eval_batch_size is 18"):
        put_on_device(net, run, trains=False)
