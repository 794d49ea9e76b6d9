"""Sweeps: a folder of runs, started and resumed by one command.

Hydra makes the product of the values (`hydra.mode: MULTIRUN` in the recipe, or `--multirun`), and
its launcher, which may be a plugin, decides how many run at a time, and where. Every cell is a
separate run in a separate process: if it is killed, the others are not affected, and cells share
only files. The same command, given again, skips finished runs and resumes the others.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nfnets_xla.arguments import quoted
from nfnets_xla.config import GROUPS, Run, differences
from nfnets_xla.exits import START_AGAIN, CellFailed, Interrupted, Unreachable
from nfnets_xla.history import ended
from nfnets_xla.inputs import open_index, open_shards
from nfnets_xla.preempt import FOLLOWED, Preemption
from nfnets_xla.record import read_record
from nfnets_xla.sources import checkpoint_dir_of, config_of


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    run: Run  # its run_dir is the sweep's folder
    keys: Sequence[str]  # dotted names of the settings that are swept
    recipe: str
    overrides: Sequence[str]  # those of the command line, with this cell's values

    @property
    def folder(self) -> Path:
        """In the sweep's folder, named after the swept values: "nfnet_f0-epochs_0.25".

        Contains no "=" or ",", which would need quotes in an override.
        """
        if self.run.run_dir is None:
            raise ValueError("run_dir is not set; it must name the folder of the sweep's runs")
        words = [_word(key, self._value(key)) for key in self.keys if key != "run_dir"]
        return Path(self.run.run_dir) / ("-".join(words) or "run")

    def _value(self, key: str) -> Any:
        """For a config group (`optim=vit`) the choice's name, not all its settings."""
        if key in GROUPS:
            return dict(word.split("=", 1) for word in self.overrides if "=" in word)[key]
        return _lookup(asdict(self.run), key)

    @property
    def command(self) -> list[str]:
        own = ["hydra.mode=RUN", f"run_dir={quoted(str(self.folder))}"]
        if self.run.job == "train" and (root := self.checkpoint_dir):
            own.append(f"trainer.checkpoint_dir={quoted(root)}")
        return [sys.executable, "-m", "nfnets_xla", self.recipe, *self.overrides, *own]

    @property
    def checkpoint_dir(self) -> str | None:
        """One for this run, since two cannot share it; once the run has begun, its recorded one."""
        asked = self.run.trainer.checkpoint_dir
        return checkpoint_dir_of(self.folder) or (
            asked and f"{asked.rstrip('/')}/{self.folder.name}"
        )

    def finished(self) -> bool:
        """Whether the folder holds exactly this run or evaluation, finished."""
        if ended(self.folder) is None:
            return False
        head = read_record(self.folder).headers[-1]
        if differences(_compared(head["config"]), _compared(asdict(self.run))):
            return False
        return "fingerprint" not in head or head["fingerprint"] == self._fingerprint()

    def _fingerprint(self) -> str:
        """The fingerprint of the shards that this cell reads."""
        if self.run.job == "evaluate" and self.run.data.eval_shards is not None:
            return open_index(self.run, self.run.data.eval_shards).fingerprint
        return open_shards(self.run)[0].fingerprint


def run_cell(cell: Cell, preemption: Preemption) -> None:
    """Raises CellFailed; or SystemExit, which is not caught, if asked to stop the sweep."""
    if preemption.reason is not None:
        sys.exit(START_AGAIN)
    if cell.finished():
        print(f"{cell.folder}: finished before", flush=True)
        return
    print(f"{cell.folder}: {' '.join(cell.overrides)}", flush=True)
    # In its own process group, so that Ctrl-C reaches only us, and we forward it once.
    followed = {**os.environ, FOLLOWED: str(os.getpid())}
    process = subprocess.Popen(cell.command, env=followed, process_group=0)
    preemption.pass_on = lambda: process.send_signal(signal.SIGTERM)
    try:
        code = process.wait()
    finally:
        preemption.pass_on = None
    if preemption.reason is not None or code == START_AGAIN:
        sys.exit(START_AGAIN)
    if code:
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        raise CellFailed(f"{cell.folder} ended with {how}")


@contextmanager
def going_on(run_dir: str | None) -> Iterator[None]:
    """If an address does not answer, a sweep that has begun is Interrupted, as a run is."""
    try:
        yield
    except Unreachable as error:
        if run_dir is not None and any(Path(run_dir).rglob("run-*.jsonl")):
            raise Interrupted(str(error)) from error
        raise


def model_of(run_dir: str) -> str:
    """The name of the model that a run trained; in recipes: ${model_of:${model.init_from}}."""
    config = config_of(Path(run_dir))
    if config is None:
        raise ValueError(f"{run_dir} is not a run's folder: it must hold a record (run-1.jsonl)")
    return config["model"]["name"]


def refuse_shared(key: str, values: Iterable[str]) -> None:
    """Raises ValueError if two swept values would give the same folder name."""
    named: dict[str, str] = {}
    for value in values:
        other = named.setdefault(_word(key, value), value)
        if other != value:
            raise ValueError(
                f"{key} is swept over {other} and {value}, whose runs would have one folder "
                f"({_word(key, value)}): rename one of them, or give each a sweep of its own"
            )


def _lookup(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _word(key: str, value: Any) -> str:
    text = str(value).rstrip("/").rpartition("/")[2]
    if isinstance(value, float) and float(short := f"{value:g}") == value:
        text = short
    text = "".join(char if char.isalnum() or char in "-_.+" else "_" for char in text)
    return text if key in ("model.name", "model.init_from") else f"{key.rpartition('.')[2]}_{text}"


def _compared(config: dict[str, Any]) -> dict[str, Any]:
    """The parts of a configuration that a finished run must share: numbers and sources."""
    elsewhere = {"run_dir", "resume"}
    if config["job"] != "throughput":  # its numbers depend on the device
        elsewhere.add("trainer")
    return {key: config[key] for key in config.keys() - elsewhere}
