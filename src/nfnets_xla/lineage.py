"""Which rows, of all that a run's starts wrote, led to its current weights.

A start resumes from a checkpoint, and its rows replace earlier starts' rows of later steps. Usually
one start follows the other. Two may also train at the same time, on two machines: then the line of
starts continues with the one that saves first (claims.OtherStart), and all rows of the other, a
rival, are dropped.

The header of a start has "start", its name; "continues", the name of the start that saved the
checkpoint it resumed from; "since", the step from which that start had resumed; and "saved_to", the
newest step known to be saved when it began. Headers without names: each continues the one before.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Start:
    number: int
    lines: list[Row]  # the header first

    @property
    def header(self) -> Row:
        return self.lines[0]

    @property
    def resumed_from(self) -> int:
        return int(self.header["resumed_from"])

    @cached_property
    def saved(self) -> int:
        """The newest step that this start is known to have saved; 0: none."""
        rows = (row["step"] for row in self.lines[1:] if row["kind"] in ("checkpoint", "end"))
        return max(rows, default=0)


def rivals(starts: Sequence[Start]) -> frozenset[int]:
    """Numbers of the starts off the line that the record follows (see above); the newest start may
    be one."""
    place = {start.header.get("start"): at for at, start in enumerate(starts)}
    found: set[int] = set()

    def stand_beside(line: int, after: int, step: int) -> None:
        beside = starts[line + 1 : after]
        found.update(other.number for other in beside if other.resumed_from < step)

    at = len(starts) - 1
    if (ahead := _ahead_of_last(starts)) is not None:
        stand_beside(ahead, len(starts), starts[ahead].saved)
        at = ahead
    while at > 0 and (step := starts[at].resumed_from):
        name = starts[at].header.get("continues")
        before = at - 1 if name is None else min(place.get(name, at - 1), at - 1)
        stand_beside(before, at, step)
        at = before
    return frozenset(found)


def _ahead_of_last(starts: Sequence[Start]) -> int | None:
    """The index of a start that has saved since the newest one began, if that has not saved."""
    last = starts[-1]
    if "saved_to" not in last.header or last.saved:
        return None
    saved = [(start.saved, at) for at, start in enumerate(starts[:-1])]
    newest = max(saved, default=(0, 0))
    return newest[1] if newest[0] > last.header["saved_to"] else None


def builds_on(starts: Sequence[Start]) -> dict[int, int]:
    """{start's number: the step up to which it builds on the starts before it}: the step it resumed
    from; but if the start that saved that is recorded in another folder, the step where that start
    began."""
    names = {start.header["start"] for start in starts if "start" in start.header}
    found: dict[int, int] = {}
    for start in starts:
        known = start.header.get("continues") in (None, *names)
        found[start.number] = start.resumed_from if known else int(start.header.get("since") or 0)
    return found


def still_built_on(
    starts: Sequence[Start], followed_at: Sequence[int | None]
) -> tuple[list[Row], float]:
    """The rows of `starts` that no later start replaces, and the seconds spent on the other rows.

    `followed_at` has, for each start, the step up to which the next one builds on it; for the last
    None, or the step of a start that has not written yet. The "end" row of a run that was continued
    is dropped, but its time is not lost. If two starts evaluated the same step, the later counts.

    Works from newest to oldest, in one pass: a row stays if no later start resumed before its step.
    """
    kept: list[list[Row]] = []
    lost = 0.0
    bound = math.inf
    evaluated: set[tuple[int, Any]] = set()  # (step, weights), in later starts
    for place in reversed(range(len(starts))):
        lines, follows = starts[place].lines, followed_at[place]
        bound = min(bound, math.inf if follows is None else follows)
        clock = [row.get("seconds", 0.0) for row in lines]
        good: list[Row] = []
        for row, (before, now) in zip(lines[1:], pairwise(clock), strict=True):
            step, kind = row["step"], row["kind"]
            if step > bound:
                lost += now - before
            elif kind == "eval" and (step, row.get("weights")) in evaluated:
                continue
            elif kind != "end" or place == len(starts) - 1:
                good.append(row)
        evaluated |= {(row["step"], row.get("weights")) for row in good if row["kind"] == "eval"}
        kept.append(good)
    return [row for good in reversed(kept) for row in good], lost


def computed_again(starts: Sequence[Start], built_on: Sequence[int]) -> int:
    """The number of steps that a later start computed again, as far as the rows show."""
    steps: list[int] = []  # computed and not replaced so far, sorted
    lost = 0
    for start, begun in zip(starts, built_on, strict=True):
        if steps:
            lost += max(0, steps[-1] - begun)
            del steps[bisect_right(steps, begun) :]
        steps += sorted(_computed(start))
    return lost


def computed_in_vain(rival: Start) -> int:
    return max(_computed(rival), default=rival.resumed_from) - rival.resumed_from


def _computed(start: Start) -> list[int]:
    return [row["step"] for row in start.lines[1:] if row["kind"] in ("train", "samples")]
