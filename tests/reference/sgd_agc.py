"""One SGD-AGC update in plain numpy, float64, parameter by parameter, unit by unit."""

import numpy as np

Arrays = dict[str, np.ndarray]


def units(role: str, x: np.ndarray) -> list[tuple]:
    """Index of each unit that is clipped as a whole."""
    return [(o,) for o in range(x.shape[0])] if role in ("conv", "linear") else [(Ellipsis,)]


def sgd_agc_step(
    weights: Arrays,
    gradients: Arrays,
    momenta: Arrays,
    roles: dict[str, str],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    clipping: float | None,
    eps: float = 1e-3,
) -> None:
    """Changes `weights` and `momenta` in place."""
    for name, role in roles.items():
        weight, gradient = weights[name], gradients[name].copy()
        if clipping is not None and role != "classifier_weight":
            for unit in units(role, weight):
                norm = np.sqrt((gradient[unit] ** 2).sum())
                max_norm = clipping * max(np.sqrt((weight[unit] ** 2).sum()), eps)
                if norm > max_norm:
                    gradient[unit] *= max_norm / max(norm, 1e-6)
        if role in ("conv", "linear", "classifier_weight"):
            gradient += weight_decay * weight
        momenta[name] = momentum * momenta[name] + gradient
        weights[name] = weight - lr * (gradient + momentum * momenta[name])


def sam_ascent(weights: Arrays, gradients: Arrays, rho: float) -> Arrays:
    norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
    return {name: weights[name] + rho * gradients[name] / norm for name in weights}


def ema_update(shadow: Arrays, weights: Arrays, decay: float, update: int) -> None:
    d = min(decay, (1 + update) / (10 + update))
    for name in shadow:
        shadow[name] = d * shadow[name] + (1 - d) * weights[name]
