from __future__ import annotations

import numpy as np
import pytest

from sparsec.passes.measure.fidelity import BROKEN, Fidelity, is_classifier

RNG = np.random.default_rng(5)


def softmax(y: np.ndarray) -> np.ndarray:
    e = np.exp(y - y.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 10), True), ((10,), True), ((1, 10, 1, 1), True), ((1, 1), False), ((2, 10), False), ((1, 4, 5), False),
     ((1, 1, 10), False), ((), False)],
)  # fmt: skip
def test_classifier_by_shape(shape: tuple[int, ...], expected: bool) -> None:
    assert is_classifier(shape) == expected


def test_kl_of_logits_and_of_probabilities_agree_with_the_definition() -> None:
    y0, y = RNG.standard_normal((4, 1, 7)) * 3, RNG.standard_normal((4, 1, 7)) * 3
    p, q = softmax(y0)[:, 0], softmax(y)[:, 0]
    expected = (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(Fidelity(["y"], [y0]).damages([y]), expected, rtol=1e-9)
    np.testing.assert_allclose(Fidelity(["y"], [softmax(y0)]).damages([softmax(y)]), expected, rtol=1e-9)
    assert str(Fidelity(["y"], [y0])) == "y: KL of the softmax, 7 classes"
    assert str(Fidelity(["y"], [softmax(y0)])) == "y: KL, 7 classes"


def test_a_constant_added_to_logits_does_no_damage_and_another_class_shows() -> None:
    y0 = RNG.standard_normal((3, 1, 5))
    same = Fidelity(["y"], [y0])
    np.testing.assert_allclose(same.damages([y0 + 3]), 0, atol=1e-12)
    y = y0.copy()
    y[1, 0] = -y[1, 0]
    assert same.changed([y]).tolist() == [False, True, False]
    assert same.damages([y])[1] > 0


def test_other_outputs_by_relative_error_and_several_by_their_mean() -> None:
    a0, b0 = RNG.standard_normal((2, 1, 4, 3)), RNG.standard_normal((2, 1, 6))
    both = Fidelity(["a", "b"], [a0, b0])
    np.testing.assert_allclose(both.damages([a0 * 1.5, b0]), [0.125, 0.125])
    assert both.classifies
    assert not Fidelity(["a"], [a0]).classifies
    np.testing.assert_allclose(Fidelity(["a"], [0 * a0]).damages([0 * a0]), 0)


def test_rows_pick_the_samples_and_a_wrong_number_is_refused() -> None:
    y0, y = RNG.standard_normal((5, 1, 4)), RNG.standard_normal((5, 1, 4))
    whole = Fidelity(["y"], [y0])
    np.testing.assert_allclose(whole.damages([y[1:3]], slice(1, 3)), whole.damages([y])[1:3])
    with pytest.raises(ValueError, match="expected outputs of shape"):
        whole.damages([y[1:3]], slice(0, 5))


def test_outputs_that_are_not_finite_do_a_finite_great_damage() -> None:
    y0 = RNG.standard_normal((2, 1, 4))
    y = y0.copy()
    y[0, 0, 2] = np.nan
    assert Fidelity(["y"], [y0]).damages([y]).tolist()[0] == BROKEN
