"""Samples that cannot be decoded: lists and counts them, and stops the run beyond a ceiling.

The loader gives such a sample a grey image and weight 0, so that it does not count in the loss; the
order and all other rows do not change. The shards alone determine which samples these are, so a
resumed run misses the same ones.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nfnets_xla.exits import Failed, Unreachable
from nfnets_xla.hosts import Hosts
from nfnets_xla.record import Discard, RecordWriter, RunRecord
from nfnets_xla.task import Batch

# The ceiling is a share of the samples shown, or of this number if fewer have been shown: one fault
# among the first few samples of a long run proves nothing yet.
AT_LEAST = 10_000
NAMED = 3  # samples that a message names
NO_BATCH = -(2**40)  # sent instead of a number of samples by a host without a batch


class Missed(Callback):
    """Runs before a batch is used. Raises Failed beyond the ceiling; if one host could not get its
    batch, raises Unreachable on all hosts, after the same step."""

    def __init__(
        self,
        record: RecordWriter | Discard,
        *,
        ceiling: float,
        unique_per_step: int,
        train_samples: int,
        eval_samples: int,
        before: int,
        hosts: Hosts,
        say: Callable[[str], None],
    ) -> None:
        """`train_samples` is the number that the run will show; `before`, the number missed by
        earlier starts up to the step from which this one resumes."""
        self.record = record
        self.ceiling = ceiling
        self.unique_per_step = unique_per_step
        self.train_samples = train_samples
        self.eval_samples = eval_samples
        self.trained = before
        self._by_step: dict[int, int] = {}
        self.evaluated = 0
        self.hosts = hosts
        self.say = say
        self._told = False  # whether another host has reported that it has no batch

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = batch["step"] + 1
        shown = max(step * self.unique_per_step, AT_LEAST)
        missed = self._of_all_hosts(batch)
        self.trained += len(missed)
        if missed:
            self._by_step[step] = len(missed)
        self._take(missed, "train", step, self.trained, min(shown, self.train_samples))

    def trained_up_to(self, step: int) -> int:
        """The number missed up to `step`; later batches may have been counted already."""
        return self.trained - sum(count for at, count in self._by_step.items() if at > step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluated = 0

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        missed = self._of_all_hosts(batch)
        self.evaluated += len(missed)
        self._take(missed, "eval", trainer.global_step, self.evaluated, self.eval_samples)

    def _of_all_hosts(self, batch: Batch) -> list[dict[str, Any]]:
        total = self.hosts.total(len(batch["missed"]))
        if total < 0:
            self._told = True
            raise Unreachable("another host could not read its samples: see its output")
        if total == 0:
            return []
        return [sample for missed in self.hosts.gather(batch["missed"]) for sample in missed]

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Tell the other hosts, which have a batch and are summing missed samples."""
        if isinstance(exception, Unreachable) and not self._told:
            self.hosts.total(NO_BATCH)

    def _take(
        self, missed: list[dict[str, Any]], split: str, step: int, total: int, of: int
    ) -> None:
        if not missed:
            return
        where = ""
        if isinstance(self.record, RecordWriter):
            path = missed_file(self.record)
            where = f"; listed in {path}"
            with path.open("a", encoding="utf-8") as file:
                for sample in missed:
                    file.write(json.dumps({"step": step, "split": split, **sample}) + "\n")
            self.record.write("missed", step, split=split, count=len(missed), total=total)
        first = "; ".join(
            f"{sample['id']} ({sample['shard']}, offset {sample['offset']}): {sample['reason']}"
            for sample in missed[:NAMED]
        )
        text = f"{total} undecodable {split} samples, now {len(missed)}: {first}{where}"
        if total > self.ceiling * of:
            raise Failed(
                f"{text}. More than data.max_missed={self.ceiling:g} of {of}: restore the shards, "
                "list the samples in data.exclude, or raise data.max_missed"
            )
        self.say(text)


def missed_file(record: RecordWriter) -> Path:
    return record.path.with_name(f"missed-{record.attempt}.jsonl")


def missed_before(record: RunRecord) -> int:
    """The number of training samples that the starts in `record` missed."""
    return sum(row["count"] for row in record.of_kind("missed") if row["split"] == "train")
