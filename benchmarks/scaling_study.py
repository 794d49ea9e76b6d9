"""The paper in miniature, resumable to the cell: python benchmarks/scaling_study.py [FOLDER]

Every model of MODELS is trained on fractals for every number of EPOCHS at its three RATES, each run
with its own cosine and warm-up; the best rate of each cell is repeated with two more seeds. Then
ViTs of equal cost are trained, with AdamW. Then the best of each cell is fine-tuned with SAM on few
handwritten digits, at three rates too, and at the best of these from the other two seeds.
Everything goes through the command line, one run after the other in each of `--jobs` processes of
one thread. The settings of pre-training were chosen before the first run of the grid.

The records in results/scaling_study/ are the study's memory: a run whose record has an end is
finished, on any machine. FOLDER keeps shards and weights. Weights that fine-tuning needs and that
are missing are trained again, which changes no record. At the end of every stage the report,
results/scaling_study.txt, is rewritten; `--report` does nothing else.

F0 to F3 are the four smallest of the family; the last costs 3.3 times the first. One thread of a
nearly idle machine computed 423, 238, 177 and 141 images/s of them, forward and backward at a batch
of 128; at these speeds the NFNets' pre-training takes 2.4 hours of two cores. F7, at 71 images/s,
would add 1.8. The grid of rates began at 0.2, 0.4 and 0.8, after three runs of 94 steps on the
held-out fractals. It moved down by a factor of 2 when, at a quarter of an epoch, 0.4 had learned
nothing and 0.8 had diverged for F0 and F1; and from one epoch on to 0.05, 0.1 and 0.2, when 0.1 had
been the best of 0.1, 0.2 and 0.4 for F0, F1 and F2. Runs outside the grid are kept.

Fine-tuning first used one rate for all, 0.1 with the NFNets' SGD. Networks of a quarter and half an
epoch, which have little to lose, reached errors of 9 to 45 % of ten classes; those of one epoch 83
to 90 %, which is chance; and the ViTs 74 to 84 % everywhere. A few runs at other rates followed:
from one epoch on 0.03 and 0.01 are better (F0: 16 and 19 %; F2 from two epochs: 14 and 9 %) while
F3 at a quarter needs 0.1; and for a ViT AdamW's 0.003 did as well as the best rate of SGD (76 %;
0.001, 0.006 and 0.012 did worse). So each network is fine-tuned at three rates, as it is
pre-trained at three. The records of the NFNets at 0.1 are kept, those of ViTs with SGD are not.

From half an epoch on the networks are compiled, which took a quarter of an hour each beside other
work. `nfnets-xla throughput` then measured 629 images/s for F0, up from 332; in the records, which
were taken beside other work, F2 and F3 are hardly faster than before.
"""

import math
import os
import shutil
import sys
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from _study_data import pack_data
from _study_report import write_report
from nfnets_xla.history import ended
from nfnets_xla.record import read_record

RECORDS = Path(__file__).parent / "results" / "scaling_study"
MODELS = ("nfnet_mini_f0", "nfnet_mini_f1", "nfnet_mini_f2", "nfnet_mini_f3")
VITS = ("vit_mini_d3_4", "vit_mini_d6_4")
EPOCHS = (0.25, 0.5, 1.0, 2.0)
RATES = {0.25: (0.1, 0.2, 0.4), 0.5: (0.1, 0.2, 0.4), 1.0: (0.05, 0.1, 0.2), 2.0: (0.05, 0.1, 0.2)}
VIT_RATES = (0.0005, 0.001, 0.002)  # of AdamW
TUNING_RATES = {0.25: (0.03, 0.1, 0.3), 0.5: (0.01, 0.03, 0.1), 1.0: (0.01, 0.03, 0.1)}
TUNING_RATES |= {2.0: (0.003, 0.01, 0.03)}
VIT_TUNING_RATES = (0.001, 0.002, 0.004)
SEEDS = (0, 1, 2)

QUIET = ["trainer.tensorboard=false", "trainer.log_every=25", "trainer.compile_cache=false"]
ONLY_END = ["trainer.eval_every=null", "trainer.checkpoint_every=null", "trainer.keep_best=false"]
ONLY_END += ["trainer.keep_every_hours=null", "hydra.mode=RUN"]
CPU = ["trainer.device=cpu", "model.compute_dtype=float32", "data.workers=0"]
# A clipping of 0.01 is for batches of 1024 and more (NF section 4.1: small batches take more). With
# 0.04 and the 94 steps of a quarter of an epoch, the skip gains hardly move from 0.
SCHEDULE = ["optim.warmup_steps=null", "optim.warmup_fraction=0.1"]
CLIPPING = "optim.clipping=0.16"
PRETRAIN = ["data=demo_fractals", "data.batch_size=128", "data.eval_image_size=32"]
PRETRAIN += ["optim.lr_batch=null", "trainer.compile=true"]
FINETUNE = ["data=demo_characters", "optim.epochs=8", "optim.ema_decay=0.99"]
VIT_FINETUNE = ["model.drop_path_rate=0.0", "optim.optimizer=adamw", "optim.beta2=0.999"]
VIT_FINETUNE += ["optim.weight_decay=0.03", "optim.clipping=null"]


@dataclass(frozen=True)
class Cell:
    """One run. Paths are relative to FOLDER, so that records contain no path of a machine."""

    name: str  # of its folder, below runs/
    words: tuple[str, ...]  # arguments of the command line
    source: "Cell | None" = None  # the run whose weights it starts from

    def finished(self) -> bool:
        return ended(RECORDS / self.name) is not None


def pretrain(model: str, epochs: float, rate: float, seed: int = 0) -> Cell:
    recipe = ["scaling_sweep"]
    own_optim = [*SCHEDULE, CLIPPING]
    if model in VITS:  # the NFNets' loss and schedule, but their own optimizer
        recipe = ["vit_baseline", "model.head_bias=0.0", "optim.loss=softmax"]
        own_optim = [*SCHEDULE, "optim.schedule=cosine", "optim.cooldown_steps=0"]
    own = [f"model.name={model}", f"optim.epochs={epochs:g}", f"optim.peak_lr={rate:g}"]
    own += [f"seed={seed}", *data("fractals"), *PRETRAIN, *own_optim]
    return Cell(f"{model}-epochs_{epochs:g}-peak_lr_{rate:g}-seed_{seed}", (*recipe, *own))


def finetune(source: Cell, rate: float, seed: int = 0) -> Cell:
    own = [f"model.init_from=runs/{source.name}", f"optim.peak_lr={rate:g}", f"seed={seed}"]
    own += [*data("digits"), *FINETUNE, *SCHEDULE]
    own += VIT_FINETUNE if source.name.startswith(VITS) else [CLIPPING]
    return Cell(f"finetuned-{source.name}-at_{rate:g}", ("finetune_sweep", *own), source)


def data(name: str) -> list[str]:
    return [f"data.shards=shards/{name}", f"data.eval_shards=shards/{name}-held-out"]


def stages() -> Iterator[list[Cell]]:
    """Lists of runs that can run at the same time. Complete sub-grids first: small budgets of all
    models and rates. The best rate is looked up only once the earlier stages are done."""
    for models in (MODELS, VITS):
        for epochs in EPOCHS:
            yield [cell for model in models for cell in pretrained_at(model, epochs).values()]
    for epochs in EPOCHS:
        models = (*MODELS, *VITS)
        optima = [(model, best(pretrained_at(model, epochs))) for model in models]
        seeds = [[pretrain(model, epochs, rate, seed) for seed in SEEDS] for model, rate in optima]
        yield [cell for cells in seeds for cell in cells]
        tried = [
            finetuned_at(model, epochs, cells[0])
            for model, cells in zip(models, seeds, strict=True)
        ]
        yield [cell for cells in tried for cell in cells.values()]
        yield [
            finetune(cell, best(rates), seed)
            for cells, rates in zip(seeds, tried, strict=True)
            for cell, seed in zip(cells, SEEDS, strict=True)
        ]


def pretrained_at(model: str, epochs: float) -> dict[float, Cell]:
    return {rate: pretrain(model, epochs, rate) for rate in rates_of(model, epochs)}


def finetuned_at(model: str, epochs: float, source: Cell) -> dict[float, Cell]:
    return {rate: finetune(source, rate) for rate in tuning_rates_of(model, epochs)}


def rates_of(model: str, epochs: float) -> tuple[float, ...]:
    return VIT_RATES if model in VITS else RATES[epochs]


def tuning_rates_of(model: str, epochs: float) -> tuple[float, ...]:
    return VIT_TUNING_RATES if model in VITS else TUNING_RATES[epochs]


def best(cells: Mapping[float, Cell]) -> float:
    """The rate with the lowest held-out loss at the first seed; diverged runs count as infinite."""
    losses = {}
    for rate, cell in cells.items():
        loss = read_record(RECORDS / cell.name).of_kind("eval")[-1]["loss"]
        losses[rate] = math.inf if loss is None else loss
    return min(losses, key=lambda rate: losses[rate])


# ---- running ----------------------------------------------------------------------------------


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("scaling-study"))
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--report", action="store_true", help="write the report and train nothing")
    given = parser.parse_args()
    if not given.report:
        given.folder.mkdir(parents=True, exist_ok=True)
        os.chdir(given.folder)
        pack_data(Path("shards"), given.jobs)
        os.environ["OMP_NUM_THREADS"] = "1"  # for the processes started from here on
        with ProcessPoolExecutor(given.jobs, get_context("spawn")) as pool:
            for cells in stages():
                if run_all(cells, pool):
                    report()
    report()


def report() -> None:
    cells = [(model, epochs) for model in (*MODELS, *VITS) for epochs in EPOCHS]
    grid = {cell: rates_of(*cell) for cell in cells}
    tuning_grid = {cell: tuning_rates_of(*cell) for cell in cells}
    # Each rate once, and the best again with the other seeds.
    whole = sum(len(rates) + len(SEEDS) - 1 for rates in (*grid.values(), *tuning_grid.values()))
    write_report(RECORDS, grid, tuning_grid, whole)


def run_all(cells: Sequence[Cell], pool: ProcessPoolExecutor) -> int:
    """Run the missing cells; returns their number. The first failure ends the study."""
    missing = [cell for cell in cells if not cell.finished()]
    running = {pool.submit(run_cell, cell): cell for cell in missing}
    for done in as_completed(running):
        if done.exception() is not None:
            pool.shutdown(cancel_futures=True)
        done.result()
        print(f"{running[done].name}: finished", flush=True)
    return len(missing)


def run_cell(cell: Cell) -> None:
    """Runs in a long-lived worker process, so that imports happen once."""
    if cell.source is not None and ended(Path("runs") / cell.source.name) is None:
        nfnets_xla(cell.source)
    nfnets_xla(cell)
    kept = RECORDS / cell.name
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path("runs") / cell.name / "run-1.jsonl", kept)


def nfnets_xla(cell: Cell) -> None:
    """Restarts an interrupted run from the beginning: only its end is saved in a checkpoint."""
    from nfnets_xla.cli import main as command_line

    folder = Path("runs") / cell.name
    if ended(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)
    words = [*cell.words, *CPU, *QUIET, *ONLY_END, f"run_dir={folder}"]
    Path("logs").mkdir(exist_ok=True)
    with (Path("logs") / f"{cell.name}.txt").open("w") as log, redirect_stdout(log):
        print("nfnets-xla", *words, flush=True)
        try:
            command_line(words)
        except SystemExit as exit:
            if exit.code:
                raise RuntimeError(f"{cell.name} failed; see logs/{cell.name}.txt") from exit


if __name__ == "__main__":
    sys.exit(main())
