"""Checkpoints: named tensors in safetensors files, a small JSON state, a manifest written last.

    checkpoints/step-00000040/
        model.safetensors  momentum.safetensors  ema.safetensors   float32, names of the module tree
        state.json         step, what identifies the run, the fingerprint of its shards
        manifest.json      name, size and SHA-256 of every file above

A checkpoint exists if and only if its manifest verifies. The rule needs no atomic rename, so it is
the same on a local disk and on an object store. Nothing here can run code when it is read, and no
name in a manifest can lead out of its folder.
"""

import errno
import hashlib
import json
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from nfnets_xla import claims
from nfnets_xla.claims import STATE, OtherStart
from nfnets_xla.data.remote import AnyFolder, RemoteFolder, open_folder
from nfnets_xla.data.storage import address
from nfnets_xla.exits import Unreachable

MANIFEST = "manifest.json"
FORMAT = 1  # of all this; a number higher than ours is a newer release's


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. Tensors are read when asked for, to the host."""

    where: str  # its folder, or the address of one
    folder: Path  # its files; of one at an address copies, which go when this does
    state: dict[str, Any]
    run: Path | None = None  # the folder of its run, if it was found through that

    def __str__(self) -> str:
        return self.where

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def run_dir(self) -> Path:
        """Where the record of its run is, if anywhere."""
        return self.run or Path(self.where).parent.parent

    @property
    def forms(self) -> list[str]:
        return sorted(file.stem for file in self.folder.glob("*.safetensors"))

    def tensors(self, form: str) -> dict[str, Tensor]:
        """`form` is "model", "ema" or a slot of the optimizer ("momentum" for SGD).

        A form that was not saved is a ValueError.
        """
        if form not in self.forms:
            raise ValueError(
                f"{self.where} holds no {form!r} weights; it holds {', '.join(self.forms)}"
            )
        return load_file(self.folder / f"{form}.safetensors")

    def release(self) -> None:
        """Delete its files if they are copies; a process that is killed later would leave them."""
        if address(self.where):
            shutil.rmtree(self.folder, ignore_errors=True)


def save(
    root: str | Path, step: int, forms: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> int:
    """Write `root/step-<step>`; `forms` are host tensors. Returns its bytes.

    It is on the disk, or at the address, when this returns. An unfinished or damaged folder of the
    same step is replaced; a complete one stays. What cannot be finished is deleted, if it can be.

    Raises OtherRun if the newest there, or that of this step, is of another run: two runs in one
    folder would delete each other's checkpoints, or go on from them. Raises OtherStart if another
    start of this run, on another machine perhaps, has saved it since the one of `state` began.
    """
    if not address(root):
        Path(root).mkdir(parents=True, exist_ok=True)
    folder, name = open_folder(root), folder_name(step)
    state = {**state, "step": step, "format": FORMAT}
    complete = complete_steps(folder.sizes(""))
    for newer in sorted(complete - {step}, reverse=True):  # the newest is ours, nearly always
        if not claims.seems_of_another(folder, folder_name(newer), state):
            break
        found = verify_one(_at(root, newer))
        if isinstance(found, Checkpoint):
            claims.refuse_another(found.where, found.state, state)
    if step in complete:
        found = verify_one(_at(root, step))
        if isinstance(found, Checkpoint):
            claims.refuse_another(found.where, found.state, state)
            files = (path for path in found.folder.iterdir() if path.name != MANIFEST)
            return sum(path.stat().st_size for path in files)
    # By a start that was killed, or by one that is writing now.
    claimed = claims.seems_of_another(folder, name, state)
    remove(folder, step)
    try:
        size = _write(folder, name, forms, state)
    except Exception as error:
        # An address would not answer to this either; and another start's files are not touched.
        if not isinstance(error, Unreachable | OtherStart):
            with suppress(Exception):  # what there is of it may be what fills the disk
                claims.check_held(folder, name, state)
                remove(folder, step)
        raise
    if claimed and isinstance(verify_one(_at(root, step)), str):
        return save(root, step, forms, state)  # the other's last file came between; it has ended
    return size


def _write(
    folder: AnyFolder,
    name: str,
    forms: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
) -> int:
    """The state first, which says whose all of it is, and the manifest last."""
    data = _json(state)
    with folder.writing(f"{name}/{STATE}") as path:
        path.write_bytes(data)
    manifest = {STATE: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    for form, tensors in forms.items():
        claims.check_held(folder, name, state)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        with folder.writing(f"{name}/{form}.safetensors") as path:
            save_file(contiguous, path)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            manifest[f"{form}.safetensors"] = {"bytes": path.stat().st_size, "sha256": digest}
    claims.check_held(folder, name, state)
    folder.write(f"{name}/{MANIFEST}", _json(manifest))
    return sum(entry["bytes"] for entry in manifest.values())


def load(where: str | Path) -> Checkpoint:
    """Verify and open one checkpoint. Raises ValueError naming what does not verify."""
    found = verify_one(where)
    if isinstance(found, str):
        raise ValueError(found)
    return found


def steps(root: str | Path) -> list[int]:
    """Of every checkpoint in `root`, complete or not; the newest first."""
    return steps_of(_names(root))


def complete(root: str | Path) -> set[int]:
    """Of those that have a manifest, whether or not they verify."""
    return complete_steps(_names(root))


def _names(root: str | Path) -> Iterable[str]:
    """Of all files; none where there is no folder yet."""
    is_there = address(root) or Path(root).is_dir()
    return open_folder(root).sizes("") if is_there else ()


def folders(root: str | Path) -> list[str]:
    """All of them, each as `load` and `verify_one` take it."""
    return [_at(root, step) for step in steps(root)]


def verify(root: str | Path, run: Path | None = None) -> Iterator[Checkpoint | str]:
    """Of every step in `root`, the newest first: the checkpoint, or why it is none."""
    return (verify_one(each, run) for each in folders(root))


def verify_one(where: str | Path, run: Path | None = None) -> Checkpoint | str:
    """The checkpoint, or why it is none. Raises Newer for one of a newer release, which is
    whole, and which nobody may go past, replace or delete."""
    try:
        return _open(where, run)
    except Fault as fault:
        return str(fault)


def is_one(where: str | Path) -> bool:
    """Whether this is one checkpoint, whole or not: by its name, or by what it holds."""
    return _step(f"{Path(where).name}/") is not None or (Path(where) / MANIFEST).is_file()


def latest(root: str | Path, run: Path | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in `root` that verifies, and why each newer one does not. Raises
    Newer if one of these is of a newer release."""
    skipped: list[str] = []
    for found in verify(root, run):
        if isinstance(found, Checkpoint):
            return found, skipped
        skipped.append(found)
    return None, skipped


# ---- files ------------------------------------------------------------------------------------


class Fault(Exception):
    """Why a folder is not a checkpoint."""


class Newer(ValueError):
    """What is whole, and to be read by a newer release."""


def _open(where: str | Path, run: Path | None) -> Checkpoint:
    """One at an address is copied, to be verified and then read from the copy."""
    url = address(where)
    try:
        if url is None:
            return Checkpoint(str(where), Path(where), _verified(Path(where)), run)
        copies = Path(tempfile.mkdtemp(prefix="nfnets-xla-"))
        with ExitStack() as on_failure:
            on_failure.callback(shutil.rmtree, copies)
            _copy(RemoteFolder(url), copies)
            found = Checkpoint(url, copies, _verified(copies), run)
            on_failure.pop_all()
        weakref.finalize(found, shutil.rmtree, copies, ignore_errors=True)
        return found
    except Fault as fault:
        raise Fault(f"{where} is not a complete checkpoint: {fault}; use an earlier one") from None
    except Newer as newer:
        raise Newer(
            f"{where} {newer}: give the command to that release, or choose another folder"
        ) from None


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _at(root: str | Path, step: int) -> str:
    """A slash at the end of an address would name another object."""
    return f"{address(root) or root}/{folder_name(step)}"


def _step(name: str) -> int | None:
    """Of the checkpoint that a file belongs to."""
    found = re.match(r"step-(\d+)/", name)
    return int(found[1]) if found else None


def steps_of(files: Iterable[str]) -> list[int]:
    """Steps that have any file, newest first."""
    found = map(_step, files)
    return sorted({step for step in found if step is not None}, reverse=True)


def complete_steps(files: Iterable[str]) -> set[int]:
    """Steps that have a manifest."""
    steps = (_step(name) for name in files if name.endswith(f"/{MANIFEST}"))
    return {step for step in steps if step is not None}


def remove(folder: AnyFolder, step: int) -> None:
    """The manifest goes first: an interrupted deletion never leaves half a checkpoint that looks
    like a whole one."""
    files = [name for name in folder.sizes("") if name.startswith(f"{folder_name(step)}/")]
    for name in sorted(files, key=lambda name: not name.endswith(f"/{MANIFEST}")):
        folder.remove(name)


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _manifest(data: bytes) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads(data)
        for name, entry in manifest.items():
            if name != Path(name).name:
                raise Fault(f"its manifest.json names {name!r}, which is no file of this folder")
            if not (isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str)):
                raise TypeError
    except (ValueError, AttributeError, TypeError, KeyError):
        raise Fault("its manifest.json is torn") from None
    return manifest


def _verified(folder: Path) -> dict[str, Any]:
    """The state of a checkpoint. Raises Fault for what is not one, Newer for one of another
    release."""
    try:
        with _reading(folder / MANIFEST):
            data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise Fault("it has no manifest.json (the writer was interrupted)") from None
    manifest = _manifest(data)
    for name, entry in manifest.items():
        with _reading(folder / name):
            _check(folder / name, entry)
    if STATE not in manifest:
        raise Fault(f"its manifest.json does not name {STATE}")
    state = json.loads((folder / STATE).read_bytes())
    if state.get("format", 1) > FORMAT:
        raise Newer(f"has format {state['format']}, of a newer release; this one reads {FORMAT}")
    return state


def _check(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise Fault(f"{path.name} is missing")
    if (size := path.stat().st_size) != entry["bytes"]:
        raise Fault(f"{path.name} has {size} bytes, the manifest says {entry['bytes']}")
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
            raise Fault(f"{path.name} does not match its checksum")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """What a disk can no longer give is damage. Other failures may pass: they name the file."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EIO:
            raise Fault(f"{path.name} cannot be read ({error.strerror})") from None
        error.filename = str(path)  # which a read does not say
        raise


def _copy(source: RemoteFolder, target: Path) -> None:
    """Everything that the manifest names, and the manifest."""
    sizes = source.sizes("")
    if MANIFEST not in sizes:
        raise Fault("it has no manifest.json (the writer was interrupted)")
    data = source.read(MANIFEST)
    for name, entry in _manifest(data).items():
        if sizes.get(name) == entry["bytes"]:  # else it is no checkpoint, and not worth the time
            source.download(name, entry["bytes"], target / name)
    (target / MANIFEST).write_bytes(data)
