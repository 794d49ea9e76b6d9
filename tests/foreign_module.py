"""A user's own LightningModule on our strategy.

python -m tests.foreign_module xla|cpu FSDP FOLDER
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from nfnets_xla import WSConv2d
from nfnets_xla.strategy import SPMDStrategy  # the import registers accelerator and strategy


class Module(LightningModule):
    """Our convolution before a timm network; knows nothing of XLA."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = WSConv2d(3, 3, 3)
        self.net = timm.create_model("test_vit", num_classes=4, img_size=32)
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.net(self.stem(images)), labels)
        self.losses.append(loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.net(self.stem(images)).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(device: str, fsdp: int, folder: Path) -> None:
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(24, 3, 32, 32, generator=generator)
    loader = DataLoader(TensorDataset(images, torch.arange(24) % 4), batch_size=8)
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 1}
    if device == "xla":
        strategy = "xla_spmd" if fsdp == 1 else SPMDStrategy(fsdp)
        options = {"accelerator": "xla", "strategy": strategy, "devices": 4}
    module = Module()
    trainer = Trainer(
        **options,
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="last")],
    )
    trainer.fit(module, loader, loader)
    saved = torch.load(folder / "last.ckpt", map_location="cpu", weights_only=False)
    assert saved["global_step"] == 6
    for name, value in module.cpu().state_dict().items():
        assert torch.equal(saved["state_dict"][name], value), name
    assert 0 <= float(trainer.callback_metrics["accuracy"]) <= 1
    print("losses:", *(float(loss) for loss in module.losses))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
