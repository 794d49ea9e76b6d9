"""A step in parts equals the whole step: accumulation, SAM's share of a batch, its microbatches.

In float32 the parts of a sum are added in another order, so equal means within 1e-5 of the size of
a tensor's update after three steps, plus the rounding of the tensor itself.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nfnets_xla.data.order import Order
from nfnets_xla.optim import Passes
from nfnets_xla.steps import make_passes
from tests.steps import IMAGES, PLAIN, ROWS, SAM, STREAMS, VIEWS, batch, task
from tests.test_recipes import composed


def stepped(*, mix: bool = False, **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Metrics and weights of three steps; in the last, streams end with rows of weight 0."""
    of = task(**options)
    metrics = []
    for step in range(3):
        weight_CN = torch.ones(STREAMS, IMAGES * VIEWS)
        if step == 2:
            weight_CN[:, 5:] = 0
        of.training_step(batch(step, mix=mix, weights=weight_CN.flatten()), step)
        assert of.step_metrics_M is not None
        metrics.append(of.step_metrics_M)
    return metrics, dict(of.net.named_parameters())


def assert_equal_updates(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    start = dict(task(**PLAIN).net.named_parameters())
    for name, value in a.items():
        size = float((value - start[name]).detach().norm())
        allowed = 1e-5 * size + 2e-7 * float(value.detach().norm()) + 1e-9
        assert float((value - b[name]).detach().norm()) <= allowed, name


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("sam", [PLAIN, SAM, {**SAM, "ascent_fraction": 0.5}])
def test_accumulation_equals_the_large_batch(sam: dict[str, Any], mix: bool) -> None:
    whole, at_once = stepped(mix=mix, **sam)
    for slices in (2, 4):
        metrics, weights = stepped(mix=mix, accumulation=slices, **sam)
        torch.testing.assert_close(torch.stack(metrics), torch.stack(whole), rtol=1e-5, atol=1e-6)
        assert_equal_updates(weights, at_once)


def test_accumulation_within_microbatches_changes_nothing_microbatches_do() -> None:
    """A microbatch whose rows all have weight 0 (at the end of a run) gives no NaN."""
    _, one = stepped(**SAM)
    _, two = stepped(**SAM, microbatches=2)
    _, sliced = stepped(**SAM, microbatches=2, accumulation=2)
    assert_equal_updates(sliced, two)
    with pytest.raises(AssertionError, match=r"weight|gain|bias"):
        assert_equal_updates(one, two)
    _, four = stepped(**SAM, microbatches=4)  # in step 2 the last microbatch has weight 0
    assert all(bool(value.isfinite().all()) for value in four.values())


def test_the_ascent_sees_the_first_images_of_every_stream_with_all_views_and_masks() -> None:
    """A fraction of 0.4 of 4 images is 2 whole images; with two microbatches, one of 2 in each."""
    cases: list[tuple[dict[str, Any], list[tuple[int, int]]]] = [
        ({"ascent_fraction": 0.4}, [(0, 2), (0, 4)]),
        ({"ascent_fraction": 0.1}, [(0, 1), (0, 4)]),
        ({"ascent_fraction": 0.4, "microbatches": 2}, [(0, 1), (0, 2), (2, 3), (2, 4)]),
        ({"ascent_fraction": 0.75, "accumulation": 2}, [(0, 2), (2, 3), (0, 2), (2, 4)]),
        ({"ascent_fraction": 0.7, "accumulation": 4}, [(n, n + 1) for n in (0, 1, 2, 0, 1, 2, 3)]),
    ]
    for options, wanted in cases:
        of = task(**SAM, **options)
        given = batch(0)
        seen: list[tuple[Tensor, ...]] = []
        forward = of.net.forward

        def spy(*inputs: Tensor, seen: list = seen, forward: Any = forward) -> Tensor:
            seen.append(inputs)
            return forward(*inputs)

        of.net.forward = spy  # type: ignore[method-assign]
        of.training_step(given, 0)
        places = np.arange(ROWS).reshape(STREAMS, IMAGES, VIEWS)
        expected = [torch.from_numpy(places[:, a:b].reshape(-1)) for a, b in wanted]
        assert len(seen) == len(expected)
        for (images, masks, dropout), rows in zip(seen, expected, strict=True):
            assert torch.equal(images, of._normalised(given["images_BHWC"][rows]))
            assert torch.equal(masks, given["keep_masks_BN"][rows])
            assert torch.equal(dropout, of._dropout_keep(given)[rows])  # type: ignore[index]


def test_the_effective_fraction_is_of_whole_images() -> None:
    assert Passes(16, 4, ascent_fraction=0.2).effective_fraction == 3 / 16
    assert Passes(1, 4, ascent_fraction=0.2).effective_fraction == 1
    assert Passes(16, 4, microbatches=4, ascent_fraction=0.2).effective_fraction == 1 / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatches": 3}, "a batch has 4 images of each stream, which 3 parts"),
        ({"microbatches": 2, "accumulation": 4}, "8 parts"),
        ({"accumulation": 0}, "accumulation is 0; it must be 1 or more"),
        ({"microbatches": 0}, "microbatches is 0; it must be 1 or more"),
        ({"ascent_fraction": 0.0}, r"ascent_fraction is 0\.0; it must be in \(0, 1\]"),
        ({"ascent_fraction": 1.5}, r"ascent_fraction is 1\.5"),
    ],
)
def test_parts_that_do_not_divide_a_batch_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Passes(IMAGES, VIEWS, **options)


def test_a_runs_passes_are_of_the_images_of_one_stream() -> None:
    run = composed("finetune_sam")
    run.data.repeats, run.optim.accumulation = 4, 2
    run.optim.sam_microbatches, run.optim.sam_ascent_fraction = 2, 0.5
    order = Order(np.full(8, 100), 0, num_streams=4, unique_per_step=32, window_shards=2, epochs=1)
    assert make_passes(run, order) == Passes(8, 4, 2, 2, 0.5)
