"""Checkpoints: named tensors in safetensors files, a small JSON state, a manifest written last.

    checkpoints/step-00000040/
        model.safetensors  momentum.safetensors  ema.safetensors   float32, names of the module tree
        state.json         step, what identifies the run, the fingerprint of its shards
        manifest.json      name, size and SHA-256 of every file above

A checkpoint exists if and only if its manifest verifies. The rule needs no atomic rename, so it is
the same on a local disk and on an object store. Nothing here can run code when it is read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk. Tensors are read when asked for, to the host."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    def tensors(self, form: str) -> dict[str, Tensor]:
        """`form` is "model", "momentum" or "ema"; a form that was not saved is a ValueError."""
        path = self.folder / f"{form}.safetensors"
        if not path.is_file():
            forms = sorted(file.stem for file in self.folder.glob("*.safetensors"))
            raise ValueError(
                f"{self.folder} holds no {form!r} weights; it holds {', '.join(forms)}"
            )
        return load_file(path)


def save(
    root: Path, step: int, forms: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]
) -> Path:
    """Write `root/step-<step>`; `forms` are host tensors. Returns its folder once it verifies.

    An unfinished or damaged folder of the same step is replaced; a complete one is left as it is.
    """
    folder = root / f"step-{step:08d}"
    if folder.is_dir():
        if _fault(folder) is None:
            return folder
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    for form, tensors in forms.items():
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / f"{form}.safetensors")
    (folder / STATE).write_text(json.dumps({**state, "step": step}, indent=1, sort_keys=True))
    files = sorted(path for path in folder.iterdir())
    for path in files:
        _flush_to_disk(path)
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True))
    for path in (folder / MANIFEST, folder, root):
        _flush_to_disk(path)
    return folder


def load(folder: Path) -> Checkpoint:
    """Verify and open one checkpoint folder. Raises ValueError naming what does not verify."""
    fault = _fault(folder)
    if fault is not None:
        raise ValueError(f"{folder} is not a complete checkpoint: {fault}; use an earlier one")
    return Checkpoint(folder, json.loads((folder / STATE).read_text()))


def latest(root: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in `root` that verifies, and why each newer one does not."""
    skipped: list[str] = []
    for folder in sorted(_folders(root), reverse=True):
        fault = _fault(folder)
        if fault is None:
            return load(folder), skipped
        skipped.append(f"skipped {folder.name}: {fault}")
    return None, skipped


def weights_file(given: Path, weights: str) -> Path:
    """A weights file from itself, from a checkpoint's folder, or from a run's (its newest one).

    `weights` is "raw" or "ema". Raises ValueError if `given` is none of these, or lacks the form.
    """
    if given.is_file():
        return given
    found = load(given) if (given / MANIFEST).is_file() else latest(given / "checkpoints")[0]
    if found is None:
        raise ValueError(
            f"{str(given)!r} holds no weights: give a weights file, the folder of a checkpoint, or "
            "the folder of a run that has one"
        )
    path = found.folder / ("model.safetensors" if weights == "raw" else "ema.safetensors")
    if not path.is_file():
        raise ValueError(f"{found.folder} holds no {weights} weights: use model.init_weights=raw")
    return path


def prune(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints that verify, and what is left of older ones.

    The manifest goes first, so that an interrupted deletion never leaves half a checkpoint that
    looks like a whole one.
    """
    complete = 0
    for folder in sorted(_folders(root), reverse=True):
        if complete < keep:
            complete += (folder / MANIFEST).is_file()
            continue
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


def _folders(root: Path) -> list[Path]:
    return [path for path in root.glob("step-*") if path.name.removeprefix("step-").isdecimal()]


def _fault(folder: Path) -> str | None:
    """Why this folder is not a checkpoint, or None if it is one."""
    path = folder / MANIFEST
    if not path.is_file():
        return "it has no manifest.json (the writer was interrupted)"
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError:
        return "its manifest.json is torn"
    for name, entry in manifest.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}"
        if _sha256(file) != entry["sha256"]:
            return f"{name} does not match its checksum"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
