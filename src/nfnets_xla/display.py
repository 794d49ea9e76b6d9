"""Output of a run for people: a live view in a terminal; plain lines in a pipe or a file."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

Say = Callable[[str], None]
Numbers = dict[str, Any]  # a train row of the record, plus "steps", "epochs" and "lost_seconds"


class Display(Protocol):
    """Driven by `monitor.Monitor`; a context manager, so that the terminal is always restored."""

    def say(self, line: str) -> None: ...

    def step(self, number: int, steps: int) -> None:
        """Update `number` of `steps` was dispatched."""

    def numbers(self, row: Numbers) -> None:
        """Show the measurements of a logged step."""

    def __enter__(self) -> "Display": ...

    def __exit__(self, *_: object) -> None: ...


def open_display() -> Display:
    """A live display if standard output is a terminal with cursor control, else lines."""
    from rich.console import Console

    console = Console()
    return Live(console) if console.is_terminal and not console.is_dumb_terminal else Lines()


class Lines:
    """One line for each logged step."""

    def __init__(self, write: Say | None = None) -> None:
        self._write = write or (lambda line: print(line, flush=True))

    def say(self, line: str) -> None:
        self._write(line)

    def step(self, number: int, steps: int) -> None: ...

    def numbers(self, row: Numbers) -> None:
        left = (row["steps"] - row["step"]) * row["step_ms"] / 1000
        head = f"step {row['step']}/{row['steps']}  epoch {row['epoch']:.2f}/{row['epochs']:g}"
        self.say(f"{head}  {'  '.join(phrases(row))}  {clock(left)} left")

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None: ...


class Live:
    """A bar with the time left and the latest numbers below it; `say` prints above."""

    def __init__(self, console: Any) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.text import Text

        live = self

        class TwoLines(Progress):
            def get_renderables(self) -> Any:
                if self.tasks:
                    yield self.make_tasks_table(self.tasks)
                    yield Text("  ".join(live._phrases), overflow="fold")

        columns = BarColumn(None), MofNCompleteColumn(), TextColumn("{task.fields[epoch]}")
        times = TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
        self._phrases: list[str] = []
        self._progress = TwoLines(
            TextColumn("step"),
            *columns,
            *times,
            console=console,
            expand=True,
            speed_estimate_period=300,
        )
        self._task: Any = None

    def say(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)

    def step(self, number: int, steps: int) -> None:
        if self._task is None:  # the first step compiles, so the estimate starts after it
            self._task = self._progress.add_task("", total=steps, completed=number, epoch="")
        self._progress.update(self._task, completed=number)

    def numbers(self, row: Numbers) -> None:
        self._phrases = phrases(row)
        self._progress.update(self._task, epoch=f"epoch {row['epoch']:.2f}/{row['epochs']:g}")

    def __enter__(self) -> "Live":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


NAMES = {"top1": "top-1", "top5": "top-5"}


def results(metrics: Mapping[str, float]) -> str:
    """The metrics of an evaluation, one after the other; not the number of images."""
    shown = {name: value for name, value in metrics.items() if name != "images"}
    return "  ".join(f"{NAMES.get(name, name)} {value:.4f}" for name, value in shown.items())


def phrases(row: Numbers) -> list[str]:
    """The numbers that people watch, each with its name."""
    known = [
        f"loss {row['loss']:.4f}",
        f"top-1 {row['top1']:.3f}",
        f"lr {row['learning_rate']:.4g}",
        f"{row['images_per_second']:.0f} images/s",
        None if row["mfu"] is None else f"MFU {row['mfu']:.1%}",
        None if row["hfu"] == row["mfu"] else f"HFU {row['hfu']:.1%}",
        f"waiting for data {row['data_wait_share']:.0%}",
        f"lost to restarts {clock(row['lost_seconds'])}" if row["lost_seconds"] else None,
    ]
    return [phrase for phrase in known if phrase is not None]


def summary(row: Numbers) -> list[str]:
    """The last row of a run's record in words: speed, compilations, lost time."""
    lines = []
    if "images_per_second" in row:
        share = "" if row["mfu"] is None else f", MFU {row['mfu']:.1%}, HFU {row['hfu']:.1%}"
        lines.append(
            f"typical step: {row['step_ms']:.0f} ms, {row['images_per_second']:.0f} images/s"
            f"{share}, waiting for data {row['data_wait_share']:.0%}"
        )
    if "compilations" in row:
        line = f"compiled {row['compilations']} graphs in {row['compile_seconds']:.0f} s"
        if "executions" in row:  # only XLA counts them
            names = ", ".join(row["fallbacks"]) or "none"
            line += (
                f"; {row['executions']} executions, {row['tensors_to_host']} reads from the "
                f"device; operations that ran on the host: {names}"
            )
        lines.append(line)
    if row["lost_seconds"]:
        lines.append(f"lost to restarts: {clock(row['lost_seconds'])}")
    return lines


def plural(number: int, noun: str) -> str:
    """The number with its noun: "1 shard", "1,024 shards", "8 classes"."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def clock(seconds: float) -> str:
    """Hours, minutes and seconds: "0:01:40"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
