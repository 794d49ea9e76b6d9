"""Reading .npz files, as numpy writes them: what is damaged is called so, and no pickle is run."""

import io
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Out = TypeVar("Out")

Arrays = dict[str, NDArray[Any]]


def from_npz(data: bytes, make: Callable[[Arrays], Out], fault: str) -> Out:
    """What `make` makes of the arrays. If there are none, or it fails, raises ValueError(fault)."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return make(dict(file))
    except Exception as error:  # of a damaged file, zipfile and numpy raise nearly anything
        # Not in their words: of a file of zeros numpy says that it is a pickle, and how to run it.
        raise ValueError(fault) from error
