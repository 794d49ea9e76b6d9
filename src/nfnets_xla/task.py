"""What Lightning calls for each batch: the loss, the update, and the sums of an evaluation.

Shape suffixes: B rows of the global batch, K classes, L labels of a row, N residual blocks,
F pooled features, P = ceil(F / 8) bytes of packed bits, H W C as usual, M numbers of a metrics
vector.

A step touches the device three times: it uploads the batch, uploads the hyper-parameters as one
vector (XLA would compile in a scalar of exactly 0 or 1; DeepMind's schedule is 0 at step 0), and
dispatches the work. It reads nothing back.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.func import functional_call

from nfnets_xla.config import OPTIMIZERS, OptimConfig
from nfnets_xla.data.mix import mixed
from nfnets_xla.inductor import as_it_is
from nfnets_xla.losses import LOSSES, probabilities, target_of
from nfnets_xla.models.registry import Network
from nfnets_xla.models.stacked import output_axes
from nfnets_xla.models.timm_names import MEAN, STDDEV
from nfnets_xla.optim.by_role import ByRole
from nfnets_xla.optim.choice import make_optimizer
from nfnets_xla.optim.ema import EMA
from nfnets_xla.optim.guard import Guard
from nfnets_xla.optim.passes import Passes
from nfnets_xla.optim.roles import parameter_roles
from nfnets_xla.optim.sam import SAM
from nfnets_xla.optim.schedule import Schedule

Batch = dict[str, Any]
Fetch = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
AddUp = Callable[[Sequence[Tensor]], None]
Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

MEAN_RGB, STDDEV_RGB = (tuple(255 * part for part in parts) for parts in (MEAN, STDDEV))  # in bytes

NO_WEIGHT = 1e-6  # floor of a sum of row weights: if all are 0, the gradient is 0, not NaN
TRAIN_METRICS = ("loss", "top1")
# Each of a row's loss and of the number of classes above its label, both (B,) float32; averaged by
# the rows' weights.
EVAL_METRICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "loss": lambda losses_B, _: losses_B,
    "top1": lambda _, rank_B: (rank_B < 1).float(),
    "top5": lambda _, rank_B: (rank_B < 5).float(),
}
# Per row: best class, its probability, number of classes above the label, weight of the row.
ANSWERS = ("predicted", "probability", "rank", "weight")


@dataclass(frozen=True)
class Restored:
    """Host tensors of a checkpoint that cannot be loaded before the optimizer exists."""

    slots: dict[str, dict[str, Tensor]]  # optimizer state
    ema: dict[str, Tensor] | None
    updates: int  # number of updates made
    skipped: int  # number of updates skipped; see optim/guard.py


def _nothing_to_add(tensors: Sequence[Tensor]) -> None:
    """For one host, and for devices that sum by themselves."""


class Classification(LightningModule):
    """Trains a network on batches of `data.batches.TrainBatches`; evaluates on `EvalBatches`."""

    mean_rgb: Tensor
    stddev_rgb: Tensor

    def __init__(
        self,
        net: Network,
        optim: OptimConfig,
        *,
        compute_dtype: torch.dtype,
        fetch: Fetch,
        add_up: AddUp = _nothing_to_add,
        compile: Compile = as_it_is,
        schedule: Schedule | None = None,
        passes: Passes | None = None,
        restored: Restored | None = None,
        remembered_steps: int = 1,
    ) -> None:
        """`fetch` copies device tensors to the host in one transfer; `add_up` sums tensors in
        place over hosts, each of which has only its own rows; `compile` compiles the two functions
        that do all the work on rows.

        Training needs `schedule`, the learning rates, and `passes`, the parts of a batch. The
        device remembers which of the latest `remembered_steps` were not finite.
        """
        super().__init__()
        self.automatic_optimization = False
        self.net = net
        self.optim = optim
        self.schedule = schedule
        self.compute_dtype = compute_dtype
        self.fetch = fetch
        self.add_up = add_up
        self.passes = passes
        self._compiled_pass = compile(self._pass)
        self._compiled_evaluation = compile(self._evaluation)
        self.register_buffer("mean_rgb", torch.tensor(MEAN_RGB), persistent=False)
        self.register_buffer("stddev_rgb", torch.tensor(STDDEV_RGB), persistent=False)
        bit = 2 ** torch.arange(8, dtype=torch.uint8)
        self.register_buffer("bit_values", bit, persistent=False)
        self.ema: EMA | None = None
        self.updater: ByRole | None = None
        self.sam: SAM | None = None
        self.guard: Guard | None = None
        self.remembered_steps = remembered_steps
        # The latest step's TRAIN_METRICS, guard's numbers and clipped shares, still on the device.
        self.step_metrics_M: Tensor | None = None
        self.evaluation: dict[str, dict[str, float]] = {}  # latest results, for "raw" and "ema"
        self._restored = restored
        # If set, an evaluation also keeps the ANSWERS of the raw weights for every row.
        self.keep_answers = False
        self.answers_NA: np.ndarray | None = None
        self._eval_sums: list[dict[str, Tensor]] = []

    # ---- training -----------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Called after the module is on its device, so that every buffer is made there."""
        named = dict(self.net.named_parameters())
        self.guard = Guard(
            self.device,
            allowed=self.optim.max_skipped,
            left_out=0 if self._restored is None else self._restored.skipped,
            memory=self.remembered_steps,
        )
        updater = make_optimizer(
            self.optim.optimizer,
            named,
            parameter_roles(self.net, classifier=self.net.classifier_name),
            lr=self.optim.peak_lr,
            momentum=self.optim.momentum,
            weight_decay=self.optim.weight_decay,
            clipping=self.optim.clipping,
            guard=self.guard,
            **{name: getattr(self.optim, name) for name in OPTIMIZERS[self.optim.optimizer]},
        )
        self.updater = updater
        if self.optim.ema_decay is not None:
            self.ema = EMA(named.items(), decay=self.optim.ema_decay)
        if self._restored is not None:
            updater.load_slots(self._restored.slots, updates=self._restored.updates)
            if self.ema is not None and self._restored.ema is not None:
                self.ema.load(self._restored.ema)
            self._restored = None
        if self.optim.sam_rho is None:
            return updater
        self.sam = SAM(
            updater,
            rho=self.optim.sam_rho,
            adaptive=self.optim.sam_adaptive,
            microbatches=self.optim.sam_microbatches,
        )
        return self.sam

    def device_state(self) -> dict[str, Tensor]:
        """Tensors besides parameters and optimizer state (see strategy.HasDeviceState)."""
        averages = {} if self.ema is None else self.ema.shadow
        guard = {} if self.guard is None else {"guard": self.guard.numbers_G}
        return {f"ema/{name}": shadow for name, shadow in averages.items()} | guard

    def cut_axes(self) -> dict[str, int]:
        """Axes along which parameters and average are sharded (see strategy.HasCutAxes)."""
        axes = output_axes(self.net)
        averaged = {} if self.ema is None else {f"ema/{name}": axis for name, axis in axes.items()}
        return {f"net.{name}": axis for name, axis in axes.items()} | averaged

    def learning_rate(self, step: int) -> float:
        """The learning rate of update number `step`, counted from 0."""
        assert self.schedule is not None
        return self.schedule(step)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One update from one global batch; leaves `step_metrics_M` on the device."""
        assert self.updater is not None
        assert self.guard is not None
        step = batch["step"]
        ema_decay = 0.0 if self.ema is None else self.ema.decay_at(step)
        hyper_2 = torch.tensor([self.learning_rate(step), ema_decay])
        hyper_2 = hyper_2.to(self.device, non_blocking=True)  # does not wait for a GPU
        self.updater.set_lr(hyper_2[0:1])

        rows = rows_of(batch)
        optimizer: Any = self.optimizers()
        unperturbed: list[Tensor] = []  # sums over rows from passes at w, not at SAM's w + e

        def closure() -> Tensor:
            """One gradient: of the batch, or of the part that SAM's current pass uses."""
            optimizer.zero_grad()
            sums = self._backward(rows)
            if self.sam is None or self.sam.ascending:
                unperturbed.append(sums)
            return sums[0]

        optimizer.step(closure=closure)
        optimizer.zero_grad()  # before the dispatch, which keeps every live tensor in memory
        if self.ema is not None:
            assert self.guard.holds is not None
            # If the update was skipped, a decay of 1 leaves the average as it is.
            self.ema.update(torch.maximum(hyper_2[1:2], self.guard.holds))
        *totals, weight = torch.stack(unperturbed).sum(dim=0)
        means = torch.stack(totals) / weight.clamp(min=NO_WEIGHT)
        clipped = [] if self.updater.clipped_P is None else [self.updater.clipped_P]
        self.step_metrics_M = torch.cat([means, self.guard.numbers_G, *clipped])
        self.updater.clipped_P = self.guard.holds = None  # not kept alive by the dispatch

    def _backward(self, rows: Batch) -> Tensor:
        """Sum a pass's gradient over its slices; returns (loss, top-1, weight) summed over rows.

        Each slice's loss is divided by the total weight of the rows whose gradients are summed:
        those of the whole batch, or of a microbatch's ascent.
        """
        assert self.passes is not None
        ascending = self.sam is not None and self.sam.ascending
        microbatch = 0 if self.sam is None else self.sam.microbatch
        slices = [
            {name: self.passes.take(value, places) for name, value in rows.items()}
            for places in self.passes.of_step(microbatch, ascending=ascending)
        ]
        weighed = slices if ascending else [rows]
        weights = [part["weight_B"].sum() for part in weighed]
        weight = torch.stack(weights).sum()
        self.add_up([weight])
        divisor = weight.clamp(min=NO_WEIGHT)
        of_slices: list[Tensor] = []
        for part in slices:
            loss, sums_3 = self._compiled_pass(part, divisor)
            self.manual_backward(loss)
            of_slices.append(sums_3)
        sums = torch.stack(of_slices).sum(dim=0)
        self.add_up([sums, *(p.grad for p in self.net.parameters() if p.grad is not None)])
        assert self.guard is not None
        self.guard.watch(sums)
        return sums

    def _pass(self, rows: Batch, divisor: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, and (loss, top-1, weight) summed over the rows."""
        images_BCHW = self._normalised(rows["images_BHWC"]).to(self.compute_dtype)
        logits_BK = self.net(images_BCHW, rows["keep_masks_BN"], self._dropout_keep(rows))
        weight_B = rows["weight_B"]
        loss = (self._losses(logits_BK, rows, self.optim.label_smoothing) * weight_B).sum()
        correct_B = (_rank(logits_BK.detach(), rows) < 1).float()
        correct = (correct_B * weight_B).sum()
        return loss / divisor, torch.stack([loss.detach(), correct, weight_B.sum()])

    def _losses(self, logits_BK: Tensor, rows: Batch, smoothing: float) -> Tensor:
        target = target_of(rows, self.optim.loss)
        return LOSSES[self.optim.loss](logits_BK, *target, smoothing)

    def at_rest(self) -> AbstractContextManager[None]:
        """Inside, the network has the unperturbed weights, even between the passes of SAM."""
        return nullcontext() if self.sam is None else self.sam.unperturbed()

    def _normalised(self, images_BHWC: Tensor) -> Tensor:
        images = (images_BHWC.float() - self.mean_rgb) / self.stddev_rgb
        return images.permute(0, 3, 1, 2)

    def _dropout_keep(self, batch: Batch) -> Tensor | None:
        """Unpack the row's bits: 1 keeps the feature. (B, P) uint8 -> (B, F)."""
        packed_BP = batch.get("dropout_bits_BP")
        if packed_BP is None:
            return None
        bits_BP8 = (packed_BP[:, :, None] & self.bit_values) > 0  # pyright: ignore[reportOperatorIssue]
        return bits_BP8.flatten(1)[:, : self.net.num_features].float()

    # ---- evaluation ---------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Weighted sums over one padded batch, for the weights and for their average, if any."""
        weights = {"raw": {name: p.detach() for name, p in self.net.named_parameters()}}
        if self.ema is not None:
            weights["ema"] = self.ema.shadow
        sums: dict[str, Tensor] = {}
        for name, values in weights.items():
            keeps = self.keep_answers and name == "raw"
            sums[name], answers = self._compiled_evaluation(values, batch, keeps)
            if keeps:
                sums["answers"] = answers
        self._eval_sums.append(sums)

    def _evaluation(
        self, weights: dict[str, Tensor], batch: Batch, keep_answers: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One program for the weights and for their average."""
        images_BCHW = self._normalised(batch["images_BHWC"])
        logits_BK = functional_call(self.net, weights, (images_BCHW,))
        answers = self._answers(logits_BK, batch) if keep_answers else None
        return self._sums(logits_BK, batch), answers

    def _sums(self, logits_BK: Tensor, batch: Batch) -> Tensor:
        """EVAL_METRICS and the weight, each summed over the rows by weight."""
        weight_B, losses_B = batch["weight_B"], self._losses(logits_BK, batch, smoothing=0.0)
        rank_B = _rank(logits_BK, batch)
        columns = [metric(losses_B, rank_B) for metric in EVAL_METRICS.values()]
        columns.append(torch.ones_like(losses_B))
        return torch.stack([(column * weight_B).sum() for column in columns])

    def _answers(self, logits_BK: Tensor, batch: Batch) -> Tensor:
        """(B, A) float32; the columns are ANSWERS."""
        probability_B, predicted_B = probabilities(logits_BK, self.optim.loss).max(dim=1)
        columns = predicted_B, probability_B, _rank(logits_BK, batch), batch["weight_B"]
        return torch.stack([column.float() for column in columns], dim=1)

    def on_validation_epoch_start(self) -> None:
        self._eval_sums = []

    def on_validation_epoch_end(self) -> None:
        """Bring the sums of all batches to the host in one transfer and average them there."""
        flat = {
            f"{number}/{weights}": sums
            for number, batch in enumerate(self._eval_sums)
            for weights, sums in batch.items()
        }
        host = self.fetch(flat)
        if self.keep_answers:
            parts = [host.pop(f"{number}/answers") for number in range(len(self._eval_sums))]
            self.answers_NA = torch.cat(parts).numpy()
        self.add_up(list(host.values()))
        self.evaluation = {}
        for weights in [name for name in self._eval_sums[0] if name != "answers"]:
            of_batches = [host[f"{number}/{weights}"] for number in range(len(self._eval_sums))]
            *totals, weight = torch.stack(of_batches).double().sum(dim=0).tolist()
            # Not torchmetrics' MeanMetric: if told not to drop NaN losses, which must show, it
            # ignores the weights.
            self.evaluation[weights] = {
                **{
                    name: total / weight if weight else math.nan
                    for name, total in zip(EVAL_METRICS, totals, strict=True)
                },
                "images": round(weight),
            }


def rows_of(batch: Batch) -> dict[str, Tensor]:
    """The batch's tensors of B rows. Images are mixed here, before streams are sliced."""
    rows = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if "mix_ratio_B" in batch:
        layout, images_BHWC = batch["layout"], batch["images_BHWC"]
        # `layout` counts one host's streams; with several XLA hosts the rows are global by now.
        layout = layout._replace(streams=len(images_BHWC) // (layout.images * layout.views))
        boxes = batch["mix_outside_B"], batch["mix_box_B4"]
        rows["images_BHWC"] = mixed(images_BHWC, layout, *boxes)
    return rows


def _rank(logits_BK: Tensor, batch: Batch) -> Tensor:
    """The number of classes that score above the label, or the best of several labels.

    Top-k is rank < k. Uses `~(<=)`, since comparisons with NaN are false: a row of NaN ranks last.
    """
    labels_BL = batch["labels_BL"] if "labels_BL" in batch else batch["labels_B"][:, None]
    best_B1 = logits_BK.gather(1, labels_BL).amax(dim=1, keepdim=True)
    return (~(logits_BK <= best_B1)).sum(dim=1)
