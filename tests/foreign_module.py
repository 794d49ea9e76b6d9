"""A user's own LightningModule on our strategy: fit, resume, test, validate, predict.

python -m tests.foreign_module xla|cpu FSDP FOLDER
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from nfnets_xla import WSConv2d, xla
from nfnets_xla.exits import HostLost
from nfnets_xla.hosts import Hosts
from nfnets_xla.strategy import SPMDStrategy  # the import registers accelerator and strategy


class Module(LightningModule):
    """Our convolution before a timm network; it knows nothing about XLA."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = WSConv2d(3, 3, 3)
        self.net = timm.create_model("test_vit", num_classes=4, img_size=32, depth=2)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", self.right(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_accuracy", self.right(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(1)

    def right(self, batch: Any) -> Tensor:
        images, labels = batch
        return (self(images).argmax(1) == labels).float().mean()

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.stem(images))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Mistaken(Module):
    def setup(self, stage: str) -> None:
        raise RuntimeError("the user's own mistake")


class OfTwoHosts(Module):
    """Believes that it runs on one of two hosts; after a step the other is gone. Whatever uses the
    devices next must report it: the next batch, or the next step."""

    def __init__(self, fails: str) -> None:
        super().__init__()
        self.fails = fails

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.trainer.strategy._num_hosts = 2  # type: ignore[attr-defined]
            xla.open_hosts = lambda: Hosts(0, 2)
            setattr(xla, self.fails, self.fail)
            xla.gather = self.fail

    def fail(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("the peer is gone")


def lose_a_host(fsdp: int, folder: Path, loader: Any) -> None:
    """State on the devices stays there: reading it may wait for a step of all hosts."""
    before = xla.sync, xla.upload_rows, xla.gather, xla.open_hosts
    for fails in ("sync", "upload_rows"):
        module = OfTwoHosts(fails)
        said = r"host 0 of 2 lost another one \(the peer is gone\): start"
        with pytest.raises(HostLost, match=said):
            make_trainer("xla", fsdp, folder, epochs=1).fit(module, loader)
        xla.sync, xla.upload_rows, xla.gather, xla.open_hosts = before
        assert {parameter.device.type for parameter in module.parameters()} == {"xla"}


def main(device: str, fsdp: int, folder: Path) -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 3, 32, 32, generator=generator)
    loader = DataLoader(TensorDataset(images, torch.arange(24) % 4), batch_size=8)
    with pytest.raises(RuntimeError, match="the user's own mistake"):
        make_trainer(device, fsdp, folder, epochs=1).fit(Mistaken(), loader)
    if device == "xla":
        lose_a_host(fsdp, folder, loader)
    first, module = Module(), Module()
    trainer = make_trainer(device, fsdp, folder, epochs=1)
    trainer.fit(first, loader, loader)
    saved = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=True)
    assert saved["global_step"] == 3
    for name, value in first.cpu().state_dict().items():
        assert torch.equal(saved["state_dict"][name], value), name
    assert first(images).shape == (24, 4)  # on the host
    trainer = make_trainer(device, fsdp, folder, epochs=2)
    trainer.fit(module, loader, loader, ckpt_path=folder / "last.ckpt")
    assert trainer.global_step == 6
    (tested,) = trainer.test(module, loader, verbose=False)
    (validated,) = trainer.validate(module, loader, verbose=False)
    assert 0 <= tested["test_accuracy"] == validated["accuracy"] <= 1
    found: Any = trainer.predict(module, loader)
    right = torch.cat(found).cpu() == torch.arange(24) % 4
    assert right.float().mean() == pytest.approx(tested["test_accuracy"])
    print("losses:", *(float(loss) for loss in first.losses + module.losses))


def make_trainer(device: str, fsdp: int, folder: Path, epochs: int) -> Trainer:
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if device == "xla":
        strategy = "xla_spmd" if fsdp == 1 else SPMDStrategy(fsdp)
        options = {"accelerator": "xla", "strategy": strategy, "devices": 4}
    return Trainer(
        **options,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="last", monitor="accuracy", mode="max")],
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
