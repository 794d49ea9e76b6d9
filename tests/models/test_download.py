"""Downloads from a real server that fails, truncates, ignores ranges and lies."""

import base64
import hashlib
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from nfnets_xla.models import download as module
from nfnets_xla.models.download import download
from nfnets_xla.models.pretrained import fetch_pretrained
from nfnets_xla.models.registry import create_network

BODY = os.urandom(3_000_000)


class Server(BaseHTTPRequestHandler):
    """Each request consumes one of `faults`: a status to answer with, or where to cut the body."""

    faults: ClassVar[list[str]] = []
    asked: ClassVar[list[str | None]] = []
    etag: ClassVar[str] = '"1"'
    body: ClassVar[bytes] = BODY
    ranges: ClassVar[bool] = True
    md5: ClassVar[bytes | None] = None

    def do_GET(self) -> None:
        span = self.headers.get("Range")
        Server.asked.append(span)
        fault = Server.faults.pop(0) if Server.faults else ""
        if fault.isdigit():
            self.send_error(int(fault))
            return
        start = 0
        if span and Server.ranges and self.headers.get("If-Range") == Server.etag:
            start = int(span.removeprefix("bytes=").removesuffix("-"))
        rest = Server.body[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("ETag", Server.etag)
        if Server.md5 is not None:
            self.send_header("x-goog-hash", "crc32c=AAAAAA==")
            self.send_header("x-goog-hash", "md5=" + base64.b64encode(Server.md5).decode())
        self.end_headers()
        self.wfile.write(rest[: int(fault.removeprefix("cut "))] if fault else rest)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(module, "FIRST_WAIT", 0.01)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    Server.faults, Server.asked, Server.etag = [], [], '"1"'
    Server.ranges, Server.md5, Server.body = True, hashlib.md5(BODY).digest(), BODY
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/weights/F0_haiku.npz"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_file_is_fetched_once_with_progress(address: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    path = download(address, tmp_path, on_progress=lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == BODY
    assert seen[-1] == (len(BODY), len(BODY))
    assert len(seen) > 2
    assert download(address, tmp_path) == path
    assert len(Server.asked) == 1


def test_who_fetches_sees_how_far_it_is(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    download(address, tmp_path)
    out, told = capsys.readouterr()
    assert out == ""
    size = f"{len(BODY):,}"
    assert told.endswith(f"] {size} of {size}, 0.0 minutes left\n")
    download(address, tmp_path)
    assert capsys.readouterr() == ("", "")


def test_it_goes_on_where_it_broke_off(address: str, tmp_path: Path) -> None:
    Server.faults = ["503", "cut 1000000", "429", "cut 500000"]
    assert download(address, tmp_path).read_bytes() == BODY
    assert Server.asked == [None, None, "bytes=1000000-", "bytes=1000000-", "bytes=1500000-"]


def test_a_later_process_goes_on_too(address: str, tmp_path: Path) -> None:
    Server.faults = ["cut 700000"] + ["500"] * (module.ATTEMPTS - 1)
    with pytest.raises(ValueError, match="could not be fetched in 6 attempts"):
        download(address, tmp_path)
    Server.asked = []
    assert download(address, tmp_path).read_bytes() == BODY
    assert Server.asked == ["bytes=700000-"]


def test_a_file_that_changed_meanwhile_is_fetched_anew(address: str, tmp_path: Path) -> None:
    Server.faults = ["cut 700000"] + ["500"] * (module.ATTEMPTS - 1)
    with pytest.raises(ValueError, match="could not be fetched"):
        download(address, tmp_path)
    Server.etag, Server.body = '"2"', BODY[::-1]
    Server.md5 = hashlib.md5(Server.body).digest()
    assert download(address, tmp_path).read_bytes() == BODY[::-1]


def test_a_server_without_ranges_will_do(address: str, tmp_path: Path) -> None:
    Server.ranges = False
    Server.faults = ["cut 700000"]
    assert download(address, tmp_path).read_bytes() == BODY


def test_wrong_bytes_are_never_kept(address: str, tmp_path: Path) -> None:
    Server.md5 = hashlib.md5(b"something else").digest()
    with pytest.raises(ValueError, match="checksum of the bytes is not the one"):
        download(address, tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".npz", ".part"))]


def test_a_refusal_is_final(address: str, tmp_path: Path) -> None:
    Server.faults = ["404"]
    with pytest.raises(ValueError, match="the server answers 404"):
        download(address, tmp_path)
    assert len(Server.asked) == 1


def test_two_processes_fetch_it_once(address: str, tmp_path: Path) -> None:
    threads = [threading.Thread(target=download, args=(address, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Server.asked) == 1


def test_offline_asks_nobody(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = download(address, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Server.asked = []
    assert download(address, tmp_path) == cached
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE forbids"):
        download(address + "2", tmp_path)
    assert Server.asked == []


def test_models_without_public_weights_say_so() -> None:
    for name in ("nfnet_f7", "nfnet_f3_plus", "nfnet_mini_f0"):
        with pytest.raises(ValueError, match=f"{name} has no public weights; there are .*nfnet_f6"):
            fetch_pretrained(name)
    with pytest.raises(ValueError, match="no tag 'jft'; give nfnet_f3"):
        create_network("nfnet_f3.jft", pretrained=True)
    with pytest.raises(ValueError, match="two sources"):
        create_network("nfnet_f0", pretrained=True, checkpoint_path="x")
