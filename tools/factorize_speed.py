"""Factorized models compiled: what `factorize_table.py` times, and how near they are to ONNX Runtime."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from factorize_cases import Case, stacked

SPEED = "forms=svd,method=plain,allocation=uniform"  # what runs how fast does not depend on the numbers


def speed_rows(given: Case, shares: list[float], rounds: int, keep: Path) -> Iterator[dict[str, Any]]:
    """Compiled for this machine with ranks of at least 16: measured speed-up of the whole model (in turns) and of the layers
    that were factorized (their steps called one by one), over the one that multiply-adds promise: all of the model's, those
    of two activations too. `by time`: of the whole, when what was not factorized takes the time that it took."""
    from bench.layers import layer_times_in_turns
    from bench.turns import pinned, ratio, take_turns

    import sparsec
    from sparsec.bench import find_runtime, read_parity
    from sparsec.loading.load import load_model
    from sparsec.lowering import lower
    from sparsec.passes.layers import weighted_layers
    from sparsec.ports import input_spec
    from sparsec.targets import find_target

    def artifact(name: str, passes: list[str]) -> Any:
        """From an earlier run if it is there."""
        where = keep / f"{given.name}-{name}.sparsec"
        if not where.exists():
            data = stacked(given.calibration)
            sparsec.compile(given.load(), "host", threads=1, passes=passes, calibration=data, output=where)
        return sparsec.load(where)

    def faster(before: Any, after: Any) -> float:
        """How many times as fast, the median over rounds."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(pinned())
            sessions = [stack.enter_context(find_runtime(None, made).open(made, 1)) for made in (before, after)]
            bursts = {str(i): burst(session.once(read_parity(before))) for i, session in enumerate(sessions)}
            first, second = take_turns(bursts, rounds).values()
        return ratio(first, second).median

    def layer_times(models: list[Any]) -> list[dict[str, float]]:
        """Microseconds of each layer of the models, by name."""
        specs = [input_spec(value) for value in models[0].graph.inputs]
        feed = {spec.name: given.held[spec.name][0].astype(np.float32) for spec in specs}
        programs = [lower(model, find_target("host")) for model in models]
        found = layer_times_in_turns(programs, [feed] * len(models), rounds)
        return [{row["name"]: row["measured_us"] for row in rows} for rows in found]

    dense = artifact("dense", [])
    for share in shares:
        made = artifact(f"{share}", [f"factorize:flops={share},multiple=16,{SPEED}"])
        first, second = (load_model(m.path / "model.onnx") for m in (dense, made))
        before, after = multiply_adds(first), multiply_adds(second)
        kept = {layer.name for layer in weighted_layers(second)}
        changed = [layer.name for layer in weighted_layers(first) if layer.name not in kept]
        promised, measured = sum(before.values()) / sum(after.values()), faster(dense, made)
        row = {
            "model": given.name, "asked": share, "layers": f"{len(changed)} of {len(list(weighted_layers(first)))}",
            "multiply-adds": promised, "measured": measured, "of them": measured / promised,
        }  # fmt: skip
        if changed:
            old, new = layer_times([first, second])
            parts = [name for name in after if name not in before]
            promised = sum(before[n] for n in changed) / sum(after[n] for n in parts)
            measured = sum(old[n] for n in changed) / sum(new[n] for n in parts)
            share_of_time = sum(old[n] for n in changed) / sum(old.values())
            row |= {"share of time": share_of_time, "by time": 1 / (1 - share_of_time + share_of_time / promised)}
            row |= {"layers multiply-adds": promised, "layers measured": measured, "layers of it": measured / promised}
        yield row


def burst(call: Callable[[], Any]) -> Callable[[int], list[float]]:
    """Seconds of each of so many calls, after one that is not timed."""

    def run(count: int) -> list[float]:
        call()
        seconds = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        return seconds

    return run


def multiply_adds(model: Any) -> dict[str, float]:
    """Of every node that has any, by name: of a constant weight where it is not zero, of two activations all."""
    from sparsec.passes.layers import weighted_layers
    from sparsec.passes.pruning.allocate import positions

    found = {layer.name: float(np.count_nonzero(layer.read()) * positions(layer)) for layer in weighted_layers(model)}
    for node in model.graph:
        if node.op_type == "MatMul" and node.name not in found:
            found[node.name] = float(np.prod(node.outputs[0].shape.numpy())) * int(node.inputs[0].shape[-1])
    return found


def parity_rows(given: Case, share: float = 0.6) -> Iterator[dict[str, Any]]:
    """Every form on, compiled for this machine and for arm: the error beside ONNX Runtime over the one that is allowed."""
    import sparsec

    forms = "forms=svd+spatial+tucker,residual=sparse,faster=false,method=plain,allocation=uniform"
    model = sparsec.rewrite(given.load(), passes=[f"factorize:parameters={share},{forms}"])
    nodes = [str(node.name).rpartition("/")[2] for node in model.graph]
    for target in ("host", "arm"):
        made = sparsec.compile(model, target, threads=1)
        fused = [row["op"] for row in made.report["layers"] if any(n.endswith("/sum") for n in row["nodes"])]
        parity = made.manifest["parity"]
        yield {
            "model": given.name, "target": target, "low rank": nodes.count("u"), "with S": nodes.count("sum"),
            "sums in a kernel": sum(op.startswith(("Conv", "Gemm", "MatMul")) for op in fused),
            "parity": "not run here" if parity is None else json.dumps(parity),
        }  # fmt: skip
