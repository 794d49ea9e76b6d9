"""Near-duplicates over Ray: equal on this machine's processes and on two nodes.

    python -m tests.data.two_nodes FOLDER

The two nodes run on this machine, with one core, a raylet and an object store each.
commands/test_dedup.py runs this in its own process.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster

from nfnets_xla.data.dedup import Settings, find
from nfnets_xla.data.index import build_index
from nfnets_xla.data.jobs import map_jobs
from nfnets_xla.data.pack import Sample, pack_samples
from nfnets_xla.data.shards import ShardIndex
from tests.data.copied import COPIES, jpeg, picture


def packed(folder: Path, samples: list[Sample]) -> ShardIndex:
    pack_samples(samples, folder, samples_per_shard=4)
    return build_index(folder)


def node(number: int) -> str:
    time.sleep(0.5 + number / 100)  # long enough for each worker to get some
    return ray.get_runtime_context().get_node_id()


def main() -> None:
    folder = Path(sys.argv[1])
    originals: list[Sample] = [(f"{n}", jpeg(picture(n)), "jpg", 0) for n in range(10)]
    against = packed(folder / "eval", originals)
    copies: list[Sample] = [
        (f"{k}-{n}", jpeg(alter(picture(n))), "jpg", 0)
        for k, alter in enumerate(COPIES.values())
        for n in (k % 10, 100 + k)
    ]
    train = packed(folder / "train", copies)
    here = find([train], [against], folder / "local", Settings(), jobs=1)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    os.environ["RAY_ADDRESS"] = str(cluster.address)
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
    ray.init(cluster.address, log_to_driver=False)
    there = find([train], [against], folder / "ray", Settings(), engine="ray", jobs=2)
    worked = set(map_jobs(node, range(8), engine="ray", jobs=2))
    # All written files are equal, and so are the results made from them.
    for path in sorted((folder / "local").rglob("*")):
        other = folder / "ray" / path.relative_to(folder / "local")
        assert path.is_dir() or path.read_bytes() == other.read_bytes(), path
    for one, other in zip(here[2:], there[2:], strict=True):
        np.testing.assert_array_equal(one, other)
    print(f"{len(here.bits_M)} pairs in {len(here.train)} shards")
    print(f"the same, on {len(worked)} nodes", flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
