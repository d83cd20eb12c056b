"""Write real models as products of smaller layers with calibration data only, and measure what that costs.

Five tables, errors measured on samples that calibration never saw:

    layers     squared error of every layer's output at half its parameters: whitened factors over plain SVD
    bytes      the same at equal stored bytes: low rank alone, sparse alone, both
    accuracy   the whole model: top-1 where there are labels, else the relative squared error of the outputs
    speed      the compiled model on this machine against what its multiply-adds promise
    parity     models with every form in them on host and arm, beside ONNX Runtime

    SPARSEC_DATA=... python tools/factorize_table.py layers --model kwt1 --out docs/benchmarks/low_rank
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import prune_table
from factorize_cases import FILES, Case, case, outputs, stacked, stream, thinned
from factorize_speed import parity_rows, speed_rows

MODELS = {"layers": ("kwt1", "squeezenet1.1"), "bytes": ("kwt1",), "speed": ("kwt1",)}
ROWS = {
    "plain SVD": "method=plain,allocation=uniform",
    "whitened": "allocation=uniform,sequential=false",
    "+ allocation": "sequential=false",
    "+ in order": "",
    "+ sparse residual": "residual=sparse",
}
RECOVERED = " + recover"
# Two fifths of its weights are in the last layer, which is matched only where it is named.
ALSO = {"squeezenet1.1": "include=*"}


def weights(model: Any) -> int:
    """Nonzero weights of all layers, those that several share once."""
    from sparsec.passes.layers import weighted_layers

    found = {str(layer.weight.name): int(np.count_nonzero(layer.read())) for layer in weighted_layers(model)}
    return sum(found.values())


# ---- layers


def seen_layers(given: Case) -> Iterator[tuple[Any, Any, Any, bool]]:
    """Layers that can be factorized, with statistics of the calibration and of the held samples, and whether centred."""
    from sparsec.passes.layers import select_layers
    from sparsec.passes.low_rank.factors import refusal
    from sparsec.passes.measure.replay import goal_of
    from sparsec.passes.measure.statistics import gather

    model = given.load()
    layers = [layer for layer in select_layers(model).layers if not refusal(layer)]
    data = (stream(s) for s in (given.calibration, given.held))
    for (layer, own), (_, other) in zip(*(gather(model, layers, d) for d in data), strict=True):
        yield layer, own, other, goal_of(layer).bias is not None


def output_error(difference: np.ndarray, statistics: Any, shift: np.ndarray) -> float:
    """Mean of |d x - shift|^2 for d = W - W' [OC, K]."""
    moved = difference @ statistics.mean
    square = np.einsum("nk,nk->", difference @ statistics.gram, difference)
    return float(square - 2 * shift @ moved + shift @ shift)


def metric_of(own: Any, centred: bool) -> Any:
    """What the pass uses."""
    from sparsec.passes.low_rank.metric import Metric
    from sparsec.passes.pruning.reconstruct import metric

    return Metric(metric(own, centred))


def judged(goal: Any, factors: Any, own: Any, other: Any, corrected: bool) -> float:
    """Error on the held samples as a share of the output's power there; `corrected`: the bias took up the mean."""
    d = goal.matrix - factors.dense().reshape(goal.matrix.shape)
    shift = d @ own.mean if corrected else np.zeros(len(d))
    power = float(np.einsum("nk,nk->", goal.matrix @ other.gram, goal.matrix))
    return output_error(d, other, shift) / power


def layer_rows(given: Case) -> Iterator[dict[str, Any]]:
    """Plain and whitened SVD of the same rank, half the parameters."""
    from sparsec.passes.low_rank.decompositions import Svd
    from sparsec.passes.low_rank.metric import Objective

    for layer, own, other, centred in seen_layers(given):
        oc, ic, kh, kw = layer.shape
        rank = layer.size // (2 * (oc + ic * kh * kw))
        if rank < 1:
            continue
        goal = Objective(layer.read(), metric_of(own, centred))
        plain = judged(goal, Svd(rank).build(Objective(layer.read())), own, other, False)
        white = judged(goal, Svd(rank).build(goal), own, other, centred)
        yield {
            "model": given.name, "layer": layer.name, "shape": list(layer.shape), "rank": rank, "plain": plain,
            "whitened": white, "ratio": white / plain if plain > 1e-9 else 1.0,
        }  # fmt: skip


# ---- bytes


def held_bytes(factors: Any) -> int:
    """Of the smallest stored form of every factor."""
    from sparsec.passes.low_rank.factor_forms import stored_bytes

    return sum(stored_bytes(f) for chain in factors.chains for _, f in chain)


PATTERNS = ((1, 1), (4, 1), (8, 1), (1, 4))
FINALISTS = 4  # splits and patterns that are searched in full


def byte_rows(given: Case, share: float = 0.5) -> Iterator[dict[str, Any]]:
    """The best of each kind at `share` of the layer's bytes, chosen on the calibration samples."""
    from sparsec.passes.low_rank.decompositions import Svd
    from sparsec.passes.low_rank.metric import Objective
    from sparsec.passes.low_rank.residual_sparse import LowRankPlusSparse, Sparse
    from sparsec.passes.pruning.masks import Pattern

    def density(shape: Any, rest: float, pattern: Any) -> float:
        """Of S, so that it takes `rest` bytes."""
        oc, ic, kh, kw = shape
        block = pattern.rows * pattern.columns
        blocks = int((rest - 4 * (-(-oc // pattern.rows) + 1)) // (4 * block + 2))
        return min(1.0, max(0, blocks) * block / (oc * ic * kh * kw))

    for layer, own, other, centred in seen_layers(given):
        if layer.op == "Conv" or np.count_nonzero(layer.read()) < 0.5 * layer.size:
            continue
        goal, (oc, ic, _, _) = Objective(layer.read(), metric_of(own, centred)), layer.shape
        patterns = [Pattern(r, c) for r, c in PATTERNS if ic % c == 0]
        budget = share * 4 * layer.size
        most = int(budget // (4 * (oc + ic)))
        forms: dict[str, list[Any]] = {"low rank": [Svd(most)] if most else []}
        forms["sparse"] = [Sparse(density(layer.shape, budget, p), p) for p in patterns]
        ranks = {most - 1, most - 2, most - 3, most * 3 // 4, most // 2, most // 4, 1} - {0, -1, -2}
        pairs = [(r, p, density(layer.shape, budget - 4 * r * (oc + ic), p)) for r in sorted(ranks) for p in patterns]

        def fits(made: Any, budget: float = budget) -> bool:
            return held_bytes(made) <= budget

        def loss(form: Any, goal: Any = goal, fits: Any = fits) -> float:
            made = form.build(goal)
            return float(goal.loss(made)) if fits(made) else np.inf

        rough = sorted((LowRankPlusSparse(Svd(r), d, p, work=0.0) for r, p, d in pairs if d > 0), key=loss)
        forms["both"] = [LowRankPlusSparse(f.low, f.density, f.pattern) for f in rough[:FINALISTS]]
        row: dict[str, Any] = {"model": given.name, "layer": layer.name, "shape": list(layer.shape), "share": share}
        for kind, ways in forms.items():
            # A ragged last group of rows stores more than its weights: such a form may not fit.
            built = [made for form in ways if fits(made := form.build(goal))]
            if not built:
                continue
            best = min(built, key=goal.loss)
            row |= {
                kind: judged(goal, best, own, other, centred), f"{kind} form": best.kind, f"{kind} bytes": held_bytes(best)
            }  # fmt: skip
        yield row


# ---- accuracy


def accuracy_rows(
    given: Case, shares: list[float], recover: float, rows: list[str], keep: Path, known: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Every row of ROWS at each share of parameters, and the same model after `recover` minutes of training, if any.

    What `known` holds is not measured again. Models lie in `keep`: recovery starts from the one that was measured before it.
    """
    import onnx_ir as ir

    import sparsec

    done = {(row["model"], row["asked"], row["variant"]) for row in known}
    wanted = [
        (share, label, end)
        for share in shares
        for label in rows
        for end in (("", RECOVERED) if recover else ("",))
        if (given.name, share, label + end) not in done
    ]
    if not wanted:
        return
    keep.mkdir(parents=True, exist_ok=True)
    dense = given.load()
    before, total = outputs(dense, given.held), weights(dense)
    teacher = keep / f"{given.name}-dense.onnx"
    ir.save(dense, teacher)
    for share, label, end in wanted:
        own = keep / f"{given.name}-{share}-{label.replace(' ', '-')}.onnx"
        factorize = ",".join(filter(None, [f"factorize:parameters={share}", ROWS[label], ALSO.get(given.name)]))
        start = time.perf_counter(), time.process_time()
        if end and own.exists():
            source, passes = ir.load(own), [f"recover:minutes={recover},teacher={teacher}"]
        else:
            source, passes = given.load(), [factorize, *([f"recover:minutes={recover}"] if end else [])]
        model = sparsec.rewrite(source, passes=passes, calibration=stacked(given.calibration))
        spent = time.perf_counter() - start[0], time.process_time() - start[1]
        if not end:
            ir.save(model, own)
        yield {
            "model": given.name, "asked": share, "variant": label + end, "parameters": weights(model) / total,
            "seconds": spent[0], "cpu": spent[1], **accuracy(before, outputs(model, given.held), given.labels),
        }  # fmt: skip


def accuracy(before: np.ndarray, after: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
    """Relative squared error of the outputs `after`; with labels [N] also what became of the classes."""
    error = float(np.square(after - before).sum() / np.square(before).sum())
    if labels is None:
        return {"error": error}
    first, second = (y.reshape(len(y), -1) for y in (before, after))
    a, b = prune_table.log_softmax(first), prune_table.log_softmax(second)
    hits = [100 * float((y.argmax(axis=1) == labels).mean()) for y in (first, second)]
    return {
        "error": error, "dense_top1": hits[0], "top1": hits[1], "drop": hits[0] - hits[1],
        "kl": float((np.exp(a) * (a - b)).sum(axis=1).mean()),
        "agreement": 100 * float((first.argmax(axis=1) == second.argmax(axis=1)).mean()),
    }  # fmt: skip


# ---- writing


def table(kind: str, rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for row in rows:
        values = [row.get(head, "") for head in heads]
        lines.append("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values) + " |")
    return f"## {kind}\n\n" + "\n".join([*lines, "", *summary(kind, rows), ""])


def summary(kind: str, rows: list[dict[str, Any]]) -> Iterator[str]:
    """A line a model."""
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        if kind == "layers":
            ratios = np.array([row["ratio"] for row in own])
            total = sum(row["whitened"] for row in own) / sum(row["plain"] for row in own)
            text = f"mean ratio {ratios.mean():.3f}, of the summed errors {total:.3f}, worst {ratios.max():.3f}"
            yield f"{model}: {len(own)} layers, {text}, worse on {(ratios > 1).sum()}."
        elif kind == "bytes":
            for share in dict.fromkeys(row["share"] for row in own):
                rows_ = [row for row in own if row["share"] == share and "both" in row]
                best = [min(row.get("low rank", 1.0), row["sparse"]) for row in rows_]
                wins = [row["both"] < limit for row, limit in zip(rows_, best, strict=True)]
                ratio = np.exp(
                    np.mean([np.log(max(row["both"], 1e-9) / max(b, 1e-9)) for row, b in zip(rows_, best, strict=True)])
                )
                where = f"error {ratio:.2f} of the better one (geometric mean)"
                yield f"{model}, {share:g} of the bytes: low rank plus sparse is best on {sum(wins)} of {len(rows_)}, {where}."


def main() -> None:
    """Measure, and write OUT-KIND.json and OUT-KIND.md after every row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("layers", "bytes", "accuracy", "speed", "parity"))
    parser.add_argument("--model", action="append", choices=FILES)
    parser.add_argument("--share", action="append", type=float)
    parser.add_argument("--row", action="append", choices=ROWS)
    parser.add_argument("--recover", type=float, default=0.0, metavar="MINUTES", help="train each, too")
    parser.add_argument("--calibration", type=int, default=0, metavar="SAMPLES", help="at most so many")
    parser.add_argument("--held", type=int, default=0, metavar="SAMPLES", help="at most so many to measure on")
    parser.add_argument("--rounds", type=int, default=31, help="of timing, for speed")
    parser.add_argument("--keep", type=Path, default=Path("factorized"), help="folder of models and artifacts")
    parser.add_argument("--out", type=Path, default=Path("low_rank"))
    arguments = parser.parse_args()
    if "SPARSEC_DATA" not in os.environ:
        sys.exit("SPARSEC_DATA names no folder of models and data")
    document, page = (arguments.out.with_name(f"{arguments.out.name}-{arguments.kind}.{e}") for e in ("json", "md"))
    rows: list[dict[str, Any]] = json.loads(document.read_text()) if document.exists() else []
    shares = arguments.share or ([0.5] if arguments.kind == "bytes" else [0.7, 0.5])
    for name in arguments.model or MODELS.get(arguments.kind, ("kwt1", "squeezenet1.1", "resnet20", "nsnet2")):
        given = thinned(case(name), arguments.calibration, arguments.held)
        if arguments.kind == "layers":
            found = layer_rows(given)
        elif arguments.kind == "bytes":
            found = (row for share in shares for row in byte_rows(given, share))
        elif arguments.kind == "accuracy":
            labels = arguments.row or list(ROWS)
            found = accuracy_rows(given, shares, arguments.recover, labels, arguments.keep, rows)
        elif arguments.kind == "parity":
            found = parity_rows(given)
        else:
            found = speed_rows(given, shares, arguments.rounds, arguments.keep)
        for row in found:
            rows.append(row)
            document.write_text(json.dumps(rows, indent=1) + "\n")
            page.write_text(table(arguments.kind, rows))
            print(json.dumps(row), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
