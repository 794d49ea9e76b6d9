"""Reads numpy's .npz files: reports damage as such, and never runs a pickle."""

import io
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Out = TypeVar("Out")

Arrays = dict[str, NDArray[Any]]


def from_npz(data: bytes, make: Callable[[Arrays], Out], fault: str) -> Out:
    """`make(arrays)`. Raises ValueError(fault) if the file cannot be read or `make` fails."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return make(dict(file))
    except Exception as error:  # on a damaged file, zipfile and numpy raise nearly anything
        # Not numpy's message: it calls a file of zeros a pickle, and advises to allow running it.
        raise ValueError(fault) from error
