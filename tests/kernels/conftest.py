"""Kernel tests run on every vector width this machine has."""

from __future__ import annotations

import pytest

from sparsec.targets import Target, find_target, host_cpu

_LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4")  # each contains the ones before
_HOST = host_cpu()
_RUNNABLE = _LEVELS[: _LEVELS.index(_HOST) + 1] if _HOST in _LEVELS else (_HOST,)


@pytest.fixture(params=_RUNNABLE)
def target(request: pytest.FixtureRequest) -> Target:
    """The host as each of its architecture levels: 4, 8 and 16 lanes on x86."""
    return find_target("host", request.param)
