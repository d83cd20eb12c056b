"""The light models that take seconds, by ONNX's own tests; `SPARSEC_BACKEND=all` runs all of them."""

from __future__ import annotations

import os

import numpy as np
import pytest
from backend import light
from onnx import numpy_helper

CHEAP = ("shufflenet", "squeezenet")
CHOSEN = light.names() if os.environ.get("SPARSEC_BACKEND") == "all" else CHEAP


@pytest.mark.parametrize("name", CHOSEN)
def test_light_model(name: str) -> None:
    light.run(name)


def test_a_wrong_output_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(self: light.Backend, inputs: object) -> list[np.ndarray]:
        expected = numpy_helper.to_array(light.onnx.load_tensor(str(light.FOLDER / "light_squeezenet_output_0.pb")))
        return [expected * np.float32(1.01)]

    monkeypatch.setattr("sparsec.backend.Prepared.run", wrong)
    with pytest.raises(AssertionError):
        light.run("squeezenet")


def test_the_folder_of_the_user_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_MODELS", "/kept")
    with light._own_folder():
        assert os.environ["ONNX_MODELS"] != "/kept"
    assert os.environ["ONNX_MODELS"] == "/kept"


def test_drawn_weights_differ_and_repeat() -> None:
    a, b = (light.drawn("squeezenet").graph.initializer for _ in range(2))
    assert [t.raw_data for t in a] == [t.raw_data for t in b]
    weights = [numpy_helper.to_array(t) for t in a if len(t.dims) == 4]
    assert len(weights) > 20
    assert all(w.std() == pytest.approx(np.sqrt(2 / np.prod(w.shape[1:])), rel=0.1) for w in weights)
