"""Files of weights: recognised by content, read without running code, refused if incomplete.

    .safetensors                         ours, and timm's on the Hugging Face Hub
    torch.save's zip and its older form  a state dict alone (`weights_only`)
    .npz of float arrays                 flattened Haiku names
    pickle (haiku_pickle.py)             DeepMind's F*_haiku.npz, which are no .npz

Tensors keep the file's names, without the prefixes of torch's wrappers; names.py translates them
into ours.
"""

# pyright: reportUnknownMemberType=false
# torch types its own signatures in part.

import argparse
import json
import struct
import zipfile
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Protocol, TypeGuard

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nfnets_xla.models.haiku_pickle import MAX_BYTES, read_haiku_pickle
from nfnets_xla.models.names import unwrapped

SAFETENSORS, TORCH, NPZ, PICKLE = "safetensors", "torch", "npz", "pickle"
MAX_HEADER = 100_000_000  # bytes; as the safetensors library has it
# How a file in torch.save's older form begins: pickle protocol 2, then a ten-byte integer.
TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
# Keys under which training scripts keep their weights; an average comes first, as timm does it.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def read_weights(path: Path) -> dict[str, Tensor]:
    """{name: tensor} from the file, on the CPU. Raises ValueError if it is no file of weights."""
    return unwrapped(_read(path))


def _read(path: Path) -> dict[str, Tensor]:
    form = recognise(path)
    if form == SAFETENSORS:
        return _read_safetensors(path)
    if form == TORCH:
        return _read_torch(path)
    try:
        arrays = _read_npz(path) if form == NPZ else read_haiku_pickle(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a .safetensors file; empty for the other formats."""
    if recognise(path) != SAFETENSORS:
        return {}
    with _safetensors(path) as file:
        return dict(file.metadata() or {})


def recognise(path: Path) -> str:
    """The format of a file, whatever its suffix. Raises ValueError if it is none of the four."""
    if not path.is_file():
        raise ValueError(f"there is no weights file {str(path)!r}")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(TORCH_MAGIC))
    if start.startswith(b"PK\x03\x04"):
        names = _zip_names(path)
        return NPZ if all(name.endswith(".npy") for name in names) else TORCH
    if start == TORCH_MAGIC:
        return TORCH
    header = struct.unpack("<Q", start[:8])[0] if len(start) > 8 else 0
    has_header = start[8:9] == b"{"
    # 0x80 begins a pickle, but may also be the first byte of a .safetensors header's length.
    if start[:1] == b"\x80" and not (has_header and header <= MAX_HEADER):
        return PICKLE
    if has_header:
        if header > min(size - 8, MAX_HEADER):
            raise ValueError(
                f"{path} is not a whole .safetensors file: its header of {header} bytes does not "
                f"fit into {size}; fetch it again"
            )
        return SAFETENSORS
    raise ValueError(
        f"{path} is not a file of weights: give .safetensors, torch's .pt or .pth, or DeepMind's "
        "F*_haiku.npz"
    )


def _zip_names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as file:
            return file.namelist()
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is a broken zip file ({error}): fetch it again") from None


class _Safetensors(Protocol):
    """An open file: the library does not annotate its own class."""

    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def metadata(self) -> dict[str, str] | None: ...


def _safetensors(path: Path) -> AbstractContextManager[_Safetensors]:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a whole .safetensors file ({error}): fetch it again"
        ) from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with _safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _read_torch(path: Path) -> dict[str, Tensor]:
    _check_torch_zip(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm's train.py adds one
            state: object = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # refused, or broken in one of many ways
        raise ValueError(
            f"{path} is not a file of tensors alone ({type(error).__name__}), and nothing else is "
            "read, since unpickling can run code: save the state dict by itself, best as "
            ".safetensors"
        ) from None
    for wrapper in WRAPPERS:
        if _is_mapping(state) and _is_mapping(inside := state.get(wrapper)):
            state = inside
    items = state.items() if _is_mapping(state) else {None: None}.items()
    tensors = {n: value for n, value in items if isinstance(n, str) and isinstance(value, Tensor)}
    if len(tensors) < len(items):
        raise ValueError(f"{path} is not a plain state dict of tensors: save only that")
    return tensors


def _is_mapping(value: object) -> TypeGuard[Mapping[object, object]]:
    return isinstance(value, Mapping)


def _check_torch_zip(path: Path) -> None:
    """torch.save never compresses, so a file with a compressed member is not from torch.save."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as file:
        infos = file.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise ValueError(f"{path} is compressed, as torch.save never does: it may be a zip bomb")
    _check_total(path, sum(info.file_size for info in infos))


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Float arrays; sizes are checked against the zip directory before memory is allocated."""
    with zipfile.ZipFile(path) as file:
        infos = file.infolist()
        _check_total(path, sum(info.file_size for info in infos))
        arrays: dict[str, np.ndarray] = {}
        for info in infos:
            with file.open(info) as member:
                arrays[info.filename.removesuffix(".npy")] = _read_npy(member, info)
    return arrays


def _read_npy(member: IO[bytes], info: zipfile.ZipInfo) -> np.ndarray:
    try:
        version = np.lib.format.read_magic(member)  # type: ignore[arg-type]
        read = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = read(member, max_header_size=10_000)  # type: ignore[call-arg,arg-type]
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{info.filename} is no .npy file ({error})") from None
    if dtype.kind != "f":
        raise ValueError(f"{info.filename} holds {dtype}, not floats (objects could run code)")
    count = int(np.prod(shape, dtype=object)) * dtype.itemsize
    if count > info.file_size:
        raise ValueError(f"{info.filename} is too short for its shape {shape}: fetch it again")
    try:
        data = member.read(count)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{info.filename} is damaged ({error}): fetch it again") from None
    if len(data) != count:
        raise ValueError(f"{info.filename} is too short for its shape {shape}: fetch it again")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _check_total(path: Path, total: int) -> None:
    if total > MAX_BYTES:
        raise ValueError(
            f"{path} unpacks to {total} bytes; the largest of our models has less than {MAX_BYTES}"
        )
