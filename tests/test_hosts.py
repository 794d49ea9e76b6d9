"""Processes that are hosts of one run: what they exchange, and what they train together."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nfnets_xla import checkpoint
from nfnets_xla.exits import START_AGAIN, HostLost, Interrupted
from nfnets_xla.hosts import Hosts, open_hosts
from nfnets_xla.ledger import audit
from nfnets_xla.record import read_record
from tests.data.images import packed
from tests.runs import (
    PLAIN_CPU,
    RECIPE,
    SMALL,
    as_hosts,
    final_state,
    losses,
    reach,
    run,
    samples,
    start,
    start_hosts,
)
from tests.warm import Warm

# Sums of the same numbers in another grouping, over 10 steps: float32 rounding, as across devices.
TOLERANCE = 1e-4

TALK = """
import json, os, sys, time
import torch
from nfnets_xla import hosts as module
from nfnets_xla.exits import Interrupted, Unreachable
from nfnets_xla.hosts import open_hosts


def refuse(kind):
    raise kind(f"asked of host {hosts.number}")


hosts = open_hosts()
one, two = torch.full((2, 3), 1.0 + hosts.number), torch.tensor(10.0 * hosts.number)
hosts.add([one, two])
module.BUCKET = 40  # bytes: the second message has one tensor, which lies channels last
shapes = (1, 1, 2, 2), (1, 1, 2, 2), (1, 3, 2, 2)
many = [torch.arange(4.0 * shape[1]).reshape(shape) * (hosts.number + 1) for shape in shapes]
many[2] = many[2].contiguous(memory_format=torch.channels_last)
hosts.add(many)
told = {"rows": str(hosts.rows(12)), "one": one.tolist(), "two": float(two)}
told["many"] = [tensor.flatten().tolist() for tensor in many]
told["messages"] = [len(bucket) for bucket in module.buckets(many)]
told["total"] = hosts.total(hosts.number + 1)
told["gather"] = hosts.gather({"é": [hosts.number] * hosts.number})
hosts.agree({"the name": "a", "the seed": 7})
try:
    hosts.agree({"the name": "a", "the seed": 7 if hosts.number < 2 else 8})
except ValueError as error:
    told["refused"] = str(error)
told["written"] = hosts.by_writer(lambda: f"by host {hosts.number}")
for kind in (ValueError, Unreachable):
    try:
        hosts.by_writer(lambda: refuse(kind))
    except ValueError as error:
        told[kind.__name__] = [type(error).__name__, str(error)]
try:
    hosts.by_writer(lambda: open("/dev/full", "w", buffering=1).write("\\n"))
except OSError as error:
    told["OSError"] = [type(error).__name__, str(error)]
try:
    hosts.by_writer(lambda: open("nowhere"))
except OSError as error:
    told["absent"] = [type(error).__name__, error.filename]
print(json.dumps(told), flush=True)
if hosts.number == 1:
    time.sleep(60)  # and is killed meanwhile
try:
    hosts.total(1)
except Interrupted as error:
    print(error, flush=True)
"""


def test_hosts_add_gather_agree_and_notice_a_loss(tmp_path: Path) -> None:
    (tmp_path / "talk.py").write_text(TALK)
    processes = [
        subprocess.Popen(
            [sys.executable, tmp_path / "talk.py"],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            text=True,
        )
        for variables in as_hosts(3)
    ]
    outputs = [process.stdout for process in processes]
    told = [json.loads(next(line for line in out if line[0] == "{")) for out in outputs if out]
    for number, one in enumerate(told):
        assert one.pop("rows") == str(slice(4 * number, 4 * number + 4))
        assert one.pop("written") == (None if number else "by host 0")
        assert one == {
            "one": [[6.0] * 3] * 2,
            "two": 30.0,
            "many": [[6.0 * number for number in range(count)] for count in (4, 4, 12)],
            "messages": [2, 1],
            "total": 6,
            "gather": [{"é": []}, {"é": [1]}, {"é": [2, 2]}],
            "refused": "hosts differ in the seed: 7 on host 0, 8 on host 2. All must run the same "
            "command, and see the same shards and run_dir",
            "ValueError": ["ValueError", "asked of host 0"],
            "Unreachable": ["Unreachable", "asked of host 0"],
            "OSError": ["OSError", "[Errno 28] No space left on device"],
            "absent": ["FileNotFoundError", "nowhere"],
        }
    processes[1].kill()
    for number in (0, 2):
        rest, _ = processes[number].communicate(timeout=60)
        assert f"host {number} of 3 lost another one" in rest
    processes[1].communicate()


def fail_by_itself() -> None:
    raise RuntimeError("its own fault")


def test_one_host_says_nothing() -> None:
    alone = Hosts()
    ones = torch.ones(2)
    alone.add([ones])
    assert ones.tolist() == [1, 1]
    assert (alone.total(3), alone.gather({1}), alone.writes) == (3, [{1}], True)
    assert alone.by_writer(lambda: 4) == 4
    with pytest.raises(RuntimeError, match="its own"):  # there is no host to lose
        alone.heard(fail_by_itself)
    with pytest.raises(HostLost, match=r"host 0 of 4 lost another one \(its own"):
        Hosts(0, 4).heard(fail_by_itself)
    with pytest.raises(ValueError, match="10 rows, which do not divide among 4 hosts"):
        Hosts(0, 4).rows(10)


def test_a_launcher_that_forgot_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with pytest.raises(ValueError, match="WORLD_SIZE is 2 and MASTER_ADDR, MASTER_PORT not set"):
        open_hosts()


def test_hosts_that_do_not_find_each_other_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Host 0 cannot listen where the others look for it: another process has its port."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        meeting = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}
        for name, value in (meeting | {"MASTER_PORT": str(taken.getsockname()[1])}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Interrupted, match="host 0 of 2 lost another one"):
            open_hosts()


def test_two_hosts_then_one_then_four_train_what_one_would(tmp_path: Path, data: list[str]) -> None:
    """With SAM, EMA, mixing, dropout and stochastic depth. One of two hosts is told to stop, and
    both save the same step; the single host is killed; one of four is killed, and the others end.
    """
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, "optim.epochs=1.5"]
    arguments += ["trainer.checkpoint_every=1"]
    whole, hosts, log = tmp_path / "whole", tmp_path / "hosts", tmp_path / "log.txt"
    run([*arguments, f"run_dir={whole}"], log)

    arguments.append(f"run_dir={hosts}")
    two = started(arguments, hosts, log, 2, 1)
    two[1].terminate()
    assert [process.wait() for process in two] == [START_AGAIN] * 2, log.read_text()
    (stop,) = read_record(hosts).of_kind("stopped")
    assert stop["reason"] == "SIGTERM"
    assert checkpoint.steps(hosts / "checkpoints")[0] == stop["step"]
    assert log.read_text().count(f"stopped after step {stop['step']}, which is saved") == 2

    one = started(arguments, hosts, log, 1, 4)
    one[0].kill()
    one[0].wait()

    four = started(arguments, hosts, log, 4, 6)
    four[2].kill()
    four[2].wait()
    assert [four[number].wait() for number in (0, 1, 3)] == [START_AGAIN] * 3, log.read_text()
    assert "host 0 of 4 lost another one" in log.read_text()
    last = start_hosts(arguments, log, 2)
    assert [process.wait() for process in last] == [0, 0], log.read_text()

    record = read_record(hosts)
    assert [header["hosts"] for header in record.headers] == [2, 1, 4, 2]
    assert len(list(hosts.glob("run-*.jsonl"))) == 4  # only host 0 writes
    assert samples(hosts) == samples(whole)
    assert audit(hosts).report()[-1] == "every sample exactly once"
    assert len(losses(whole)) == 10
    np.testing.assert_allclose(losses(hosts), losses(whole), rtol=TOLERANCE)
    for mine, other in zip(record.of_kind("eval"), read_record(whole).of_kind("eval"), strict=True):
        assert mine["images"] == other["images"] == 21
        assert mine["weights"] == other["weights"]
        np.testing.assert_allclose(mine["loss"], other["loss"], rtol=TOLERANCE)
        assert mine["top1"] == pytest.approx(other["top1"], abs=1 / 21 + 1e-9)
    state = final_state(hosts)
    for name, tensor in final_state(whole).items():
        difference = (state[name] - tensor).norm() / tensor.norm().clamp(min=1e-3)
        assert difference < 10 * TOLERANCE, name


def test_hosts_that_see_different_checkpoints(tmp_path: Path, data: list[str]) -> None:
    """One looked before the newest was complete: they start again. Or it sees another folder."""
    arguments = [*RECIPE, *data, *SMALL, *PLAIN_CPU, "optim.epochs=0.25", "optim.warmup_steps=1"]
    arguments += ["trainer.checkpoint_every=1", f"run_dir={tmp_path / 'r'}"]
    log, there = tmp_path / "log.txt", tmp_path / "there"
    run(arguments, log)
    (tmp_path / "r" / "run-1.jsonl").unlink()  # its record must not say that it has finished
    shutil.copytree(tmp_path / "r" / "checkpoints", there)
    elsewhere = [*arguments, f"trainer.checkpoint_dir={there}"]
    (there / "step-00000002" / "manifest.json").unlink()
    for code, said in (
        (START_AGAIN, "different steps (2, 1)"),
        (2, "checkpoints that they see"),
    ):
        variables = as_hosts(2)
        one, other = start(arguments, log, **variables[0]), start(elsewhere, log, **variables[1])
        assert [one.wait(), other.wait()] == [code, code], log.read_text()
        assert log.read_text().count(said) == 2
        shutil.rmtree(there, ignore_errors=True)


def test_hosts_that_do_not_belong_together(tmp_path: Path, data: list[str]) -> None:
    arguments = [
        *RECIPE,
        *data,
        *SMALL,
        *PLAIN_CPU,
        "optim.epochs=0.5",
        f"run_dir={tmp_path / 'r'}",
    ]
    log = tmp_path / "log.txt"
    variables = as_hosts(2)
    packed(tmp_path / "other", 13, 8, 5)
    for one, other, said in (
        ("seed=0", "seed=1", "seed: 0 on host 0, 1 on host 1. All must run the same command"),
        ("trainer.eval_every=4", "trainer.eval_every=6", "trainer.eval_every: 4 on host 0, 6 on"),
        ("data.workers=0", f"data.eval_shards={tmp_path / 'other'}", "the held-out samples: '"),
    ):
        processes = [
            start([*arguments, word], log, **variables[number])
            for number, word in enumerate((one, other))
        ]
        assert [process.wait(timeout=120) for process in processes] == [2, 2], log.read_text()
        text = log.read_text()
        assert text.count(f"nfnets-xla: hosts differ in {said}") == 2
        assert "Traceback" not in text
        assert not (tmp_path / "r").exists()
    odd = start([*arguments, "data.num_streams=1"], log, **variables[0])
    other = start([*arguments, "data.num_streams=1"], log, **variables[1])
    assert [odd.wait(), other.wait()] == [2, 2]
    assert "1 streams must divide among them" in log.read_text()


def started(arguments: list[str], run_dir: Path, log: Path, count: int, step: int) -> list[Warm]:
    """Hosts that have saved `step`, or resumed from it."""
    return reach(lambda: start_hosts(arguments, log, count), run_dir, step, log, "checkpoint")
