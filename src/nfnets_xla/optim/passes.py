"""Which rows of a batch each pass of a step sees: SAM's ascents, microbatches, accumulation.

A batch is ordered by stream, then image, then view (data/order.py). Every part takes the same
images from every stream, with all their views, so that it does not depend on the number of hosts or
devices; arXiv 2010.01412 and DeepMind's code take what is on one device instead.

    a stream's images     0 1 2 3 4 5 6 7      N = 8, microbatches=2, accumulation=2
    microbatch 0          [0 1|2 3]            an ascent of its own, gradient summed over two slices
    microbatch 1                  [4 5|6 7]
    ascent, fraction 0.5  [0 1]   [4 5]

All sizes are known before the run begins: no shape depends on a tensor's value.
"""

# pyright: reportUnknownMemberType=false
# torch types its own signatures in part.

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Passes:
    images: int  # N, unique images per stream in a batch
    views: int  # K, per image
    microbatches: int = 1  # of m-sharpness
    accumulation: int = 1  # slices of a microbatch whose gradients are summed, to save memory
    ascent_fraction: float = 1.0  # share of a microbatch that SAM ascends on

    def __post_init__(self) -> None:
        for name in ("microbatches", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if not 0 < self.ascent_fraction <= 1:
            raise ValueError(f"ascent_fraction is {self.ascent_fraction}; it must be in (0, 1]")
        parts = self.microbatches * self.accumulation
        if self.images % parts:
            raise ValueError(
                f"a batch has {self.images} images of each stream, which {parts} parts "
                f"(microbatches {self.microbatches} x accumulation {self.accumulation}) do not "
                "divide: choose divisors of it, or fewer data.num_streams"
            )

    @property
    def ascent_images(self) -> int:
        """Images per stream on which SAM ascends in a microbatch: at least one."""
        return max(1, round(self.ascent_fraction * self.images / self.microbatches))

    @property
    def effective_fraction(self) -> float:
        """`ascent_fraction` after rounding to whole images."""
        return self.ascent_images * self.microbatches / self.images

    def of_step(self, microbatch: int, *, ascending: bool) -> list[range]:
        """The images of a stream, as one range per accumulation slice, that one pass takes.

        >>> passes = Passes(images=8, views=1, microbatches=2, accumulation=2, ascent_fraction=0.75)
        >>> passes.of_step(1, ascending=True), passes.of_step(1, ascending=False)
        ([range(4, 6), range(6, 7)], [range(4, 6), range(6, 8)])
        """
        size = self.images // self.microbatches
        images = self.ascent_images if ascending else size
        start, slice_ = microbatch * size, size // self.accumulation
        return [
            range(start + first, start + min(first + slice_, images))
            for first in range(0, images, slice_)
        ]

    def take(self, rows_B: Tensor, places: range) -> Tensor:
        """The rows of the images at `places` in every stream."""
        if len(places) == self.images:
            return rows_B
        streams_CNK: Tensor = rows_B.unflatten(0, (-1, self.images, self.views))
        return streams_CNK[:, places.start : places.stop].flatten(0, 2)
