"""Top-k of samples with several labels, and rows of several hosts."""

import torch

from nfnets_xla.data.mix import Layout
from nfnets_xla.task import Batch, _rank, rows_of

BATCH = {
    "labels_B": torch.tensor([4, 2, 0]),
    "labels_BL": torch.tensor([[4, 1, 4], [2, 2, 2], [0, 1, 2]]),
    "label_weights_BL": torch.tensor([[3.0, 1, 0], [1, 0, 0], [1, 1, 2]]),
}


def test_the_best_ranked_of_the_labels_counts() -> None:
    logits_BK = torch.tensor([[5.0, 4, 3, 2, 1], [5, 4, 3, 2, 1], [float("nan")] * 5])
    assert _rank(logits_BK, BATCH).tolist() == [1, 2, 5]
    alone = {"labels_B": BATCH["labels_B"]}
    assert _rank(logits_BK, alone).tolist() == [4, 2, 5]


def test_rows_of_all_hosts_are_mixed_as_each_hosts_own() -> None:
    """On XLA a batch is global once it is on the devices, and its layout is still a host's."""
    generator = torch.Generator().manual_seed(0)

    def of_host() -> Batch:
        images = torch.randint(256, (12, 4, 4, 3), dtype=torch.uint8, generator=generator)
        outside = torch.rand(12, generator=generator)
        boxes = torch.tensor([[1, 0, 3, 2]], dtype=torch.int32).expand(12, 4)
        mixes = {"mix_outside_B": outside, "mix_box_B4": boxes, "mix_ratio_B": outside}
        return {"images_BHWC": images, **mixes}

    layout = Layout(streams=2, images=3, views=2)
    hosts = [of_host(), of_host()]
    together = {name: torch.cat([host[name] for host in hosts]) for name in hosts[0]}
    alone = [rows_of({**host, "layout": layout})["images_BHWC"] for host in hosts]
    assert torch.equal(rows_of({**together, "layout": layout})["images_BHWC"], torch.cat(alone))
