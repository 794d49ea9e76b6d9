"""A minimum of Amazon's and Google's storage protocols, over a folder of buckets, for tests.

It lists, reads whole objects and ranges, writes whole objects and deletes them.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

STAMP = "2024-01-01T00:00:00.000Z"


class Store:
    def __init__(self, root: Path) -> None:
        self.root = root

    def objects(self, bucket: str, prefix: str) -> dict[str, int]:
        top = self.root / bucket
        files = {str(path.relative_to(top)): path for path in top.rglob("*") if path.is_file()}
        return {
            name: path.stat().st_size
            for name, path in sorted(files.items())
            if name.startswith(prefix)
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    store: Store

    def log_message(self, format: str, *args: object) -> None: ...

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def reply(self, status: int, body: bytes = b"", size: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.send_header("ETag", '"0"')
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self, path: Path) -> None:
        if not path.is_file():
            return self.reply(404)
        data = path.read_bytes()
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            end = int(asked[2]) + 1 if asked[2] else len(data)
            return self.reply(206, data[int(asked[1]) : end])
        return self.reply(200, data)

    def put(self, bucket: str, key: str, data: bytes) -> None:
        path = self.store.root / bucket / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def handle_any(self) -> None:
        body = self.body()
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        return self.answer(unquote(url.path).strip("/").split("/"), query, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def answer(self, parts: list[str], query: dict[str, str], body: bytes) -> None:
        raise NotImplementedError


class S3(Handler):
    def answer(self, parts: list[str], query: dict[str, str], body: bytes) -> None:
        bucket, key = parts[0], "/".join(parts[1:])
        if self.command == "PUT":
            self.put(bucket, key, body)
            return self.reply(200)
        if self.command == "DELETE":
            (self.store.root / bucket / key).unlink(missing_ok=True)
            return self.reply(204)
        if key:
            return self.serve(self.store.root / bucket / key)
        rows = "".join(
            f"<Contents><Key>{escape(name)}</Key><Size>{size}</Size><ETag>0</ETag>"
            f"<LastModified>{STAMP}</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            for name, size in self.store.objects(bucket, query.get("prefix", "")).items()
        )
        listing = f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        return self.reply(200, listing.encode())


class GCS(Handler):
    def answer(self, parts: list[str], query: dict[str, str], body: bytes) -> None:
        where = "/".join(parts)
        asked = re.fullmatch(r"(?:(\w+)/)?storage/v1/b/([^/]+)/o(?:/(.*))?", where)
        if asked is None:
            return self.reply(404)
        kind, bucket, name = asked.groups()
        if self.command == "POST":
            head, data = _multipart(body)
            name = json.loads(head)["name"]
            self.put(bucket, name, data)
            return self.reply(200, self.described(bucket, name))
        if self.command == "DELETE":
            (self.store.root / bucket / name).unlink(missing_ok=True)
            return self.reply(204)
        if kind == "download" or query.get("alt") == "media":
            return self.serve(self.store.root / bucket / name)
        if name:
            known = name in self.store.objects(bucket, name)
            return self.reply(200, self.described(bucket, name)) if known else self.reply(404)
        found = self.store.objects(bucket, query.get("prefix", ""))
        items = [json.loads(self.described(bucket, each)) for each in found]
        return self.reply(200, json.dumps({"items": items, "prefixes": []}).encode())

    def described(self, bucket: str, name: str) -> bytes:
        path = self.store.root / bucket / name
        item = {"name": name, "bucket": bucket, "size": str(path.stat().st_size)}
        return json.dumps(item | {"updated": STAMP, "timeCreated": STAMP}).encode()


def _multipart(body: bytes) -> tuple[bytes, bytes]:
    """The two parts of Google's upload in one request, each after its headers and an empty line."""
    head, rest = body.split(b"\n\n", 1)[1].split(b"\n--", 1)
    return head, rest.split(b"\n\n", 1)[1].rsplit(b"\n--", 1)[0]


@contextmanager
def storing(root: Path, kind: type[Handler]) -> Iterator[str]:
    """Yields the endpoint's address."""
    handler = type("Bound", (kind,), {"store": Store(root)})
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
