"""Antialiased bicubic resizing in plain numpy: Keys' kernel (a = -1/2), widened when shrinking."""

import numpy as np
from numpy.typing import NDArray


def resized(pixels: NDArray[np.uint8], height: int, width: int) -> NDArray[np.float64]:
    """Rows first, then columns, each rounded and clipped to 0..255."""
    rows = np.einsum("ox,hxc->hoc", weights(pixels.shape[1], width), pixels)
    return rounded(np.einsum("oy,ywc->owc", weights(pixels.shape[0], height), rounded(rows)))


def weights(size: int, new_size: int) -> NDArray[np.float64]:
    """(new_size, size): what each old pixel gives to each new one."""
    step = size / new_size
    centres = (np.arange(new_size)[:, None] + 0.5) * step
    distance = np.abs(np.arange(size) + 0.5 - centres) / max(step, 1)
    share = keys(distance)
    return share / share.sum(axis=1, keepdims=True)


def keys(x: NDArray[np.float64]) -> NDArray[np.float64]:
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.clip(np.floor(values + 0.5), 0, 255)
