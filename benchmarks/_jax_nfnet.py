"""The network, its loss, clipping and update in plain JAX, as JAX users write them: channels last.

xla_step.py and train_step.py run it in an environment that has JAX. It reads weights (in torch's
layout), images and labels from an .npz, trains a few steps, and prints losses, processor seconds
and wall-clock seconds as JSON. In bfloat16, convolutions and gates compute in bfloat16, as ours do.
"""

import json
import math
import sys
import time

import jax  # pyright: ignore[reportMissingImports]
import jax.numpy as jnp  # pyright: ignore[reportMissingImports]
import numpy as np

ALPHA, GELU_GAIN, WS_FLOOR = 0.2, 1.7015043497085571, 1e-4
CLIPPING, NORM_EPS, NORM_FLOOR, MOMENTUM, WEIGHT_DECAY = 0.01, 1e-3, 1e-6, 0.9, 2e-5
GATES = ("reduce.weight", "reduce.bias", "expand.weight", "expand.bias")
STAGE_STRIDES, STEM_STRIDES = (1, 2, 2, 2), (2, 1, 1, 2)


def main(inputs: str, steps: int, dtype: str = "float32") -> None:
    given = dict(np.load(inputs, allow_pickle=False))
    images = jnp.asarray(given.pop("images").transpose(0, 2, 3, 1), dtype)
    labels, lr = jnp.asarray(given.pop("labels")), float(given.pop("lr"))
    depth, group_width = given.pop("depth").tolist(), int(given.pop("group_width"))
    params = {name: jnp.asarray(to_jax(value)) for name, value in given.items()}
    momentum = jax.tree.map(jnp.zeros_like, params)

    def loss_of(params: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = forward(params, images, depth, group_width)
        log_p = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_p, labels[:, None], axis=1).mean()

    def step(params, momentum, images, labels, lr):
        loss, grads = jax.value_and_grad(loss_of)(params, images, labels)
        stepped = {n: update(n, params[n], grads[n], momentum[n], lr) for n in params}
        return {n: s[0] for n, s in stepped.items()}, {n: s[1] for n, s in stepped.items()}, loss

    jitted = jax.jit(step, donate_argnums=(0, 1))
    losses, seconds, clock = [], [], []
    for _ in range(1 + steps):
        start, began = time.process_time(), time.perf_counter()
        params, momentum, loss = jitted(params, momentum, images, labels, jnp.float32(lr))
        jax.block_until_ready((params, momentum, loss))
        seconds.append(time.process_time() - start)
        clock.append(time.perf_counter() - began)
        losses.append(float(loss))
    print(json.dumps({"losses": losses, "seconds": seconds, "clock": clock, "trace_ms": None}))


def to_jax(value: np.ndarray) -> np.ndarray:
    """OIHW to HWIO, OI to IO."""
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if value.ndim == 2 else value


def forward(params: dict, x: jax.Array, depth: list[int], group_width: int) -> jax.Array:
    for number, stride in enumerate(STEM_STRIDES):
        x = scaled_gelu(x) if number else x
        x = convolve(params, f"stem.{number}", x, stride)
    std = 1.0
    for stage, (blocks, first_stride) in enumerate(zip(depth, STAGE_STRIDES, strict=True)):
        for number in range(blocks):
            name, stride = f"stages.{stage}.{number}", first_stride if number == 0 else 1
            activated = scaled_gelu(x) / std
            shortcut = x
            if number == 0:
                pooled = average_pool(activated) if stride > 1 else activated
                shortcut = convolve(params, f"{name}.conv_shortcut", pooled)
                std = 1.0
            out = convolve(params, f"{name}.conv0", activated)
            groups = out.shape[-1] // group_width
            out = convolve(params, f"{name}.conv1", scaled_gelu(out), stride, groups)
            out = convolve(params, f"{name}.conv1b", scaled_gelu(out), 1, groups)
            out = convolve(params, f"{name}.conv2", scaled_gelu(out))
            out = 2 * gates(params, f"{name}.squeeze_excite", out) * out
            x = shortcut + (ALPHA * params[f"{name}.skip_gain"]).astype(x.dtype) * out
            std = math.sqrt(std**2 + ALPHA**2)
    features = scaled_gelu(convolve(params, "final_conv", x))
    pooled = features.astype(jnp.float32).mean(axis=(1, 2))
    return pooled @ params["head.weight"] + params["head.bias"]


def scaled_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True) * GELU_GAIN


def convolve(params: dict, name: str, x: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    weight = params[f"{name}.weight"]
    fan_in = math.prod(weight.shape[:3])
    mean, variance = weight.mean(axis=(0, 1, 2)), weight.var(axis=(0, 1, 2))
    scale = jax.lax.rsqrt(jnp.maximum(variance * fan_in, WS_FLOOR)) * params[f"{name}.gain"]
    return jax.lax.conv_general_dilated(
        x,
        ((weight - mean) * scale).astype(x.dtype),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    ) + params[f"{name}.bias"].astype(x.dtype)


def average_pool(x: jax.Array) -> jax.Array:
    def summed(x: jax.Array) -> jax.Array:
        zero, window = np.zeros((), x.dtype), (1, 2, 2, 1)
        return jax.lax.reduce_window(x, zero, jax.lax.add, window, window, "SAME")

    return summed(x) / summed(jnp.ones_like(x))


def gates(params: dict, name: str, x: jax.Array) -> jax.Array:
    own = {leaf: params[f"{name}.{leaf}"].astype(x.dtype) for leaf in GATES}
    hidden = jax.nn.relu(x.mean(axis=(1, 2)) @ own["reduce.weight"] + own["reduce.bias"])
    out = hidden @ own["expand.weight"] + own["expand.bias"]
    return jax.nn.sigmoid(out)[:, None, None, :]


def update(
    name: str, weight: jax.Array, grad: jax.Array, velocity: jax.Array, lr: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Output channels are the last axis, so a unit's norm is taken over all other axes."""
    if name != "head.weight":
        axes = tuple(range(weight.ndim - 1)) if weight.ndim > 1 else None
        norm_w = jnp.sqrt(jnp.square(weight).sum(axes, keepdims=True))
        norm_g = jnp.sqrt(jnp.square(grad).sum(axes, keepdims=True))
        largest = CLIPPING * jnp.maximum(norm_w, NORM_EPS)
        grad = jnp.where(norm_g > largest, grad * largest / jnp.maximum(norm_g, NORM_FLOOR), grad)
    if weight.ndim > 1:
        grad = grad + WEIGHT_DECAY * weight
    velocity = MOMENTUM * velocity + grad
    return weight - lr * (grad + MOMENTUM * velocity), velocity


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
