"""A process that reads every sample of a folder at an address through a cache.

python -m tests.data.remote_reader URL CACHE LIMIT FIRST_SHARD
"""

import hashlib
import sys
from pathlib import Path

from nfnets_xla.data.cache import Cache
from nfnets_xla.data.remote import Patience, RemoteFolder
from nfnets_xla.data.shards import ShardIndex

QUICK = Patience(total=60, first_wait=0.01, timeout=30)
STALLING = QUICK._replace(timeout=0.5)  # each stall takes this long


def digest(index: ShardIndex, first: int = 0) -> str:
    """Digest of all samples in index order, whichever shard is read first."""
    found: dict[int, bytes] = {}
    for shard in [*range(first, index.num_shards), *range(first)]:
        rows = [index.read(shard, row) for row in range(int(index.counts[shard]))]
        found[shard] = b"".join(rows)
    return hashlib.sha256(b"".join(found[shard] for shard in sorted(found))).hexdigest()


def main() -> None:
    url, folder, limit, first = sys.argv[1:]
    cache = Cache(Path(folder), int(limit))
    print(digest(ShardIndex.load(RemoteFolder(url, cache, QUICK)), int(first)))


if __name__ == "__main__":
    main()
