"""Formula-driven images: a labelled set of any size and number of classes, free of licences.

A class is a random iterated function system, as in Kataoka et al. 2020 ("Pre-training without
Natural Images"): a few affine maps whose attractor is a fractal. An instance perturbs the maps,
turns and scales the picture, and colours it by which map was applied last. Deterministic: every
number is drawn from (seed, class) or (seed, class, instance).
"""

import io
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WALKERS = 1024  # points of the chaos game that move together
STEPS = 40
BURN_IN = 8  # steps before a walker is on the attractor
MIN_FILLED = 0.12  # of a 32 x 32 grid; Kataoka et al. reject emptier attractors too
OVERSAMPLING = 2

Float = NDArray[np.float64]


def fractal(seed: int, class_index: int, instance: int, size: int) -> NDArray[np.uint8]:
    """One image, `(size, size, 3)`."""
    system = class_system(seed, class_index)
    rng = np.random.default_rng([seed, class_index, instance, 2])
    jitter = 1 + rng.normal(0, 0.06, system.shape)  # the paper varies them by 0.8 to 1.2
    points, last_map = chaos_game(system * jitter, rng)
    density, shade = _rasterise(_placed(points, rng), last_map, size * OVERSAMPLING, len(system))
    pixels = _coloured(density, shade, rng)
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


@lru_cache(maxsize=4096)
def class_system(seed: int, class_index: int) -> Float:
    """(maps, 2, 3) affine maps of a class: the first draw whose attractor fills enough."""
    for attempt in range(1000):
        rng = np.random.default_rng([seed, class_index, attempt, 1])
        maps = random_system(rng)
        points, _ = chaos_game(maps, rng)
        if filled_share(points) >= MIN_FILLED:
            return maps
    raise ValueError(f"no fractal found for class {class_index} with seed {seed}: use another seed")


def random_system(rng: np.random.Generator) -> Float:
    """2 to 5 contractions: rotation x scaling x rotation, and a shift."""
    count = int(rng.integers(2, 6))
    maps = np.empty((count, 2, 3))
    for number in range(count):
        first, second = rng.uniform(-np.pi, np.pi, 2)
        scales = rng.uniform(0.25, 0.85, 2) * rng.choice([-1, 1], 2)
        maps[number, :, :2] = _rotation(first) @ np.diag(scales) @ _rotation(second)
        maps[number, :, 2] = rng.uniform(-1, 1, 2)
    return maps


def chaos_game(maps: Float, rng: np.random.Generator) -> tuple[Float, NDArray[np.int64]]:
    """Points on the attractor `(P, 2)` and the map that each was reached by `(P,)`.

    Maps are chosen in proportion to their areas, so that the picture is evenly filled."""
    areas = np.abs(np.linalg.det(maps[:, :, :2])) + 0.02
    choices = rng.choice(len(maps), (STEPS, WALKERS), p=areas / areas.sum())
    points = np.zeros((WALKERS, 2))
    visited = np.empty((STEPS, WALKERS, 2))
    for step in range(STEPS):
        chosen = maps[choices[step]]
        points = np.einsum("pij,pj->pi", chosen[:, :, :2], points) + chosen[:, :, 2]
        visited[step] = points
    return visited[BURN_IN:].reshape(-1, 2), choices[BURN_IN:].reshape(-1)


def filled_share(points: Float) -> float:
    low, high = np.quantile(points, [0.01, 0.99], axis=0)
    cells = np.clip((points - low) / np.maximum(high - low, 1e-9) * 32, 0, 31).astype(int)
    return len(np.unique(cells[:, 0] * 32 + cells[:, 1])) / 32**2


def _rotation(angle: float) -> Float:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _placed(points: Float, rng: np.random.Generator) -> Float:
    """Turned, mirrored, and scaled so that most of the points lie in the unit square."""
    points = (points - np.median(points, axis=0)) @ _rotation(rng.normal(0, 0.35))
    if rng.random() < 0.5:
        points = points * [-1, 1]
    extent = np.quantile(np.abs(points), 0.98) * rng.uniform(0.85, 1.3)
    return points / (2 * extent + 1e-9) + 0.5 + rng.uniform(-0.08, 0.08, 2)


def _rasterise(
    points: Float, last_map: NDArray[np.int64], size: int, count: int
) -> tuple[Float, Float]:
    """Log density in [0, 1] and the mean number of the last map in [0, 1], both `(size, size)`."""
    cells = np.floor(points * size).astype(np.int64)
    inside = ((cells >= 0) & (cells < size)).all(axis=1)
    flat = cells[inside, 1] * size + cells[inside, 0]
    hits = np.bincount(flat, minlength=size * size).astype(float)
    shade = np.bincount(flat, weights=last_map[inside], minlength=size * size)
    shade = shade / np.maximum(hits, 1) / max(count - 1, 1)
    density = np.log1p(hits) / np.log1p(max(np.quantile(hits, 0.995), 1))
    return np.minimum(density, 1).reshape(size, size), shade.reshape(size, size)


def _coloured(density: Float, shade: Float, rng: np.random.Generator) -> Float:
    """Two hues for the last map over a plain or graded background: `(size, size, 3)` in [0, 1]."""
    first, second = _colour(rng, 0.95), _colour(rng, 0.95)
    ink = first + (second - first) * shade[:, :, None]
    size = len(density)
    slope = np.linspace(0, 1, size)[:, None] if rng.random() < 0.5 else np.linspace(0, 1, size)
    ground = (
        _colour(rng, 0.35) + _colour(rng, 0.25) * np.broadcast_to(slope, density.shape)[..., None]
    )
    opacity = density[:, :, None] ** 0.7
    return np.clip(ground * (1 - opacity) + ink * opacity, 0, 1)


def _colour(rng: np.random.Generator, brightness: float) -> Float:
    """A saturated hue: cosine palette at a random phase."""
    phase = rng.uniform(0, 2 * np.pi)
    return brightness * (0.55 + 0.45 * np.cos(phase + np.array([0, 2.1, 4.2])))


def fractal_samples(
    num_classes: int, per_class: int, *, size: int, seed: int, first_instance: int = 0
) -> Iterator[tuple[str, bytes, str, int]]:
    """(key, PNG bytes, "png", label), classes mixed, for `pack_samples`.

    Instances are numbered from `first_instance`: a held-out set takes those after the training's.
    """
    mixed = np.random.default_rng([seed, first_instance, 3]).permutation(num_classes * per_class)
    for number in mixed:
        label, instance = divmod(int(number), per_class)
        instance += first_instance
        file = io.BytesIO()
        Image.fromarray(fractal(seed, label, instance, size)).save(file, "PNG")
        yield f"{label:05d}-{instance:06d}", file.getvalue(), "png", label
