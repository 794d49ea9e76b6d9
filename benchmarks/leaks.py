"""Whether a long run leaks memory, files or threads: python benchmarks/leaks.py

Trains for 2,000 steps on a CPU with everything that a run repeats: a loader worker, logged steps,
curves, sample ids, a ledger, checkpoints, evaluations. At every logged step it reads from /proc the
resident memory, open files and threads of the run's process and of its worker. It prints them at
the quarters of the run, and their slopes per 1,000 steps with standard errors (least squares from
step 400 on, by when everything has happened several times).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from _turns import Report
from nfnets_xla.data.fractals import fractal_samples
from nfnets_xla.data.index import build_index
from nfnets_xla.data.pack import pack_samples

STEPS, IMAGES, BATCH, SETTLED = 2000, 400, 4, 400
RECIPE = ["finetune_sam_demo", "model.init_from=null", "optim.sam_rho=null"]
RECIPE += ["trainer.device=cpu", "trainer.virtual_devices=null", "data.workers=1"]
RECIPE += [f"data.{name}=16" for name in ("image_size", "eval_image_size", "eval_batch_size")]
RECIPE += [f"data.batch_size={BATCH}", "data.num_streams=4", "data.window_shards=2"]
RECIPE += ["trainer.log_every=10", "trainer.checkpoint_every=50", "trainer.eval_every=100"]
COLUMNS = ("MiB", "files", "threads", "worker's MiB", "worker's files", "worker's threads")


def main() -> None:
    report = Report("leaks", f"python benchmarks/leaks.py: {STEPS} steps of nfnet_mini_f0")
    with tempfile.TemporaryDirectory() as folder:
        measured = followed(Path(folder))
    steps, values = measured[:, 0], measured[:, 1:]
    report.say(f"\n{'':16}" + "".join(f"{name:>18}" for name in COLUMNS))
    for step in (SETTLED, STEPS // 2, STEPS * 3 // 4, STEPS):
        near = np.abs(steps - step).argmin()
        report.say(f"at step {steps[near]:<8.0f}" + "".join(f"{v:18.1f}" for v in values[near]))
    settled = steps >= SETTLED
    report.say(f"{'per 1,000 steps':16}" + slopes(steps[settled] / 1000, values[settled]))
    report.save()


def slopes(thousands: np.ndarray, values: np.ndarray) -> str:
    text = ""
    for column in values.T:
        (slope, _), covariance = np.polyfit(thousands, column, 1, cov=True)
        text += f"{f'{slope:+.2f} ± {covariance[0, 0] ** 0.5:.2f}':>18}"
    return text


def followed(folder: Path) -> np.ndarray:
    """One row per logged step: the step, then COLUMNS."""
    for name, first in (("train", 0), ("held-out", 100)):
        images = IMAGES if name == "train" else 32
        pack_samples(
            fractal_samples(4, images // 4, size=24, seed=0, first_instance=first),
            folder / name,
            samples_per_shard=50,
        )
        build_index(folder / name)
    run_dir = folder / "run"
    data = [f"data.shards={folder / 'train'}", f"data.eval_shards={folder / 'held-out'}"]
    epochs = f"optim.epochs={STEPS * BATCH / IMAGES:g}"
    command = [sys.executable, "-m", "nfnets_xla", *RECIPE, *data, epochs, f"run_dir={run_dir}"]
    rows: list[list[float]] = []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.05)
            step = logged(run_dir / "run-1.jsonl")
            if step and (not rows or step > rows[-1][0]):
                try:
                    rows.append([step, *of_process(process.pid), *of_process(worker(process.pid))])
                except (FileNotFoundError, ProcessLookupError, StopIteration):
                    break  # the process is ending
    assert process.returncode == 0
    return np.array(rows)


def logged(record: Path) -> int:
    """The last logged step."""
    if not record.exists():
        return 0
    with record.open("rb") as file:
        file.seek(max(0, record.stat().st_size - 20_000))
        lines = file.read().split(b"\n")[1:-1]
    rows = (json.loads(line) for line in reversed(lines))
    return next((row["step"] for row in rows if row["kind"] == "train"), 0)


def worker(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return next(int(c) for c in children if b"spawn_main" in cmdline(c))


def cmdline(pid: str) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def of_process(pid: int) -> tuple[float, int, int]:
    """Resident memory in MiB, number of open files, number of threads."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines)
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"])


if __name__ == "__main__":
    main()
