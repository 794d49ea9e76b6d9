"""A run whose shards are at an address is the run of the local ones."""

import json
from pathlib import Path

import pytest

from nfnets_xla.cli import main
from tests.data.server import Fault, serving
from tests.runs import PLAIN_CPU, RECIPE, SMALL, assert_bit_equal, final_state, losses, run, start

SHORT = [*RECIPE, *SMALL, *PLAIN_CPU, "optim.epochs=0.5"]


def some(name: str, number: int) -> Fault:
    """A few answers fail; the waits of a real run between attempts are a second and more."""
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
    assert json.loads((remote / "config.json").read_text())["data"]["cache_bytes"] == 2_000_000


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
        assert set(server.shard_requests.values()) != {1}  # samples, by ranges
        for command in ("index", "lint"):
            with pytest.raises(SystemExit, match="2"):
                main(["shards", command, url])
            message = capsys.readouterr().err
            assert message.startswith(f"nfnets-xla: {url} can be neither listed nor written")
            assert message.count("\n") == 1
