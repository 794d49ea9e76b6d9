"""Reads DeepMind's published weights, which are pickles (nfnets/utils.py:111-115), untrusted.

Unpickling runs whatever a file asks for. This reader accepts a dozen names, all listed below, and
replaces each by a stand-in that can only become an array or a mapping; it accepts only the opcodes
that data needs, and refuses everything else by name. It needs neither Haiku nor JAX nor dill.
"""

# pyright: reportPrivateUsage=false, reportUnknownLambdaType=false, reportUnknownArgumentType=false
# pyright: reportUnknownVariableType=false
# What a file holds has no type until it has been checked.

import io
import math
import pickle
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

MAX_BYTES = 2**33  # of all arrays: twice the size of F7+ with 29,593 classes in float32
_FLOATS = ("f2", "f4", "f8")

# Opcodes that build data. Left out are those that call something by another route (INST, OBJ) or
# name objects outside the file (PERSID, EXT), and those that no dump of arrays has.
_INSTRUCTIONS = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4
    STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES
    SHORT_BINBYTES BINBYTES8 BYTEARRAY8 TUPLE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 LIST EMPTY_LIST
    APPEND APPENDS EMPTY_DICT SETITEM SETITEMS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT
    MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD
"""


def read_haiku_pickle(data: bytes) -> dict[str, np.ndarray]:
    """{flattened name: float array} of a pickled `{module: {parameter: array}}`.

    Raises ValueError for any file that is not just that; nothing in it is ever run.
    """
    try:
        loaded = _Reader(io.BytesIO(data)).load()
    except _Refused:
        raise
    except Exception as error:  # on hostile bytes an unpickler raises nearly anything
        raise _Refused(f"the pickle is broken ({type(error).__name__})") from None
    if not isinstance(loaded, dict) or not loaded:
        raise _Refused("the pickle does not hold a mapping of modules")
    arrays: dict[str, np.ndarray] = {}
    for module, parameters in loaded.items():
        if not (isinstance(module, str) and isinstance(parameters, dict)):
            raise _Refused("the pickle does not hold {module: {parameter: array}}")
        for name, value in parameters.items():
            array = value.array if isinstance(value, _Array) else None
            if not isinstance(name, str) or array is None:
                raise _Refused(f"{module[:80]!r} holds something that is not a float array")
            arrays[flattened(module, name)] = array
    return arrays


def flattened(module: str, name: str) -> str:
    """`NFNet/~/nf_block_1/~/conv0`, `w` -> `NFNet.nf_block_1.conv0.w` (utils.py:118-126)."""
    return f"{module}/{name}".replace("/~/", ".").replace("/", ".")


class _Refused(ValueError):
    pass


class _Reader(pickle._Unpickler):  # pyright: ignore[reportAttributeAccessIssue]
    """The standard library's unpickler in Python, not the one in C: opcodes can be removed from it,
    and a file cannot make it allocate a memo table as large as the file says."""

    dispatch: ClassVar[dict[int, Any]] = {}  # filled below
    stack: list[Any]
    pop_mark: Any

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="latin1")
        self.bytes_left = MAX_BYTES

    def load_setitem(self) -> None:
        value = self.stack.pop()
        key = self.stack.pop()
        _put(self.stack[-1], [(key, value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        _put(self.stack[-1], zip(items[::2], items[1::2], strict=True))

    def find_class(self, module: str, name: str) -> Any:
        # New stand-ins for each file, so that no file can alter those of the next.
        if module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return _Maker(lambda *_: _Array(self))
            if name == "scalar":
                return _Maker(lambda dtype, data: _Array(self).filled((), dtype, data))
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return _Maker(
                lambda data, dtype, shape, order: _Array(self).filled(
                    shape, dtype, data, fortran=order == "F"
                )
            )
        if (module, name) == ("numpy", "ndarray"):
            return _Maker(_never)  # only ever an argument of _reconstruct
        if (module, name) == ("numpy", "dtype"):
            return _Maker(lambda code, *_: _Dtype(code))
        if (module, name) in (
            ("jax._src.array", "_reconstruct_array"),
            ("jax._src.device_array", "reconstruct_device_array"),
            ("jax.interpreters.xla", "reconstruct_device_array"),
        ):
            return _Maker(lambda make, arguments, state, _: _built(make(*arguments), state))
        if module == "haiku._src.data_structures" and name in ("FlatMapping", "frozendict"):
            return _Maker(_mapping)
        if (module, name) == ("_codecs", "encode"):  # bytes, in the protocols of Python 2
            return _Maker(_latin1)
        if (module, name) == ("collections", "OrderedDict"):
            return _Maker(_mapping)
        raise _Refused(
            f"the pickle asks for {module[:80]}.{name[:80]}, which weights do not need: "
            "it may be hostile, and none of it was run"
        )

    def take(self, count: int) -> None:
        self.bytes_left -= count
        if self.bytes_left < 0:
            raise _Refused(f"the arrays are larger than {MAX_BYTES} bytes")


for _name in _INSTRUCTIONS.split():
    _code = getattr(pickle, _name)[0]
    _Reader.dispatch[_code] = pickle._Unpickler.dispatch[_code]  # pyright: ignore[reportAttributeAccessIssue]
_Reader.dispatch[pickle.SETITEM[0]] = _Reader.load_setitem
_Reader.dispatch[pickle.SETITEMS[0]] = _Reader.load_setitems


class _Maker:
    """Can be called, and nothing else: BUILD cannot set attributes on it."""

    __slots__ = ("_make",)

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *arguments: Any) -> Any:
        return self._make(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("the pickle tries to alter what builds its arrays")


class _Dtype:
    __slots__ = ("code", "order")

    def __init__(self, code: Any) -> None:
        if not isinstance(code, str) or code not in _FLOATS:
            raise _Refused(f"the pickle holds an array of type {str(code)[:20]!r}, not of floats")
        self.code: str = code
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise _Refused("the pickle holds an array of unknown byte order")
        self.order = state[1]


class _Array:
    __slots__ = ("array", "reader")

    def __init__(self, reader: _Reader) -> None:
        self.reader = reader
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        *_, shape, dtype, fortran, data = state
        self.filled(shape, dtype, data, fortran=bool(fortran))

    def filled(self, shape: Any, dtype: Any, data: Any, *, fortran: bool = False) -> "_Array":
        """`data` must have exactly as many bytes as the shape needs; checked before allocating."""
        data = data.encode("latin1") if isinstance(data, str) else data  # Python 2's bytes
        sides = [side for side in shape if type(side) is int and 0 <= side <= MAX_BYTES]
        if not isinstance(dtype, _Dtype) or len(sides) != len(shape) or len(sides) > 4:
            raise _Refused("the pickle holds an array of an impossible shape or type")
        kind = np.dtype(dtype.order + dtype.code)
        if (
            not isinstance(data, (bytes, bytearray))
            or len(data) != math.prod(sides) * kind.itemsize
        ):
            raise _Refused(f"the pickle holds an array of shape {tuple(sides)} with other data")
        self.reader.take(len(data))
        flat = np.frombuffer(data, kind)
        self.array = flat.reshape(sides, order="F" if fortran else "C")
        return self


def _never(*_: Any) -> None:
    raise _Refused("the pickle makes an array by an unusual route")


def _mapping(mapping: Any = ()) -> dict[str, Any]:
    made: dict[str, Any] = {}
    _put(made, mapping.items() if isinstance(mapping, dict) else mapping)
    return made


def _put(mapping: Any, items: Iterable[tuple[Any, Any]]) -> None:
    """Accepts only string keys: hashing deeply nested tuples would overflow the stack."""
    if type(mapping) is not dict:
        raise _Refused("the pickle treats something else as a mapping")
    for key, value in items:
        if type(key) is not str:
            raise _Refused("the pickle has a key that is not a string")
        mapping[key] = value


def _latin1(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("the pickle encodes something else than bytes")
    return text.encode("latin1")


def _built(array: Any, state: Any) -> _Array:
    if not isinstance(array, _Array):
        raise _Refused("the pickle makes a JAX array of something else")
    array.__setstate__(state)
    return array
