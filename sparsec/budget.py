"""`--budget`: choose the pruning of a model so that a promise about the whole holds.

    accuracy=A   the drop is at most A, and of what holds that the fastest is taken
    speedup=F    the target runs the model F times as fast as before the pruning, and of that the smallest drop is taken

drop, on samples that no pass sees (every HELD_OUT-th of the calibration data, or data given for this alone):

    classifiers, no labels    share of samples whose top class is not the original's.  accuracy(original) - accuracy(new)
                              <= this share, whatever the labels are, so a promise about it is one about accuracy
    classifiers, data given   with labels: accuracy(original) - accuracy(new) on them
    other outputs             |y - y0| / |y0|, the root of the mean of its square

Labels of calibration data are never used. A point is (block, share): `prune` with that block removes that share of the
latency that the cost model predicts for the layers it prunes (T_matched of T), so its predicted speed-up is known before

    T / (T - share * T_matched)

and points of equal share are equally fast, whatever the block. accuracy: bisection over SHARES for the first block; of
every other block only larger shares are tried. speedup: the share follows from F; every block is tried at it. Recovery by
training runs only if the passes hold `recover`: above the largest share that holds without it (at most RECOVERIES times),
or on the choice for a speed-up. Where the target can run here, a speed-up is timed, in turns with the model before; a
share that misses it, predicted or timed, is raised, at most RETRIES times.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from sparsec.data import Data
from sparsec.errors import CheckError, RecipeError, UsageError
from sparsec.loading.load import model_bytes
from sparsec.lowering import lower
from sparsec.lowering.predict import layer_price
from sparsec.passes.layers import select_layers
from sparsec.passes.measure.fidelity import Fidelity
from sparsec.passes.measure.trial import in_parallel
from sparsec.proving.ort_session import open_session
from sparsec.rewriting.pass_specs import PassStep, as_step
from sparsec.rewriting.pipeline import run_passes
from sparsec.targets import Target

HELD_OUT = 4  # every 4th calibration sample judges, the others calibrate
FEWEST = 8  # samples that judge, at least
SHARES = tuple(round(0.05 * i, 2) for i in range(1, 19))
BLOCKS = ("4x1", "8x1", "1x1")  # by predicted speed at equal zeros
RECOVERIES = 3
RETRIES = 2
NOISE = 0.03  # of a timing: a measured speed-up may miss by this
FASTEST = 1000.0

Pruning = Callable[[str, float], Sequence[Any]]  # (block, share): specs or passes
Clock = Callable[[bytes], float]  # the measured speed-up of a model over the one before
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Budget:
    """kind: "accuracy" or "speedup"; amount: the largest drop as a share, or the least factor.

    >>> Budget.parse("accuracy=1%"), Budget.parse("speedup=2x")
    (Budget(kind='accuracy', amount=0.01), Budget(kind='speedup', amount=2.0))
    """

    kind: str
    amount: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`accuracy=1%`, `accuracy=0.01`, `speedup=2x` or `speedup=2`. UsageError for anything else."""
        kind, _, amount = text.strip().partition("=")
        unit, factor = ("%", 0.01) if kind == "accuracy" else ("x", 1.0)
        try:
            number = float(amount.removesuffix(unit)) * (factor if amount.endswith(unit) else 1.0)
        except ValueError:
            number = math.nan
        if kind == "accuracy" and 0 <= number < 1:
            return cls(kind, number)
        if kind == "speedup" and 1 < number <= FASTEST:
            return cls(kind, number)
        raise UsageError(f"expected accuracy=1% (a drop below 100%) or speedup=2x (above 1), got {text!r}", "--budget")

    def __str__(self) -> str:
        return f"accuracy={100 * self.amount:g}%" if self.kind == "accuracy" else f"speedup={self.amount:g}x"


@dataclass(frozen=True)
class Point:
    """A pruning that was tried. `share`: of the predicted latency of the layers it prunes; `zeros`: of their weights."""

    block: str
    share: float
    zeros: float
    drop: float
    speedup: float  # predicted
    recovered: bool = False
    holds: bool = False
    measured: float | None = None  # speed-up; a time, so no record holds it

    def record(self) -> dict[str, Any]:
        """What a manifest may hold."""
        facts = {key: value for key, value in vars(self).items() if key != "measured"}
        return {key: round(value, 6) if isinstance(value, float) else value for key, value in facts.items()}

    def __str__(self) -> str:
        speed = f"{self.speedup:.2f}x predicted"
        speed += f", {self.measured:.2f}x measured" if self.measured is not None else ""
        after = " after recovery" if self.recovered else ""
        return f"{self.block} blocks, {100 * self.zeros:.1f}% zero: drop {100 * self.drop:.2f}%{after}, {speed}"


class BudgetMissed(CheckError):
    """Nothing that was tried holds the budget; `points` are what was."""

    def __init__(self, message: str, points: Sequence[Point]) -> None:
        super().__init__(message, "--budget")
        self.points = tuple(points)


@dataclass(frozen=True)
class _Made:
    """A point with the model it stands for."""

    point: Point
    data: bytes = field(repr=False)
    records: list[dict[str, Any]] = field(repr=False)


def fit_budget(
    model: ir.Model,
    steps: Sequence[PassStep],
    budget: Budget,
    target: Target,
    calibration: Data,
    judge_data: Data | None = None,
    clock: Clock | None = None,
    progress: Progress | None = None,
    blocks: Sequence[str] = BLOCKS,
    pruning: Pruning | None = None,
) -> tuple[ir.Model, list[dict[str, Any]]]:
    """A model that holds `budget`, and the records of its passes; the last has the curve as `budget`.

    steps: passes of the user: those before and with `recover` are kept in their order around the pruning that is chosen.
    judge_data: measures the drop in the place of held-out calibration samples. clock: measures a speed-up. pruning: the
    passes for a block and a share (default: `best_pruning`). UsageError: too few samples, or a `prune` among the steps.
    BudgetMissed: nothing holds it.
    """
    named = [step.name for step in steps]
    if "prune" in named:
        raise UsageError("chooses how to prune; leave out the pass prune", "--budget")
    cut = named.index("recover") if "recover" in named else len(steps)
    seen = Part(calibration, held_out=False) if judge_data is None else calibration
    judging: Any = Part(calibration, held_out=True) if judge_data is None else judge_data
    labels = judge_data.labels if judge_data is not None else None
    if len(judging) < FEWEST:
        what = (
            f"{len(judging)} of {len(calibration)} calibration samples"
            if judge_data is None
            else f"{len(judging)} samples"
        )
        raise UsageError(f"{what} are too few to measure a drop on; give at least {FEWEST * HELD_OUT}", "--calibration")
    judge = Judge(model, judging, labels)
    with tempfile.TemporaryDirectory(prefix="sparsec-budget-") as folder:
        make = pruning or best_pruning(Path(folder), "rearrange" not in named)
        fitter = _Fitter(budget, model, steps[:cut], steps[cut:], target, seen, judge, clock, progress, make)
        made = fitter.accuracy(blocks) if budget.kind == "accuracy" else fitter.speedup(blocks)
    points = sorted(fitter.points, key=lambda p: (p.speedup, p.drop))
    curve = {
        "budget": str(budget), "drop": judge.measure, "samples": len(judging), "chosen": made.point.record(),
        "curve": [point.record() for point in points],
    }  # fmt: skip
    records = [dict(record) for record in made.records]
    records[-1]["budget"] = curve
    return ir.from_proto(onnx.load_model_from_string(made.data)), records


def best_pruning(folder: Path, rearrange: bool = True) -> Pruning:
    """`rearrange` for blocks, and `prune`; what is measured is kept in `folder`, so that the next share finds it."""

    def passes(block: str, share: float) -> list[str]:
        state, removed = folder / f"{block}.json", math.ceil(1e6 * share) / 1e6
        moved = [f"rearrange:block={block}"] if rearrange and block != "1x1" else []
        return [*moved, f"prune:block={block},sparsity={removed:.6f},budget=latency,state={state}"]

    return passes


class Part:
    """The samples of a stream that judge, every HELD_OUT-th, or all others."""

    labels = None  # of calibration data: never used

    def __init__(self, stream: Any, held_out: bool) -> None:
        self._stream, self._held_out = stream, held_out

    def __len__(self) -> int:
        judging = -(-len(self._stream) // HELD_OUT)
        return judging if self._held_out else len(self._stream) - judging

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        if self._held_out:
            return islice(iter(self._stream), 0, None, HELD_OUT)
        return (sample for i, sample in enumerate(self._stream) if i % HELD_OUT)


class Judge:
    """Measures drops against the model as it was when this was made. labels: int [samples], or None."""

    def __init__(self, model: ir.Model, samples: Any, labels: np.ndarray | None) -> None:
        self._samples, self._labels = samples, labels
        outputs = self._run(model_bytes(model))
        self._fidelity = Fidelity([str(y.name) for y in model.graph.outputs], outputs)
        if self._fidelity.classifies and labels is not None:
            self.measure = "accuracy lost on labelled samples"
            self._right = self._correct(outputs)
        elif self._fidelity.classifies:
            self.measure = "samples whose top class changed"
        else:
            self.measure = "relative error of the outputs"

    def drop(self, data: bytes) -> float:
        """Of the model in the bytes `data`, as a share."""
        outputs = self._run(data)
        if not self._fidelity.classifies:
            return math.sqrt(float(self._fidelity.damages(outputs).mean()))
        if self._labels is not None:
            return self._right - self._correct(outputs)
        return float(self._fidelity.changed(outputs).mean())

    def _correct(self, outputs: list[np.ndarray]) -> float:
        assert self._labels is not None
        return float((outputs[0].reshape(len(self._labels), -1).argmax(axis=1) == self._labels).mean())

    def _run(self, data: bytes) -> list[np.ndarray]:
        session = open_session(data)
        names = [x.name for x in session.get_inputs()]
        stream, results = iter(self._samples), []
        while batch := list(islice(stream, 32)):
            results += in_parallel(lambda sample: session.run(None, {n: sample[n] for n in names}), batch)
        return [np.stack(ys) for ys in zip(*results, strict=True)]


class _Fitter:
    """Makes points and looks for the one that holds the budget."""

    def __init__(
        self, budget: Budget, model: ir.Model, before: Sequence[PassStep], after: Sequence[PassStep], target: Target,
        calibration: Any, judge: Judge, clock: Clock | None, progress: Progress | None, pruning: Pruning,
    ) -> None:  # fmt: skip
        self._data, self._before, self._after = model_bytes(model), before, after
        self._budget, self._target, self._calibration = budget, target, calibration
        self._price = layer_price(target)
        self._judge, self._clock, self._progress, self._pruning = judge, clock, progress, pruning
        model, _ = self._run(before)
        self._total = predicted_us(model, target)
        selection = select_layers(model)
        selection.require()
        self._layers = [layer.name for layer in selection.layers]
        self._matched = sum(self._price(layer, np.ones(layer.shape, np.float32)) for layer in selection.layers)
        self.points: list[Point] = []

    def accuracy(self, blocks: Sequence[str]) -> _Made:
        """The largest share whose drop is small enough."""
        best: _Made | None = None
        low = -1  # SHARES[low] holds
        for block in blocks:
            high, first = len(SHARES), best is None
            while high - low > 1:
                middle = (low + high) // 2 if first else low + 1
                made, first = self._try(block, SHARES[middle]), True
                if made is not None and made.point.holds:
                    low, best = middle, made
                else:
                    high = middle
        if self._after:
            block, high = (best.point.block if best else blocks[0]), min(len(SHARES), low + 2**RECOVERIES)
            while high - low > 1:
                middle = (low + high) // 2
                made = self._try(block, SHARES[middle], recover=True)
                if made is not None and made.point.holds:
                    low, best = middle, made
                else:
                    high = middle
        if best is None:
            raise self._missed()
        return best

    def speedup(self, blocks: Sequence[str]) -> _Made:
        """The smallest drop of what is fast enough."""
        wanted = self._budget.amount
        for _ in range(RETRIES + 1):
            share = (1 - 1 / wanted) * self._total / self._matched
            tried = [made for block in blocks if share <= 1 and (made := self._try(block, share)) is not None]
            if not tried:
                break
            best = min(tried, key=lambda made: made.point.drop)
            if self._after:
                best = self._try(best.point.block, share, recover=True) or best
            best = self._timed(best)
            if best.point.holds:
                return best
            wanted *= self._budget.amount / (best.point.measured or best.point.speedup)
            blocks = [best.point.block]
        raise self._missed()

    def _timed(self, made: _Made) -> _Made:
        if self._clock is None:
            return made
        if self._progress is not None:
            self._progress("budget: timing", 0, 1)
        measured = self._clock(made.data)
        point = replace(made.point, measured=measured, holds=bool(measured >= self._budget.amount * (1 - NOISE)))
        self.points[self.points.index(made.point)] = point
        return replace(made, point=point)

    def _run(self, steps: Sequence[PassStep]) -> tuple[ir.Model, list[dict[str, Any]]]:
        return run_passes(
            ir.from_proto(onnx.load_model_from_string(self._data)), steps, calibration=self._calibration,
            target=self._target, price=self._price, progress=self._progress,
        )  # fmt: skip

    def _try(self, block: str, share: float, recover: bool = False) -> _Made | None:
        """The point; None if `prune` cannot reach the share with this block."""
        if self._progress is not None:
            self._progress(f"budget: {block} blocks, {100 * share:.0f}% of the pruned layers' latency", 0, 1)
        chosen = [as_step(item) for item in self._pruning(block, share)]
        after = self._after if recover else ()
        try:
            try:
                model, records = self._run([*self._before, *chosen, *after])
            except RecipeError as error:
                if error.where != "pass rearrange" or len(chosen) == 1:
                    raise
                model, records = self._run([*self._before, *chosen[1:], *after])  # no channels of it may move
        except RecipeError as error:
            if "cannot be held" in error.message:
                return None
            raise
        data = model_bytes(model)
        layers = [layer for layer in select_layers(model).layers if layer.name in self._layers]
        zeros = sum(layer.size - int(np.count_nonzero(layer.read())) for layer in layers)
        drop, speedup = float(self._judge.drop(data)), float(self._total / predicted_us(model, self._target))
        if self._budget.kind == "accuracy":
            holds = drop <= self._budget.amount + 1e-12
        else:
            holds = speedup >= self._budget.amount * (1 - 1e-6)
        share_zero = zeros / sum(layer.size for layer in layers)
        point = Point(block, share, share_zero, drop, speedup, recover and bool(self._after), bool(holds))
        self.points.append(point)
        return _Made(point, data, records)

    def _missed(self) -> BudgetMissed:
        if not self.points:
            text = f"out of reach: all prunable layers together take {self._matched / self._total:.0%} of the predicted time"
            return BudgetMissed(f"{self._budget} is {text}", [])
        if self._budget.kind == "accuracy":
            best = min(self.points, key=lambda p: p.drop)
        else:
            timed = [point for point in self.points if point.measured is not None]
            best = max(timed or self.points, key=lambda p: p.measured or p.speedup)
        return BudgetMissed(f"no pruning holds {self._budget}; the best found: {best}", self.points)


def predicted_us(model: ir.Model, target: Target) -> float:
    """Microseconds that the cost model expects of the whole model."""
    return sum(layer.predicted_us for layer in lower(model, target).layers)
