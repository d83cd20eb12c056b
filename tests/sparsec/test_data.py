"""DATA: the N rule, labels, images, and one clear line for everything that does not fit."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparsec.data import load_data
from sparsec.errors import DataError, SparsecError, UsageError
from sparsec.images import Images
from sparsec.npz import read_npy, read_npz
from sparsec.ports import InputSpec, check_inputs

X = InputSpec("x", (1, 3, 4, 4), "float32")
STATE = InputSpec("state", (2, 5), "float32")
STEP = InputSpec("step", (), "int64")


def save(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_first_axis_of_one_is_replaced_by_n_and_others_get_n_in_front(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, state, step = rng.random((7, 3, 4, 4), np.float32), rng.random((7, 2, 5), np.float32), np.arange(7)
    data = load_data(save(tmp_path / "d.npz", x=x, state=state, step=step), [X, STATE, STEP])
    samples = list(data)
    assert len(data) == len(samples) == 7
    for i, sample in enumerate(samples):
        assert {n: a.shape for n, a in sample.items()} == {"x": (1, 3, 4, 4), "state": (2, 5), "step": ()}
        np.testing.assert_array_equal(sample["x"][0], x[i])
        np.testing.assert_array_equal(sample["state"], state[i])
        assert sample["step"] == i


def test_axis_of_one_serves_every_sample_and_missing_is_zeros(tmp_path: Path) -> None:
    data = load_data(
        save(tmp_path / "d.npz", x=np.ones((3, 3, 4, 4), np.float32), step=np.full(1, 9)), [X, STATE, STEP]
    )
    for sample in data:
        assert sample["step"] == 9
        assert not sample["state"].any()
    assert data.labels is None


def test_labels(tmp_path: Path) -> None:
    x = np.zeros((3, 3, 4, 4), np.float32)
    data = load_data(save(tmp_path / "d.npz", x=x, label=np.array([2, 0, 1], np.int16)), [X])
    assert data.labels is not None
    assert data.labels.tolist() == [2, 0, 1]
    for wrong in (np.array([1.0, 2.0, 3.0]), np.array([1, 2]), np.zeros((3, 3), int)):
        with pytest.raises(DataError, match=r"label|number of samples"):
            load_data({"x": x, "label": wrong}, [X])


def test_input_called_label_is_an_input() -> None:
    spec = InputSpec("label", (1, 2), "float32")
    data = load_data({"label": np.ones((4, 2), np.float32)}, [spec])
    assert len(data) == 4
    assert data.labels is None


def test_digest_follows_content(tmp_path: Path) -> None:
    a = load_data(save(tmp_path / "a.npz", x=np.zeros((1, 3, 4, 4), np.float32)), [X])
    b = load_data(save(tmp_path / "b.npz", x=np.ones((1, 3, 4, 4), np.float32)), [X])
    assert a.digest != b.digest
    assert len(a.digest) == 64


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"x": np.zeros((3, 4, 4), np.float32)}, r"expects \[N, 3, 4, 4\], got \[3, 4, 4\]"),
        ({"x": np.zeros((2, 3, 4, 5), np.float32)}, r"got \[2, 3, 4, 5\]"),
        ({"x": np.zeros((2, 3, 4, 4), np.complex64)}, "expects float32, got complex64"),
        ({"x": np.zeros((0, 3, 4, 4), np.float32)}, "no sample"),
        ({"y": np.zeros((2, 3, 4, 4), np.float32)}, "no input of the model"),
        ({"label": np.zeros(2, int)}, "none of the model's inputs: x, state"),
        ({"x": np.zeros((2, 3, 4, 4), np.float32), "state": np.zeros((3, 2, 5), np.float32)}, "x 2, state 3"),
        ({"x": np.zeros((2, 3, 4, 4), np.float32), "state": np.zeros((2, 5), np.float32)}, r"\[N, 2, 5\]"),
    ],
)
def test_wrong_arrays_say_what_is_wrong(arrays: dict[str, np.ndarray], says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_data(arrays, [X, STATE])


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    text = tmp_path / "text.npz"
    text.write_text("hello")
    empty = tmp_path / "empty.npz"
    empty.write_bytes(b"")
    single = tmp_path / "single.npz"
    with single.open("wb") as file:
        np.save(file, np.zeros(3))
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, x=np.array([{}], dtype=object))
    truncated = tmp_path / "truncated.npz"
    whole = save(tmp_path / "whole.npz", x=np.zeros((64, 3, 4, 4), np.float32)).read_bytes()
    truncated.write_bytes(whole[: len(whole) // 2])
    damaged = tmp_path / "damaged.npz"
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY garbage")
    damaged.write_bytes(buffer.getvalue())
    for path in (text, empty, single, pickled, truncated, damaged, tmp_path / "absent.npz"):
        with pytest.raises(DataError) as caught:
            load_data(path, [X])
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError):
        read_npz(tmp_path)


def test_npy(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(3))
    assert read_npy(tmp_path / "x.npy").tolist() == [0, 1, 2]
    np.save(tmp_path / "o.npy", np.array([{}], dtype=object))
    save(tmp_path / "z.npz", x=np.zeros(1))
    for name in ("o.npy", "z.npz", "absent.npy"):
        with pytest.raises(DataError, match=name):
            read_npy(tmp_path / name)


def test_check_inputs() -> None:
    x = np.zeros((1, 3, 4, 4))
    assert check_inputs({"x": x}, [X])["x"].dtype == np.float32
    for arrays, says in (
        ({}, "'x' is missing"),
        ({"x": x[0]}, "expects shape"),
        ({"x": x, "xx": x}, "did you mean 'x'"),
    ):
        with pytest.raises(DataError, match=says):
            check_inputs(arrays, [X])
    with pytest.raises(DataError, match="outside"):
        check_inputs({"q": np.full((1, 2), 300)}, [InputSpec("q", (1, 2), "uint8")])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for label, size in ((3, (40, 30)), (12, (30, 50)), (1, (32, 32))):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{label}_a b.png")
    (folder / "README.md").write_text("not an image")
    return folder


def test_images_against_the_definition(photos: Path) -> None:
    spec = InputSpec("x", (1, 3, 16, 16), "float32")
    text = "resize=20,crop=16,scale=255,mean=0.485+0.456+0.406,std=0.229+0.224+0.225,color=rgb,layout=nchw"
    data = load_data(photos, [spec], text)
    assert len(data) == 3
    assert data.labels is not None
    assert data.labels.tolist() == [12, 1, 3]  # by file name
    for sample, name in zip(data, ("12_a b.png", "1_a b.png", "3_a b.png"), strict=True):
        image = Image.open(photos / name)
        scale = 20 / min(image.size)
        image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
        left, top = round((image.width - 16) / 2), round((image.height - 16) / 2)
        pixels = np.asarray(image)[top : top + 16, left : left + 16] / 255
        expected = ((pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(2, 0, 1)
        np.testing.assert_allclose(sample["x"][0], expected, rtol=0, atol=1e-5)


def test_image_options(photos: Path) -> None:
    first = next(
        iter(load_data(Images(photos, resize=(8, 6), layout="nhwc"), [InputSpec("x", (1, 8, 6, 3), "float32")]))
    )
    swapped = next(
        iter(
            load_data(
                Images(photos, resize=(8, 6), layout="nhwc", color="bgr"), [InputSpec("x", (1, 8, 6, 3), "float32")]
            )
        )
    )
    np.testing.assert_array_equal(first["x"][..., ::-1], swapped["x"])
    gray = next(iter(load_data(photos, [InputSpec("x", (1, 1, 8, 8), "uint8")], "resize=8x8,color=gray,scale=1")))
    assert gray["x"].dtype == np.uint8
    assert gray["x"].max() > 1


def test_label_needs_an_integer_before_the_underscore(photos: Path) -> None:
    Image.new("RGB", (32, 32)).save(photos / "cat.png")
    assert load_data(photos, [X], "resize=4,crop=4").labels is None


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("resise=256", "did you mean 'resize'"),
        ("resize=big", "does not accept 'big'"),
        ("crop=0", "takes pixels"),
        ("mean=1+2", "2 values"),
        ("std=0", "must not be 0"),
        ("std=nan", "does not accept"),
        ("color=rbg", "rgb, bgr, gray"),
        ("layout=hwc", "did you mean 'nhwc'"),
        ("resize=4,resize=5", "twice"),
    ],
)
def test_wrong_preprocess(photos: Path, spec: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load_data(photos, [X], spec)


def test_wrong_folders(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(UsageError, match="--preprocess"):
        load_data(photos, [X])
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no image"):
        load_data(tmp_path / "none", [X], "resize=4")
    with pytest.raises(DataError, match="larger than the image"):
        list(load_data(photos, [X], "crop=400"))
    with pytest.raises(DataError, match=r"expects \[1, 3, 4, 4\]"):
        list(load_data(photos, [X], "resize=8,crop=8"))
    with pytest.raises(DataError, match="one input of 3 or 4 axes"):
        load_data(photos, [STATE], "resize=8")
    (photos / "0_bad.jpg").write_bytes(b"\xff\xd8 not a jpeg")
    with pytest.raises(SparsecError, match=r"0_bad\.jpg: not a readable image"):
        list(load_data(photos, [X], "resize=4,crop=4"))
    with pytest.raises(UsageError, match="preprocessed already"):
        load_data(save(tmp_path / "d.npz", x=np.zeros((1, 3, 4, 4), np.float32)), [X], "resize=4")
