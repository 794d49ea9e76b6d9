"""A whole step written out, top-k for samples with several labels, and rows of several hosts."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nfnets_xla import NFNet, checkpoint
from nfnets_xla.callbacks.checkpointer import host_copies
from nfnets_xla.data.mix import Layout
from nfnets_xla.network import restore
from nfnets_xla.optim import SGD_AGC, parameter_roles
from nfnets_xla.optim.schedule import Schedule
from nfnets_xla.task import Batch, _rank, rows_of
from tests.optim.network import SETTINGS
from tests.steps import CLASSES, PLAIN, ROWS, SAM, batch, network, task

# ImageNet's, from dataset.py:34-35 of the reference: red, green, blue of bytes.
MEAN, STDDEV = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

BATCH = {
    "labels_B": torch.tensor([4, 2, 0]),
    "labels_BL": torch.tensor([[4, 1, 4], [2, 2, 2], [0, 1, 2]]),
    "label_weights_BL": torch.tensor([[3.0, 1, 0], [1, 0, 0], [1, 1, 2]]),
}


def test_the_best_ranked_of_the_labels_counts() -> None:
    logits_BK = torch.tensor([[5.0, 4, 3, 2, 1], [5, 4, 3, 2, 1], [float("nan")] * 5])
    assert _rank(logits_BK, BATCH).tolist() == [1, 2, 5]
    alone = {"labels_B": BATCH["labels_B"]}
    assert _rank(logits_BK, alone).tolist() == [4, 2, 5]


def test_rows_of_all_hosts_are_mixed_as_each_hosts_own() -> None:
    """On XLA a batch on the devices is global, but its layout is still each host's."""
    generator = torch.Generator().manual_seed(0)

    def of_host() -> Batch:
        images = torch.randint(256, (12, 4, 4, 3), dtype=torch.uint8, generator=generator)
        outside = torch.rand(12, generator=generator)
        boxes = torch.tensor([[1, 0, 3, 2]], dtype=torch.int32).expand(12, 4)
        mixes = {"mix_outside_B": outside, "mix_box_B4": boxes, "mix_ratio_B": outside}
        return {"images_BHWC": images, **mixes}

    layout = Layout(streams=2, images=3, views=2)
    hosts = [of_host(), of_host()]
    together = {name: torch.cat([host[name] for host in hosts]) for name in hosts[0]}
    alone = [rows_of({**host, "layout": layout})["images_BHWC"] for host in hosts]
    assert torch.equal(rows_of({**together, "layout": layout})["images_BHWC"], torch.cat(alone))


def normalised(images_BHWC: Tensor) -> Tensor:
    images = (images_BHWC.float() - torch.tensor(MEAN)) / torch.tensor(STDDEV)
    return images.permute(0, 3, 1, 2)


def logits_and_losses(net: NFNet, rows: Batch) -> tuple[Tensor, Tensor]:
    """From bytes to the smoothed loss of each row, with the given masks."""
    bits = np.unpackbits(rows["dropout_bits_BP"].numpy(), axis=1, bitorder="little")
    keep_BF = torch.from_numpy(bits[:, : net.num_features])
    images_BCHW = normalised(rows_of(rows)["images_BHWC"])
    logits_BK = net(images_BCHW, rows["keep_masks_BN"], keep_BF)
    ratio_B1 = rows["mix_ratio_B"][:, None]
    own, partners = (F.one_hot(rows[name], CLASSES) for name in ("labels_B", "mix_labels_B"))
    target_BK = 0.9 * (ratio_B1 * own + (1 - ratio_B1) * partners) + 0.1 / CLASSES
    return logits_BK, -(target_BK * logits_BK.log_softmax(dim=1)).sum(dim=1)


@pytest.mark.parametrize("form", [PLAIN, SAM], ids=["sgd", "sam"])
def test_steps_are_what_is_written_out_here(form: dict[str, Any]) -> None:
    """Normalised, masked, mixed, smoothed, weighted; each step's rate; SAM's two passes; the
    average and its rising decay; metrics of the weights before the step. Three steps, within 1e-5
    relative."""
    rates = Schedule("cosine", 0.3, 2, 5)
    of = task(**form, ema_decay=0.9)
    of.schedule = rates
    net = network().train()
    sgd = SGD_AGC(
        net.named_parameters(),
        parameter_roles(net, classifier="head"),
        lr=0.3,
        momentum=0.9,
        weight_decay=1e-3,
        clipping=0.05,
    )
    average = {name: p.detach().clone() for name, p in net.named_parameters()}
    weight_B = torch.ones(ROWS)
    weight_B[-3:] = 0
    for step in range(1, 4):
        rows = batch(step, mix=True, weights=weight_B)
        of.net.train()
        of.training_step(rows, step)

        def gradient(rows: Batch = rows) -> tuple[float, float]:
            net.zero_grad()
            logits_BK, losses_B = logits_and_losses(net, rows)
            loss = (losses_B * weight_B).sum() / weight_B.sum()
            loss.backward()
            right_B = logits_BK.argmax(dim=1) == rows["labels_B"]
            return float(loss.detach()), float((right_B * weight_B).sum() / weight_B.sum())

        metrics = gradient()
        if form["sam_rho"] is not None:
            ascents = [p.grad.clone() for p in net.parameters() if p.grad is not None]
            norm = torch.stack([ascent.norm() for ascent in ascents]).norm()
            kept = [p.detach().clone() for p in net.parameters()]
            with torch.no_grad():
                for parameter, ascent in zip(net.parameters(), ascents, strict=True):
                    parameter += form["sam_rho"] * ascent / norm
            gradient()
            with torch.no_grad():
                for parameter, before in zip(net.parameters(), kept, strict=True):
                    parameter.copy_(before)
        sgd.set_lr(torch.tensor([rates(step)]))
        sgd.step()
        decay = (1 + step) / (10 + step)  # still below 0.9
        for name, parameter in net.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * parameter.detach()

        assert of.step_metrics_M is not None
        assert of.ema is not None
        np.testing.assert_allclose(of.step_metrics_M[:2].tolist(), metrics, rtol=1e-5)
        for name, parameter in of.net.named_parameters():
            torch.testing.assert_close(parameter, net.get_parameter(name), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(of.ema.shadow[name], average[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_a_held_out_loss_is_not_smoothed_and_in_float32(loss: str, dtype: torch.dtype) -> None:
    of = task(**PLAIN, loss=loss, compute_dtype=dtype)
    of.eval()
    totals = []
    of.on_validation_epoch_start()
    for step in range(2):
        rows = batch(step)
        rows["weight_B"][-5:] = 0
        with torch.no_grad():
            of.validation_step(rows, step)
            logits = network().eval()(normalised(rows["images_BHWC"]))[:-5]
        labels = rows["labels_B"][:-5]
        if loss == "softmax":
            totals.append(F.cross_entropy(logits, labels, reduction="none"))
        else:
            target = F.one_hot(labels, CLASSES).float()
            each = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
            totals.append(each.sum(dim=1))
    of.on_validation_epoch_end()
    found = of.evaluation["raw"]
    assert found["images"] == 2 * (ROWS - 5)
    assert math.isclose(found["loss"], float(torch.cat(totals).mean()), rel_tol=1e-5)


def test_microbatches_are_weighed_as_parts_of_the_batch() -> None:
    """With a negligible ascent, SAM reduces to the sum over its microbatches."""
    whole, parts = task(**PLAIN), task(sam_rho=1e-9, microbatches=4)
    weight = torch.ones(ROWS).reshape(2, -1)
    weight[:, 5:] = 0  # the third microbatch weighs half, the last nothing
    for of in (whole, parts):
        of.training_step(batch(0, weights=weight.flatten()), 0)
    for name, parameter in whole.net.named_parameters():
        other = parts.net.get_parameter(name)
        torch.testing.assert_close(other, parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer", SETTINGS)
def test_a_restored_task_goes_on_to_the_bit(optimizer: str, tmp_path: Path) -> None:
    """AdamW's bias correction counts the updates of all starts."""
    options = {**PLAIN, "peak_lr": 0.01, "ema_decay": 0.9}
    options |= {**SETTINGS[optimizer], "optimizer": optimizer}
    whole, begun, rest = task(**options), task(**options), task(**options)
    for step in range(5):
        whole.training_step(batch(step), step)
    for step in range(3):
        begun.training_step(batch(step), step)
    checkpoint.save(tmp_path, 3, host_copies(begun)[0], {})
    of_run: Any = SimpleNamespace(optim=rest.optim)
    rest._restored = restore(rest.net, checkpoint.load(tmp_path / "step-00000003"), of_run)
    made = rest.configure_optimizers()
    rest.optimizers = lambda: made  # type: ignore[method-assign, assignment]
    for step in (3, 4):
        rest.training_step(batch(step), step)
    ours, theirs = host_copies(rest)[0], host_copies(whole)[0]
    for form, tensors in theirs.items():
        assert all(torch.equal(ours[form][name], value) for name, value in tensors.items()), form
