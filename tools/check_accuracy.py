"""Every real model on its real data: the compiled one beside ONNX Runtime on the file, in the model's own measure.

    SPARSEC_DATA=... python tools/check_accuracy.py --targets host arm --share 1

Classifiers: top-1. Voice activity: AUC of the clip's largest probability, states fed back. Denoiser: SI-SNR of the enhanced
speech, states fed back. Face detector: faces with a score above 0.7 after suppression at 0.3. `--share 10` takes every tenth
sample. Parity is checked on samples spread evenly over the data, with the states that ONNX Runtime computed, so that they are
independent: `--samples` of them here, `--emulated` under emulation, where the measure itself would take too long.
Exit code 1 if a measure moves by more than its bar (0.2 points, 0.05 dB, no face), or parity fails.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Arrays]
MEAN, STD = np.float32((0.485, 0.456, 0.406)), np.float32((0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Case:
    """A model: how it is compiled, and a function that measures a `Run` on every n-th sample of the data."""

    measure: Callable[[Run, Path, int], float]
    unit: str
    bar: float
    options: dict[str, Any] = field(default_factory=dict)
    constants: Arrays = field(default_factory=dict)  # inputs of the file that are fixed in the artifact


def top1(samples: Callable[[Path, int], Iterator[tuple[Arrays, int]]]) -> Callable[[Run, Path, int], float]:
    """Percent of samples whose largest output is at the label."""

    def measure(run: Run, data: Path, share: int) -> float:
        right = [int(next(iter(run(x).values())).argmax()) == label for x, label in samples(data, share)]
        return 100 * float(np.mean(right))

    return measure


def imagenet(name: str) -> Callable[[Path, int], Iterator[tuple[Arrays, int]]]:
    """Photographs, resized to 256, cropped to 224, normalized."""

    def samples(data: Path, share: int) -> Iterator[tuple[Arrays, int]]:
        from sparsec.data import load_data
        from sparsec.images import Images
        from sparsec.ports import InputSpec

        mean, std = ("+".join(map(str, v.tolist())) for v in (MEAN, STD))
        images = Images.parse(data / "images" / "imagenet", f"resize=256,crop=224,scale=255,mean={mean},std={std}")
        loaded = load_data(images, [InputSpec(name, (1, 3, 224, 224), "float32")])
        files = sorted((data / "images" / "imagenet").glob("*.jpg"))
        for i, (sample, file) in enumerate(zip(loaded, files, strict=True)):
            if i % share == 0:
                yield {name: sample[name]}, int(file.name.partition("_")[0])

    return samples


def cifar(data: Path, share: int) -> Iterator[tuple[Arrays, int]]:
    held = np.load(data / "cifar10" / "cifar10_test_2000.npz")
    for x, y in zip(held["x"][::share], held["y"][::share], strict=True):
        image = (x.astype(np.float32) / 255 - MEAN) / STD
        yield {"input": np.ascontiguousarray(image.transpose(2, 0, 1)[None].astype(np.float32))}, int(y)


def keywords(data: Path, share: int) -> Iterator[tuple[Arrays, int]]:
    """Clips of one second; labels in the order of the model's outputs."""
    order = ["silence", "unknown", "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go"]
    held = np.load(data / "audio" / "speech_commands_408.npz")
    names = [str(label) for label in held["labels"]]
    for x, y in zip(held["x"][::share], held["y"][::share], strict=True):
        yield {"input_1": (x.astype(np.float32) / 32768)[None]}, order.index(names[int(y)])


def features(data: Path, share: int) -> Iterator[tuple[Arrays, int]]:
    held = np.load(data / "audio" / "kws_mfcc_500.npz")
    for x, y in zip(held["x"][::share], held["y"][::share], strict=True):
        yield (
            {"input_1": ((x.astype(np.float32) - held["zero_point"]) * held["scale"]).astype(np.float32)[None]},
            int(y),
        )


def voice(run: Run, data: Path, share: int) -> float:
    """AUC in percent of speech against noise by the largest probability in a clip."""
    held = np.load(data / "audio" / "speech_commands_408.npz")
    names = [str(label) for label in held["labels"]]
    scores, speech = [], []
    for x, y in zip(held["x"][::share], held["y"][::share], strict=True):
        signal, best = np.concatenate([np.zeros(64, np.float32), x.astype(np.float32) / 32768]), 0.0
        state = np.zeros((2, 1, 128), np.float32)
        for start in range(0, len(x) - 511, 512):
            out = run({"input": signal[None, start : start + 576], "state": state})
            state, best = out["stateN"], max(best, float(out["output"].max()))
        scores.append(best)
        speech.append(names[int(y)] != "silence")
    ranks = np.argsort(np.argsort(scores)) + 1.0
    yes = np.array(speech)
    return 100 * float((ranks[yes].sum() - yes.sum() * (yes.sum() + 1) / 2) / (yes.sum() * (~yes).sum()))


def denoise(run: Run, data: Path, share: int) -> float:
    """Mean SI-SNR in dB of the enhanced speech; a frame at a time. `share`: that part of each file's length."""
    gains = []
    for noisy in sorted((data / "audio" / "dns").glob("*_noisy.wav")):
        x, clean = _wave(noisy), _wave(noisy.with_name(noisy.name.replace("_noisy", "_clean")))
        length = min(len(x), len(clean)) // share
        x, clean = x[:length], clean[:length]
        window = np.sqrt(np.hanning(321)[:320]).astype(np.float64)
        padded = np.pad(x, (160, 320))  # so that every sample is in two frames
        count = 1 + (len(padded) - 320) // 160
        frames = np.stack([padded[160 * i : 160 * i + 320] * window for i in range(count)])
        spectra = np.fft.rfft(frames)
        logs = np.log10(np.maximum(np.abs(spectra) ** 2, 1e-12)).astype(np.float32)
        states = {name: np.zeros((1, 1, 400), np.float32) for name in ("h_in_1", "h_in_2")}
        enhanced = np.zeros(len(padded))
        for i in range(count):
            out = run({"input": logs[None, i : i + 1], **states})
            mask, *new = out.values()
            states = dict(zip(states, new, strict=True))
            enhanced[160 * i : 160 * i + 320] += np.fft.irfft(spectra[i] * mask.reshape(-1)) * window
        gains.append(_si_snr(enhanced[160 : 160 + length], clean))
    return float(np.mean(gains))


def _wave(path: Path) -> np.ndarray:
    with wave.open(str(path)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float64) / 32768


def _si_snr(x: np.ndarray, reference: np.ndarray) -> float:
    x, reference = x - x.mean(), reference - reference.mean()
    part = (x @ reference) / (reference @ reference) * reference
    return float(10 * np.log10((part @ part) / ((x - part) @ (x - part))))


def faces(run: Run, data: Path, share: int) -> float:
    """Faces found in all photographs."""
    from PIL import Image

    count = 0
    for file in sorted((data / "detection").glob("faces_*.jpg"))[::share]:
        image = np.asarray(Image.open(file).convert("RGB").resize((320, 240), Image.Resampling.BILINEAR), np.float32)
        out = run({"input": np.ascontiguousarray(((image - 127) / 128).transpose(2, 0, 1)[None])})
        scores, boxes = out["scores"][0, :, 1], out["boxes"][0]
        left = [i for i in np.argsort(-scores) if scores[i] > 0.7]
        while left:
            count += 1
            left = [i for i in left[1:] if _overlap(boxes[left[0]], boxes[i]) <= 0.3]
    return float(count)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    both = float(np.prod(np.maximum(high - low, 0)))
    return both / float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - both)


CASES = {
    "dscnn_kws_mlperf_tiny": Case(top1(features), "%", 0.2),
    "kwt1_speech_commands": Case(top1(keywords), "%", 0.2),
    "resnet20_cifar10": Case(top1(cifar), "%", 0.2),
    "squeezenet1.1": Case(top1(imagenet("data")), "%", 0.2),
    "mobilenetv2_torchvision": Case(top1(imagenet("input")), "%", 0.2),
    "silero_vad": Case(
        voice, "AUC %", 0.2, {"shapes": {"input": (1, 576), "state": (2, 1, 128)}, "bind": {"sr": 16000}},
        {"sr": np.array(16000)},
    ),
    "nsnet2": Case(
        denoise, "dB", 0.05, {"shapes": {"input": (1, 1, 161), "h_in_1": (1, 1, 400), "h_in_2": (1, 1, 400)}}
    ),
    "ultraface_RFB_320": Case(faces, "faces", 0),
}  # fmt: skip


class Spread:
    """Keeps up to twice `count` samples, evenly spread over all that are shown to it."""

    def __init__(self, count: int) -> None:
        self._most, self._every, self._shown = 2 * count, 1, 0
        self.kept: list[Arrays] = []

    def show(self, sample: Arrays) -> None:
        """One more sample."""
        if self._shown % self._every == 0:
            self.kept.append(sample)
        if len(self.kept) > self._most:
            self.kept, self._every = self.kept[::2], 2 * self._every
        self._shown += 1

    def some(self, count: int) -> list[Arrays]:
        """At most `count` of them, evenly spread."""
        return [self.kept[i] for i in sorted({int(i) for i in np.linspace(0, len(self.kept) - 1, count)})]


def check(name: str, target: str, share: int, count: int, data: Path) -> list[str]:
    """One row; "FAILED" stands last if it failed. Runs in a process of its own, so that memory is given back."""
    import sparsec
    from sparsec.runtimes.base import find_runtime
    from sparsec.runtimes.ort import OrtSession

    case, file = CASES[name], data / "models" / f"{name}.onnx"
    seen = Spread(count)
    with tempfile.TemporaryDirectory() as folder, OrtSession(file.read_bytes(), where=name) as reference:
        artifact = sparsec.compile(str(file), target, output=Path(folder) / "model.sparsec", **case.options)

        def original(x: Arrays) -> Arrays:
            seen.show(x)
            return dict(reference.run({**x, **case.constants}))

        expected = case.measure(original, data, share)
        if target == "host":
            with find_runtime(None, artifact).open(artifact) as session:
                got = case.measure(lambda x: dict(session.run(x)), data, share)
        else:
            got = expected
        join = {spec.name: np.concatenate if spec.shape[:1] == (1,) else np.stack for spec in artifact.inputs}
        stacked = {name: along([x[name] for x in seen.some(count)]) for name, along in join.items()}
        found = artifact.verify(data=stacked)
        worst = found.worst
    passed = found.passed and abs(got - expected) <= case.bar + 1e-9
    measured = [f"{expected:.2f}", f"{got:.2f}"] if target == "host" else ["-", "-"]
    error = f"{worst.max_relative_error:.1e} of {worst.tolerance:.1e}"
    return [name, target, *measured, case.unit, str(found.samples), error, "ok" if passed else "FAILED"]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", nargs="+", default=["host", "arm"])
    parser.add_argument("--models", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--share", type=int, default=1, help="every n-th sample")
    parser.add_argument("--samples", type=int, default=100, help="samples of which parity is checked here")
    parser.add_argument("--emulated", type=int, default=4, help="samples of which parity is checked under emulation")
    parser.add_argument("--row", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "SPARSEC_DATA" not in os.environ:
        parser.error("set SPARSEC_DATA to the folder with models and data")
    if options.row:
        count = options.samples if options.row[1] == "host" else options.emulated
        print("\t".join(check(*options.row, options.share, count, Path(os.environ["SPARSEC_DATA"]))))
        return 0
    table = Table("model", "target", "ONNX Runtime", "sparsec", "unit", "samples", "parity error", "")
    failed = False
    for target in options.targets:
        for name in options.models:
            given = {"--share": options.share, "--samples": options.samples, "--emulated": options.emulated}
            numbers = [str(part) for pair in given.items() for part in pair]
            command = [sys.executable, __file__, *numbers, "--row", name, target]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = done.stdout.strip().splitlines() if done.returncode == 0 else []
            why = (done.stderr.strip().splitlines() or ["no output"])[-1]
            row = lines[-1].split("\t") if lines else [name, target, "-", "-", "-", "-", why, "FAILED"]
            failed |= row[-1] == "FAILED"
            print("\t".join(row), file=sys.stderr, flush=True)
            table.add_row(*row)
    Console(width=150).print(table)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
