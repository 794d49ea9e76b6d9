"""A contact sheet shows the run's own first views, and the samples they come from."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nfnets_xla.cli import main
from nfnets_xla.commands.show import first_views, parse
from nfnets_xla.data.mix import mixed
from nfnets_xla.data.shards import ShardIndex
from nfnets_xla.sheet import draw_sheet
from tests.data.loading import train

SMALL = ["data.image_size=16", "data.batch_size=16", "data.num_streams=4"]


def test_the_sheet_is_written_and_its_samples_are_named(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    options = ["--recipe", "imagenet", "--out", str(out), "--rows", "2", "data.repeats=2"]
    main(["shards", "show", str(shards / "train"), *options, *SMALL])
    printed = capsys.readouterr().out
    assert printed.count("row ") == 2
    assert "shard-0" in printed
    assert " x 0." in printed  # mixed labels
    assert "4 views of 16 px" in printed
    with Image.open(out) as sheet:
        assert sheet.size == (2 * (128 + 4), 2 * (128 + 34))


def test_more_rows_than_there_are_images_show_all_of_them(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe's batch is larger than the folder: padding rows are not shown."""
    out = tmp_path / "sheet.png"
    options = ["--out", str(out), "--rows", "100", "data.image_size=16", "data.batch_size=256"]
    main(["shards", "show", str(shards / "train"), *options])
    assert "100 views" in capsys.readouterr().out


@pytest.mark.parametrize("name", ['a "b"', "a\\", 'a\\"b', "a, b=[c]"])
def test_a_folder_may_have_any_name(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).symlink_to(shards / "train")
    options = ["--out", str(tmp_path / "sheet.png"), "--rows", "1", *SMALL]
    main(["shards", "show", str(tmp_path / name), *options])
    assert "8 views" in capsys.readouterr().out


@pytest.mark.parametrize("mix", [False, True])
def test_tiles_are_the_first_batchs_views(shards: Path, mix: bool) -> None:
    dataset = train(ShardIndex.load(shards / "train"), mix=mix, randaugment_magnitude=5)
    tiles, batch = first_views(dataset, 12), dataset[0]
    images = batch["images_BHWC"]
    if mix:
        images = mixed(images, batch["layout"], batch["mix_outside_B"], batch["mix_box_B4"]).round()
    names = [dataset.samples.name(int(number)) for number in batch["sample_U"]]
    shown = [0, 1, 3, 4]  # two images of each of the two streams, with 3 views
    assert [sample for _, _, sample in tiles] == [names[place] for place in shown for _ in range(3)]
    for place, image in enumerate(shown):
        for view in range(3):
            pixels, label, _ = tiles[place * 3 + view]
            assert np.array_equal(pixels, images[image * 3 + view])
            assert label.startswith(str(int(batch["labels_B"][image * 3])))
    sheet = np.asarray(draw_sheet(tiles, 3))
    assert np.array_equal(sheet[:128:8, 132 : 132 + 128 : 8], tiles[1][0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: dir"),
        (["a", "--size", "3"], "unrecognized arguments: --size"),
        (["a", "--out"], "argument --out: expected one argument"),
        (["a", "--out", "/no/such/sheet.png"], "there is no folder /no/such"),
        (["a", "--rows", "0"], "--rows is 0; it must be a whole number from 1 to 100"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(arguments)
