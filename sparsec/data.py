"""DATA: samples for calibration and verification, from an `.npz`, a folder of images, or arrays in memory.

Rules. An `.npz` is keyed by input name and holds N preprocessed samples of the input's shape: where
the input's first dimension is 1, N replaces it, else N stands before it; a first axis of 1 serves every sample; a
missing input is zeros; `label`, optional, is one integer a sample. A folder of images needs a preprocess spec; the
label is the integer before the first `_` of the file name. Images are decoded one at a time. Nothing is unpickled.

Samples come in the inputs' own types: for an input of 8 bits, floats are quantized; whole numbers are taken for stored ones.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx_ir as ir

from sparsec.errors import DataError, UsageError
from sparsec.npz import read_npy, read_npz, write_npz

__all__ = [
    "Data",
    "Images",
    "InputSpec",
    "check_inputs",
    "input_spec",
    "load_data",
    "read_npy",
    "read_npz",
    "write_npz",
]

LABEL = "label"
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm"})
MAX_PIXELS = 1 << 26  # 67 megapixels: more is a decompression bomb, not a calibration image


@dataclass(frozen=True)
class Quantization:
    """What whole numbers of 8 bits stand for: real = scale * (stored - zero_point)."""

    scale: float  # a float32
    zero_point: int

    def __str__(self) -> str:
        return f"real = {self.scale:.7g} * (stored - {self.zero_point})".replace("- -", "+ ")

    def quantize(self, real: np.ndarray, dtype: str) -> np.ndarray:
        """As ONNX's QuantizeLinear: divided in float32, rounded half to even, saturated. `dtype`: int8 or uint8.

        >>> Quantization(0.5, 128).quantize(np.array([0.25, 0.75, 100.0]), "uint8")
        array([128, 130, 255], dtype=uint8)
        """
        limits = np.iinfo(dtype)
        steps = np.rint(np.asarray(real, np.float32) / np.float32(self.scale)).astype(np.float64) + self.zero_point
        return np.clip(steps, limits.min, limits.max).astype(dtype)

    def dequantize(self, stored: np.ndarray) -> np.ndarray:
        """As ONNX's DequantizeLinear: float32."""
        return (stored.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale)


@dataclass(frozen=True)
class InputSpec:
    """An input or output of a model: `dtype` is NumPy's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    quantization: Quantization | None = None

    def stored(self, array: np.ndarray) -> np.ndarray:
        """`array` as the port takes it: floats for an 8-bit port are quantized."""
        if self.quantization is None or array.dtype.kind != "f":
            return array
        return self.quantization.quantize(array, self.dtype)

    def real(self, array: np.ndarray) -> np.ndarray:
        """The numbers that the port's `array` stands for: float32 where the port is quantized."""
        return array if self.quantization is None or array.dtype.kind == "f" else self.quantization.dequantize(array)


def input_spec(value: ir.Value) -> InputSpec:
    """The spec of a model's input, whose shape is static."""
    assert value.shape is not None and value.dtype is not None
    return InputSpec(str(value.name), tuple(int(str(d)) for d in value.shape), str(value.dtype.numpy()))


class Data(Protocol):
    """A finite stream of samples; iterating again starts again."""

    labels: np.ndarray | None  # int64 [N], the model's own class order

    @property
    def digest(self) -> str:
        """sha256 of the content."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...

    def reals(self) -> Iterator[dict[str, np.ndarray]]:
        """The same samples with real numbers for inputs of 8 bits: not quantized where they were given so."""


@dataclass(frozen=True)
class Images:
    """A folder of images with its preprocessing: resize, centre crop, then (pixel / scale - mean) / std.

    `resize`: the shorter side in pixels, or (height, width) exactly; bilinear. `crop`: square side in pixels, or
    (height, width). `color`: rgb, bgr or gray. `layout`: nchw or nhwc.

    >>> Images.parse("photos", "resize=256,crop=224,mean=0.485+0.456+0.406").mean
    (0.485, 0.456, 0.406)
    """

    folder: str | Path
    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    scale: float = 255.0
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    color: str = "rgb"
    layout: str = "nchw"

    def __post_init__(self) -> None:
        channels = 1 if self.color == "gray" else 3
        _choice("color", self.color, ("rgb", "bgr", "gray"))
        _choice("layout", self.layout, ("nchw", "nhwc"))
        for key in ("resize", "crop"):
            value = getattr(self, key)
            sides = () if value is None else value if isinstance(value, tuple) else (value,)
            if len(sides) > 2 or any(side < 1 for side in sides):
                raise UsageError(f"{key} takes pixels or HEIGHTxWIDTH, got {value!r}", "preprocess")
        for key in ("mean", "std"):
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) not in (1, channels):
                raise UsageError(
                    f"{key} has {len(value)} values, expected 1 or {channels} for color={self.color}", "preprocess"
                )
        if not self.scale or np.any(np.asarray(self.std) == 0):
            raise UsageError("scale and std must not be 0", "preprocess")

    @classmethod
    def parse(cls, folder: str | Path, spec: str) -> Images:
        """Read a `--preprocess` spec: `key=value,...`, lists with `+`, two sides with `x`."""
        from sparsec.targets import suggest

        known = [f.name for f in dataclasses.fields(cls) if f.name != "folder"]
        options: dict[str, object] = {}
        for part in filter(None, spec.split(",")):
            key, equals, value = part.partition("=")
            key = key.strip()
            if not equals or key not in known:
                raise UsageError(f"unknown option {part!r}{suggest(key, known)}", "--preprocess")
            if key in options:
                raise UsageError(f"{key} is given twice", "--preprocess")
            try:
                options[key] = _preprocess_value(key, value.strip().lower())
            except ValueError:
                raise UsageError(f"{key} does not accept {value!r}", "--preprocess") from None
        return cls(folder, **options)  # type: ignore[arg-type]

    def files(self) -> list[Path]:
        """The images, by name. Raises DataError if there are none."""
        folder = Path(self.folder)
        try:
            found = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        except OSError as error:
            raise DataError(f"cannot list the folder: {error.strerror}", str(folder)) from error
        if not found:
            raise DataError(f"no image in the folder (looked for {', '.join(sorted(IMAGE_SUFFIXES))})", str(folder))
        return found

    def load(self, path: Path) -> np.ndarray:
        """One image as float32 `[C, H, W]` or `[H, W, C]`, without a batch axis."""
        pixels = self._pixels(path)
        x: np.ndarray = pixels.astype(np.float32)
        if x.ndim == 2:
            x = x[:, :, None]
        if self.color == "bgr":
            x = x[:, :, ::-1]
        x = (x / np.float32(self.scale) - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(x.transpose(2, 0, 1) if self.layout == "nchw" else x, dtype=np.float32)

    def _pixels(self, path: Path) -> np.ndarray:
        """uint8 `[H, W, 3]` or `[H, W]`, resized and cropped."""
        from PIL import Image

        try:
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise DataError(
                        f"the image has {image.width}x{image.height} pixels, more than {MAX_PIXELS}", str(path)
                    )
                picture = image.convert("L" if self.color == "gray" else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"not a readable image: {error}", str(path)) from error
        if self.resize is not None:
            picture = picture.resize(self._resized(picture.width, picture.height), Image.Resampling.BILINEAR)
        if self.crop is not None:
            height, width = self.crop if isinstance(self.crop, tuple) else (self.crop, self.crop)
            if height > picture.height or width > picture.width:
                raise DataError(
                    f"the crop {height}x{width} is larger than the image {picture.height}x{picture.width}"
                    " (height x width); give a larger resize", str(path),
                )  # fmt: skip
            top, left = round((picture.height - height) / 2), round((picture.width - width) / 2)
            picture = picture.crop((left, top, left + width, top + height))
        return np.asarray(picture)

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        assert self.resize is not None
        if width <= height:
            return self.resize, int(self.resize * height / width)
        return int(self.resize * width / height), self.resize


def _choice(key: str, value: str, known: tuple[str, ...]) -> None:
    from sparsec.targets import suggest

    if value not in known:
        raise UsageError(
            f"{key} is one of {', '.join(known)}, got {value!r}{suggest(value, list(known))}", "preprocess"
        )


def _preprocess_value(key: str, text: str) -> object:
    if key in ("color", "layout"):
        return text
    if key in ("resize", "crop"):
        sides = tuple(int(side) for side in text.split("x"))
        return sides[0] if len(sides) == 1 else sides
    if key == "scale":
        return _finite(text)
    values = tuple(_finite(v) for v in text.split("+"))
    return values[0] if len(values) == 1 else values


def _finite(text: str) -> float:
    value = float(text)
    if not np.isfinite(value):
        raise ValueError(text)
    return value


class _ImageData:
    """Images as samples of one input; the other inputs are zeros."""

    def __init__(self, images: Images, inputs: Sequence[InputSpec]) -> None:
        self._images = images
        self._files = images.files()
        self._rest = {spec.name: np.zeros(spec.shape, spec.dtype) for spec in inputs}
        self._input = _image_input(inputs, images)
        labels = [_file_label(path) for path in self._files]
        self.labels = None if any(label is None for label in labels) else np.asarray(labels, np.int64)

    @property
    def digest(self) -> str:
        options = {k: v for k, v in dataclasses.asdict(self._images).items() if k != "folder"}
        hasher = hashlib.sha256(repr(sorted(options.items())).encode())
        for path in self._files:
            hasher.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        return hasher.hexdigest()

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        spec = self._input
        for sample in self.reals():
            x = sample[spec.name]
            if spec.quantization is None and np.dtype(spec.dtype).kind in "iu":
                limits = np.iinfo(spec.dtype)
                x = np.clip(np.rint(x), limits.min, limits.max)
            yield {**self._rest, spec.name: spec.stored(x).astype(spec.dtype)}

    def reals(self) -> Iterator[dict[str, np.ndarray]]:
        spec = self._input
        for path in self._files:
            x = self._images.load(path)
            if x.size != int(np.prod(spec.shape)) or x.shape != tuple(spec.shape[-3:]):
                raise DataError(
                    f"input {spec.name!r} expects {list(spec.shape)}, the preprocessed image is {list(x.shape)};"
                    " check resize, crop, color and layout of --preprocess", str(path),
                )  # fmt: skip
            yield {**self._rest, spec.name: x.reshape(spec.shape)}


def _image_input(inputs: Sequence[InputSpec], images: Images) -> InputSpec:
    """The input that takes the image: the only one of at least three axes."""
    fitting = [spec for spec in inputs if len(spec.shape) in (3, 4)]
    if len(fitting) != 1:
        shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in inputs)
        raise DataError(
            f"images need a model with one input of 3 or 4 axes, got {shapes}; use an .npz", str(images.folder)
        )
    return fitting[0]


def _file_label(path: Path) -> int | None:
    head = path.name.split("_", 1)[0]
    return int(head) if "_" in path.name and head.isascii() and head.isdigit() else None


class _ArrayData:
    """Samples in arrays keyed by input name."""

    def __init__(self, arrays: Mapping[str, np.ndarray], inputs: Sequence[InputSpec], where: str, digest: str) -> None:
        from sparsec.targets import suggest

        names = [spec.name for spec in inputs]
        for name in arrays:
            if name not in names and name != LABEL:
                raise DataError(f"holds {name!r}, which is no input of the model{suggest(name, names)}", where)
        if not any(name in arrays for name in names):
            raise DataError(f"holds none of the model's inputs: {', '.join(names)}", where)
        self.digest = digest
        self._inputs = tuple(inputs)
        self._arrays = {spec.name: _samples(arrays[spec.name], spec, where) for spec in inputs if spec.name in arrays}
        label = arrays.get(LABEL) if LABEL not in names else None
        counts = {name: len(a) for name, a in self._arrays.items()}
        if label is not None:
            counts[LABEL] = np.asarray(label).shape[0] if np.asarray(label).ndim else 1
        several = {count for count in counts.values() if count != 1}
        if len(several) > 1:
            listing = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise DataError(f"the arrays differ in their number of samples: {listing}", where)
        self._count = several.pop() if several else 1
        if self._count == 0:
            raise DataError("holds no sample", where)
        self.labels = None if label is None else _labels(np.asarray(label), self._count, where)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for given in self._given():
            yield {s.name: np.asarray(s.stored(given[s.name]), dtype=s.dtype, order="C") for s in self._inputs}

    def reals(self) -> Iterator[dict[str, np.ndarray]]:
        for given in self._given():
            yield {
                s.name: np.asarray(s.real(given[s.name]), "float32" if s.quantization else s.dtype, order="C")
                for s in self._inputs
            }

    def _given(self) -> Iterator[dict[str, np.ndarray]]:
        """Samples in the types that they came in; zeros where nothing is given."""
        for i in range(self._count):
            sample = {}
            for spec in self._inputs:
                array = self._arrays.get(spec.name)
                one = (
                    np.zeros(spec.shape, "f" if spec.quantization else spec.dtype)
                    if array is None
                    else array[i if len(array) > 1 else 0]
                )
                sample[spec.name] = one.reshape(spec.shape)
            yield sample


def _samples(array: np.ndarray, spec: InputSpec, where: str) -> np.ndarray:
    """`array` checked against the N rule: `[N, ...]` of `spec`'s shape."""
    array = np.asarray(array)
    rest = tuple(spec.shape[1:]) if spec.shape and spec.shape[0] == 1 else tuple(spec.shape)
    if array.ndim != len(rest) + 1 or tuple(array.shape[1:]) != rest:
        raise DataError(f"input {spec.name!r} expects [N, {', '.join(map(str, rest))}], got {list(array.shape)}", where)
    _check_dtype(array, spec, where)
    return array


def _check_dtype(array: np.ndarray, spec: InputSpec, where: str) -> None:
    wanted, got = np.dtype(spec.dtype), array.dtype
    if spec.quantization is not None and got.kind == "f":
        return
    integers = got.kind in "iu" and wanted.kind in "iu"
    if integers or (got.kind == wanted.kind == "f") or np.can_cast(got, wanted, "safe"):
        if integers and array.size:
            limits = np.iinfo(wanted)
            if array.min() < limits.min or array.max() > limits.max:
                raise DataError(f"input {spec.name!r} holds values outside of {wanted}", where)
        return
    raise DataError(f"input {spec.name!r} expects {wanted}, got {got}", where)


def _labels(label: np.ndarray, count: int, where: str) -> np.ndarray:
    if label.dtype.kind not in "iu" or label.size != count or label.ndim > 2:
        raise DataError(
            f"'label' must be one integer a sample: expected [{count}], got {label.dtype} {list(label.shape)}", where
        )
    return label.reshape(-1).astype(np.int64)


def check_inputs(
    arrays: Mapping[str, np.ndarray], inputs: Sequence[InputSpec], where: str = "inputs"
) -> dict[str, np.ndarray]:
    """Exactly one sample for `run`: every input present, of the exact shape; contiguous, cast to the input's dtype."""
    from sparsec.targets import suggest

    names = [spec.name for spec in inputs]
    for name in arrays:
        if name not in names:
            raise DataError(f"{name!r} is no input of the model{suggest(name, names)}", where)
    checked = {}
    for spec in inputs:
        if spec.name not in arrays:
            raise DataError(f"input {spec.name!r} is missing: expected {spec.dtype} {list(spec.shape)}", where)
        array = np.asarray(arrays[spec.name])
        if array.shape != tuple(spec.shape):
            raise DataError(f"input {spec.name!r} expects shape {list(spec.shape)}, got {list(array.shape)}", where)
        if spec.quantization is not None and array.dtype.kind == "f":
            text = (
                f"input {spec.name!r} takes {spec.dtype}, got {array.dtype}; `Artifact.quantize` turns floats into it"
            )
            raise DataError(text, where)
        _check_dtype(array, spec, where)
        checked[spec.name] = np.asarray(array, dtype=spec.dtype, order="C")
    return checked


def load_data(
    source: str | Path | Mapping[str, np.ndarray] | Images,
    inputs: Sequence[InputSpec],
    preprocess: str | None = None,
) -> Data:
    """Open DATA for a model with `inputs`. Raises DataError or UsageError, one line each.

    `source`: an `.npz`, a folder of images (with `preprocess`), arrays keyed by input name, or `Images`.
    """
    if isinstance(source, Images):
        return _ImageData(source, inputs)
    if isinstance(source, Mapping):
        hasher = hashlib.sha256()
        for name in sorted(source):
            array = np.ascontiguousarray(source[name])
            hasher.update(f"{name}\0{array.dtype.str}{array.shape}\0".encode() + array.tobytes())
        return _ArrayData(source, inputs, "data", hasher.hexdigest())
    path = Path(source)
    if path.is_dir():
        if preprocess is None:
            raise UsageError("a folder of images needs --preprocess, e.g. resize=256,crop=224,scale=255", str(path))
        return _ImageData(Images.parse(path, preprocess), inputs)
    if preprocess is not None:
        raise UsageError("--preprocess is for a folder of images; an .npz is preprocessed already", str(path))
    if not path.exists():
        raise DataError("no such file or folder; expected an .npz or a folder of images", str(path))
    arrays = read_npz(path)
    return _ArrayData(arrays, inputs, str(path), hashlib.sha256(path.read_bytes()).hexdigest())
