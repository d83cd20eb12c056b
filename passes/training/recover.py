"""Recover accuracy by training: distil the original model into the changed one on unlabelled calibration samples.

    min over w     E_x  D(original(x), model_w(x)) + features * E_x |f_original(x) - f_model(x)|^2 / var(f_original)

over the constants w of the model, under the mask w_i = 0 where it is zero now: whatever pattern a pass before left
stays bit by bit. The law of the loss, of the parametrization and of the schedule is in `distill.py`; the samples are
widened by random views that the original labels itself (`augment.py`). Only what lies behind the first difference
between the two models is trained.

    train = all        every weight, bias and normalization
    train = bias       biases and normalizations alone (PERP: Zimmer et al. 2023, arXiv:2312.15230)
    train = lowrank    those, and an update U V of rank `rank` for each weight, merged under its mask (PERP's MaskLoRA)

The original is the model before the first inexact pass of the run, or the file `teacher`. Needs torch. Never implied by
another pass. Never changed: the graph, shapes, names, zeros.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import onnx
import onnx_ir as ir

from sparsec.errors import RecipeError, RuntimeUnavailable, UsageError
from sparsec.passes.layers import FLOATS, WeightedLayer, as_layer
from sparsec.passes.measure.matching import Agreement, agreement, put_back
from sparsec.rewriting.passes_api import Context, Pass, PassResult, Samples

if TYPE_CHECKING:
    from sparsec.passes.training.distill import Settings, Task, Trainable

SAMPLED = 16  # samples that the sizes of steps are derived from
TINY = 1e-12
SAMPLE_BYTES = 1 << 31  # of calibration samples held in memory; of more, evenly spaced ones are taken
_NORMS = ("LayerNormalization", "GroupNormalization", "InstanceNormalization", "RMSNormalization", "BatchNormalization")


@dataclass(frozen=True)
class Recover(Pass):
    """Train what was pruned until it answers like the original again (needs --calibration and torch).

    `minutes`: processor time it may take (clock time on a GPU); `steps` instead, if positive. `train`: all, bias or
    lowrank (of `rank`). `augment`: random views of images, mixtures of others. `features`: weight of the feature loss.
    `teacher`: the dense ONNX file, for a model that was pruned elsewhere. `rate`: the largest
    relative change of an output in one step.
    """

    name: ClassVar[str] = "recover"

    minutes: float = 30.0
    steps: int = 0
    train: Literal["all", "bias", "lowrank"] = "all"
    rank: int = 8
    rate: float = 1e-3
    batch: int = 16
    temperature: float = 1.0
    features: float = 1.0
    augment: bool = True
    optimizer: Literal["adamw", "sgd"] = "adamw"
    patience: int = 4
    threads: int = 0
    seed: int = 0
    teacher: str = ""

    def __post_init__(self) -> None:
        for key, low in (("minutes", 0.0), ("rate", 0.0), ("temperature", 0.0)):
            if not getattr(self, key) > low:
                raise RecipeError(f"recover: {key} must be above {low:g}, got {getattr(self, key)}")
        for key, least in (("steps", 0), ("batch", 1), ("rank", 1), ("patience", 1), ("threads", 0), ("features", 0)):
            if getattr(self, key) < least:
                raise RecipeError(f"recover: {key} must be at least {least}, got {getattr(self, key)}")
        for key, known in (("train", ("all", "bias", "lowrank")), ("optimizer", ("adamw", "sgd"))):
            if getattr(self, key) not in known:
                raise RecipeError(f"recover: {key} must be {', '.join(known)}, got {getattr(self, key)!r}")

    def call(self, model: ir.Model) -> PassResult:
        context = Context.of(model)
        samples = collect_samples(model, context.calibration)
        teacher = self._teacher(model, context)
        shared = agreement(teacher, model)
        if shared.equal:
            text = "the model still computes what the original does; put recover behind the pass that changes it"
            raise RecipeError(f"{text}, or give teacher=DENSE.onnx for a model pruned elsewhere")
        torch = require_torch()
        restored = put_back(teacher, model)
        shared = agreement(teacher, model) if restored else shared
        if self.threads:
            torch.set_num_threads(self.threads)
        from sparsec.passes.training.distill import Samples, Task, distill, output_kinds
        from sparsec.passes.training.torch_graph import TorchGraph

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        task = Task(
            TorchGraph(teacher, device), TorchGraph(model, device), shared.frontier, shared.taps, output_kinds(model)
        )
        data = Samples(samples, device, self.seed)
        trainables = list(self._trainables(model, shared, task, data))
        if not trainables:
            raise RecipeError("nothing behind the first change can be trained")

        def tell(text: str, share: float) -> None:
            context.tell(f"recover: {text}", round(100 * share), 100)

        outcome = distill(task, trainables, data, self._settings(), tell)
        changed = 0
        for name, array in outcome.weights.items():
            changed += _store(model.graph.initializers[name], array)
        context.records.append({
            "trained": len(trainables), "changed": changed, "samples": len(samples), "seen": outcome.samples,
            "steps": outcome.steps, "held_out": len(data.held), "divergence_before": round(outcome.before, 6),
            "divergence_after": round(outcome.after, 6), "feature_losses": len(shared.taps),
        })  # fmt: skip
        return PassResult(model, bool(changed or restored))

    def _settings(self) -> Settings:
        from sparsec.passes.training.augment import Views
        from sparsec.passes.training.distill import Settings

        return Settings(
            minutes=self.minutes, steps=self.steps, batch=self.batch, rate=self.rate, temperature=self.temperature,
            features=self.features, patience=self.patience, rank=self.rank if self.train == "lowrank" else 0,
            seed=self.seed, optimizer=self.optimizer, views=Views() if self.augment else None,
        )  # fmt: skip

    def _teacher(self, model: ir.Model, context: Context) -> ir.Model:
        if self.teacher:
            from sparsec.loading.load import load_model

            shapes = {str(x.name): tuple(int(str(d)) for d in x.shape or ()) for x in model.graph.inputs}
            try:
                teacher = load_model(self.teacher, shapes, None, [])
            except UsageError as error:
                raise RecipeError(
                    f"the teacher has other inputs than the model: {error.message}", self.teacher
                ) from error
        elif context.original is not None:
            teacher = ir.from_proto(onnx.load_model_from_string(context.original))
        else:
            raise RecipeError("the original model is not known outside of a pipeline; give teacher=DENSE.onnx")
        for what, first, second in (
            ("inputs", teacher.graph.inputs, model.graph.inputs),
            ("outputs", teacher.graph.outputs, model.graph.outputs),
        ):
            if [list(x.shape or ()) for x in first] != [list(x.shape or ()) for x in second]:
                raise RecipeError(f"the teacher's {what} have other shapes than the model's", "recover")
        if [x.name for x in teacher.graph.inputs] != [x.name for x in model.graph.inputs]:
            raise RecipeError("the teacher's inputs have other names than the model's", "recover")
        return teacher

    def _trainables(self, model: ir.Model, shared: Agreement, task: Task, data: Any) -> Iterable[Trainable]:
        from sparsec.passes.training.distill import Centre, Trainable

        seen: set[str] = set()
        layers: list[tuple[ir.Node, ir.Value, WeightedLayer | None]] = []
        for node in model.graph:
            if node in shared.nodes:
                seen |= {str(x.name) for x in node.inputs if x is not None}  # frozen: what is shared stays so
        for node in model.graph:
            if node not in shared.nodes:
                for value, layer in _constants(node, weights=self.train != "bias"):
                    if value.name not in seen:
                        seen.add(str(value.name))
                        layers.append((node, value, layer))
        spreads = _spreads(task, data, {str(node.outputs[0].name) for node, _, _ in layers})
        moments = _moments(task, data, [layer for _, _, layer in layers if layer is not None])
        names = {str(value.name) for _, value, _ in layers}
        for node, value, layer in layers:
            tensor = value.const_value
            assert tensor is not None
            start = np.asarray(tensor.numpy(), np.float32)
            if layer is None:
                yield Trainable(
                    str(value.name), start, None, _bias_scale(start, spreads.get(str(node.outputs[0].name)))
                )
                continue
            oc, ic, kh, kw = layer.shape
            matrix = (ic, oc) if layer.transposed else (oc, ic * kh * kw)
            scale = np.broadcast_to(_row_scale(layer), layer.shape)
            centre, found = None, moments.get(layer.name)
            spread = spreads.get(str(node.outputs[0].name))
            if found is not None and spread is not None and spread.size == oc:
                mean, deviation = (_of_rows(layer, m) for m in found)
                row = np.maximum(spread, 0.01 * spread.mean() + TINY).reshape(-1, 1, 1, 1)
                scale = np.broadcast_to(row / (ic * kh * kw * deviation), layer.shape)
                bias = node.inputs[2] if layer.op != "MatMul" and len(node.inputs) > 2 else None
                if bias is not None and str(bias.name) in names:
                    axes = (0,) if layer.transposed else tuple(range(1, len(layer.tensor.shape)))
                    centre = Centre(str(bias.name), _as_stored(layer, np.broadcast_to(mean, layer.shape)), axes)
            yield Trainable(str(value.name), start, start != 0, _as_stored(layer, scale), matrix, centre)


def require_torch() -> Any:
    """The torch module. RuntimeUnavailable if it is not installed."""
    try:
        import torch
    except ImportError as error:
        text = "recover trains with torch, which is not installed; pip install 'sparsec[torch]'"
        raise RuntimeUnavailable(text, "recover") from error
    return torch


def collect_samples(model: ir.Model, calibration: Samples | None) -> list[dict[str, np.ndarray]]:
    """Calibration samples of the inputs' shapes, thinned evenly to what memory may hold. RecipeError for fewer than 2."""
    if calibration is None:
        raise RecipeError("needs samples to train on; give --calibration DATA")
    size = sum(int(np.prod([int(str(d)) for d in x.shape or ()])) * 4 for x in model.graph.inputs)
    every = max(1, -(-len(calibration) * size // SAMPLE_BYTES))
    samples = [sample for index, sample in enumerate(calibration) if index % every == 0]
    if len(samples) < 2:
        raise RecipeError(f"needs at least 2 calibration samples, one of them held out, got {len(samples)}")
    return samples


def _constants(node: ir.Node, weights: bool) -> Iterable[tuple[ir.Value, WeightedLayer | None]]:
    """Constants of a node that training may change: weights with their layer, biases and normalizations with None."""
    layer = as_layer(node)
    if isinstance(layer, WeightedLayer):
        if weights:
            yield layer.weight, layer
        if layer.op != "MatMul" and len(node.inputs) > 2 and _is_float(node.inputs[2]):
            yield node.inputs[2], None  # type: ignore[misc]
    elif node.op_type in _NORMS:
        for value in node.inputs[1:3]:
            if _is_float(value):
                yield value, None  # type: ignore[misc]
    elif node.op_type == "Add":  # a bias by another name
        for value in node.inputs:
            if _is_float(value):
                yield value, None  # type: ignore[misc]


def _is_float(value: ir.Value | None) -> bool:
    tensor = None if value is None or value.is_graph_input() else value.const_value
    return tensor is not None and tensor.dtype in FLOATS and tensor.size > 1


def _row_scale(layer: WeightedLayer) -> np.ndarray:
    """[OC, 1, 1, 1]: |row| / k for a row of k nonzeros, the step where nothing is known of the input. A row counts as at
    least a hundredth of the layer's."""
    weight = np.asarray(layer.read(), np.float64)
    axes = (1, 2, 3)
    count = np.maximum((weight != 0).sum(axes, keepdims=True), 1)
    rms = np.sqrt(np.square(weight).sum(axes, keepdims=True) / count)
    whole = np.sqrt(np.square(weight).sum() / max(np.count_nonzero(weight), 1))
    return np.maximum(rms, 0.01 * whole + TINY) / np.sqrt(count)


def _as_stored(layer: WeightedLayer, oihw: np.ndarray) -> np.ndarray:
    """[OC, IC, KH, KW] in the form of the stored weight, float32."""
    matrix = oihw if layer.op == "Conv" else oihw.reshape(layer.shape[:2])
    stored = (matrix.T if layer.transposed else matrix).reshape([int(str(d)) for d in layer.tensor.shape])
    return np.ascontiguousarray(stored, np.float32)


def _of_rows(layer: WeightedLayer, channels: np.ndarray) -> np.ndarray:
    """One value an input channel [groups * IC] as [OC, IC, 1, 1]: what each row reads."""
    by_group = channels.reshape(layer.groups, 1, -1)
    rows = np.broadcast_to(by_group, (layer.groups, layer.shape[0] // layer.groups, layer.shape[1]))
    return rows.reshape(*layer.shape[:2], 1, 1)


def _moments(task: Task, data: Any, layers: list[WeightedLayer]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Layer name -> mean and deviation of each input channel over a few samples; a deviation is at least a tenth of the
    layer's, so that a channel that is almost constant gets no huge steps."""
    import torch

    reads = {layer.name: str(x.name) for layer in layers if (x := _read(layer)) is not None}
    made = {}
    with torch.no_grad():
        values = task.student.run(data.take(data.train[:SAMPLED]), sorted(set(reads.values())))
        for layer in layers:
            if layer.name in reads:
                x = values[reads[layer.name]]
                axis = 2 if layer.op == "Conv" else x.dim() - 1
                flat = x.movedim(axis, -1).reshape(-1, x.shape[axis]).double()
                deviation = flat.std(0, unbiased=False)
                floor = 0.1 * float(deviation.square().mean().sqrt()) + TINY
                made[layer.name] = flat.mean(0).cpu().numpy(), deviation.clamp(min=floor).cpu().numpy()
    return made


def _read(layer: WeightedLayer) -> ir.Value | None:
    """The layer's input where its channels lie on axis 1 (Conv) or the last axis (products)."""
    if layer.op == "Gemm" and layer.node.attributes.get_int("transA", 0):
        return None
    return layer.node.inputs[0] if layer.op != "MatMul" or layer.transposed else None


def _spreads(task: Task, data: Any, names: set[str]) -> dict[str, np.ndarray]:
    """Deviation over one batch of the student's values, one a channel (axis 1 of images, the last of others)."""
    import torch

    feeds = data.take(data.train[:SAMPLED])
    found = {}
    with torch.no_grad():
        wanted = sorted(names)
        for name, x in task.student.run(feeds, wanted).items():
            axis = 2 if x.dim() >= 5 or x.dim() == 4 else x.dim() - 1
            flat = x.movedim(axis, -1).reshape(-1, x.shape[axis])
            found[name] = flat.std(0).cpu().numpy() if len(flat) > 1 else np.ones(x.shape[axis], np.float32)
    return found


def _bias_scale(start: np.ndarray, spread: np.ndarray | None) -> np.ndarray:
    """The channel's deviation where the shapes fit, else the constant's own size."""
    if spread is not None and spread.size == start.size:
        floor = 0.01 * float(spread.mean()) + 1e-8
        return np.maximum(spread, floor).reshape(start.shape).astype(np.float32)
    size = float(np.sqrt(np.square(start, dtype=np.float64).mean()))
    return np.full(start.shape, size or 1.0, np.float32)


def _store(value: ir.Value, array: np.ndarray) -> bool:
    """Write a constant back in its own type; whether it changed. What rounds to zero in half precision stays nonzero."""
    tensor = value.const_value
    assert tensor is not None
    before = tensor.numpy()
    after = array.astype(before.dtype)
    after = np.where((after == 0) & (before != 0), before, after)
    after = np.where(before == 0, before, after) if array.ndim > 1 else after
    if np.array_equal(after, before):
        return False
    value.const_value = ir.Tensor(np.asarray(after, order="C"), dtype=tensor.dtype, name=value.name)
    return True
