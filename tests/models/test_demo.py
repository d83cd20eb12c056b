"""The demo model: small, right on held-out images, and hurt by pruning; its data: the same bits everywhere."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from sparsec import models
from sparsec.errors import UsageError
from sparsec.models import demo_data
from sparsec.models.demo import LAYERS, assemble


@pytest.fixture(scope="module")
def held_out() -> tuple[np.ndarray, np.ndarray]:
    return demo_data.generate("test", 1000)


def _accuracy(model: onnx.ModelProto, data: tuple[np.ndarray, np.ndarray]) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    answers = [session.run(["logits"], {"input": image[None]})[0].argmax() for image in data[0]]
    return float((np.array(answers) == data[1]).mean())


def _weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}


def _pruned(sparsity: float) -> onnx.ModelProto:
    """Blocks of 4 output channels x 1 of least magnitude set to zero in every 1x1 and full 3x3 convolution."""
    weights = _weights(models.build("demo"))
    for layer in LAYERS[1:]:
        if layer.groups == 1:
            blocks = weights[f"{layer.name}.weight"].reshape(layer.outputs // 4, 4, -1)
            score = np.abs(blocks).sum(axis=1, keepdims=True)
            kept = blocks * (score > np.quantile(score, sparsity))
            weights[f"{layer.name}.weight"] = kept.reshape(weights[f"{layer.name}.weight"].shape)
    return assemble(weights)


def test_accuracy_on_held_out_images(held_out: tuple[np.ndarray, np.ndarray]) -> None:
    assert 0.93 <= _accuracy(models.build("demo"), held_out) <= 0.99


def test_half_of_the_blocks_may_go_but_not_four_fifths(held_out: tuple[np.ndarray, np.ndarray]) -> None:
    dense = _accuracy(models.build("demo"), held_out)
    assert _accuracy(_pruned(0.5), held_out) > dense - 0.07
    assert _accuracy(_pruned(0.8), held_out) < dense - 0.20


def test_the_file_is_small_and_what_the_table_of_layers_says() -> None:
    model = models.build("demo")
    onnx.checker.check_model(model, full_check=True)
    assert model.ByteSize() < 1_000_000
    assert assemble(_weights(model)) == model
    assert (model.ir_version, model.opset_import[0].version) == (9, 17)


def test_it_holds_the_layer_kinds_that_matter() -> None:
    kinds = {(layer.kernel, layer.stride, layer.groups > 1) for layer in LAYERS}
    assert kinds == {(3, 2, False), (3, 1, True), (3, 2, True), (1, 1, False), (3, 1, False)}
    operators = {node.op_type for node in models.build("demo").graph.node}
    assert operators == {"Conv", "Clip", "Relu", "HardSwish", "Add", "GlobalAveragePool", "Flatten", "Gemm"}


def test_images_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for split in demo_data.SPLITS:
        images, labels = demo_data.generate(split, 40, seed=1)
        digest.update(images.astype("<f4").tobytes() + labels.astype("<i8").tobytes())
    assert digest.hexdigest() == "2346ce951db66757a1e0288ca8908f012437c7fb1054956fd8d8601988967f10"


def test_a_longer_sequence_starts_with_the_shorter() -> None:
    few, many = demo_data.generate("test", 5), demo_data.generate("test", 9)
    np.testing.assert_array_equal(few[0], many[0][:5])
    np.testing.assert_array_equal(few[1], many[1][:5])


def test_splits_and_seeds_share_no_image() -> None:
    draws = [demo_data.generate(split, 50, seed)[0] for split in demo_data.SPLITS for seed in (0, 1)]
    distinct = {image.tobytes() for images in draws for image in images}
    assert len(distinct) == 50 * len(draws)


def test_values_are_exact_levels_and_labels_balanced() -> None:
    images, labels = demo_data.generate("train", 600)
    assert images.dtype == np.float32
    assert labels.dtype == np.int64
    assert images.shape == (600, 3, 32, 32)
    levels = images * 64 + 128
    np.testing.assert_array_equal(levels, np.clip(np.round(levels), 0, 255))
    counts = np.bincount(labels, minlength=len(demo_data.LABELS))
    assert len(counts) == len(demo_data.LABELS)
    assert counts.min() > 35
    assert counts.max() < 90


@pytest.mark.parametrize(("split", "count", "seed"), [("validation", 1, 0), ("test", 0, 0), ("test", 1, -1)])
def test_bad_requests_are_refused(split: str, count: int, seed: int) -> None:
    with pytest.raises(UsageError, match="expected"):
        demo_data.generate(split, count, seed)


def test_written_data_reads_back_and_repeats(tmp_path: Path) -> None:
    first, second = tmp_path / "held-out", tmp_path / "again.npz"
    models.write_data(first, count=20)
    models.write_data(second, count=20)
    assert first.read_bytes() == second.read_bytes()
    with np.load(first, allow_pickle=False) as data:
        images, labels = demo_data.generate("test", 20)
        assert sorted(data) == ["input", "label"]
        np.testing.assert_array_equal(data["input"], images)
        np.testing.assert_array_equal(data["label"], labels)


@pytest.mark.parametrize("label", range(len(demo_data.LABELS)), ids=demo_data.LABELS)
def test_a_shape_fits_the_unit_circle(label: int) -> None:
    axis = np.linspace(-1.5, 1.5, 121)
    u, v = np.meshgrid(axis, axis)
    inside = demo_data.SHAPES[demo_data.LABELS[label]](u, v) < 0
    assert 0.1 < inside.mean() * 9 / np.pi < 0.9
    assert np.sqrt(u * u + v * v)[inside].max() < 1.2
