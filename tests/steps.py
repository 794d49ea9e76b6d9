"""The training task of a tiny NFNet, stepped without a Trainer, and batches for it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nfnets_xla import NFNet
from nfnets_xla.config import OptimConfig
from nfnets_xla.data.mix import Layout, draw_mixes
from nfnets_xla.models.variants import Variant
from nfnets_xla.optim import Passes
from nfnets_xla.optim.schedule import Schedule
from nfnets_xla.task import Batch, Classification, Compile

STREAMS, IMAGES, VIEWS, SIZE, CLASSES = 2, 4, 2, 16, 5
ROWS = STREAMS * IMAGES * VIEWS
TINY = Variant(
    "tiny", (16, 16, 32, 16), (1, 2, 1, 1), SIZE, SIZE, 0.3, 5, group_width=8, stem=(4, 4, 4)
)
PLAIN: dict[str, Any] = {"sam_rho": None}
SAM: dict[str, Any] = {"sam_rho": 0.05}


def batch(step: int, *, mix: bool = False, weights: Tensor | None = None) -> Batch:
    generator = torch.Generator().manual_seed(step)
    weight_B = torch.ones(ROWS) if weights is None else weights
    images = torch.randint(256, (ROWS, SIZE, SIZE, 3), generator=generator, dtype=torch.uint8)
    rows: Batch = {
        "step": step,
        "images_BHWC": images,
        "labels_B": torch.randint(CLASSES, (ROWS,), generator=generator),
        "weight_B": weight_B,
        "keep_masks_BN": (torch.rand(ROWS, 5, generator=generator) > 0.2).byte(),
        "dropout_bits_BP": torch.randint(256, (ROWS, 4), generator=generator, dtype=torch.uint8),
    }
    if not mix:
        return rows
    layout = Layout(STREAMS, IMAGES, VIEWS)
    mixes = draw_mixes(
        layout,
        SIZE,
        sample_B=np.arange(ROWS) // VIEWS,
        stream_B=np.arange(ROWS) // (IMAGES * VIEWS),
        weight_B=weight_B.numpy(),
        rng_of=lambda row: np.random.default_rng([step, row]),
    )
    return rows | {
        "layout": layout,
        "mix_outside_B": torch.from_numpy(mixes.outside_B),
        "mix_box_B4": torch.from_numpy(mixes.box_B4),
        "mix_ratio_B": torch.from_numpy(mixes.ratio_B),
        "mix_labels_B": rows["labels_B"][torch.from_numpy(mixes.partner_B)],
    }


def network() -> NFNet:
    """Skip gains as if trained a while: a branch whose gain is 0 gets no gradient."""
    torch.manual_seed(0)
    net = NFNet(TINY, num_classes=CLASSES)
    for name, parameter in net.named_parameters():
        if name.endswith("skip_gain"):
            nn.init.constant_(parameter, 0.5)
    return net


def channels_last(net: NFNet) -> NFNet:
    return net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def task(
    *,
    form: Callable[[NFNet], NFNet] = lambda net: net,
    device: str = "cpu",
    compile: Compile = lambda function: function,
    compute_dtype: torch.dtype = torch.float32,
    ascent_fraction: float = 1.0,
    microbatches: int = 1,
    **optim: Any,
) -> Classification:
    """A task ready to step without a Trainer; `form` first changes the network."""
    config = OptimConfig(
        **{
            "epochs": 1,
            "peak_lr": 0.3,
            "lr_batch": None,
            "schedule": "constant",
            "warmup_steps": 0,
            "warmup_epochs": None,
            "warmup_fraction": None,
            "rsqrt_timescale": 1,
            "cooldown_steps": 0,
            "optimizer": "sgd",
            "momentum": 0.9,
            "beta2": None,
            "weight_decay": 1e-3,
            "clipping": 0.05,
            "loss": "softmax",
            "label_smoothing": 0.1,
            "accumulation": 1,
            "sam_ascent_fraction": ascent_fraction,
            "sam_microbatches": microbatches,
            "sam_adaptive": False,
            "ema_decay": None,
            "max_skipped": 0,
            **optim,
        }
    )
    made = Classification(
        form(network()),
        config,
        schedule=Schedule("constant", config.peak_lr, 0, 10),
        compute_dtype=compute_dtype,
        fetch=lambda named: {name: tensor.cpu() for name, tensor in named.items()},
        compile=compile,
        passes=Passes(IMAGES, VIEWS, microbatches, config.accumulation, ascent_fraction),
    )
    made.to(device)
    optimizer = made.configure_optimizers()
    made.optimizers = lambda: optimizer  # type: ignore[method-assign, assignment]
    made.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign, assignment]
    return made


def on(device: str, rows: Batch) -> Batch:
    return {name: x.to(device) if isinstance(x, Tensor) else x for name, x in rows.items()}
