"""Models that `factorize_table.py` measures, with what they are calibrated with and measured on."""

from __future__ import annotations

import os
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import prune_table

FOLDER = Path(os.environ.get("SPARSEC_DATA", ""))
FILES = {**prune_table.FILES, "nsnet2": "nsnet2.onnx"}
FRAMES = 50  # of one sample of nsnet2
Samples = dict[str, np.ndarray]  # [N, 1, ...] by input name: a batch of one in front of each sample


@dataclass(frozen=True)
class Case:
    """A model with what it is calibrated with and measured on; labels where there are any."""

    name: str
    load: Callable[[], Any]
    calibration: Samples
    held: Samples
    labels: np.ndarray | None = None


def thinned(given: Case, calibration: int, held: int) -> Case:
    """With at most so many samples, evenly spread; 0: all."""

    def some(samples: Samples, count: int) -> tuple[Samples, np.ndarray]:
        total = len(next(iter(samples.values())))
        picked = np.unique(np.linspace(0, total - 1, min(count or total, total)).round().astype(int))
        return {name: x[picked] for name, x in samples.items()}, picked

    (own, _), (other, picked) = some(given.calibration, calibration), some(given.held, held)
    labels = None if given.labels is None else given.labels[picked]
    return Case(given.name, given.load, own, other, labels)


def case(name: str) -> Case:
    """By name."""
    from sparsec.loading.load import load_model

    path = FOLDER / "models" / FILES[name]
    if name == "nsnet2":
        one, *others = (features(f) for f in sorted((FOLDER / "audio/dns").glob("*_noisy.wav")))
        return Case(
            name, lambda: load_model(path, {"input": (1, FRAMES, 161)}), states(one), states(np.concatenate(others))
        )
    (calibration, _), (x, y) = prune_table.DATA[name](FOLDER)
    source = str(load_model(path).graph.inputs[0].name)
    return Case(name, lambda: load_model(path), {source: calibration[:, None]}, {source: x[:, None]}, y)


def features(path: Path) -> np.ndarray:
    """Log power spectra of a recording, [N, FRAMES, 161]."""
    with wave.open(str(path)) as stream:
        x = np.frombuffer(stream.readframes(stream.getnframes()), "<i2") / 32768
    frames = np.lib.stride_tricks.sliding_window_view(x, 320)[::160] * np.sqrt(np.hanning(321)[:-1])
    spectra = np.log10(np.maximum(np.abs(np.fft.rfft(frames)) ** 2, 1e-12)).astype(np.float32)
    return spectra[: len(spectra) // FRAMES * FRAMES].reshape(-1, FRAMES, 161)


def states(x: np.ndarray) -> Samples:
    """The inputs of nsnet2 with states of zeros."""
    zeros = np.zeros((len(x), 1, 1, 400), np.float32)
    return {"input": x[:, None], "h_in_1": zeros, "h_in_2": zeros}


def outputs(model: Any, samples: Samples) -> np.ndarray:
    """The model's first output of each sample, [N, ...]."""
    from sparsec.passes.measure.segments import Segment

    result = str(model.graph.outputs[0].name)
    segment = Segment(model, None, [result])
    count = len(next(iter(samples.values())))
    parts = [segment.run({n: x[i : i + 16] for n, x in samples.items()})[result] for i in range(0, count, 16)]
    return np.concatenate(parts)


def stream(samples: Samples) -> list[Samples]:
    """One dict a sample."""
    return [{n: x[i] for n, x in samples.items()} for i in range(len(next(iter(samples.values()))))]


def stacked(samples: Samples) -> Samples:
    """[N, ...] without the batch of one, as `sparsec.rewrite` takes them."""
    return {name: x[:, 0] for name, x in samples.items()}
