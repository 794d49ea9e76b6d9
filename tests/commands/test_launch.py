"""Launching: the commands themselves, and whole lives of runs with a cloud in a folder."""

import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from nfnets_xla.cli import main
from nfnets_xla.commands.launch import Launch, find, shipped
from nfnets_xla.compose import composed, read_settings, to_run
from nfnets_xla.manual import recipes
from tests.cloud import Cloud

ROOT = Path(__file__).parents[2]


@pytest.fixture
def overrides(tmp_path: Path) -> list[str]:
    (tmp_path / "ours.whl").touch()
    (tmp_path / "lock.txt").touch()
    files = [f"wheel={tmp_path / 'ours.whl'}", f"lock={tmp_path / 'lock.txt'}"]
    return ["project=mine", "share=10.0.0.2:/runs", *files]


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cloud]:
    def make(*plan: str) -> Cloud:
        made = Cloud(tmp_path / "cloud", list(plan))
        monkeypatch.setenv("PATH", f"{made.bin}:/usr/bin:/bin")
        return made

    return make


def launch(command: str, overrides: list[str]) -> int:
    try:
        main(["launch", command, "v4_64", *overrides, "--every", "0.05"])
    except SystemExit as stopped:
        return int(str(stopped.code))
    return 0


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- the settings and the commands --------------------------------------------------------------


def test_no_settings_are_taken_for_a_recipe() -> None:
    assert shipped() == ["v4_512", "v4_64", "v4_8"]
    assert not set(shipped()) & set(recipes())


@pytest.mark.parametrize("name", ["v4_512", "v4_64", "v4_8"])
def test_shipped_settings_start_a_run_that_composes(name: str, overrides: list[str]) -> None:
    with find(name) as file:
        settings = read_settings(Launch, file, overrides, Launch.needed("watch"))
    settings.check("watch")
    run = to_run(composed(settings.run[0], settings.run[1:]))
    assert run.run_dir == f"/mnt/share/{settings.name}"
    assert settings.accelerator_type.replace("-", "_") == name
    chips = int(settings.accelerator_type.partition("-")[2]) // 2  # of two cores each
    hosts = max(1, chips // 4)
    assert f"{chips} chips ({2 * chips} cores), {hosts} host" in file.read_text()
    # What a run of that shape must fulfil: data/order.py, data/batches.py (with ImageNet's shards
    # of 1,000 images, 110 MB each), and network.put_on_device.
    assert run.data.num_streams % hosts == 0
    held = 2 * run.data.num_streams // hosts * run.data.window_shards
    assert 110e6 * held <= run.data.cache_bytes
    assert run.data.batch_size % chips == run.data.eval_batch_size % chips == 0


def test_a_dry_run_prints_commands_and_runs_none(
    overrides: list[str], cloud: Callable[..., Cloud], capsys: pytest.CaptureFixture[str]
) -> None:
    made = cloud()
    assert launch("watch", [*overrides, "--dry-run"]) == 0
    lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert made.calls() == []
    where = ["--project=mine", "--zone=us-central2-b", "--quiet"]
    assert all(line[:3] == ["gcloud", "compute", "tpus"] and line[-3:] == where for line in lines)
    assert [line[3:5] for line in lines] == [
        ["queued-resources", "describe"],
        ["queued-resources", "delete"],
        ["queued-resources", "create"],
        ["queued-resources", "describe"],
        *[["tpu-vm", "ssh"]] * 2,
        ["tpu-vm", "scp"],
        *[["tpu-vm", "ssh"]] * 2,
    ]
    assert lines[2][5:-3] == [
        "nfnet-f3",
        "--node-id=nfnet-f3",
        "--accelerator-type=v4-64",
        "--runtime-version=tpu-ubuntu2204-base",
        "--spot",
    ]
    for words in (["spot=false", "--dry-run"], ["--dry-run", "spot=false"]):  # in any order
        launch("create", [*overrides, *words])
        assert "--spot" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["run=[pretrain,run_dir=runs/f0]"], "run_dir=runs/f0; it must lie under /mnt/share"),
        (["wheel=nowhere.whl"], "wheel is 'nowhere.whl', and there is no such file"),
        (["spot=perhaps"], "spot is perhaps; it must be true or false"),
        (["zones=x"], "zones"),
        (["project=???"], "project not set"),
    ],
)
def test_mistakes_are_refused_before_anything_is_asked_for(
    change: list[str],
    said: str,
    overrides: list[str],
    cloud: Callable[..., Cloud],
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = cloud()
    assert launch("create", [*overrides, *change]) == 2
    assert said in capsys.readouterr().err
    assert made.calls() == []


def test_what_ends_the_cost_needs_no_wheel(
    overrides: list[str], cloud: Callable[..., Cloud], capsys: pytest.CaptureFixture[str]
) -> None:
    made = cloud("wait")
    for command in ("create", "wait", "install", "start"):
        assert launch(command, overrides) == 0
    until(lambda: all((made.home(number) / "waits").exists() for number in (0, 1)))
    gone = [*overrides, "wheel=nowhere.whl", "lock=nowhere.lock", "run=[pretrain]"]
    assert launch("status", gone) == launch("stop", gone) == 0
    until(lambda: all((made.home(n) / "nfnets-xla" / "exit").exists() for n in (0, 1)))
    assert launch("delete", gone) == 0
    assert not made.home(0).exists()
    assert launch("start", gone) == 2
    assert "run has run_dir=None" in capsys.readouterr().err


def test_what_ends_the_cost_needs_to_know_no_more_than_where(
    overrides: list[str], cloud: Callable[..., Cloud], capsys: pytest.CaptureFixture[str]
) -> None:
    """Run on another machine, with the settings as they are shipped."""
    for command in ("delete", "stop", "status", "wait", "logs"):
        main(["launch", command, "v4_512", "project=mine", "--dry-run"])
        assert "--project=mine" in capsys.readouterr().out
    made = cloud()
    assert launch("start", ["project=mine"]) == 2
    assert "share, wheel not set: fill in the file" in capsys.readouterr().err
    assert made.calls() == []


@pytest.mark.parametrize("every", ["0", "-3", "nan", "1e12"])
def test_no_slice_is_asked_for_by_a_watch_that_could_not_wait(
    every: str,
    overrides: list[str],
    cloud: Callable[..., Cloud],
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = cloud()
    with pytest.raises(SystemExit) as stopped:
        main(["launch", "watch", "v4_64", *overrides, "--every", every])
    assert stopped.value.code == 2
    assert "it must be seconds, greater than 0 and at most 86,400" in capsys.readouterr().err
    assert made.calls() == []


def test_without_gcloud_it_says_so(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert launch("create", overrides) == 2
    assert "there is no gcloud on the PATH" in capsys.readouterr().err


def test_the_example_can_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["launch", "example", "v4_8"])
    assert capsys.readouterr().out == (ROOT / "recipes" / "launch" / "v4_8.yaml").read_text()


# ---- whole lives --------------------------------------------------------------------------------


def test_step_by_step(
    overrides: list[str], cloud: Callable[..., Cloud], capfd: pytest.CaptureFixture[str]
) -> None:
    made = cloud("wait", "0")
    for command in ("create", "wait", "install", "start"):
        assert launch(command, overrides) == 0
    until(lambda: all((made.home(number) / "waits").exists() for number in (0, 1)))
    assert launch("start", overrides) == 0  # repeating it changes nothing
    assert launch("install", overrides) == 0
    capfd.readouterr()
    assert launch("status", overrides) == 0
    said = capfd.readouterr().out
    assert "nfnet-f3: ACTIVE" in said
    assert "host-0: running\n  host-1: running" in said
    assert launch("stop", overrides) == 0  # the run saves, exits with 75, and is not started again
    until(lambda: all((made.home(n) / "nfnets-xla" / "exit").exists() for n in (0, 1)))
    for number in (0, 1):
        (ran,) = made.runs(number)
        assert ran.startswith("pretrain run_dir=/mnt/share/nfnet-f3 model.name=nfnet_f3 ")
    asked = [shlex.split(call) for call in made.calls() if call.split()[3:4] == ["tpu-vm"]]
    for call in asked:  # a worker that is gone prints nothing
        assert f"--{call[4]}-flag=-oServerAliveInterval=15" in call
    mounts = [call for call in made.calls() if call.startswith("sudo mount")]
    assert mounts == ["sudo mount -t nfs 10.0.0.2:/runs /mnt/share"] * 2
    assert "uv pip sync -q --require-hashes --python venv/bin/python lock.txt" in made.calls()
    assert launch("delete", overrides) == 0
    assert not made.home(0).exists()
    assert launch("delete", overrides) == 1  # there is no slice


def test_a_run_is_brought_to_its_end_through_an_interruption_and_a_preemption(
    overrides: list[str], cloud: Callable[..., Cloud]
) -> None:
    """The run saves and exits with 75; hangs until the slice is taken away; and finishes on a new
    one."""
    made = cloud("75", "hang", "0")
    assert launch("watch", overrides) == 0
    assert [verb for verb in made.verbs() if verb != "tpu-vm ssh"] == [
        "queued-resources create",
        "tpu-vm scp",
        "queued-resources delete",
        "queued-resources create",
        "tpu-vm scp",
    ]
    for number in (0, 1):
        assert len(made.runs(number)) == 3
        assert len(set(made.runs(number))) == 1  # the command is repeated unchanged


def test_a_run_that_fails_is_not_repeated(
    overrides: list[str], cloud: Callable[..., Cloud], capsys: pytest.CaptureFixture[str]
) -> None:
    made = cloud("2", "0")
    assert launch("watch", overrides) == 1
    said = capsys.readouterr().err
    assert re.search(r"the run ended on [12] of 2 workers \(host-[01]: exit 2\)", said)
    until(lambda: all((made.home(n) / "nfnets-xla" / "exit").exists() for n in (0, 1)))
    assert [len(made.runs(number)) for number in (0, 1)] == [1, 1]
    assert launch("start", overrides) == 0  # the fault is fixed
    until(lambda: all((made.home(n) / "nfnets-xla" / "exit").exists() for n in (0, 1)))
    assert launch("watch", overrides) == 0


def test_what_is_interrupted_at_once_is_repeated_ten_times(
    overrides: list[str], cloud: Callable[..., Cloud], capsys: pytest.CaptureFixture[str]
) -> None:
    """A slice whose TPU never starts would cost money until someone looks."""
    made = cloud(*["75"] * 12)
    assert launch("watch", overrides) == 1
    assert "the run ended on 2 of 2 workers (host-0: exit 75)" in capsys.readouterr().err
    assert [len(made.runs(number)) for number in (0, 1)] == [10, 10]


def test_gcloud_that_hangs_is_asked_again(
    overrides: list[str],
    cloud: Callable[..., Cloud],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """ssh hangs like this on a worker that is gone."""
    made = cloud("0")
    monkeypatch.setattr("nfnets_xla.commands.launch.ANSWERS_IN", 2)
    (made.folder / "hangs").touch()
    assert launch("watch", overrides) == 0
    assert "has not answered in 2 s; trying again\n" in capsys.readouterr().err


def test_a_killed_loop_is_started_again(overrides: list[str], cloud: Callable[..., Cloud]) -> None:
    """As after a reboot of a worker: no process, no exit code, and no mount."""
    made = cloud("0", "0")
    for command in ("create", "wait", "install"):
        assert launch(command, overrides) == 0
    assert launch("resume", overrides) == 0
    until(lambda: all((made.home(n) / "nfnets-xla" / "exit").exists() for n in (0, 1)))
    (made.home(1) / "nfnets-xla" / "exit").unlink()
    (made.home(1) / "mounted").unlink()
    assert launch("resume", overrides) == 0
    until(lambda: len(made.runs(1)) == 2)
    assert made.calls()[-1] == "sudo mount -t nfs 10.0.0.2:/runs /mnt/share"


def test_a_run_that_is_not_alive_can_be_stopped(
    overrides: list[str], cloud: Callable[..., Cloud], capsys: pytest.CaptureFixture[str]
) -> None:
    """After a reboot `pid` may be any process. The run stays stopped, whoever watches, until
    started."""
    made = cloud("0")
    for command in ("create", "wait", "install"):
        assert launch(command, overrides) == 0
    with subprocess.Popen(["sleep", "60"]) as other:
        (made.home(0) / "nfnets-xla" / "pid").write_text(f"{other.pid}\n")
        assert launch("stop", overrides) == 0
        assert other.poll() is None
        other.kill()
    assert launch("watch", overrides) == 1
    assert "the run ended on 2 of 2 workers (host-0: exit 75)" in capsys.readouterr().err
    assert launch("start", overrides) == 0
    until(lambda: all((made.home(n) / "nfnets-xla" / "exit").exists() for n in (0, 1)))
    assert launch("resume", overrides) == 0


def test_a_run_that_is_being_mounted_for_can_be_stopped(
    overrides: list[str], cloud: Callable[..., Cloud]
) -> None:
    """After a reboot, on a slow network, nothing can be signalled yet; `pid` may be any process."""
    made = cloud("0")
    for command in ("create", "wait", "install"):
        assert launch(command, overrides) == 0
    mounted = len([call for call in made.calls() if call.startswith("sudo mount")])
    (made.folder / "slow").touch()
    with subprocess.Popen(["sleep", "60"]) as other:
        for number in (0, 1):
            (made.home(number) / "mounted").unlink()
            (made.home(number) / "nfnets-xla" / "pid").write_text(f"{other.pid}\n")
        assert launch("start", overrides) == 0
        until(lambda: len([c for c in made.calls() if c.startswith("sudo mount")]) == mounted + 2)
        assert launch("stop", overrides) == 0
        assert other.poll() is None
        other.kill()
    (made.folder / "slow").unlink()
    until(lambda: all((made.home(n) / "nfnets-xla" / "exit").exists() for n in (0, 1)))
    assert (made.home(0) / "nfnets-xla" / "exit").read_text() == "75\n"
    assert not list(made.folder.glob("runs-*"))


def test_half_an_answer_is_no_end(overrides: list[str], cloud: Callable[..., Cloud]) -> None:
    """A full disk left one worker's exit code empty: the other worker's 0 would pass for both."""
    made = cloud("0", "0")
    assert launch("watch", overrides) == 0
    (made.home(1) / "nfnets-xla" / "exit").write_text("")
    assert launch("watch", overrides) == 0
    assert [len(made.runs(number)) for number in (0, 1)] == [2, 2]  # none runs alone


def test_watching_survives_a_network_that_is_down(
    overrides: list[str], cloud: Callable[..., Cloud], capsys: pytest.CaptureFixture[str]
) -> None:
    made = cloud("0")
    (made.folder / "down").touch()
    assert launch("watch", overrides) == 0
    assert "gcloud crashed the network is down; trying again\n" in capsys.readouterr().err
    (made.folder / "down").touch()
    assert launch("status", overrides) == 1
    assert capsys.readouterr().err.count("\n") == 1
