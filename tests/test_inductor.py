"""Compiled steps: one graph for training, one for evaluation, and the numbers of eager steps.

`make test` only traces, which shows graph breaks and recompilation; the slow tests let Inductor
generate code, which takes minutes. It sums in another order: metrics are equal within 1e-5 relative
after four steps, as in test_passes.py, and a run's losses within 1e-4.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nfnets_xla import NFNet
from nfnets_xla.compose import composed, to_run
from nfnets_xla.inductor import Clock, compiled
from nfnets_xla.models.stacked import stack
from nfnets_xla.record import read_record
from tests.runs import (
    PLAIN_CPU,
    RECIPE,
    SMALL,
    assert_bit_equal,
    final_state,
    losses,
    run,
    run_killed_at,
    samples,
)
from tests.steps import SAM, batch, channels_last, task

EMA = {"ema_decay": 0.9}
Form = Callable[[NFNet], NFNet]


def recomputing(net: NFNet) -> NFNet:
    net.set_grad_checkpointing()
    return net


def stacked_and_recomputing(net: NFNet) -> NFNet:
    return recomputing(stack(net))


Steps = tuple[Tensor, list[float]]


def four_steps(**options: Any) -> Steps:
    """Metrics of four steps with mixing, the first at rate 0, and of both evaluations."""
    of = task(**SAM, **EMA, **options)
    of.learning_rate = lambda step: 0.0 if step == 0 else 0.3 / step  # type: ignore[method-assign]
    metrics = []
    for step in range(4):
        of.net.train()
        of.training_step(batch(step, mix=True), step)
        assert of.step_metrics_M is not None
        metrics.append(of.step_metrics_M)
        of.net.eval()
        of.on_validation_epoch_start()
        with torch.no_grad():
            of.validation_step(batch(9), 0)
        of.on_validation_epoch_end()
    return torch.stack(metrics), [of.evaluation[name]["loss"] for name in ("raw", "ema")]


def assert_same(a: Steps, b: Steps) -> None:
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-5)


def test_channels_last_changes_no_number() -> None:
    assert_same(four_steps(form=channels_last), four_steps())


@pytest.mark.parametrize("form", [lambda net: net, stacked_and_recomputing])
def test_two_graphs_whatever_changes_between_steps(form: Form) -> None:
    """Both passes of SAM, rates of 0 and more, mixing, two sets of weights; a graph break would be
    an error. Traced only."""
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    clock = Clock()
    assert_same(four_steps(form=form, compile=traced), four_steps())
    assert clock.graphs == 2
    assert clock.seconds > 0


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False, backend="eager")


@pytest.mark.slow
@pytest.mark.timeout(3600)  # compiles C++
def test_compiled_steps_have_the_eager_numbers() -> None:
    torch._dynamo.reset()  # pyright: ignore[reportPrivateImportUsage]
    clock = Clock()
    assert_same(four_steps(form=channels_last, compile=compiled), four_steps())
    assert clock.graphs == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_compiled_run_says_so_and_ends_as_if_it_had_not_been_killed(
    tmp_path: Path, data: list[str]
) -> None:
    """Its programs are kept in its folder for the restart. It is a ViT, which has fewer kernels to
    compile."""
    vit = ["model.name=timm/test_vit", "model.drop_path_rate=0", "data.image_size=32"]
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, *vit, "data.eval_image_size=32"]
    arguments += ["optim.epochs=1.5", "trainer.compile_cache=true"]
    eager, whole, killed, log = (tmp_path / name for name in ("eager", "whole", "killed", "log"))
    run([*arguments, f"run_dir={eager}"], log)
    arguments.append("trainer.compile=true")
    run([*arguments, f"run_dir={whole}"], log)
    run_killed_at([*arguments, f"run_dir={killed}"], killed, 6, log)
    run([*arguments, f"run_dir={killed}"], log)
    (end,) = read_record(whole).of_kind("end")
    assert end["compilations"] == 2
    rows = read_record(whole).of_kind("train")
    assert [row["compilations"] for row in rows] == [1] + [0] * (len(rows) - 1)
    assert "compiled 2 graphs in" in log.read_text()
    assert list((killed / "compiled").iterdir())
    assert samples(killed) == samples(whole) == samples(eager)
    assert losses(killed) == losses(whole)
    assert_bit_equal(final_state(killed), final_state(whole))
    np.testing.assert_allclose(losses(whole), losses(eager), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["trainer.compile=fast"], "compile is 'fast'; it must be auto, true or"),
        (["trainer.compile=true", "trainer.device=xla"], "which compiles by itself: use auto"),
    ],
)
def test_what_cannot_be_compiled_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_run(composed("smoke", ["run_dir=R", *options]))
