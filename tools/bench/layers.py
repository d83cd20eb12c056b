"""Predicted against measured, layer by layer: a program's steps called one by one, whole inferences in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.loaded import bind, seconds
from bench.models import Case, Missing, prepare
from bench.turns import Say, pinned
from sparsec.errors import SparsecError
from sparsec.loading.load import load_model
from sparsec.lowering import lower
from sparsec.measure import Library, Room
from sparsec.program import Arg, Program
from sparsec.targets import find_target


class Stepper:
    """A program's steps in this process, each callable alone."""

    def __init__(self, program: Program) -> None:
        self.program = program
        library = Library(program.kernels, program.target)
        sizes = {"arena": program.arena_bytes, "weights": program.weights_bytes, "scratch": program.scratch_bytes}
        self.spaces = {space: Room(size, "uint8") for space, size in sizes.items()}
        for constant in program.constants:
            data = np.ascontiguousarray(constant.data).reshape(-1).view(np.uint8)
            self.spaces["weights"].array[constant.offset : constant.offset + data.size] = data
        self.calls = [bind(library, step.kernel, [self._address(a) for a in step.args]) for step in program.steps]

    def _address(self, place: Arg) -> int:
        return int(self.spaces[place.space].pointer.value or 0) + place.offset

    def feed(self, inputs: dict[str, np.ndarray]) -> None:
        """Copy inputs to their places."""
        for tensor in self.program.inputs:
            data = np.ascontiguousarray(inputs[tensor.name], tensor.dtype).reshape(-1).view(np.uint8)
            self.spaces["arena"].array[tensor.location.offset :][: data.size] = data

    def inference(self) -> list[float]:
        """Seconds of each step of one inference."""
        return [seconds(call, step.tiles) for call, step in zip(self.calls, self.program.steps, strict=True)]


def layer_times(program: Program, inputs: dict[str, np.ndarray], rounds: int) -> list[dict[str, Any]]:
    """For each layer that runs code: name, op, shape, route, kernel, structure, predicted and measured microseconds."""
    return layer_times_in_turns([program], [inputs], rounds)[0]


def layer_times_in_turns(
    programs: Sequence[Program], inputs: Sequence[dict[str, np.ndarray]], rounds: int
) -> list[list[dict[str, Any]]]:
    """The same of several programs: in each round each runs twice, the first time untimed."""
    steppers = [Stepper(program) for program in programs]
    times: list[list[list[float]]] = [[] for _ in programs]
    with pinned():
        for _ in range(rounds + 1):
            for stepper, given, own in zip(steppers, inputs, times, strict=True):
                for _ in range(2):
                    stepper.feed(given)
                    found = stepper.inference()
                own.append(found)
    medians = (np.median(np.asarray(own[1:]), axis=0) for own in times)
    return [_by_layer(program, own) for program, own in zip(programs, medians, strict=True)]


def _by_layer(program: Program, medians: np.ndarray) -> list[dict[str, Any]]:
    owner = {node: i for i, layer in enumerate(program.layers) for node in layer.nodes}
    measured = [0.0] * len(program.layers)
    for step, median in zip(program.steps, medians, strict=True):
        found = [owner[node] for node in step.nodes if node in owner]
        if not found:
            raise SparsecError(f"step {step.kernel} belongs to no layer")
        measured[found[0]] += 1e6 * float(median)
    return [
        {
            "name": layer.name, "op": layer.op, "shape": list(layer.shape), "route": layer.route,
            "kernel": layer.kernel, "structure": layer.structure,
            "predicted_us": round(float(layer.predicted_us), 2), "measured_us": round(us, 2),
        }
        for layer, us in zip(program.layers, measured, strict=True)
        if us > 0
    ]  # fmt: skip


def measure(cases: Sequence[Case], rounds: int, say: Say) -> dict[str, Any]:
    """For each case the layers, their sums and the share of time in the generic route."""
    found: dict[str, Any] = {}
    target = find_target("host")
    for case in cases:
        say(f"{case.name}: layer by layer")
        try:
            made = prepare(case)
            program = lower(load_model(made.model), target, "bench")
            with np.load(made.inputs, allow_pickle=False) as stored:
                rows = layer_times(program, {name: stored[name] for name in stored.files}, rounds)
        except (Missing, SparsecError) as error:
            found[case.name] = {"missing": str(error)}
            continue
        total = sum(row["measured_us"] for row in rows)
        generic = [row for row in rows if row["route"] == "generic"]
        found[case.name] = {
            "layers": rows,
            "measured_us": round(total, 1),
            "predicted_us": round(sum(row["predicted_us"] for row in rows), 1),
            "generic_share": round(sum(row["measured_us"] for row in generic) / total, 4),
            "largest_generic_share": round(max((row["measured_us"] for row in generic), default=0.0) / total, 4),
        }
    return found
