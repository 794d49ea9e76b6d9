"""A run whose shards are at an address equals the run on the local ones."""

from pathlib import Path

import pytest
from fsspec.config import conf

from nfnets_xla import checkpoint
from nfnets_xla.cli import main
from nfnets_xla.record import read_record
from tests.data.object_store import S3, storing
from tests.data.server import Fault, serving
from tests.runs import PLAIN_CPU, RECIPE, SMALL, assert_bit_equal, final_state, losses, run, start
from tests.test_cli import refused

SHORT = [*RECIPE, *SMALL, *PLAIN_CPU, "optim.epochs=0.5"]


def some(name: str, number: int) -> Fault:
    """A few answers fail; a real run waits a second or more between attempts."""
    return {5: 503, 12: "cut", 20: 429}.get(number)


def test_a_run_over_http_is_the_local_run(shards: Path, data: list[str], tmp_path: Path) -> None:
    log, local, remote = tmp_path / "log.txt", tmp_path / "local", tmp_path / "remote"
    run([*SHORT, *data, f"run_dir={local}"], log)
    with serving(shards, some) as server:
        there = [f"data.shards={server.url}/train", f"data.eval_shards={server.url}/held-out/"]
        there += [f"data.cache_dir={tmp_path / 'cache'}", "data.cache_bytes=2e6"]
        run([*SHORT, *there, f"run_dir={remote}"], log)
        assert set(server.failed) == {503, "cut", 429}
    assert losses(remote) == losses(local)
    assert_bit_equal(final_state(remote), final_state(local))
    (header,) = read_record(remote).headers
    assert header["config"]["data"]["cache_bytes"] == 2_000_000


def test_a_run_whose_shard_is_gone_ends_in_one_line(shards: Path, tmp_path: Path) -> None:
    with serving(shards, lambda name, _: 404 if name == "train/shard-000002.tar" else None) as it:
        there = [f"data.shards={it.url}/train", f"data.cache_dir={tmp_path / 'cache'}"]
        process = start([*SHORT, *there, f"run_dir={tmp_path / 'run'}"], tmp_path / "log.txt")
        assert process.wait() == 2
    last = (tmp_path / "log.txt").read_text().splitlines()[-1]
    assert last.startswith(f"nfnets-xla: {it.url}/train/shard-000002.tar is missing: put it back")


def test_the_shards_commands_take_addresses(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["shards", "stats", str(shards / "train"), "--jobs", "1"])
    local = capsys.readouterr().out
    with serving(shards) as server:
        url = f"{server.url}/train"
        main(["shards", "stats", url, "--jobs", "1"])
        assert capsys.readouterr().out == local
        main(["shards", "show", url, "--out", str(tmp_path / "a.png"), "--rows", "2", *SMALL[:1]])
        assert (tmp_path / "a.png").stat().st_size > 0
        assert set(server.shard_requests.values()) != {1}  # samples are read by ranges
        cached = [f"data.cache_dir={tmp_path / 'cache'}", "data.cache_bytes=9e4"]
        plan = ["check", "pretrain_demo", *SMALL, f"data.shards={url}", "data.eval_shards=null"]
        with pytest.raises(SystemExit, match="2"):  # as the run would be, on the slice
            main([*plan, *cached])
        assert "data.cache_bytes is 90000, and windows" in capsys.readouterr().err
        for command in ("index", "lint"):
            with pytest.raises(SystemExit, match="2"):
                main(["shards", command, url])
            message = capsys.readouterr().err
            assert message.startswith(f"nfnets-xla: {url} can be neither listed nor written")
            assert message.count("\n") == 1


class Forbidding(S3):
    """Answers requests of one kind with 403."""

    verb = ""

    def answer(self, parts: list[str], query: dict[str, str], body: bytes) -> None:
        if self.command == self.verb:
            return self.reply(403)
        return super().answer(parts, query, body)


def test_where_no_checkpoint_can_be_written_no_step_is_done(
    data: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Below a file, and in a read-only bucket."""
    (tmp_path / "file").touch()
    with storing(tmp_path, type("ReadOnly", (Forbidding,), {"verb": "PUT"})) as endpoint:
        monkeypatch.setitem(conf, "s3", {"endpoint_url": endpoint, "anon": True})
        for root, why in (
            (f"{tmp_path}/file/c", "Not a directory"),
            ("s3://bucket/c", "Forbidden"),
        ):
            where = [f"run_dir={tmp_path / 'run'}", f"trainer.checkpoint_dir={root}"]
            message = refused([*SHORT, *data, *where], capsys)
            assert f"no checkpoint can be written in {root} (" in message
            assert why in message
            assert not (tmp_path / "run").exists()


def test_a_bucket_that_fills_is_said_once(
    data: list[str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    with storing(tmp_path, type("Kept", (Forbidding,), {"verb": "DELETE"})) as endpoint:
        monkeypatch.setitem(conf, "s3", {"endpoint_url": endpoint, "anon": True})
        where = [f"run_dir={folder}", "trainer.checkpoint_dir=s3://bucket/c"]
        keep = ["trainer.checkpoint_every=1", "trainer.keep_checkpoints=1"]
        main([*SHORT, *data, *where, *keep])
        assert checkpoint.steps("s3://bucket/c") == [4, 3, 2, 1]
    said = "that are not to be kept could not be deleted in s3://bucket/c, which fills ("
    assert capfd.readouterr().out.count(said) == 1
    (row,) = read_record(folder).of_kind("prune_failed")
    assert "Forbidden" in row["reason"]
