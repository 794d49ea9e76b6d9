"""The batches of a range of steps, made by worker processes ahead of need.

    with closing(Batches(dataset, start_step=1000, stop_step=9000, workers=8)) as batches:
        for batch in batches: ...

The number of workers only affects speed: the dataset alone determines each batch.
"""

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing import resource_tracker
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from nfnets_xla.data.ahead import PREFETCH
from nfnets_xla.data.batches import Batch, EvalBatches, TrainBatches

NO_MEMORY = "no memory is left to make a batch: lower data.workers, or use a machine with more"


class Batches:
    """Iterates over `dataset[start_step] ... dataset[stop_step - 1]`, in order.

    With `workers=0` batches are made in this process; else each worker makes whole batches, on one
    thread. Workers are spawned: a fork would copy locks held by the device runtime's threads, and
    workers of a fork server outlive a killed parent. It has no length on purpose: Lightning would
    sum lengths on the device, which compiles two graphs.
    """

    def __init__(
        self,
        dataset: TrainBatches | EvalBatches,
        *,
        start_step: int,
        stop_step: int,
        workers: int,
        pin_memory: bool = False,
    ) -> None:
        """`pin_memory` is for a GPU, which copies from such memory while it computes."""
        if not 0 <= start_step <= stop_step <= len(dataset):
            raise ValueError(
                f"steps {start_step} to {stop_step} are asked for; they must lie in 0 to "
                f"{len(dataset)}"
            )
        self._loader = DataLoader(
            _Sending(dataset),
            batch_size=None,
            sampler=range(start_step, stop_step),
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=PREFETCH if workers else None,
            persistent_workers=workers > 0,
            pin_memory=pin_memory,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=_end_with_parent,
        )

    def __iter__(self) -> Iterator[Batch]:
        with _deaf() if self._loader.num_workers else nullcontext():
            sent = iter(self._loader)
        # A map drops its reference to each batch; a generator would keep it during the next wait.
        return map(_received, sent)

    def close(self) -> None:
        """End the workers. At the interpreter's exit, a busy worker would be killed, which torch
        would report as a crash, after the real error."""
        iterator: Any = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # if it hangs: torch's SIGTERM is blocked
            self._loader._iterator = None


class _Sent(NamedTuple):
    """A batch as a worker sends it. Only the images are sent as a tensor, in shared memory: each
    tensor costs an exchange of messages, and a busy worker answers late."""

    batch: Batch
    small: list[str]  # names of the tensors sent as arrays


def _received(sent: _Sent | ValueError | OSError) -> Batch:
    if isinstance(sent, ValueError | OSError):
        raise sent
    return sent.batch | {name: torch.from_numpy(sent.batch[name]) for name in sent.small}


class _Sending(Dataset[Any]):
    def __init__(self, dataset: TrainBatches | EvalBatches) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> _Sent | ValueError | OSError:
        """Errors that the command line prints in one line are returned as values: raised here, they
        would arrive with a worker's traceback."""
        try:
            batch = self.dataset[step]
        except (ValueError, OSError) as error:
            return error
        except MemoryError:
            return OSError(errno.ENOMEM, NO_MEMORY)
        tensors = [name for name, value in batch.items() if isinstance(value, torch.Tensor)]
        small = [name for name in tensors if name != "images_BHWC"]
        return _Sent(batch | {name: batch[name].numpy() for name in small}, small)


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started inside ignore SIGTERM and SIGINT: these are often sent to a whole process
    group, but only the parent should react, save, and end its workers."""
    resource_tracker.ensure_running()  # before: starting it unblocks the signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(_worker: int) -> None:
    """End the worker if its parent is killed: it could wait forever to hand over a batch."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def _unchanged(batch: Any) -> Any:
    return batch  # torch's default would convert host arrays to tensors
