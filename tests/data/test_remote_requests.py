"""Single requests to an address: names, how failures are classified, and their messages."""

import errno
from pathlib import Path

import fsspec
import pytest
from botocore.exceptions import NoCredentialsError
from fsspec.config import conf
from gcsfs.retry import HttpError

from nfnets_xla.data.remote import AGREEING, PATIENCE, RemoteFolder, _may_pass
from nfnets_xla.data.shards import ShardIndex
from tests.data.object_store import S3, storing
from tests.data.remote_reader import QUICK
from tests.data.remote_shards import path_of
from tests.data.server import Fault, serving
from tests.data.tars import one_line

HASTY = QUICK._replace(first_wait=0.0005)
ODD = "a b#1%3F+&.bin"  # all the characters that an address would interpret


def s3(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> RemoteFolder:
    monkeypatch.setitem(conf, "s3", {"endpoint_url": endpoint, "anon": True})
    return RemoteFolder("s3://bucket/shards", patience=HASTY)


def test_a_name_is_a_name_over_http(tmp_path: Path) -> None:
    (tmp_path / ODD).write_bytes(b"found")
    with serving(tmp_path) as server:
        assert RemoteFolder(server.url, patience=HASTY).read(ODD) == b"found"


def test_a_name_is_a_name_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with storing(tmp_path, S3) as endpoint:
        folder = s3(endpoint, monkeypatch)
        folder.write(ODD, b"found")
        assert (tmp_path / "bucket/shards" / ODD).read_bytes() == b"found"
        assert folder.read(ODD) == b"found"


def test_a_bucket_is_listed_as_it_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with storing(tmp_path, S3) as endpoint:
        folder = s3(endpoint, monkeypatch)
        folder.write("0.tar", b"one")
        assert folder.sizes() == {"0.tar": 3}
        (tmp_path / "bucket/shards/1.tar").write_bytes(b"another's")
        (tmp_path / "bucket/shards/0.tar").write_bytes(b"replaced")
        assert folder.sizes() == {"0.tar": 8, "1.tar": 9}
        assert folder.open("0.tar").whole() == b"replaced"


def test_what_is_not_there_is_removed() -> None:
    """An earlier attempt, whose answer was lost, may have removed it."""
    folder = RemoteFolder("memory://requests", patience=HASTY)
    folder.write("one", b"")
    folder.remove("one")
    folder.remove("one")
    assert folder.sizes("") == {}


def test_when_a_file_was_written_is_known_to_less_than_a_second() -> None:
    folder = RemoteFolder("memory://requests", patience=HASTY)
    folder.write("one", b"")
    written = fsspec.filesystem("memory").modified("memory://requests/one").timestamp()
    assert folder.modified("one") == pytest.approx(written * 1e9, abs=1e3)
    assert folder.modified("none") is None


@pytest.mark.parametrize("fault", ["short", "whole"])
def test_a_range_has_its_length(local: ShardIndex, fault: str) -> None:
    """An answer that is complete by HTTP but short is requested again; a complete one is final."""
    faults: list[Fault] = [fault]
    with serving(path_of(local), lambda *_: faults.pop() if faults else None) as server:
        folder = RemoteFolder(server.url, patience=HASTY)
        if fault == "whole":
            refused = one_line(lambda: folder.read_range(local.name(0), 0, 512))
            assert "does not answer requests for a part of a file" in refused
        else:
            data = folder.read_range(local.name(0), 512, 512)
            assert data == (path_of(local) / local.name(0)).read_bytes()[512:1024]
        assert server.total == (1 if fault == "whole" else 2)


def test_a_file_is_another_only_if_answers_agree(local: ShardIndex, tmp_path: Path) -> None:
    """More wrong lengths than would have to agree, each different: a failing network, not a new
    file."""
    name = local.name(0)
    size = (path_of(local) / name).stat().st_size
    with serving(
        path_of(local), lambda _, number: "other" if number < 2 * AGREEING else None
    ) as server:
        folder = RemoteFolder(server.url, patience=HASTY)
        folder.download(name, size, tmp_path / "copy")
        assert server.total == 2 * AGREEING + 1
    assert (tmp_path / "copy").read_bytes() == (path_of(local) / name).read_bytes()
    with serving(path_of(local), lambda _, number: "other" if number < 2 else "short") as server:
        folder = RemoteFolder(server.url, patience=HASTY)
        message = one_line(lambda: folder.download(name, size, tmp_path / "copy"))
        assert f"has {size // 2} bytes and had {size}" in message
        assert server.total == 2 + AGREEING


def test_two_failures_are_not_worth_a_word(
    local: ShardIndex, caplog: pytest.LogCaptureFixture
) -> None:
    for failing in (2, 3):
        with serving(path_of(local), lambda _, n, last=failing: 503 if n < last else None) as it:
            RemoteFolder(it.url, patience=HASTY).read("index.npz")
        assert ("attempt 4" in caplog.text) == (failing == 3), caplog.text
        assert "attempt 2" not in caplog.text


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (NoCredentialsError(), False),
        (OSError("Forbidden: bucket/shards\ncaller does not have storage.objects.get"), False),
        (HttpError({"code": 403, "message": "denied"}), False),
        (HttpError({"code": 429, "message": "slow down"}), True),
        (HttpError({"code": 503, "message": "back end"}), True),
        (PermissionError("Access Denied"), False),
        (ConnectionResetError(errno.ECONNRESET, "reset"), True),
        (TimeoutError(), True),
    ],
    ids=repr,
)
def test_what_may_pass(error: Exception, passes: bool) -> None:
    assert _may_pass(error) is passes


def test_a_folder_goes_to_other_processes_with_its_patience() -> None:
    folder = RemoteFolder("memory://requests", patience=HASTY)
    make, given = folder.__reduce__()
    assert make(*given).patience == HASTY != PATIENCE
