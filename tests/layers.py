"""A bound layer, run alone with the checks that every kernel must pass. Shared by the tests of kernel families."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from harness import Library, Room

from sparsec.kernels.base import KernelCall
from sparsec.program import Kernel
from sparsec.runtimes.base import machine_arch
from sparsec.runtimes.emulated import find_emulator
from sparsec.targets import Target, find_target, host_cpu, missing_features

T = TypeVar("T")

_FILLS = (12344.0, 54304.0)  # what no result is
_BYTES = (0x5A, 0xA5)


def _fills(element: str) -> tuple[float, float]:
    """Two values, one of which a result differs from."""
    return (_BYTES if element == "uint8" else (_BYTES[0], -_BYTES[0])) if "int" in element else _FILLS


def _runnable() -> tuple[str, ...]:
    """One CPU for every instruction of 8-bit sums and width of it that this machine has."""
    if machine_arch() != "x86_64":
        return (host_cpu(),)
    levels = ("x86-64-v2", "x86-64-v3", "alderlake", "x86-64-v4", "cascadelake", "znver5")
    return tuple(name for name in levels if not missing_features(find_target("host", name)))


_HOST_DOT_CPUS = _runnable()
EMULATED_DOT_CPUS = ("cortex-a53", "armv8.6-a", "armv8.2-a") if machine_arch() != "aarch64" and find_emulator() else ()
DOT_CPUS = (*_HOST_DOT_CPUS, *EMULATED_DOT_CPUS)
_EVERYTHING = (_HOST_DOT_CPUS[-1], "armv8.2-a")


def share(cases: Sequence[T], target: Target, parts: int) -> list[T]:
    """The cases for one of DOT_CPUS: all on this machine's best and on Arm's default, elsewhere every `parts`-th.

    Neighbouring CPUs take other ones, so that every case runs on some of them; compiling for all would take minutes.
    """
    if target.cpu in _EVERYTHING:
        return list(cases)
    others = [cpu for cpu in DOT_CPUS if cpu not in _EVERYTHING]
    return list(cases[others.index(target.cpu) % min(parts, len(cases)) :: parts])


class Layer:
    """A bound layer with the arrays of its roles and what it should give."""

    def __init__(
        self, call: KernelCall, expected: np.ndarray, tolerance: float | np.ndarray, **activations: np.ndarray
    ):
        self.call, self.expected, self.tolerance = call, expected, tolerance
        self.activations = activations

    def rooms(self, first: bool = False) -> list[Room]:
        """One buffer for each role; outputs and scratch start as NaN. `first`: nothing can be read in front of them."""
        element = str(self.call.func.params[self.call.roles.index("y")].dtype)
        garbage = np.nan if element.startswith("float") else _fills(element)[0]
        arrays = {**self.activations, **self.call.constants, "y": np.full(self.expected.shape, garbage, element)}
        arrays["scratch"] = np.full(self.call.scratch, 0xFF, np.uint8)  # NaN
        return [Room(arrays[role], first) for role in self.call.roles]


def _tiles(library: Library, name: str, rooms: Sequence[Room], begin: int, end: int) -> None:
    library.run(name, [room.place for room in rooms], [(begin, end)])


def check_layers(layers: Sequence[Layer], target: Target) -> None:
    """Run all layers and compare; every buffer must be unwritten behind its end, and tiles independent.

    One tile in the middle also runs alone: with the other tiles' results already there, they must stay as they are.
    """
    kernels = {layer.call.name: Kernel(layer.call.name, layer.call.func) for layer in layers}
    library = Library(list(kernels.values()), target)
    for layer in layers:
        call, rooms = layer.call, layer.rooms()
        y = rooms[call.roles.index("y")]
        library.call(call.name, rooms, call.tiles)
        wrong = np.abs(y.array.astype(np.float64) - layer.expected)
        np.testing.assert_array_less(wrong, np.broadcast_to(layer.tolerance, wrong.shape), err_msg=call.text)
        for role, room in zip(call.roles, rooms, strict=True):
            room.check(f"{call.text}, {role}")
        whole = y.array.copy()
        rooms = layer.rooms(first=True)
        y = rooms[call.roles.index("y")]
        fill, other = _fills(str(y.array.dtype))
        y.array[...] = fill
        _tiles(library, call.name, rooms, call.tiles // 2, call.tiles // 2 + 1)
        first = y.array.copy()
        y.array[...] = other
        _tiles(library, call.name, rooms, call.tiles // 2, call.tiles // 2 + 1)
        written = first == y.array  # elements that did not keep their fill
        assert written.any(), f"{call.text}: tile {call.tiles // 2} writes nothing"
        np.testing.assert_array_equal(first[written], whole[written], err_msg=f"{call.text}: a tile alone")
        if call.tiles > 1:
            y.array[...] = fill
            _tiles(library, call.name, rooms, 0, call.tiles // 2)
            _tiles(library, call.name, rooms, call.tiles // 2 + 1, call.tiles)
            assert (y.array[written] == fill).all(), f"{call.text}: other tiles write what tile {call.tiles // 2} owns"
