"""The learning rate of each step: linear warm-up from 0, then half a cosine to 0.

Reference: deepmind-research/nfnets at f5de0ed, optim.py:181-200, and experiment_nfnets.py:63-70 for
the peak. Steps count updates from 0, so the first update's rate is 0 (with any warm-up).
"""

import math


def warmup_cosine(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of update number `step`, a float64.

    >>> [warmup_cosine(n, peak=1.6, warmup_steps=2, total_steps=6) for n in (0, 1, 2, 4, 6)]
    [0.0, 0.8, 1.6, 0.8, 0.0]
    """
    if not 0 <= peak < math.inf:
        raise ValueError(f"peak is {peak}; it must be 0 or more, and finite")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps} of {total_steps} total_steps; it must be 0 or more "
            "and leave at least one step: shorten the warm-up or lengthen the run"
        )
    if not 0 <= step <= total_steps:
        raise ValueError(
            f"step is {step}; it must be in [0, total_steps = {total_steps}]: past the end the "
            "cosine would rise again"
        )
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def scaled_peak(batch_size: int, *, base: float = 0.1) -> float:
    """The linear scaling rule, `base` * batch / 256: 1.6 at the paper's 4096 rows."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    return base * batch_size / 256
