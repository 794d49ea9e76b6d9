"""Draw what the model will see: the first views of a run, as one contact sheet.

    nfnets-xla shards show DIR --recipe imagenet --rows 6 data.repeats=4

The views are those of the first step, or of `--step N` if seed, batch size and epochs are those of
the run, just before normalisation: cropped, augmented and mixed. Prints the label of each (or two,
with their shares) and its sample's id.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from nfnets_xla.arguments import Parser, quoted
from nfnets_xla.config import Run
from nfnets_xla.data.batches import TrainBatches
from nfnets_xla.data.mix import mixed
from nfnets_xla.display import plural
from nfnets_xla.inputs import count_classes, make_order, make_train_batches, open_shards
from nfnets_xla.sheet import draw_sheet

COLUMNS = 8  # of a sheet without repeats; with K repeats, a row has the K views of an image


# Settings that a recipe may leave missing, and that do not affect the sheet.
NEEDLESS = ["run_dir=null", "model.init_from=null", "data.eval_shards=null", "optim.epochs=1"]


def main(arguments: list[str]) -> None:
    given = parse(arguments)
    from nfnets_xla.compose import composed, to_run

    overrides = [f"data.shards={quoted(given.dir)}", *NEEDLESS, *given.overrides]
    run = to_run(composed(given.recipe, overrides, given.config_dir))
    show(run, Path(given.out), given.rows, given.step)


def parse(arguments: list[str]) -> Any:
    """Raises ValueError for what cannot be."""
    parser = Parser(prog="nfnets-xla shards show", description=__doc__)
    parser.add_argument("dir", help="indexed shards: folder or address")
    parser.add_settings()
    parser.add_argument("--out", default="sheet.png", help="PNG to write")
    parser.add_argument("--rows", type=int, default=4, help="rows of the sheet, 1 to 100")
    parser.add_argument("--step", type=int, default=1, help="training step, counted from 1")
    parser.add_argument("--recipe", default="pretrain", help="a recipe of `nfnets-xla --help`")
    given = parser.parse_intermixed_args(arguments)
    if not 1 <= given.rows <= 100:
        raise ValueError(f"--rows is {given.rows}; it must be a whole number from 1 to 100")
    if given.step < 1:
        raise ValueError(f"--step is {given.step}; it must be a whole number from 1")
    if not Path(given.out).absolute().parent.is_dir():
        raise ValueError(f"--out is {given.out}: there is no folder {Path(given.out).parent}")
    return given


def show(run: Run, out: Path, rows: int, step: int = 1, say: Callable[[str], None] = print) -> None:
    """Write the sheet, and say which sample is where."""
    index, _ = open_shards(run)
    order = make_order(run, index)
    if step > order.num_steps:
        raise ValueError(
            f"--step is {step}, and the run has {plural(order.num_steps, 'step')}: give its own "
            "values (optim.epochs=...)"
        )
    dataset = make_train_batches(
        run, index, order, count_classes(run, index), drop_path_rates=(), num_features=1
    )
    columns = run.data.repeats if run.data.repeats > 1 else COLUMNS
    tiles = first_views(dataset, rows * columns, step - 1)
    draw_sheet(tiles, columns).save(out, "PNG")
    for start in range(0, len(tiles), columns):
        line = [f"{sample} ({label})" for _, label, sample in tiles[start : start + columns]]
        say(f"row {start // columns + 1}: {', '.join(line)}")
    say(f"{out}: {len(tiles)} views of {run.data.image_size} px")


def first_views(
    dataset: TrainBatches, number: int, step: int = 0
) -> list[tuple[np.ndarray, str, str]]:
    """(pixels, label, id) of the first views of a batch, without padding rows.

    They come from as few streams as possible, but at least two: one of MixUp, one of CutMix."""
    order, repeats = dataset.order, dataset.repeats
    real_CN = order.step(step).weight.reshape(order.num_streams, -1) > 0
    images = -(-number // repeats)
    streams = int(np.searchsorted(real_CN.sum(axis=1).cumsum(), images)) + 1
    streams = min(max(streams, 2), order.num_streams)
    batch = dataset.of_streams(step, range(streams))
    places_CN = np.arange(real_CN[:streams].size).reshape(streams, -1)
    # Stream by stream, as many of each as are needed; the first ones have one more.
    in_turn = [place for place in places_CN.T.flat if batch["weight_U"][place] > 0][:images]
    pixels_BHWD, labels = seen(batch)
    return [
        (pixels_BHWD[row], labels[row], dataset.samples.name(int(batch["sample_U"][place])))
        for place in sorted(in_turn)
        for row in range(place * repeats, (place + 1) * repeats)
    ]


def seen(batch: dict[str, Any]) -> tuple[np.ndarray, list[str]]:
    """The images of a batch as the model gets them, in uint8 again, and their labels in words."""
    images_BHWD, own_B = batch["images_BHWC"], batch["labels_B"].tolist()
    if "mix_ratio_B" not in batch:
        return images_BHWD.numpy(), [str(label) for label in own_B]
    images = mixed(images_BHWD, batch["layout"], batch["mix_outside_B"], batch["mix_box_B4"])
    shares = zip(own_B, batch["mix_labels_B"].tolist(), batch["mix_ratio_B"].tolist(), strict=True)
    words = [f"{own} x {r:.2f} + {other} x {1 - r:.2f}" for own, other, r in shares]
    return images.round().byte().numpy(), words
