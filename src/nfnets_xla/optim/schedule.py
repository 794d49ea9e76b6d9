"""The learning rate of each step: linear warm-up from 0, then one of three shapes.

Steps count updates from 0, so with a warm-up the first update's rate is 0. References:

- cosine: deepmind-research/nfnets at f5de0ed, optim.py:181-200, and experiment_nfnets.py:63-70 for
  the peak;
- rsqrt with cooldown: arXiv 2106.04560, section 3.5, as big_vision's create_learning_rate_schedule
  (utils.py) has it: a long run can be ended at any point by a short linear cooldown;
- constant, with or without cooldown.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "constant", "rsqrt"]
SHAPES: tuple[Shape, ...] = ("cosine", "constant", "rsqrt")


@dataclass(frozen=True)
class Schedule:
    """`schedule(step)` is the learning rate of update number `step`, a float64.

    >>> [Schedule("cosine", peak=1.6, warmup_steps=2, total_steps=6)(n) for n in (0, 1, 2, 4, 6)]
    [0.0, 0.8, 1.6, 0.8, 0.0]
    >>> ending = Schedule("rsqrt", peak=1.0, warmup_steps=2, total_steps=16, cooldown_steps=4,
    ...                   timescale=2)
    >>> [round(ending(n), 3) for n in (0, 1, 2, 8, 12, 14, 16)]
    [0.0, 0.5, 1.0, 0.5, 0.408, 0.189, 0.0]
    """

    shape: Shape
    peak: float
    warmup_steps: int  # linear from 0 to the peak
    total_steps: int
    cooldown_steps: int = 0  # at the end: a factor on the rate falls linearly to 0
    timescale: int = 10_000  # rsqrt: steps after the warm-up until the rate is peak / sqrt(2)

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"schedule is {self.shape!r}; it must be one of {', '.join(SHAPES)}")
        if not 0 <= self.peak < math.inf:
            raise ValueError(f"peak is {self.peak}; it must be 0 or more, and finite")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} of {self.total_steps} total_steps; it must "
                "be 0 or more and leave at least one step: shorten the warm-up or lengthen the run"
            )
        if not 0 <= self.cooldown_steps <= self.total_steps - self.warmup_steps:
            raise ValueError(
                f"cooldown_steps is {self.cooldown_steps}; it must be 0 or more and fit behind a "
                f"warm-up of {self.warmup_steps} of {self.total_steps} steps"
            )
        if self.cooldown_steps and self.shape == "cosine":
            raise ValueError(
                f"cooldown_steps is {self.cooldown_steps} with the cosine schedule, which ends at "
                "0 by itself: give 0, or the schedule constant or rsqrt"
            )
        if self.timescale < 1:
            raise ValueError(f"timescale is {self.timescale}; it must be at least 1")

    def __call__(self, step: int) -> float:
        """Raises ValueError for a step outside the run."""
        if not 0 <= step <= self.total_steps:
            raise ValueError(
                f"step is {step}; it must be in [0, total_steps = {self.total_steps}]: past the "
                "end the rate would rise again"
            )
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        rate = self.peak * _SHAPES[self.shape](self, step - self.warmup_steps)
        left = self.total_steps - step
        return rate * left / self.cooldown_steps if left < self.cooldown_steps else rate


def _cosine(schedule: Schedule, after: int) -> float:
    progress = after / (schedule.total_steps - schedule.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


_SHAPES: dict[Shape, Callable[[Schedule, int], float]] = {
    "cosine": _cosine,
    "constant": lambda _, after: 1.0,
    "rsqrt": lambda schedule, after: 1 / math.sqrt(1 + after / schedule.timescale),
}


def warmup_length(
    *,
    steps: int | None = None,
    epochs: float | None = None,
    fraction: float | None = None,
    steps_per_epoch: float,
    total_steps: int,
) -> int:
    """Length in steps of a warm-up given in steps, in epochs or as a fraction of the run.

    Rounded to the nearest whole step. Raises ValueError unless exactly one of the three is given,
    and for a warm-up that does not end before the run does.

    >>> warmup_length(epochs=5, steps_per_epoch=1_281_167 / 4096, total_steps=112_603)
    1564
    """
    given = {"steps": steps, "epochs": epochs, "fraction": fraction}
    values = {f"warmup_{name}": value for name, value in given.items() if value is not None}
    if len(values) != 1:
        said = ", ".join(f"{name}={value}" for name, value in values.items()) or "none of them"
        raise ValueError(
            f"the warm-up is given as {said}; give exactly one of warmup_steps, warmup_epochs and "
            "warmup_fraction, and null for the others"
        )
    ((name, value),) = values.items()
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it must be 0 or more, and finite")
    if fraction is not None and fraction >= 1:
        raise ValueError(f"warmup_fraction is {fraction}; it must be in [0, 1)")
    per_unit = {"warmup_steps": 1, "warmup_epochs": steps_per_epoch, "warmup_fraction": total_steps}
    length = round(value * per_unit[name])
    if length >= total_steps:
        raise ValueError(
            f"{name} is {value:g}, a warm-up of {length} steps, and the run has {total_steps}; it "
            "must leave at least one step: shorten it or lengthen the run"
        )
    return length


def scaled_peak(batch_size: int, *, base: float = 0.1, per: int = 256) -> float:
    """The linear scaling rule, `base` * batch / `per`: 1.6 at the paper's 4096 rows."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    return base * batch_size / per
