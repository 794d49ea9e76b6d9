"""Scaled weight standardisation and SAME convolution in plain numpy, loop by loop."""

import numpy as np


def ws_conv_same(
    x: np.ndarray,
    weight: np.ndarray,
    gain: np.ndarray,
    bias: np.ndarray,
    *,
    stride: int,
    groups: int,
) -> np.ndarray:
    """(B, C, H, W) with weight (O, C / groups, k, k) to (B, O, ceil(H / s), ceil(W / s))."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    out_channels, per_group, kernel, _ = weight.shape
    fan_in = per_group * kernel * kernel
    standardised = np.empty_like(weight)
    for o in range(out_channels):
        scale = gain[o] / np.sqrt(max(weight[o].var() * fan_in, 1e-4))
        standardised[o] = weight[o] * scale - weight[o].mean() * scale
    padded, (rows, columns) = _pad_same(x, kernel, stride)
    out = np.zeros((x.shape[0], out_channels, rows, columns))
    for o in range(out_channels):
        first = (o // (out_channels // groups)) * per_group
        for i in range(rows):
            for j in range(columns):
                window = padded[
                    :,
                    first : first + per_group,
                    i * stride : i * stride + kernel,
                    j * stride : j * stride + kernel,
                ]
                out[:, o, i, j] = (window * standardised[o]).sum(axis=(1, 2, 3)) + bias[o]
    return out


def _pad_same(x: np.ndarray, kernel: int, stride: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Zeros around, the odd one after: out = ceil(in / stride)."""
    pads = []
    outs = []
    for size in x.shape[2:]:
        out = int(np.ceil(size / stride))
        total = max((out - 1) * stride + kernel - size, 0)
        pads.append((total // 2, total - total // 2))
        outs.append(out)
    return np.pad(x, [(0, 0), (0, 0), *pads]), (outs[0], outs[1])
