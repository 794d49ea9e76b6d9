"""Every recipe that trains, with a shallow network and small shards: whole, and killed and resumed.

    python -m tests.each_recipe cpu|xla RECIPE ...

As in chaos.py, each start is a process forked from this one. A recipe keeps everything that its
header is about (rates, decay, SAM, views, mixing, precision); only sizes and lengths are replaced.
"""

import os
import random
import sys
import tempfile
import time
from pathlib import Path

import torch

from nfnets_xla.record import read_record
from tests.chaos_suite import FOLDERS, QUIET, Suite, kill
from tests.runs import PLAIN_CPU, SMALL, UNOPTIMISED, xla
from tests.shallow import SHALLOW, register_shallow

VIT = ["model.name=timm/test_vit", "data.image_size=32", "data.eval_image_size=32"]
WHOLE_RUN = ["optim.epochs=1", "trainer.checkpoint_every=1", "trainer.ledger=true"]
ATTEMPTS = 5
OPTIONS: dict[str, list[str]] = {
    "pretrain": SHALLOW,
    "imagenet": [*SHALLOW, "optim.warmup_epochs=null"],
    "finetune_sam": SHALLOW,
    "finetune_repeat_aug": SHALLOW,
    "vit_baseline": [*VIT, "optim.cooldown_steps=2"],
}


def main() -> None:
    device, *names = sys.argv[1:]
    os.environ["XLA_FLAGS"] = UNOPTIMISED
    torch.set_num_threads(1)
    register_shallow()
    with tempfile.TemporaryDirectory() as folder:
        suite = Suite(Path(folder), random.Random(0))
        data = [f"data.{key}={suite.folder / name}" for key, name in FOLDERS]
        common = [*SMALL, *(PLAIN_CPU if device == "cpu" else xla(2)), *QUIET, *WHOLE_RUN, *data]
        for name in names:
            options = [*common, *OPTIONS[name]]
            if name.startswith("finetune"):
                options.append(
                    f"model.init_from={suite.reference(['pretrain', *common, *SHALLOW])}"
                )
            kill_and_go_on(suite, [name, *options])
    sys.exit(0 if all(result.good for result in suite.results) else 1)


def kill_and_go_on(suite: Suite, arguments: list[str]) -> None:
    """Kill the run as soon as it has its own checkpoint; repeat once if it had finished by then."""
    name = arguments[0]
    run_dir = suite.folder
    for attempt in range(ATTEMPTS):
        run_dir = suite.folder / f"{name}-{attempt}"
        pid = suite.started(arguments, run_dir)
        while not any(run_dir.glob("checkpoints/*/manifest.json")):
            time.sleep(0.005)
        if kill(pid):
            break
    suite.run(arguments, run_dir)
    note = f"resumed from {read_record(run_dir).headers[1]['resumed_from']}"
    suite.judge(name, [run_dir], 1, suite.reference(arguments), note)


if __name__ == "__main__":
    main()
