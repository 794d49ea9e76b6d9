"""The processes of one run: which rows each reads, which one writes, and that they agree.

Any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT makes a run of several
processes (`torchrun` does); on a TPU slice the runtime knows them. We call each process a host. A
host reads the rows of its own streams; only host 0 writes into the run's folder, which all must
see. They communicate over gloo, and sum GPU tensors over NCCL.
"""

# pyright: reportPrivateImportUsage=false

import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nfnets_xla.exits import HostLost, Unreachable

T = TypeVar("T")

BUCKET = 2**26  # bytes per message; a sum needs memory for two of them


@dataclass(frozen=True)
class Hosts:
    """Collective operations. All hosts must call them in the same order (except `rows`); a single
    host sends nothing. HostLost is raised if a host has ended, or does not answer in half an hour.
    """

    number: int = 0  # of this host, from 0
    count: int = 1

    @property
    def writes(self) -> bool:
        return self.number == 0

    def rows(self, batch_size: int) -> slice:
        """This host's rows of a global batch. Raises ValueError if they do not divide it."""
        if batch_size % self.count:
            raise ValueError(
                f"a batch has {batch_size} rows, which do not divide among {self.count} hosts: "
                "choose another batch size or number of hosts"
            )
        each = batch_size // self.count
        return slice(self.number * each, (self.number + 1) * each)

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors of one dtype and device over the hosts, in place, many per message.

        While one message is in flight the next is assembled. GPU tensors go from device to device,
        without synchronising with the host.
        """
        if self.count == 1:
            return
        underway: deque[tuple[list[Tensor], Tensor, Any]] = deque()
        for bucket in buckets([tensor.detach() for tensor in tensors]):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            work = self.heard(lambda flat=flat: dist.all_reduce(flat, async_op=True))
            underway.append((bucket, flat, work))
            if len(underway) > 1:
                self._take_over(*underway.popleft())
        for message in underway:
            self._take_over(*message)

    def _take_over(self, bucket: list[Tensor], flat: Tensor, work: Any) -> None:
        self.heard(work.wait)
        totals = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [t.view_as(x) for t, x in zip(totals, bucket, strict=True)])

    def total(self, number: int) -> int:
        sum_1 = torch.tensor([number])
        self.add([sum_1])
        return int(sum_1[0])

    def gather(self, value: Any) -> list[Any]:
        """The values of all hosts, in their order; anything that JSON can hold."""
        if self.count == 1:
            return [value]
        text_N = torch.from_numpy(np.frombuffer(json.dumps(value).encode(), np.uint8).copy())
        sizes_H = torch.zeros(self.count, dtype=torch.int64)
        sizes_H[self.number] = len(text_N)
        self.add([sizes_H])
        texts_HN = torch.zeros(self.count, int(sizes_H.max()), dtype=torch.uint8)
        texts_HN[self.number, : len(text_N)] = text_N
        self.add([texts_HN])  # each row has one summand that is not 0
        return [
            json.loads(row_N[:size].numpy().tobytes())
            for row_N, size in zip(texts_HN, sizes_H.tolist(), strict=True)
        ]

    def agree(self, values: Mapping[str, Any]) -> None:
        """Raises ValueError, on every host, if a value on some host differs from host 0's. The keys
        name the values in the message."""
        first, *others = self.gather(dict(values))
        for number, other in enumerate(others, start=1):
            for what in first:
                theirs = other.get(what)  # absent if that host runs another release
                if theirs != first[what]:
                    raise ValueError(
                        f"hosts differ in {what}: {first[what]!r} on host 0, {theirs!r} on "
                        f"host {number}. All must run the same command, and see the same shards "
                        "and run_dir"
                    )

    def by_writer(self, work: Callable[[], T]) -> T | None:
        """Runs `work` on host 0 only; returns its result there, None elsewhere. If it raises
        ValueError (or Unreachable) or OSError, every host does, with the same words."""
        result = fault = None
        if self.writes:
            try:
                result = work()
            except Unreachable as error:
                fault = "Unreachable", str(error)
            except ValueError as error:
                fault = "ValueError", str(error)
            except OSError as error:
                file = None if error.filename is None else str(error.filename)
                words = (error.errno, error.strerror, file) if error.errno else (str(error),)
                fault = "OSError", *words
        if (fault := self.gather(fault)[0]) is not None:
            kinds = {"Unreachable": Unreachable, "ValueError": ValueError, "OSError": OSError}
            name, *words = fault
            raise kinds[name](*words)
        return result

    def heard(self, exchange: Callable[[], T]) -> T:
        """The result of `exchange`; HostLost if it fails and there are several hosts."""
        try:
            return exchange()
        except RuntimeError as error:
            if self.count == 1:
                raise
            raise self.lost(error) from error

    def lost(self, error: Exception) -> HostLost:
        return HostLost(
            f"host {self.number} of {self.count} lost another one ({error}): start all of them "
            "again, and the run goes on from its newest checkpoint"
        )


ALONE = Hosts()


def buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of consecutive tensors of at most BUCKET bytes, or a single larger tensor."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def open_hosts() -> Hosts:
    """The hosts that a launcher's environment variables describe; one host without them. Waits for
    the others for half an hour, as the methods of Hosts do."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return Hosts()
    unset = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if unset:
        raise ValueError(
            f"WORLD_SIZE is {count} and {', '.join(unset)} not set: start the run with torchrun, "
            "or set all four"
        )
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        expected = Hosts(int(os.environ["RANK"]), count)
        expected.heard(lambda: dist.init_process_group(backend))
    return Hosts(dist.get_rank(), dist.get_world_size())
