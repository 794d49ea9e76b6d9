"""A real HTTP server in a thread, for tests: serves a folder, counts requests, injects faults."""

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

# Possible faults of an answer: an error status, or a body that is cut, is stated to be shorter than
# it is, has another length each time, stops half-way until the client gives up, or is whole where a
# part was requested.
Fault = int | str | None
Faults = Callable[[str, int], Fault]  # arguments: a name, and the number of earlier requests for it


def every_other(name: str, number: int) -> Fault:
    """Half of the answers fail, in six ways; few stall, since each stall costs the client its
    timeout."""
    kinds: list[Fault] = [503, "cut", 429, "short", 500, "cut", 503, "stall"]
    return kinds[number // 2 % len(kinds)] if number % 2 == 0 else None


class Server:
    """`url` is the address of the folder."""

    def __init__(self, folder: Path, faults: Faults) -> None:
        self.folder, self.faults = folder, faults
        self.lock = threading.Lock()
        self.total = 0
        self.asked: Counter[str] = Counter()  # requests by name
        self.failed: Counter[Fault] = Counter()
        self.stalled = threading.Event()  # set while an answer has stopped half-way
        self.closing = threading.Event()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self, unquote(self.path).lstrip("/"))

            def log_message(self, format: str, *args: object) -> None: ...

        return Handler

    def answer(self, request: BaseHTTPRequestHandler, name: str) -> None:
        with self.lock:
            number = self.total
            fault = self.faults(name, number)
            self.total += 1
            self.asked[name] += 1
            if fault is not None:
                self.failed[fault] += 1
        path = self.folder / name
        if isinstance(fault, int) or not path.is_file():
            request.send_response(fault if isinstance(fault, int) else 404)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        body, status = path.read_bytes(), 200
        if fault != "whole" and (
            asked := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
        ):
            body, status = body[int(asked[1]) : int(asked[2]) + 1], 206
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "other":
            body = body[: number + 1]
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if fault in ("cut", "stall"):
            request.wfile.write(body[: len(body) // 2])
            request.close_connection = True
            if fault == "stall":
                self.stalled.set()
                self.closing.wait()
        else:
            request.wfile.write(body)

    @property
    def shard_requests(self) -> dict[str, int]:
        return {name: count for name, count in self.asked.items() if name.endswith(".tar")}


@contextmanager
def serving(folder: Path, faults: Faults = lambda name, number: None) -> Iterator[Server]:
    server = Server(folder, faults)
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.http.shutdown()
        server.http.server_close()
        thread.join()
