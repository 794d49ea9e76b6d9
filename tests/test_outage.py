"""A storage stops answering during a run: the run's steps are saved, and it resumes."""

import threading
from pathlib import Path

import pytest

from nfnets_xla import checkpoint
from nfnets_xla.compose import composed, to_run
from nfnets_xla.exits import START_AGAIN
from nfnets_xla.prepare import make_plan
from nfnets_xla.record import read_record
from tests.data.server import Fault, Server, serving
from tests.runs import (
    PLAIN_CPU,
    RECIPE,
    SMALL,
    as_hosts,
    assert_bit_equal,
    final_state,
    losses,
    run,
    start,
    xla,
)
from tests.shallow import SHALLOW
from tests.warm import Warm

ONE = [*RECIPE, *SMALL, *PLAIN_CPU, "optim.epochs=1"]
ONE += ["data.num_streams=2", "data.window_shards=1"]
ONE += ["trainer.checkpoint_every=null", "trainer.eval_every=null"]


class Storage:
    """Shards behind a server that serves only those of the first three steps until it is `up`."""

    def __init__(self, shards: Path) -> None:
        self.up = threading.Event()
        given = [*ONE[1:], f"data.shards={shards / 'train'}", "run_dir=R"]
        plan = make_plan(to_run(composed(ONE[0], given)))
        steps = [{*plan.order.step(step).shard.tolist()} for step in range(plan.num_steps)]
        self.known = set.union(*steps[:3])
        # The trainer prefetches one batch: the last one fetched is not trained on.
        first = next(step for step, used in enumerate(steps) if used - self.known)
        self.step = first - 1

    def fault(self, name: str, _: int) -> Fault:
        if self.up.is_set() or not name.startswith("train/shard-"):
            return None
        return None if int(name[12:18]) in self.known else 503


def arguments(server: Server, cache: Path) -> list[str]:
    there = [f"data.shards={server.url}/train", f"data.eval_shards={server.url}/held-out"]
    return [*ONE, *there, f"data.cache_dir={cache}"]


@pytest.mark.parametrize("workers", [0, 1])
def test_steps_that_were_done_are_saved(
    workers: int, shards: Path, data: list[str], tmp_path: Path
) -> None:
    log, there, here = tmp_path / "log.txt", tmp_path / "there", tmp_path / "here"
    storage = Storage(shards)
    with serving(shards, storage.fault) as server:
        given = [*arguments(server, tmp_path / "cache"), f"run_dir={there}"]
        given.append(f"data.workers={workers}")
        assert start(given, log, "tests.impatient").wait() == START_AGAIN, log.read_text()
        assert checkpoint.steps(there / "checkpoints") == [storage.step]
        assert "could not be had in 2 s" in read_record(there).of_kind("stopped")[0]["reason"]
        said = log.read_text()
        assert f"stopped after step {storage.step}, which is saved" in said
        assert "Traceback" not in said
        storage.up.set()
        run(given, log)
    run([*ONE, *data, f"run_dir={here}"], log)
    assert losses(there) == losses(here)
    assert read_record(there).steps_lost == 0
    assert_bit_equal(final_state(there), final_state(here))


def test_all_hosts_save_the_same_step(shards: Path, tmp_path: Path) -> None:
    log, folder = tmp_path / "log.txt", tmp_path / "run"
    storage = Storage(shards)
    with serving(shards, storage.fault) as server:

        def hosts() -> list[Warm]:
            return [
                start(
                    [*arguments(server, tmp_path / str(number)), f"run_dir={folder}"],
                    log,
                    "tests.impatient",
                    **variables,
                )
                for number, variables in enumerate(as_hosts(2))
            ]

        assert [each.wait() for each in hosts()] == [START_AGAIN] * 2, log.read_text()
        assert checkpoint.steps(folder / "checkpoints") == [storage.step]
        assert [row["step"] for row in read_record(folder).of_kind("stopped")] == [storage.step]
        storage.up.set()
        assert [each.wait() for each in hosts()] == [0, 0], log.read_text()
    assert read_record(folder).steps_lost == 0


def test_an_outage_of_the_last_evaluation_on_xla(shards: Path, tmp_path: Path) -> None:
    """If `eval_every` does not divide the steps, the evaluation comes after fit, which has taken
    the optimizer's state off the devices; the last step is saved by then."""
    pytest.importorskip("torch_xla", exc_type=ModuleNotFoundError)
    log, folder, up = tmp_path / "log.txt", tmp_path / "run", threading.Event()

    def fault(name: str, _: int) -> Fault:
        return 503 if name.startswith("held-out/shard") and not up.is_set() else None

    with serving(shards, fault) as server:
        given = [*arguments(server, tmp_path / "cache"), *SHALLOW, *xla(2), f"run_dir={folder}"]
        given.append("trainer.eval_every=100")
        assert start(given, log, "tests.impatient").wait() == START_AGAIN, log.read_text()
        assert checkpoint.steps(folder / "checkpoints") == [7]
        assert "stopped after step 7, which is saved" in log.read_text()
        up.set()
        run(given, log)
    record = read_record(folder)
    assert [row["step"] for row in record.of_kind("eval")] == [7, 7]  # raw and average
    assert record.steps_lost == 0
    assert record.of_kind("end")


def test_an_address_that_never_answered_may_be_wrong(shards: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    with serving(shards, lambda _name, _number: 503) as server:
        given = [*arguments(server, tmp_path / "cache"), f"run_dir={tmp_path / 'run'}"]
        assert start(given, log, "tests.impatient").wait() == 2, log.read_text()
    assert "could not be had in 2 s" in log.read_text()
