"""Kernel tests run on every vector width this machine has, and on Arm."""

from __future__ import annotations

import pytest
from layers import DOT_CPUS, EMULATED_DOT_CPUS

from sparsec.runtimes.base import machine_arch
from sparsec.runtimes.emulated import find_emulator
from sparsec.targets import Target, find_target, host_cpu, missing_features

_LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")  # each contains the ones before
_RUNNABLE = (
    [name for name in _LEVELS if not missing_features(find_target("host", name))]
    if machine_arch() == "x86_64"
    else [host_cpu()]
)
_EMULATED = ("armv8.2-a",) if machine_arch() != "aarch64" and find_emulator() else ()


@pytest.fixture(params=DOT_CPUS)
def dot_target(request: pytest.FixtureRequest) -> Target:
    """The host with each of its instructions for 8-bit sums, and Arm with each of its own."""
    return find_target("arm" if request.param in EMULATED_DOT_CPUS else "host", request.param)


@pytest.fixture(params=[*_RUNNABLE, *_EMULATED])
def target(request: pytest.FixtureRequest) -> Target:
    """The host as each of its architecture levels (4, 8 and 16 lanes on x86), and Arm where there is an emulator."""
    return find_target("arm" if request.param in _EMULATED else "host", request.param)
