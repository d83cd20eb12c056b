"""Every builder gives a valid model that runs, with activations alive, and the published number of weights."""

from __future__ import annotations

import functools
import hashlib
import math

import numpy as np
import onnx
import onnxruntime
import pytest

from sparsec import models
from sparsec.errors import UsageError
from sparsec.models.graph import round_channels, same_padding

# Learned parameters without BatchNorm's running statistics: torchvision's numbers; for MobileNetV1 the paper's network
# with one bias a channel; for EfficientNet-Lite0 likewise (timm's 4,652,008 counts BatchNorm's weight and bias).
PARAMETERS = {
    "mobilenet_v1": 4_221_032,
    "mobilenet_v2": 3_504_872,
    "resnet18": 11_689_512,
    "resnet50": 25_557_032,
    "squeezenet": 1_235_496,
    "efficientnet_lite0": 4_631_000,
}
SEEDED = sorted(PARAMETERS)


@functools.cache
def _full_size(name: str) -> onnx.ModelProto:
    """Not to be changed."""
    return models.build(name)


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _smooth_images(count: int, resolution: int) -> np.ndarray:
    """Random 4x4 colours, enlarged: closer to photographs than noise is."""
    coarse = np.random.default_rng(5).standard_normal((count, 1, 3, 4, 4)).astype(np.float32)
    return np.repeat(np.repeat(coarse, resolution // 4, axis=3), resolution // 4, axis=4)


def test_the_tests_cover_all_builders() -> None:
    assert sorted(models.BUILDERS) == sorted([*SEEDED, "demo"])


@pytest.mark.parametrize("name", [*SEEDED, "demo"])
def test_builder_entry(name: str) -> None:
    builder = models.BUILDERS[name]
    assert builder.name == name
    assert len(builder.summary) > 20
    value = _full_size(name).graph.input[0]
    assert value.name == "input"
    assert tuple(each.dim_value for each in value.type.tensor_type.shape.dim) == builder.input_shape


@pytest.mark.parametrize("name", SEEDED)
def test_valid_and_as_many_weights_as_published(name: str) -> None:
    model = _full_size(name)
    onnx.checker.check_model(model, full_check=True)
    assert (model.ir_version, model.opset_import[0].version) == (9, 17)
    learned = [each for each in model.graph.initializer if "running_" not in each.name and "clip_" not in each.name]
    assert sum(math.prod(each.dims) for each in learned) == PARAMETERS[name]


@pytest.mark.parametrize("name", SEEDED)
def test_every_value_has_a_static_shape_and_every_node_a_name(name: str) -> None:
    graph = onnx.shape_inference.infer_shapes(_full_size(name), strict_mode=True).graph
    known = {value.name: value.type.tensor_type.shape.dim for value in [*graph.value_info, *graph.output]}
    for node in graph.node:
        assert all(each.dim_value > 0 for each in known[node.output[0]]), node.name
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert all(names)
    assert graph.output[0].name == "logits"
    assert [each.dim_value for each in graph.output[0].type.tensor_type.shape.dim] == [1, 1000]


@pytest.mark.parametrize("name", SEEDED)
def test_activations_stay_of_order_one_and_outputs_depend_on_the_image(name: str) -> None:
    model = models.build(name, resolution=96, classes=100)
    images = _smooth_images(4, 96)
    logits = np.stack([_session(model).run(None, {"input": image})[0][0] for image in images])
    assert logits.shape == (4, 100)
    assert np.isfinite(logits).all()
    # Relative to the spread over classes, or a head that ignores its input would pass.
    assert logits.std(axis=0).mean() > 0.1 * logits.std(axis=1).mean()

    inner = [output for node in model.graph.node for output in node.output if output != "logits"]
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(output) for output in inner)
    for output, value in zip(["logits", *inner], _session(model).run(None, {"input": images[0]}), strict=True):
        assert 0.03 < value.std() < 30, output


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_determines_every_byte(name: str) -> None:
    small = {"resolution": 64, "width": 0.25}
    once, again, other = (models.build(name, **small, seed=seed).SerializeToString() for seed in (3, 3, 4))
    assert once == again
    assert once != other


def test_weights_do_not_depend_on_the_machine() -> None:
    digest = hashlib.sha256()
    for each in models.build("mobilenet_v2", width=0.25, classes=10).graph.initializer:
        digest.update(onnx.numpy_helper.to_array(each).astype("<f4").tobytes())
    assert digest.hexdigest() == "0401494d1781e7f2656aa362f94e493807bea47992a93bbd9e1cbe1d460cfa72"


@pytest.mark.parametrize("name", SEEDED)
@pytest.mark.parametrize("resolution", [models.SMALLEST, 97])
def test_other_resolutions_and_widths(name: str, resolution: int) -> None:
    model = models.build(name, resolution=resolution, width=0.5, classes=7)
    image = np.ones((1, 3, resolution, resolution), np.float32)
    assert _session(model).run(None, {"input": image})[0].shape == (1, 7)


def test_both_forms_of_normalization_are_there() -> None:
    def counts(name: str) -> tuple[int, int]:
        nodes = models.build(name, resolution=64, width=0.25).graph.node
        return sum(n.op_type == "BatchNormalization" for n in nodes), sum(n.op_type == "Conv" for n in nodes)

    for name in ("mobilenet_v2", "resnet18", "resnet50"):
        normalized, convs = counts(name)
        assert normalized == convs, name
    for name in ("mobilenet_v1", "squeezenet", "efficientnet_lite0"):
        assert counts(name)[0] == 0, name


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("mobilenet_v3", {}, "did you mean 'mobilenet_v2'|did you mean 'mobilenet_v1'"),
        ("resnet18", {"resolutoin": 64}, "did you mean 'resolution'"),
        ("resnet18", {"resolution": 16}, "expected an integer >= 32, got 16"),
        ("resnet18", {"resolution": 64.0}, "expected an integer"),
        ("resnet18", {"width": 0}, "expected a factor"),
        ("resnet18", {"width": "wide"}, "expected a factor"),
        ("demo", {"width": 0.5}, "unknown option 'width'"),
    ],
)
def test_bad_requests_are_refused(name: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        models.build(name, **options)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [(224, 3, 2, (0, 1)), (225, 3, 2, (1, 1)), (112, 5, 2, (1, 2)), (14, 5, 1, (2, 2)), (7, 1, 1, (0, 0))],
)
def test_same_padding(size: int, kernel: int, stride: int, expected: tuple[int, int]) -> None:
    assert same_padding(size, kernel, stride) == expected


@pytest.mark.parametrize(("channels", "expected"), [(16, 16), (8 * 1.4, 16), (35, 32), (3, 8), (20, 24), (36, 40)])
def test_round_channels(channels: float, expected: int) -> None:
    assert round_channels(channels) == expected
