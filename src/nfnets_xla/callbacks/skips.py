"""Steps whose loss or gradient was not finite: recorded with their samples once the host knows.

The guard on the device (optim/guard.py) has skipped them already when its numbers are read, with a
logged step or a checkpoint. A skipped update is counted, and the run continues. Beyond the ceiling
the guard has frozen: the device keeps the state from before that step, however many steps have run
since.
"""

from collections.abc import Callable, Sequence

from nfnets_xla.record import Discard, RecordWriter

KIND = "nonfinite"  # kind of their rows in the record


class Skips:
    def __init__(
        self,
        record: RecordWriter | Discard,
        *,
        ceiling: int,
        before: int,
        start_step: int,
        ids: Callable[[int], list[str]] | None,
        say: Callable[[str], None],
    ) -> None:
        """`before` updates were skipped by earlier starts, up to `start_step`. `ids(step)` returns
        the samples of all hosts; only the host that records them has it."""
        self.record = record
        self.ceiling = ceiling
        self.count = before
        self.frozen_at: int | None = None  # the first step beyond the ceiling
        self._ids = ids
        self._say = say
        self._read_to = start_step

    def read(self, step: int, numbers_G: Sequence[float]) -> None:
        """Process the guard's numbers as of update `step`, counted from 1."""
        _, frozen, *bad = numbers_G
        if frozen and self.frozen_at is None:
            self.frozen_at = step - round(frozen) + 1
        last = self.frozen_at or step  # later steps have no effect
        for number in range(max(self._read_to, step - len(bad)) + 1, last + 1):
            self._read_to = number  # before `_found`, which may fail: counts nothing twice
            if bad[number - step - 1]:
                self._found(number)

    def _found(self, step: int) -> None:
        stopped = step == self.frozen_at
        self.count += not stopped
        ids, unnamed = self._names(step)
        self.record.write(KIND, step, count=self.count, stopped=stopped, ids=ids)
        if not stopped:
            self._say(
                f"warning: step {step}: loss or gradient is not finite; its update is left out, "
                f"{self.count} of at most {self.ceiling}{unnamed}"
            )

    def _names(self, step: int) -> tuple[list[str] | None, str]:
        """The ids of the step's samples; or None and why. They are in shards that other hosts read;
        if those are unavailable, the checkpoint being saved must not be lost."""
        if self._ids is None:
            return None, ""
        try:
            return self._ids(step), ""
        except (ValueError, OSError) as error:
            return None, f"; which samples it has could not be read ({error})"

    def why(self) -> str:
        """The message for a run that ends because the guard froze."""
        assert self.frozen_at is not None
        return (
            f"step {self.frozen_at}: loss or gradient is not finite, and optim.max_skipped="
            f"{self.ceiling} such steps may be left out. Step {self.frozen_at - 1} is saved; the "
            "same command would end in the same way. Look at the step's samples (their ids are in "
            "the record; nfnets-xla shards show DIR --recipe RECIPE --rows 100 --step "
            f"{self.frozen_at}, with the run's own settings, draws 100 rows), then raise "
            "optim.max_skipped to go on without it, or begin another run with a smaller rate"
        )
