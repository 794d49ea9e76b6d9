"""What is known of a run's steps in advance: learning rates, passes, copies, operations."""

from nfnets_xla.config import OptimConfig, Run
from nfnets_xla.data.order import Order
from nfnets_xla.models.nfnet import NFNet
from nfnets_xla.models.registry import Network
from nfnets_xla.optim.choice import OPTIMIZERS
from nfnets_xla.optim.passes import Passes
from nfnets_xla.optim.schedule import Schedule, scaled_peak, warmup_length
from nfnets_xla.scaling import account


def make_schedule(run: Run, order: Order) -> Schedule:
    """Raises ValueError for a warm-up and a cooldown that do not fit into the run."""
    optim, peak = run.optim, run.optim.peak_lr
    if optim.lr_batch is not None:
        peak = scaled_peak(run.data.batch_size, base=peak, per=optim.lr_batch)
    return Schedule(
        optim.schedule,  # type: ignore[arg-type]
        peak,
        warmup_length(
            steps=optim.warmup_steps,
            epochs=optim.warmup_epochs,
            fraction=optim.warmup_fraction,
            steps_per_epoch=order.num_samples / run.data.batch_size,  # in views, as `epochs`
            total_steps=order.num_steps,
        ),
        order.num_steps,
        optim.cooldown_steps,
        optim.rsqrt_timescale,
    )


def make_passes(run: Run, order: Order) -> Passes:
    """Raises ValueError for parts that do not divide a stream's images."""
    return Passes(
        images=order.unique_per_step // order.num_streams,
        views=run.data.repeats,
        microbatches=run.optim.sam_microbatches,
        accumulation=run.optim.accumulation,
        ascent_fraction=run.optim.sam_ascent_fraction,
    )


def saved_copies(optim: OptimConfig) -> int:
    """Tensors per parameter in a checkpoint: itself, optimizer slots, average."""
    return 1 + len(OPTIMIZERS[optim.optimizer].SLOTS) + (optim.ema_decay is not None)


def kept_copies(optim: OptimConfig) -> int:
    """Tensors per parameter on the device: all that is saved, the gradient, and SAM's copy."""
    return saved_copies(optim) + 1 + (optim.sam_rho is not None)


def ascent_share(run: Run, passes: Passes) -> float:
    """The share of each batch that SAM computes twice, in whole images; 0 without SAM."""
    return 0.0 if run.optim.sam_rho is None else passes.effective_fraction


def describe_ascent(passes: Passes) -> str:
    """The share of a batch used for the ascent, after rounding to images, in words."""
    parts = f" in each of {passes.microbatches} microbatches" if passes.microbatches > 1 else ""
    return (
        f"{passes.effective_fraction:.1%} of each batch: the first {passes.ascent_images} of "
        f"{passes.images // passes.microbatches} images of every stream{parts}"
    )


def train_flops(net: Network, run: Run, passes: Passes) -> tuple[float, float]:
    """FLOPs per view: those training needs, and those computed, including recomputation."""
    fraction = ascent_share(run, passes)
    needed = account.train_flops(net.macs(run.data.image_size), 1, sam_fraction=fraction)
    if not run.model.recompute or not isinstance(net, NFNet):
        return needed, needed
    again = net.macs(run.data.image_size, blocks_only=True)
    return needed, needed + (1 + fraction) * account.FLOPS_PER_MAC * again
