"""A folder of images as samples: what is done to their pixels, and the one input that takes them. Decoded one at a time."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparsec.errors import DataError, UsageError
from sparsec.ports import InputSpec

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm"})
MAX_PIXELS = 1 << 26  # 67 megapixels: more is a decompression bomb, not a calibration image


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


class ImageData:
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
