"""Files of weights are recognised by content; hostile ones are refused without running anything."""

import collections
import io
import json
import pickle
import struct
import sys
import tracemalloc
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.utils.checkpoint_saver import CheckpointSaver
from torch import nn
from torch.optim.swa_utils import AveragedModel

from nfnets_xla.models.formats import NPZ, PICKLE, SAFETENSORS, TORCH, read_weights, recognise
from nfnets_xla.models.haiku_pickle import read_haiku_pickle
from nfnets_xla.models.weights import load_into
from tests.fixtures import deepmind

# ---- DeepMind's form: a pickle of Haiku's mapping of mappings of arrays ------------------------


def two_levels() -> dict[str, dict[str, np.ndarray]]:
    """The fixture's parameters under Haiku's own names, for example `NFNet/~/nf_block/~/conv0`,
    `w`."""
    nested: dict[str, dict[str, np.ndarray]] = {}
    for flat, array in deepmind.parameters().items():
        *modules, leaf = flat.split(".")
        nested.setdefault("/~/".join(modules), {})[leaf] = array
    return nested


class FlatMapping(Mapping[str, Any]):
    """Pickles like Haiku's: its class by name, and a dict."""

    def __init__(self, mapping: Mapping[str, Any]) -> None:
        self._mapping = dict(mapping)

    def __getitem__(self, key: str) -> Any:
        return self._mapping[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._mapping)

    def __len__(self) -> int:
        return len(self._mapping)

    def __reduce__(self) -> tuple[Any, ...]:
        return FlatMapping, (self._mapping,)


class DeviceArray:
    """Pickles like JAX's: through numpy's own parts."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __reduce__(self) -> tuple[Any, ...]:
        make, arguments, state = self.array.__reduce__()  # type: ignore[misc]
        return _reconstruct_array, (make, arguments, state, {"weak_type": False})


def _reconstruct_array(*_: Any) -> None:
    raise AssertionError("only its name is of interest")


@pytest.fixture
def as_in_deepminds_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the modules that the file was written with; reading has none of them."""
    for name, thing in (
        ("haiku._src.data_structures", FlatMapping),
        ("jax._src.array", _reconstruct_array),
    ):
        module = ModuleType(name)
        setattr(module, thing.__name__, thing)
        monkeypatch.setattr(thing, "__module__", name)
        for depth in range(1, name.count(".") + 1):
            parent = name.rsplit(".", depth)[0]
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("as_in_deepminds_process")
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("wrap", ["plain", "haiku", "jax"])
def test_deepminds_pickles_are_read(
    protocol: int, wrap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nested: Any = two_levels()
    if wrap == "haiku":
        nested = FlatMapping({k: FlatMapping(v) for k, v in nested.items()})
    if wrap == "jax":
        nested = {k: {n: DeviceArray(a) for n, a in v.items()} for k, v in nested.items()}
    path = tmp_path / "F0_haiku.npz"
    path.write_bytes(pickle.dumps(nested, protocol))
    monkeypatch.undo()  # from here on without those modules
    assert recognise(path) == PICKLE
    net = deepmind.network()
    for parameter in net.parameters():
        parameter.data.zero_()
    assert not load_into(net, read_weights(path), source="F0")
    expected = deepmind.network().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in net.state_dict().items())


def test_other_layouts_of_arrays_are_read() -> None:
    """Fortran order, big-endian, double, half, 0-d, numpy scalars, ordered dicts."""
    arrays = {
        "fortran": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
        "big": np.arange(3, dtype=">f4"),
        "double": np.arange(3, dtype=np.float64),
        "half": np.arange(3, dtype=np.float16),
        "scalar": np.float32(2.5),
        "point": np.array(1.5, np.float32),
    }
    for protocol in (2, 4, 5):
        data = pickle.dumps(collections.OrderedDict(m=collections.OrderedDict(arrays)), protocol)
        read = read_haiku_pickle(data)
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[f"m.{name}"], array)


# ---- recognition ------------------------------------------------------------------------------


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    state = {"a": torch.arange(3.0)}
    save_file(state, tmp_path / "1")
    torch.save(state, tmp_path / "2")
    torch.save(state, tmp_path / "3", _use_new_zipfile_serialization=False)
    with (tmp_path / "4").open("wb") as file:
        np.savez(file, a=state["a"].numpy())
    with (tmp_path / "5").open("wb") as file:
        np.savez_compressed(file, a=state["a"].numpy())
    for number, form in zip("12345", (SAFETENSORS, TORCH, TORCH, NPZ, NPZ), strict=True):
        assert recognise(tmp_path / number) == form
        assert torch.equal(read_weights(tmp_path / number)["a"], state["a"])


def test_what_torchs_wrappers_put_before_names_is_taken_off(tmp_path: Path) -> None:
    """DistributedDataParallel and torch.compile, nested; not if some names lack the prefix."""
    for prefix in ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."):
        torch.save({f"{prefix}a.b": torch.zeros(2), f"{prefix}c": torch.ones(1)}, tmp_path / "x")
        assert read_weights(tmp_path / "x").keys() == {"a.b", "c"}
    torch.save({"module.a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "x")
    assert read_weights(tmp_path / "x").keys() == {"module.a", "b"}


def test_a_state_dict_inside_a_training_scripts_file_is_found(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": {"a": torch.zeros(2)}}, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth").keys() == {"a"}
    for average in ("state_dict_ema", "model_ema"):  # timm's loader prefers it, too
        both = {"state_dict": {"a": torch.zeros(2)}, average: {"a": torch.ones(2)}}
        torch.save(both, tmp_path / "x.pth")
        assert read_weights(tmp_path / "x.pth")["a"].tolist() == [1, 1]
    averaged = AveragedModel(nn.Linear(2, 1))  # counts its updates in its state
    torch.save({"model_ema": averaged.state_dict()}, tmp_path / "x.pth")
    assert read_weights(tmp_path / "x.pth").keys() == {"weight", "bias"}
    torch.save({"epoch": 3, "weights": {"a": torch.zeros(2)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="not a plain state dict"):
        read_weights(tmp_path / "x.pth")


def test_a_checkpoint_of_timms_train_script_is_read(tmp_path: Path) -> None:
    """It holds the command's arguments, an argparse.Namespace, beside the weights."""
    net = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    arguments = Namespace(model="dm_nfnet_f0", opt_betas=(0.9, 0.99), log_dir=None)
    saver = CheckpointSaver(net, optimizer, args=arguments, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=3, metric=71.5)
    state = read_weights(tmp_path / "last.pth.tar")
    assert torch.equal(state["weight"], net.weight)
    assert state.keys() == {"weight", "bias"}


# ---- hostile and broken files -----------------------------------------------------------------


class RunsOnOpening:
    """Unpickling this creates the named file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


class Calls:
    """Pickles as a call of `function`, optionally with changes to the returned object."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def one_line(path: Path) -> str:
    """The refusal, which is one line, takes little memory, and leaves no sentinel file."""
    tracemalloc.start()
    with pytest.raises(ValueError, match=r".") as error:
        read_weights(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64e6
    message = str(error.value)
    assert message.count("\n") == 0
    assert len(message) < 500
    return message


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_payload_in_a_pickle_does_not_run(tmp_path: Path, protocol: int) -> None:
    ran, path = tmp_path / "ran", tmp_path / "F0_haiku.npz"
    path.write_bytes(pickle.dumps({"m": {"w": RunsOnOpening(ran)}}, protocol))
    one_line(path)
    assert not ran.exists()
    pickle.loads(path.read_bytes())  # shows that the test can fail: this runs it
    assert ran.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", ["pth", "bin"])
def test_a_payload_in_torchs_file_does_not_run(tmp_path: Path, zipped: bool, suffix: str) -> None:
    ran, path = tmp_path / "ran", tmp_path / f"model.{suffix}"
    torch.save({"a": RunsOnOpening(ran)}, path, _use_new_zipfile_serialization=zipped)
    assert "unpickling can run code" in one_line(path)
    assert not ran.exists()


def test_a_payload_in_an_object_array_does_not_run(tmp_path: Path) -> None:
    ran, path = tmp_path / "ran", tmp_path / "x.npz"
    np.savez(path, a=np.array([RunsOnOpening(ran)], dtype=object))
    assert "a.npy holds object, not floats" in one_line(path)
    assert not ran.exists()


def pickled(thing: Any, protocol: int = 4) -> bytes:
    return pickle.dumps({"m": {"w": thing}}, protocol)


RECONSTRUCT, ARGUMENTS, STATE = np.arange(3.0).__reduce__()  # type: ignore[misc]
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {  # with a part of each refusal
    "eval": (lambda: pickled(Calls(eval, "open('ran', 'w')")), "asks for builtins.eval,"),
    "getattr": (lambda: pickled(Calls(getattr, "", "upper")), "asks for builtins.getattr,"),
    "numpy's own loader": (lambda: pickled(Calls(np.load, "x")), "asks for numpy.load,"),
    "another class for _reconstruct": (
        lambda: pickled(Calls(RECONSTRUCT, np.matrix, (0,), b"b")),
        "asks for numpy.matrix,",
    ),
    "altering what builds arrays": (
        lambda: b"\x80\x02cnumpy.core.multiarray\nscalar\n}b.",
        "tries to alter what builds its arrays",
    ),
    "too little data": (
        lambda: pickled(
            Calls(RECONSTRUCT, *ARGUMENTS, state=(1, (10**6,), np.dtype("f4"), False, b"1234"))
        ),
        "an array of shape (1000000,) with other data",
    ),
    "an absurd shape": (
        lambda: pickled(
            Calls(RECONSTRUCT, *ARGUMENTS, state=(1, (10**9, 10**9), np.dtype("f4"), False, b""))
        ),
        "an array of shape (1000000000, 1000000000) with other data",
    ),
    "objects": (lambda: pickled(np.array([1, "a"], dtype=object)), "of type 'O8', not of floats"),
    "integers": (lambda: pickled(np.arange(3)), "of type 'i8', not of floats"),
    "no array": (lambda: pickled("text"), "'m' holds something that is not a float array"),
    "no mapping": (lambda: pickle.dumps([1, 2]), "does not hold a mapping of modules"),
    "a tuple as a key": (lambda: pickle.dumps({(1, 2): {}}), "a key that is not a string"),
    "dill's door": (
        lambda: b"\x80\x04\x8c\x0adill._dill\x8c\x0a_load_type\x93\x8c\x04dict\x85R.",
        "asks for dill._dill._load_type,",
    ),
    "a table of 16 GB": (
        lambda: b"\x80\x04}r\xff\xff\xff\x7f.",
        "does not hold a mapping of modules",
    ),
    "bytes that are not there": (
        lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",
        "is broken (",
    ),
    "a frame that is not there": (
        lambda: b"\x80\x04\x95" + struct.pack("<Q", 2**40) + b"}.",
        "does not hold a mapping of modules",
    ),
    "an object by its class": (
        lambda: b"\x80\x02(cos\nsystem\nS'touch ran'\no.",
        "asks for os.system,",
    ),
    "the old instruction": (lambda: b"\x80\x02(S'touch ran'\nios\nsystem\n.", "is broken ("),
    "an extension": (lambda: b"\x80\x02\x82\x01.", "is broken ("),
    "an outside name": (lambda: b"\x80\x02Px\n.", "is broken ("),
    "nested tuples as a key": (
        lambda: b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.",
        "a key that is not a string",
    ),
    "nested lists": (
        lambda: b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b".",
        "does not hold a mapping of modules",
    ),
    "cut short": (lambda: pickled(np.arange(9, dtype=np.float32))[:-20], "is broken ("),
    "nothing in it": (lambda: b"\x80\x04.", "is broken ("),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)  # anything that runs would leave a file here
    path = tmp_path / "F0_haiku.npz"
    make, message = HOSTILE[kind]
    path.write_bytes(make())
    refusal = one_line(path)
    assert str(path) in refusal
    assert message in refusal
    assert list(tmp_path.iterdir()) == [path]


def npy(shape: tuple[int, ...], data: bytes) -> bytes:
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


def zipped(path: Path, name: str, data: bytes, *, compress: bool) -> Path:
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr(name, data)
    return path


def test_zip_bombs_are_refused_before_they_are_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nfnets_xla.models.formats.MAX_BYTES", 10**8)
    bomb = npy((10**8,), bytes(4 * 10**8))
    assert "unpacks to" in one_line(zipped(tmp_path / "x.npz", "a.npy", bomb, compress=True))
    torch_like = zipped(tmp_path / "x.pt", "archive/data.pkl", bytes(10**7), compress=True)
    assert "zip bomb" in one_line(torch_like)


def test_arrays_that_lie_about_their_shape_are_refused(tmp_path: Path) -> None:
    for shape in ((10**12,), (2**40, 2**40), (5,)):
        path = zipped(tmp_path / "x.npz", "a.npy", npy(shape, b"1234" * 4), compress=False)
        assert "too short for its shape" in one_line(path)


def test_a_damaged_member_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "x.npz", "a.npy", npy((4,), b"1234" * 4), compress=False)
    data = bytearray(path.read_bytes())
    data[data.index(b"12341234")] ^= 1
    path.write_bytes(data)
    assert "damaged" in one_line(path)
    path.write_bytes(path.read_bytes()[:-30])
    assert "broken zip" in one_line(path)


def test_broken_safetensors_are_refused(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, whole)
    data = whole.read_bytes()
    path.write_bytes(data[:-100])
    assert "not a whole .safetensors" in one_line(path)
    path.write_bytes(struct.pack("<Q", 2**40) + data[8:])
    assert "header of" in one_line(path)
    lie = {"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    header = json.dumps(lie).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(100))
    assert "not a whole .safetensors" in one_line(path)


@pytest.mark.parametrize("content", [b"", b"x", b"\x89HDF\r\n\x1a\n" + bytes(99), b"<html>" * 9])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    assert "not a file of weights" in one_line(path)
    assert "there is no weights file" in one_line(tmp_path / "absent")
