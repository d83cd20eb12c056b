"""Calibration: constants that made the measurements are found again; the rest stay; the clock is a clock."""

from __future__ import annotations

import tomllib
from dataclasses import replace

import numpy as np
import pytest

from sparsec.kernels import conv
from sparsec.kernels.base import Machine
from sparsec.targets import find_target
from tools import calibrate

TARGET = find_target("host")
START = replace(find_target("arm", "cortex-a76").machine, ghz=3.0)  # data: this machine need not be one


def synthetic(machine: Machine, noise: float = 0.0) -> list[calibrate.Observation]:
    """What `machine` would take for every third case of the grid, as the model has it."""
    rng, found = np.random.default_rng(0), []
    for i, (geometry, rows, density) in enumerate(calibrate.cases()[::5]):
        w = calibrate.weights(geometry, max(rows, 1), density, i)
        for form in conv.TABLE[:4]:
            columns = conv.stored_columns(w, form, machine, geometry)
            for _, tiling in conv.ranked_tilings(machine, geometry, form, columns)[::3]:
                known = calibrate.Observation(i, geometry, form, tiling, columns[tiling.rows], 1.0)
                us = known.predicted_us(machine) * float(np.exp(noise * rng.standard_normal()))
                found.append(replace(known, measured_us=us))
    return found


@pytest.fixture(scope="module")
def other() -> Machine:
    """A machine that differs in what the grid determines."""
    return replace(
        START, fma=START.fma * 0.7, row_cycles=START.row_cycles * 3, l2_bytes_per_cycle=START.l2_bytes_per_cycle * 0.6
    )


def test_constants_are_found_again(other: Machine) -> None:
    observations = synthetic(other)
    fitted = calibrate.fit(START, observations)
    before, after = (calibrate.judge(m, observations) for m in (START, fitted))
    assert before["ratio"] > 1.1
    assert after["ratio"] == pytest.approx(1.0, abs=0.02)
    assert after["spread"] < 1.05 < before["spread"]
    assert fitted.fma == pytest.approx(other.fma, rel=0.05)
    assert fitted.ghz == START.ghz


def test_noise_and_outliers_are_borne(other: Machine) -> None:
    observations = synthetic(other, noise=0.1)
    observations = [
        replace(o, measured_us=o.measured_us * (10 if i % 29 == 0 else 1)) for i, o in enumerate(observations)
    ]
    assert calibrate.fit(START, observations).fma == pytest.approx(other.fma, rel=0.1)


def test_nothing_moves_without_need() -> None:
    fitted = calibrate.fit(START, synthetic(START))
    for key in calibrate.FITTED:
        assert getattr(fitted, key) == pytest.approx(getattr(START, key), rel=0.02), key


def test_the_stanza_is_one(other: Machine) -> None:
    found = tomllib.loads(calibrate.stanza(TARGET, other))["cpu"][TARGET.cpu]
    assert set(found) == {"ghz", "source", *calibrate.FITTED}
    assert found["fma"] == pytest.approx(other.fma, rel=0.01)
    assert "measured on" in found["source"]
    assert set(found) - {"source"} <= set(Machine.__dataclass_fields__)


def test_patterns_have_the_density_they_say() -> None:
    for geometry, rows, density in calibrate.cases():
        w = calibrate.weights(geometry, max(rows, 1), density, 1)
        assert w.shape == geometry.w_shape
        blocks = (w != 0).reshape(-1, max(rows, 1), w[0].size).any(axis=1)
        assert blocks.mean() == pytest.approx(density, abs=4 * np.sqrt(density * (1 - density) / blocks.size) + 1e-9)
        assert np.count_nonzero(w) == blocks.sum() * max(rows, 1)


def test_the_clock_is_a_plausible_one() -> None:
    assert 0.3 < calibrate.clock_ghz(TARGET) < 8


def test_observing_and_reporting(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    cases = [(conv.Geometry((1, 16, 7, 7), (16, 16, 1, 1)), rows, 0.25) for rows in (1, 4)]
    monkeypatch.setattr(calibrate, "cases", lambda: cases)
    observations = calibrate.observe(TARGET, 0.2, said.append)
    assert len(said) == 2
    assert {o.layer for o in observations} == {0, 1}
    assert {"conv_f32_1x1", "conv_f32_4x1"} <= {o.form.name for o in observations}
    assert all(o.measured_us > 0 for o in observations)
    result = calibrate.report(TARGET, START, observations)
    assert result["fit"]["after"]["held out"]["layers"] == 1
    assert len(result["worst"]) == min(calibrate.WORST, len(observations))
    ratios = [abs(np.log(row["ratio"])) for row in result["worst"]]
    assert ratios == sorted(ratios, reverse=True)
