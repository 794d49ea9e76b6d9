"""Folders of runs as training leaves them, with chosen numbers."""

from pathlib import Path
from typing import Any

from nfnets_xla.models.variants import VARIANTS
from nfnets_xla.record import RecordWriter
from nfnets_xla.scaling.account import macs_per_image

IMAGES = 40_000
BATCH = 80


def header(
    model: str = "nfnet_mini_f0",
    epochs: float = 1,
    rate: float = 0.1,
    seed: int = 0,
    init_from: str | None = None,
    batch_size: int = BATCH,
    image_size: int = 32,
    optim: dict[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    return {
        "resumed_from": 0,
        "config": {
            "seed": seed,
            "trainer": {"log_every": 25, "eval_every": None},
            "model": {"name": model, "init_from": init_from},
            "data": {"batch_size": batch_size, "image_size": image_size, "repeats": 1},
            "optim": {
                "epochs": epochs,
                "peak_lr": rate,
                "sam_rho": None if init_from is None else 0.05,
                "loss": "softmax",
                "optimizer": "sgd",
                **(optim or {}),
            },
        },
        "fingerprint": "f" * 64,
        "num_classes": 200,
        "num_steps": round(epochs * IMAGES / BATCH),
        "parameters": 1_000_000,
        "macs_per_image": macs_per_image(model, 32, 200) if model in VARIANTS else None,
        "device_kind": "CPU",
        "num_devices": 1,
        **changes,
    }


def write_diverged(folder: Path, **fields: Any) -> None:
    """A run that the guard ended at step 2, after one non-finite update too many."""
    with RecordWriter(folder, header(**fields)) as record:
        record.write("train", 1, loss=9.0, images_per_second=100.0)
        record.write("nonfinite", 2, count=10, stopped=True, ids=[])


def write_run(
    folder: Path,
    *,
    loss: float,
    top1: float = 0.5,
    speeds: tuple[float, ...] = (100.0,),
    **fields: Any,
) -> dict[str, Any]:
    """A finished run of one start; `fields` go to `header`."""
    first = header(**fields)
    steps = first["num_steps"]
    with RecordWriter(folder, first) as record:
        for number, speed in enumerate(speeds, start=1):
            step = round(steps * number / len(speeds))
            record.write("train", step, loss=loss, images_per_second=speed)
        record.write("eval", steps, weights="raw", loss=loss, top1=top1, top5=1.0)
        record.write("end", steps)
    return first
