"""Exact learning rates at every boundary, and big_vision's and DeepMind's schedules written out."""

import math

import numpy as np
import pytest

from nfnets_xla.config import SCHEDULES
from nfnets_xla.data.order import Order
from nfnets_xla.optim import Schedule, scaled_peak, warmup_length
from nfnets_xla.optim.schedule import SHAPES
from nfnets_xla.steps import make_schedule
from tests.test_recipes import composed

PEAK, WARMUP, TOTAL, COOLDOWN, TIMESCALE = 1.6, 10, 110, 40, 25


def big_visions(shape: str, step: int, cooldown: int) -> float:
    """create_learning_rate_schedule of big_vision's utils.py, for these arguments."""
    rate = PEAK
    progress = min(max((step - WARMUP) / (TOTAL - WARMUP), 0.0), 1.0)
    if shape == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * progress))
    elif shape == "rsqrt" and step >= WARMUP:
        rate /= math.sqrt(1 + (step - WARMUP) / TIMESCALE)
    rate *= min(1.0, step / WARMUP)
    return rate * min(1.0, (TOTAL - step) / cooldown) if cooldown else rate


@pytest.mark.parametrize(
    ("shape", "cooldown"),
    [("cosine", 0), ("constant", 0), ("constant", COOLDOWN), ("rsqrt", 0), ("rsqrt", COOLDOWN)],
)
def test_every_rate_is_big_visions(shape: str, cooldown: int) -> None:
    schedule = Schedule(shape, PEAK, WARMUP, TOTAL, cooldown, TIMESCALE)  # type: ignore[arg-type]
    rates = [schedule(step) for step in range(TOTAL + 1)]
    expected = [big_visions(shape, step, cooldown) for step in range(TOTAL + 1)]
    np.testing.assert_allclose(rates, expected, rtol=1e-14, atol=1e-16)
    # Exactly, at the boundaries.
    assert rates[0] == 0
    assert rates[WARMUP] == PEAK
    assert rates[WARMUP // 2] == PEAK / 2
    assert Schedule(shape, PEAK, 0, TOTAL)(0) == PEAK  # type: ignore[arg-type]
    if shape == "rsqrt":
        assert rates[WARMUP + 3 * TIMESCALE] == (PEAK / 2 * (25 / 40 if cooldown else 1))
    if cooldown:
        plain = Schedule(shape, PEAK, WARMUP, TOTAL, 0, TIMESCALE)  # type: ignore[arg-type]
        assert rates[TOTAL - COOLDOWN] == plain(TOTAL - COOLDOWN)
        assert rates[TOTAL - 1] == plain(TOTAL - 1) / COOLDOWN
        assert rates[TOTAL] == 0
    elif shape == "cosine":
        assert rates[TOTAL] == 0
        assert rates[(WARMUP + TOTAL) // 2] == PEAK / 2
    else:
        assert rates[TOTAL] == schedule(TOTAL) > 0


def test_a_warm_up_is_given_in_one_of_three_units() -> None:
    run = {"steps_per_epoch": 12.5, "total_steps": 100}
    assert warmup_length(steps=7, **run) == 7
    assert warmup_length(epochs=2, **run) == 25
    assert warmup_length(epochs=0.3, **run) == 4
    assert warmup_length(fraction=0.05, **run) == 5
    assert warmup_length(fraction=0.0, **run) == 0
    with pytest.raises(ValueError, match="given as none of them; give exactly one"):
        warmup_length(**run)
    with pytest.raises(ValueError, match=r"warmup_steps=7, warmup_fraction=0\.1; give exactly one"):
        warmup_length(steps=7, fraction=0.1, **run)
    with pytest.raises(ValueError, match=r"warmup_fraction is 1; it must be in \[0, 1\)"):
        warmup_length(fraction=1, **run)
    with pytest.raises(ValueError, match="warmup_epochs is -1; it must be 0 or more, and finite"):
        warmup_length(epochs=-1, **run)
    with pytest.raises(
        ValueError, match=r"warmup_epochs is 8, a warm-up of 100 steps, .* has 100;"
    ):
        warmup_length(epochs=8, **run)


def test_recipes_state_the_scaling_rule_and_epochs_of_warm_up() -> None:
    """ImageNet: 1.6 at 4096 rows after 5 of 360 epochs, about 112,602 steps; epochs count views."""
    run = composed("imagenet")
    order = Order(np.full(1000, 1280), 0, 64, run.data.batch_size, 8, run.optim.epochs)
    schedule = make_schedule(run, order)
    assert (schedule.peak, scaled_peak(4096)) == (1.6, 1.6)
    assert schedule.warmup_steps == round(5 * 1_280_000 / 4096) == 1562
    run.data.batch_size, run.data.repeats = 1024, 4
    quarter = Order(np.full(1000, 1280), 0, 64, 256, 8, run.optim.epochs / 4)
    schedule = make_schedule(run, quarter)
    assert (schedule.peak, schedule.warmup_steps) == (0.4, 6250)
    assert schedule.total_steps == 450_000
    finetune = composed("finetune_sam")
    assert make_schedule(finetune, order).peak == finetune.optim.peak_lr == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "step"}, "schedule is 'step'; it must be one of cosine, constant, rsqrt"),
        ({"cooldown_steps": 5}, "cooldown_steps is 5 with the cosine schedule"),
        ({"shape": "rsqrt", "cooldown_steps": 101}, "cooldown_steps is 101; it must be 0 or more"),
        ({"warmup_steps": 110}, "warmup_steps is 110 of 110 total_steps"),
        ({"timescale": 0}, "timescale is 0; it must be at least 1"),
        ({"peak": math.nan}, "peak is nan"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    given = {"shape": "cosine", "peak": PEAK, "warmup_steps": WARMUP, "total_steps": TOTAL}
    with pytest.raises(ValueError, match=message):
        Schedule(**{**given, **change})


def test_the_vocabulary_has_every_shape() -> None:
    assert SCHEDULES == SHAPES


def test_a_run_may_state_a_share_of_its_steps_and_a_cooldown() -> None:
    run = composed("pretrain")
    optim = run.optim
    optim.warmup_steps, optim.warmup_epochs, optim.warmup_fraction = None, None, 0.05
    optim.schedule, optim.cooldown_steps = "constant", 7
    order = Order(np.full(10, 100), 0, 4, 20, 2, 2)
    schedule = make_schedule(run, order)
    assert (schedule.warmup_steps, schedule.total_steps, schedule.cooldown_steps) == (5, 100, 7)
