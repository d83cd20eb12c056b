"""How far a model's outputs are from the original's, as one number that needs no labels.

For each output y of a sample, y0 that of the original model:

    classifier   y [C] or [1, C, 1...], C >= 2:   KL(softmax(y0) || softmax(y)) in nats; outputs that are probabilities
                 already (none negative, sum 1) are not softmaxed again
    any other                                     |y - y0|^2 / |y0|^2

The damage of a model is the mean over samples and outputs; the drop is the share of samples whose top class changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TINY = 1e-12  # of a probability, before its logarithm
CERTAIN = 1e-3  # how near to 1 probabilities sum
BROKEN = 1e6  # damage of outputs that are not finite


def is_classifier(shape: Sequence[int]) -> bool:
    """Whether an output of this shape is one score for each of at least two classes."""
    sizes = [d for d in shape if d != 1]
    return len(sizes) == 1 and (len(shape) == 1 or (shape[0] == 1 and shape[1] == sizes[0]))


def log_softmax(y: np.ndarray) -> np.ndarray:
    """log(softmax) over the last axis, float64."""
    shifted = y - y.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Fidelity:
    """Compares outputs with those of the original model, `reference`: one array [samples, ...] for each output.

    Raises ValueError for arrays of another number or shape than the reference's.
    """

    def __init__(self, names: Sequence[str], reference: Sequence[np.ndarray]) -> None:
        self._names = tuple(names)
        self._reference = [np.asarray(y, np.float64) for y in reference]
        self._log: list[np.ndarray | None] = []
        self._probabilities: list[bool] = []
        for y in self._reference:
            flat = y.reshape(len(y), -1)
            probable = bool(np.all(flat >= 0) and np.all(np.abs(flat.sum(axis=1) - 1) < CERTAIN))
            self._probabilities.append(probable)
            self._log.append(_logs(flat, probable) if is_classifier(y.shape[1:]) else None)

    @property
    def classifies(self) -> bool:
        """Whether any output is a classifier's, so that a drop is defined."""
        return any(log is not None for log in self._log)

    def __str__(self) -> str:
        kinds = []
        for name, log, probable in zip(self._names, self._log, self._probabilities, strict=True):
            of = "" if probable else " of the softmax"
            kinds.append(f"{name}: {'relative squared error' if log is None else f'KL{of}, {log.shape[1]} classes'}")
        return "; ".join(kinds)

    def damages(self, outputs: Sequence[np.ndarray], rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Damage of each sample, the mean over outputs; `rows`: which samples of the reference they are."""
        total: np.ndarray | float = 0.0
        for y, y0, log, probable in zip(outputs, self._reference, self._log, self._probabilities, strict=True):
            a, b = np.asarray(y, np.float64).reshape(len(y), -1), y0[rows].reshape(len(y), -1)
            if a.shape != b.shape:
                raise ValueError(f"expected outputs of shape {b.shape}, got {a.shape}")
            if log is None:
                size = np.square(b).sum(axis=1)
                total = total + np.square(a - b).sum(axis=1) / np.where(size > 0, size, 1.0)
            else:
                p = log[rows]
                total = total + (np.exp(p) * (p - _logs(a, probable))).sum(axis=1)
        return np.nan_to_num(np.asarray(total) / len(self._reference), nan=BROKEN, posinf=BROKEN)

    def changed(self, outputs: Sequence[np.ndarray], rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Of each sample, whether the top class of any classifying output changed."""
        different = np.zeros(len(outputs[0]), bool)
        for y, log in zip(outputs, self._log, strict=True):
            if log is not None:
                different |= np.asarray(y).reshape(len(y), -1).argmax(axis=1) != log[rows].argmax(axis=1)
        return different


def _logs(y: np.ndarray, probable: bool) -> np.ndarray:
    return np.log(np.maximum(y, TINY)) if probable else log_softmax(y)
