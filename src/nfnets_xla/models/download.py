"""Download a file once: resume where it broke off, and verify it when it is complete.

    path = download("https://storage.googleapis.com/dm-nfnets/F0_haiku.npz")

Kept under `$NFNETS_XLA_CACHE`, else in torch.hub's folder. With `HF_HUB_OFFLINE=1` nothing is
fetched, as with the Hugging Face Hub.
"""

import base64
import fcntl
import hashlib
import http.client
import os
import re
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nfnets_xla.bar import Progress, progress

ATTEMPTS = 6
FIRST_WAIT = 1.0  # seconds, doubled for each further attempt
TIMEOUT = 60.0  # seconds without a byte
CHUNK = 2**20  # bytes


def is_address(source: str | Path) -> bool:
    return re.match(r"https?://", str(source)) is not None


def is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def cache_folder() -> Path:
    chosen = os.environ.get("NFNETS_XLA_CACHE")
    return Path(chosen) if chosen else Path(torch.hub.get_dir()) / "checkpoints"


def download(address: str, folder: Path | None = None, on_progress: Progress | None = None) -> Path:
    """The file at `address`; not fetched again if it is in `folder` (by default the cache).

    A download that broke off is resumed where it stopped, by this process or a later one. Its size
    is checked against the server's, and so is its MD5 if the server sends one, as Google's storage
    does. `on_progress` is called with (bytes so far, total bytes or None); without it a bar is
    shown on standard error. Raises ValueError if the server refuses, if size or MD5 differ, or when
    offline.
    """
    folder = cache_folder() if folder is None else folder
    # Named after the whole address: files at two addresses may have the same name.
    name = hashlib.sha256(address.encode()).hexdigest()[:12] + "-" + address.rsplit("/", 1)[-1]
    target = folder / re.sub(r"[^\w.+-]", "_", name)
    if target.exists():
        return target
    if is_offline():
        raise ValueError(
            f"{address} is not in {folder}, and HF_HUB_OFFLINE forbids fetching it: unset that, or "
            "give the path of a file you have"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with _lock(target):
        if not target.exists():  # another process may have fetched it while this one waited
            part = target.with_name(target.name + ".part")
            _fetch(address, part, on_progress or progress("fetched"))
            part.replace(target)
    return target


def _fetch(address: str, part: Path, on_progress: Progress) -> None:
    fault: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        try:
            headers = _append(address, part, on_progress)
            _check(address, part, headers)
            return
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:  # range not satisfiable: the part is of another file
                part.unlink(missing_ok=True)
            elif error.code not in (408, 429) and error.code < 500:
                raise ValueError(
                    f"{address}: the server answers {error.code} {error.reason}"
                ) from None
            fault = error
        except (OSError, http.client.HTTPException) as error:
            fault = error
    raise ValueError(
        f"{address} could not be fetched in {ATTEMPTS} attempts (last: {fault}); what arrived is "
        "kept, and the next attempt goes on from there"
    )


def _append(address: str, part: Path, on_progress: Progress) -> Any:
    """Fetch what is missing at the end of `part`; returns the headers of the response.

    With If-Range the server sends the rest if the file is unchanged since, else the whole file.
    """
    mark = part.with_name(part.name + ".etag")
    begun = part.stat().st_size if part.exists() and mark.exists() else 0
    request = urllib.request.Request(address)
    if begun:
        request.add_header("Range", f"bytes={begun}-")
        request.add_header("If-Range", mark.read_text())
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        if answer.status != 206:
            begun = 0
        if answer.headers.get("ETag"):
            mark.write_text(answer.headers["ETag"])
        else:
            mark.unlink(missing_ok=True)
        length = answer.headers.get("Content-Length")
        total = None if length is None else begun + int(length)
        with part.open("ab" if begun else "wb") as file:
            on_progress(begun, total)
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                begun += len(chunk)
                on_progress(begun, total)
            file.flush()
            os.fsync(file.fileno())
        if total is not None and begun < total:
            raise OSError(f"the answer ended after {begun} of {total} bytes")
        return answer.headers


def _check(address: str, part: Path, headers: Any) -> None:
    """Google's storage sends `x-goog-hash: md5=...`: of the whole file, even for a range of it."""
    stated = re.search(r"md5=([A-Za-z0-9+/=]+)", ",".join(headers.get_all("x-goog-hash") or []))
    if stated is None:
        return
    md5 = hashlib.md5(usedforsecurity=False)
    with part.open("rb") as file:
        while chunk := file.read(CHUNK):
            md5.update(chunk)
    if base64.b64decode(stated[1]) != md5.digest():
        part.unlink()
        raise OSError(f"the checksum of the bytes is not the one that the server sent ({address})")


@contextmanager
def _lock(target: Path) -> Any:
    """One process fetches, the others wait for it."""
    with target.with_name(target.name + ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
