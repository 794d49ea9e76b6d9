"""What a run's steps are made of, worked out before the first: how each goes through its batch."""

from nfnets_xla.config import Run
from nfnets_xla.data.order import Order
from nfnets_xla.optim.passes import Passes


def make_passes(run: Run, order: Order) -> Passes:
    """Raises ValueError for parts that do not divide a stream's images."""
    return Passes(
        images=order.unique_per_step // order.num_streams,
        views=run.data.repeats,
        microbatches=run.optim.sam_microbatches,
        accumulation=run.optim.accumulation,
        ascent_fraction=run.optim.sam_ascent_fraction,
    )


def describe_ascent(passes: Passes) -> str:
    """The share of a batch that the ascent really sees, in words."""
    parts = f" in each of {passes.microbatches} microbatches" if passes.microbatches > 1 else ""
    return (
        f"{passes.effective_fraction:.1%} of each batch: the first {passes.ascent_images} of "
        f"{passes.images // passes.microbatches} images of every stream{parts}"
    )
