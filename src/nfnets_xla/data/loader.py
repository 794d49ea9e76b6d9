"""The batches of a range of steps, made by worker processes ahead of need.

    with closing(Batches(dataset, start_step=1000, stop_step=9000, workers=8)) as batches:
        for batch in batches: ...

Workers only change how soon a batch is there: which step holds what is the data set's to say.
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

    With `workers=0` they are made in this process; else each worker makes whole batches, on one
    thread. Workers are spawned: a fork would copy the locks that the device runtime's threads hold,
    and workers of a fork server outlive a parent that is killed. There is no length on purpose:
    Lightning would add lengths up on the device, which compiles twice.
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
        # A map lets go of what it has given: a generator would free the batch during the next wait.
        return map(_received, sent)

    def close(self) -> None:
        """End the workers. Left to the interpreter's exit, one that is busy would be killed, and
        torch, taking that for a crash, would have the last word after the real error."""
        iterator: Any = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            for worker in iterator._workers:
                worker.kill()  # one that hangs; SIGTERM, which torch has sent, is blocked
            self._loader._iterator = None


class _Sent(NamedTuple):
    """A batch on its way from a worker. Only the images go as a tensor, in shared memory: each
    tensor is asked for by messages, which a busy worker answers late."""

    batch: Batch
    small: list[str]  # tensors that go as arrays


def _received(sent: _Sent | ValueError | OSError) -> Batch:
    if isinstance(sent, ValueError | OSError):
        raise sent
    return sent.batch | {name: torch.from_numpy(sent.batch[name]) for name in sent.small}


class _Sending(Dataset[Any]):
    def __init__(self, dataset: TrainBatches | EvalBatches) -> None:
        self.dataset = dataset

    def __getitem__(self, step: int) -> _Sent | ValueError | OSError:
        """What the command line says in one line is handed over as a value: raised here, it would
        come as a traceback."""
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
    """Processes started here never see SIGTERM and SIGINT: these are often sent to all processes of
    a group, and it is the parent's business to save and to end its workers."""
    resource_tracker.ensure_running()  # which unblocks them when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent(_worker: int) -> None:
    """For a run that is killed: a worker's own end may wait for ever to hand over its batch."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="end-with-parent").start()


def _unchanged(batch: Any) -> Any:
    return batch  # torch's conversion would make tensors of what stays on the host
