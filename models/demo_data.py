"""The demo model's images: ten shapes among clutter, drawn from integers alone, the same bits on every machine.

Randomness is the raw 64-bit stream of PCG64 (NumPy promises that stream, not what its distributions make of it), one
stream an image, so the first k images of any count are the same. Drawing uses only + - * / sqrt min max, which IEEE 754
rounds exactly: rotations are rational, (1 - t^2, 2t) / (1 + t^2), and there is no sin, exp or sum of floats.

A picture, in this order: a background blended from a 4x4 grid of colours, strokes behind, the shape (signed distance,
antialiased, rotated, scaled, stretched, of low or high contrast), strokes in front, noise, 8-bit rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike

import numpy as np
from numpy.typing import NDArray

from sparsec.errors import UsageError

SIZE = 32  # pixels a side
CHANNELS = 3
SPLITS = ("train", "calibration", "test")

Plane = NDArray[np.float64]
Shape = Callable[[Plane, Plane], Plane]


def _box(u: Plane, v: Plane, half_width: float, half_height: float) -> Plane:
    return np.maximum(np.abs(u) - half_width, np.abs(v) - half_height)


def _disk(u: Plane, v: Plane, radius: float) -> Plane:
    return np.sqrt(u * u + v * v) - radius


# Signed distance (negative inside) in the shape's own coordinates; the shape fits the circle of radius 1.
SHAPES: dict[str, Shape] = {
    "disk": lambda u, v: _disk(u, v, 0.85),
    "ring": lambda u, v: np.abs(_disk(u, v, 0.68)) - 0.2,
    "square": lambda u, v: _box(u, v, 0.72, 0.72),
    "frame": lambda u, v: np.abs(_box(u, v, 0.58, 0.58)) - 0.18,
    "triangle": lambda u, v: np.maximum(-v - 0.5, 0.866 * np.abs(u) + 0.5 * v - 0.5),
    "cross": lambda u, v: np.minimum(_box(u, v, 0.9, 0.24), _box(u, v, 0.24, 0.9)),
    "tee": lambda u, v: np.minimum(_box(u, v + 0.55, 0.8, 0.24), _box(u, v - 0.1, 0.24, 0.8)),
    "crescent": lambda u, v: np.maximum(_disk(u, v, 0.9), -_disk(u - 0.45, v, 0.65)),
    "half": lambda u, v: np.maximum(_disk(u, v + 0.3, 0.95), -v - 0.3),
    "bars": lambda u, v: np.minimum(_box(np.abs(u) - 0.62, v, 0.17, 0.8), _box(u, v, 0.17, 0.8)),
}
LABELS = tuple(SHAPES)

_V, _U = (axis.astype(np.float64) + 0.5 for axis in np.indices((SIZE, SIZE)))


class _Stream:
    """Numbers for one image."""

    def __init__(self, split: str, seed: int, index: int) -> None:
        self._bits = np.random.PCG64([SPLITS.index(split), seed, index])

    def integer(self, below: int) -> int:
        return int(self._bits.random_raw()) % below

    def uniform(self, low: float, high: float, count: int | None = None) -> Plane:
        """`count` values (a scalar for None) in [low, high), on a grid of 2^-24 of the range."""
        raw = np.asarray(self._bits.random_raw(count), np.uint64) >> np.uint64(40)
        return low + (high - low) * (raw.astype(np.float64) / 2.0**24)

    def noise(self, count: int) -> Plane:
        """`count` (even) values of mean 0 and deviation 1, nearly normal: sums of four bytes."""
        octets = np.asarray(self._bits.random_raw(count // 2), np.uint64).astype("<u8").view(np.uint8).reshape(count, 4)
        return (octets.astype(np.int64).sum(axis=1) - 510) / 147.8

    def rotation(self) -> tuple[float, float]:
        """Cosine and sine of a random angle."""
        t = float(self.uniform(-1, 1))
        c, s = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
        return (c, s) if self.integer(2) else (-c, s)


def _blend(image: Plane, distance: Plane, colour: Plane) -> None:
    """Paint where `distance` (pixels) is negative, one pixel of antialiasing."""
    cover = np.clip(0.5 - distance, 0.0, 1.0)
    image += cover * (colour[:, None, None] - image)


def _background(stream: _Stream) -> Plane:
    base = stream.uniform(0.2, 0.8, CHANNELS)
    grid = (base[:, None] + stream.uniform(-0.22, 0.22, CHANNELS * 16).reshape(CHANNELS, 16)).reshape(CHANNELS, 4, 4)
    at = (np.arange(SIZE) + 0.5) * (3.0 / SIZE)
    low = np.minimum(at.astype(np.int64), 2)
    part = at - low
    rows = grid[:, low] * (1 - part)[:, None] + grid[:, low + 1] * part[:, None]
    return rows[:, :, low] * (1 - part) + rows[:, :, low + 1] * part


def _strokes(stream: _Stream, image: Plane, count: int) -> None:
    """Short thick segments of random colours anywhere."""
    for _ in range(count):
        cos, sin = stream.rotation()
        cx, cy = stream.uniform(0, SIZE, 2)
        u = (_U - cx) * cos + (_V - cy) * sin
        v = (_V - cy) * cos - (_U - cx) * sin
        half_length = float(stream.uniform(1.0, 6.0))
        along = np.maximum(np.abs(u) - half_length, 0.0)
        distance = np.sqrt(along * along + v * v) - float(stream.uniform(0.5, 1.2))
        _blend(image, distance, stream.uniform(0.0, 1.0, CHANNELS))


def _image(stream: _Stream) -> tuple[NDArray[np.float32], int]:
    label = stream.integer(len(LABELS))
    image = _background(stream)
    _strokes(stream, image, stream.integer(6))

    cos, sin = stream.rotation()
    radius = float(stream.uniform(6.0, 12.5))
    stretch = float(stream.uniform(0.8, 1.25))
    cx, cy = SIZE / 2 + stream.uniform(-1.0, 1.0, 2) * (SIZE / 2 - 0.8 * radius)
    u = ((_U - cx) * cos + (_V - cy) * sin) / radius
    v = ((_V - cy) * cos - (_U - cx) * sin) / (radius * stretch)
    distance = SHAPES[LABELS[label]](u, v) * radius
    # The contrast to the mean background: each channel lighter or darker, at least one of them clearly.
    contrast = stream.uniform(-0.5, 0.5, CHANNELS)
    strong = stream.integer(CHANNELS)
    strength = float(stream.uniform(0.25, 0.5))
    contrast[strong] = strength if stream.integer(2) else -strength
    middle = image[:, SIZE // 2, SIZE // 2] if stream.integer(2) else image[:, int(cy), int(cx)]
    _blend(image, distance, middle + contrast)

    _strokes(stream, image, stream.integer(3))
    sigma = float(stream.uniform(0.01, 0.09))
    image += sigma * stream.noise(image.size).reshape(image.shape)
    levels = np.clip(np.floor(image * 255.0 + 0.5), 0.0, 255.0)
    return ((levels - 128.0) / 64.0).astype(np.float32), label


def generate(split: str, count: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """`count` images [count, 3, 32, 32] in [-2, 2) and their labels, indices into `LABELS`.

    Splits share no image. The first k of any count are the same k images.
    """
    if split not in SPLITS:
        raise UsageError(f"unknown split {split!r}, expected one of {', '.join(SPLITS)}", where="demo data")
    if count < 1 or seed < 0:
        raise UsageError(f"expected count >= 1 and seed >= 0, got count={count}, seed={seed}", where="demo data")
    images = np.empty((count, CHANNELS, SIZE, SIZE), np.float32)
    labels = np.empty(count, np.int64)
    for index in range(count):
        images[index], labels[index] = _image(_Stream(split, seed, index))
    return images, labels


def write_data(path: str | PathLike[str], count: int = 500, split: str = "test", seed: int = 0) -> None:
    """Write an .npz for `--data` and `--calibration`: `input` [count, 3, 32, 32] float32, `label` [count] int64."""
    images, labels = generate(split, count, seed)
    with open(path, "wb") as file:
        np.savez_compressed(file, input=images, label=labels)
