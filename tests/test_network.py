"""Which networks a run trains, and what of them is new."""

from typing import Any

import pytest

from nfnets_xla.compose import composed, to_run
from nfnets_xla.network import make_model


def made(num_classes: int, *settings: str) -> tuple[Any, list[str]]:
    given = ["data.shards=S", "run_dir=R", "optim.epochs=1", "model.compute_dtype=float32"]
    said: list[str] = []
    run = to_run(composed("pretrain", [*given, *settings]))
    return make_model(run, num_classes, said.append), said


def test_running_statistics_are_refused() -> None:
    small = ["model.drop_path_rate=0", "data.image_size=32", "data.eval_image_size=32"]
    with pytest.raises(ValueError, match=r"timm/test_resnet keeps running statistics \(net\."):
        made(5, "model.name=timm/test_resnet", *small)
    made(5, "model.name=timm/test_vit", *small)
