"""load: a model file to a checked, normalised `onnx_ir.Model` at one working opset with static shapes.

All of it happens in a process of its own (`sparsec.isolation`), within `Limits`: the file is untrusted, and checker,
version converter, shape inference and ONNX Runtime are C++. What comes back has been through each of them.

The line: read (sparsec.reading) -> inline functions -> refuse what is not plain ONNX -> upgrade to `OPSET` -> name the
nodes -> fix input shapes, bind inputs -> the passes of `normalisation`, in this order -> check that every value has a
static shape and a type -> one run in ONNX Runtime. Deterministic; weights keep their values except where BatchNorm is
folded into them.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from sparsec import isolation
from sparsec.errors import ModelError, SparsecError, UnsupportedError, UsageError
from sparsec.exchange import mapped, pack, unpack, without_data
from sparsec.external_data import RANK, Extent, ExternalFiles
from sparsec.isolation import Allowance, Worker, call
from sparsec.limits import DEFAULT, MEMORY_FACTOR, Limits
from sparsec.opsets import STANDARD_DOMAINS, inline_functions, listed, to_working_opset
from sparsec.passes import (
    CancelTransposes,
    ExplicitPads,
    FoldBatchNorm,
    FoldConstants,
    FuseLayerNorm,
    ImportQOperator,
    NormalizeQdq,
    RemoveNoOps,
    UnrollRecurrent,
)
from sparsec.passes.fold_constants import (
    constant,
    has_subgraph,
    quiet_session,
    remove_unused_initializers,
    static_shape,
)
from sparsec.passes.unroll_recurrent import RECURRENT, refusal
from sparsec.passes_api import META_KEY, Pass
from sparsec.reading import Source, check_proto, read_proto, read_source
from sparsec.targets import suggest


def normalisation(limits: Limits = DEFAULT) -> tuple[Pass, ...]:
    """The passes of loading, in order.

    Shapes first (the others need them) but behind what has no standard operator yet; again at the end, since folding
    may leave constants to fold.
    """
    fold = FoldConstants(limits.unroll, limits.folded_bytes, limits.nodes)
    return (
        ImportQOperator(),
        fold,
        UnrollRecurrent(limits.unroll),
        RemoveNoOps(),
        CancelTransposes(),
        NormalizeQdq(),
        ExplicitPads(),
        FoldBatchNorm(),
        fold,
        FuseLayerNorm(),
    )


Shapes = Mapping[str, tuple[int, ...]]


def load_model(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model,
    shapes: Shapes | None = None,
    bind: Mapping[str, Any] | None = None,
    notes: list[str] | None = None,
    limits: Limits = DEFAULT,
) -> ir.Model:
    """The model, checked and normalised; the caller's object is left alone.

    `shapes`: input name -> full shape. `bind`: input name -> value (number, sequence, array or text such as "16000" or
    "0.5+1"), fixed as a constant. `notes` receives one line for everything a user should be told, such as a symbolic
    batch that became 1. `limits`: what the model may cost, and whether it is read in a process of its own.

    Raises ModelError (damaged, invalid, or beyond a limit), UnsupportedError (lists everything at once), UsageError
    (a shape or bound value that does not fit).
    """
    notes = notes if notes is not None else []
    if isinstance(source, ir.Model):
        source = ir.to_proto(source)
    shapes, bind = dict(shapes or {}), dict(bind or {})
    if limits.isolate and not isolation.available():
        notes.append("this system cannot read models in a process of their own: memory and time are not limited")
    elif limits.isolate:
        return _isolated(source, shapes, bind, notes, limits)
    return load_here(source, shapes, bind, notes, limits)[0]


def load_here(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    shapes: dict[str, Any],
    bind: dict[str, Any],
    notes: list[str],
    limits: Limits = DEFAULT,
    say: Say = lambda text: None,
    on_map: Callable[[int], None] = lambda size: None,
) -> tuple[ir.Model, Beside]:
    """`load_model` in this process; with the model the large initializers that are still what a file beside it holds."""
    where = _where(source)
    say("reading the file")
    read = read_source(source, limits, on_map=on_map)
    try:
        return _load(read, shapes, bind, notes, limits, say)
    except (SparsecError, MemoryError):
        raise
    except Exception as error:  # what onnx.checker lets through and the libraries below then stumble over
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise ModelError(f"cannot be normalised: {text[:300]}", where) from error


Say = Callable[[str], None]
Beside = dict[str, tuple[ir.Tensor, Extent]]


def _where(source: Any) -> str:
    return os.path.basename(os.fspath(source)) if isinstance(source, (str, os.PathLike)) else "model"


def _load(
    read: Source, shapes: dict[str, Any], bind: dict[str, Any], notes: list[str], limits: Limits, say: Say
) -> tuple[ir.Model, Beside]:
    where = read.where
    say("onnx.checker")
    check_proto(read.proto, where)
    say("inlining functions")
    proto = inline_functions(read.proto, where)
    say("the opset conversion")
    model = ir.from_proto(to_working_opset(proto, where))
    beside = _attach(model.graph, read)
    say("shape inference and constant folding")
    _name_nodes(model.graph)
    _drop_initializer_inputs(model.graph, bind, notes)
    _fix_shapes(model.graph, shapes, bind, where, notes)
    _forget_inferred_shapes(model.graph)
    normalise(model, limits)
    _refuse_unfinished(model, where, limits)
    _tidy(model)
    say("onnx.checker on the normalised model")
    check_proto(without_data(model), where)
    return model, beside


def _attach(graph: ir.Graph, read: Source) -> Beside:
    """Give the large external initializers their data back, mapped."""
    beside: Beside = {}
    for value in [v for v in graph.inputs if v.name in read.lazy]:
        name = str(value.name)
        proto, extent = read.lazy[name]
        tensor = mapped(read.files.view(extent), ir.serde.TensorProtoTensor(proto), name, read.where)
        beside[name] = tensor, extent
        value.const_value = tensor
        if value.name in read.declared:
            graph.register_initializer(value)
            continue
        graph.inputs.remove(value)
        graph.register_initializer(value)
    return beside


def normalise(model: ir.Model, limits: Limits = DEFAULT) -> None:
    """Run the passes of loading in place."""
    for step in normalisation(limits):
        step(model)
    common.RemoveUnusedNodesPass()(model)
    remove_unused_initializers(model.graph)
    common.TopologicalSortPass()(model)
    model.meta.pop(META_KEY, None)


# ---- the process of its own


def _isolated(
    source: str | os.PathLike[str] | bytes | onnx.ModelProto,
    shapes: dict[str, Any],
    bind: dict[str, Any],
    notes: list[str],
    limits: Limits,
) -> ir.Model:
    more = {
        "shapes": {name: _sizes(name, shape) for name, shape in shapes.items()},
        "bind": {name: _plain(value) for name, value in bind.items()},
    }
    answer, contents, files = _ask("load_task", source, more, limits)
    notes += [str(note) for note in answer.get("notes", [])]
    return unpack(contents, files)


def vet(source: str | os.PathLike[str] | bytes | onnx.ModelProto, limits: Limits = DEFAULT) -> None:
    """Raise ModelError unless a model can be read as it is and ONNX Runtime opens it; tried in a process of its own."""
    if limits.isolate:
        _ask("vet_task", source, {}, limits)


def _ask(
    task: str, source: str | os.PathLike[str] | bytes | onnx.ModelProto, more: dict[str, Any], limits: Limits
) -> tuple[dict[str, Any], list[memoryview], ExternalFiles]:
    """What a task of this module answers about `source`."""
    where, folder, path = _where(source), None, None
    parts: list[bytes] = []
    size = 0
    if isinstance(source, onnx.ModelProto):
        try:
            parts = [source.SerializeToString()]
        except ValueError as error:
            raise ModelError("above 2 GB; save it with external data and give its path", where) from error
        size = len(parts[0])
    elif isinstance(source, (bytes, bytearray, memoryview)):
        parts, size = [bytes(source)], len(source)
    elif isinstance(source, (str, os.PathLike)):
        path = os.path.abspath(os.fspath(source))
        folder = Path(path).parent
        size = os.path.getsize(path) if os.path.isfile(path) else 0
    else:
        read_source(source, limits)  # says what is wrong
    if size > limits.file_bytes:
        raise ModelError(f"{size} bytes, at most {limits.file_bytes} are read (--limit file-bytes=N)", where)
    header = {
        "path": path,
        "shown": os.fspath(source) if isinstance(source, (str, os.PathLike)) else None,
        "where": where,
        "limits": dataclasses.asdict(limits),
        **more,
    }
    allowance = Allowance(limits.memory + MEMORY_FACTOR * size, limits.seconds)
    answer, contents = call(f"sparsec.loading:{task}", header, parts, allowance, where)
    return answer, contents, ExternalFiles(folder, where, limits)


def load_task(worker: Worker, header: dict[str, Any], parts: list[memoryview]) -> None:
    """`load_model` for `sparsec.isolation`."""
    limits = Limits(**header["limits"])
    bind = {name: value if isinstance(value, str) else _bound(value) for name, value in header["bind"].items()}
    source = header["path"] if header["path"] is not None else bytes(parts[0])
    notes: list[str] = []
    try:
        model, beside = load_here(
            source, header["shapes"], bind, notes, limits, worker.step, lambda n: worker.allow(3 * n)
        )
    except SparsecError as error:
        if error.where == header["path"] and header["shown"]:
            error.where = header["shown"]
        raise
    if not beside:
        worker.step("a run in ONNX Runtime")
        _try(model, header["where"])
    worker.step("handing the model over")
    worker.answer({"notes": notes}, pack(model, beside))


def warm() -> None:
    """Load something small, so that the workers of `sparsec.isolation` find everything imported."""
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy")
    proto = onnx.helper.make_model(onnx.helper.make_graph([node], "warm", [x], [y]))
    _try(load_here(proto, {}, {}, [])[0], "warm")


def vet_task(worker: Worker, header: dict[str, Any], parts: list[memoryview]) -> None:
    """`vet` for `sparsec.isolation`."""
    source = header["path"] if header["path"] is not None else bytes(parts[0])
    worker.step("reading and checking the file")
    proto = read_proto(source, Limits(**header["limits"]), lambda n: worker.allow(3 * n))
    worker.step("ONNX Runtime")
    try:
        quiet_session(proto.SerializeToString())
    except MemoryError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise ModelError(f"ONNX Runtime does not load it: {text}", header["where"]) from error
    worker.answer({})


def _try(model: ir.Model, where: str) -> None:
    """Run the model once, on ones. A crash ends this process; an operator that ONNX Runtime lacks is no fault."""
    try:
        session = quiet_session(model_bytes(model))
        feeds = {
            v.name: np.ones([int(str(d)) for d in v.shape], v.dtype.numpy())  # integers divide by zero with a crash
            for v in model.graph.inputs
            if v.shape is not None and v.dtype is not None
        }
        session.run(None, feeds)
    except MemoryError:
        raise
    except Exception as error:
        if "bad_alloc" in str(error) or "Failed to allocate memory" in str(error):
            raise MemoryError from error


def _bound(value: Any) -> Any:
    dtype, numbers = value
    return np.array(numbers, dtype) if isinstance(numbers, list) else np.dtype(dtype).type(numbers).item()


def _plain(value: Any) -> Any:
    """A bound value in JSON: text as it is, numbers with their type; what is neither as text, to be refused."""
    if isinstance(value, str):
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):
        return repr(value)
    return [array.dtype.str, array.tolist()] if array.dtype.kind in "biuf" else repr(value)


def _sizes(name: str, shape: Any) -> list[int]:
    try:
        return [int(d) for d in shape]
    except (TypeError, ValueError) as error:
        raise UsageError(f"expected a list of numbers, got {shape!r}", f"--shape {name}") from error


# ---- names, inputs and shapes


def _name_nodes(graph: ir.Graph) -> None:
    """Every node gets a unique name; missing ones are `OPERATOR_INDEX`, the index counting nodes of the file."""
    taken = {node.name for node in graph if node.name}
    seen: set[str] = set()
    for index, node in enumerate(graph):
        name = node.name or f"{node.op_type}_{index}"
        if node.name in seen or (not node.name and name in taken):
            base, count = name, 1
            while name in taken:
                name, count = f"{base}_{count}", count + 1
        taken.add(name)
        seen.add(name)
        node.name = name


def _drop_initializer_inputs(graph: ir.Graph, bind: Mapping[str, Any], notes: list[str]) -> None:
    """Inputs with a default value are constants of that value, unless `bind` gives another."""
    dropped = []
    for value in [v for v in graph.inputs if v.is_initializer()]:
        if value.name in bind:
            del graph.initializers[str(value.name)]
            continue
        graph.inputs.remove(value)
        if value.uses():
            dropped.append(value.name)
    if dropped:
        notes.append(f"{len(dropped)} inputs have default values and became constants")


def _dims(value: ir.Value) -> list[int | str | None] | None:
    if value.shape is None:
        return None
    return [int(d) if isinstance(d, int) else d.value for d in value.shape.dims]


def _fix_shapes(graph: ir.Graph, shapes: dict[str, Any], bind: dict[str, Any], where: str, notes: list[str]) -> None:
    names = [str(v.name) for v in graph.inputs]
    for option, given in (("--shape", shapes), ("--bind", bind)):
        for name in given:
            if name not in names:
                raise UsageError(f"the model has no input {name!r}{suggest(str(name), names)}", option)
    _refuse_types(graph, where)
    symbols = _symbols(graph, shapes, bind, notes)
    problems = []
    for value in graph.inputs:
        dims = _dims(value)
        if value.name in shapes or value.name in bind:
            continue
        if dims is None:
            problems.append(f"input {value.name!r} has no shape: give --shape {value.name}:1x3x224x224")
            continue
        fixed = [symbols.get(d, d) if isinstance(d, str) else d for d in dims]
        if fixed and not isinstance(fixed[0], int):
            fixed[0] = 1
            notes.append(f"input {value.name!r}: batch {_dim_text(dims[0])} became 1")
        if all(isinstance(d, int) and d > 0 for d in fixed):
            value.shape = ir.Shape(fixed)
            continue
        open_dims = ", ".join(f"dimension {i} is {_dim_text(d)}" for i, d in enumerate(fixed) if not _is_size(d))
        example = "x".join(str(d) if _is_size(d) else "N" for d in fixed)
        problems.append(f"input {value.name!r}: {open_dims}; give --shape {value.name}:{example} with a number for N")
    if problems:
        raise UnsupportedError(f"every shape must be fixed at compile time: {listed(problems)}", where)
    for name, given in bind.items():
        _bind(graph, next(v for v in graph.inputs if v.name == name), given)


def _is_size(dim: int | str | None) -> bool:
    return isinstance(dim, int) and dim > 0


def _dim_text(dim: int | str | None) -> str:
    return f"symbolic ({dim})" if isinstance(dim, str) and dim else "symbolic" if not isinstance(dim, int) else str(dim)


def _symbols(graph: ir.Graph, shapes: dict[str, Any], bind: dict[str, Any], notes: list[str]) -> dict[str, int]:
    """Sizes of named dimensions: what `shapes` say, then 1 for every name that leads an input (a batch)."""
    symbols: dict[str, int] = {}
    for value in graph.inputs:
        dims = _dims(value)
        if value.name not in shapes:
            continue
        shape = tuple(int(d) for d in shapes[value.name])
        declared = "x".join("?" if not isinstance(d, int) else str(d) for d in dims) if dims is not None else "any"
        wrong = dims is not None and len(dims) != len(shape)
        wrong |= any(d < 0 or (d == 0 and (dims is None or wrong or dims[i] != 0)) for i, d in enumerate(shape))
        if not wrong and dims is not None:
            for dim, size in zip(dims, shape, strict=True):
                if isinstance(dim, int) and dim > 0:
                    wrong |= dim != size
                elif isinstance(dim, str) and symbols.setdefault(dim, size) != size:
                    text = f"{dim} cannot be {symbols[dim]} and {size} at once"
                    raise UsageError(text, f"--shape {value.name}")
        if wrong:
            text = f"input {value.name!r} is {declared}, got {'x'.join(map(str, shape))}"
            raise UsageError(f"{text}; symbolic dimensions (?) may be chosen, the others are fixed", "--shape")
        value.shape = ir.Shape(shape)
    for value in graph.inputs:
        dims = _dims(value)
        if dims and isinstance(dims[0], str) and value.name not in bind and dims[0] not in symbols:
            symbols[dims[0]] = 1
            notes.append(f"input {value.name!r}: batch {_dim_text(dims[0])} became 1")
    return symbols


def _bind(graph: ir.Graph, value: ir.Value, given: Any) -> None:
    option = f"--bind {value.name}"
    if value.dtype is None:
        raise UsageError("the input has no element type", option)
    dtype = value.dtype.numpy()
    try:
        array = np.asarray(_numbers(given) if isinstance(given, str) else given)
    except (TypeError, ValueError):
        array = np.asarray("")
    if array.dtype.kind not in "biuf":
        raise UsageError(f"expected numbers of type {dtype}, got {given!r}", option)
    whole = np.issubdtype(dtype, np.integer)
    if whole and not (np.isfinite(array).all() and np.array_equal(array, array.astype(dtype))):
        raise UsageError(f"expected whole numbers of type {dtype}, got {given!r}", option)
    dims = _dims(value)
    fixed = [d for d in dims or () if isinstance(d, int) and d > 0]
    if dims is not None and len(fixed) == len(dims):  # one number fills the input, a flat list takes its shape
        if array.size == 1:
            array = np.full(fixed, array.reshape(-1)[0])
        elif array.size == np.prod(fixed, dtype=np.int64):
            array = array.reshape(fixed)
    if dims is not None and (
        len(dims) != array.ndim or any(_is_size(d) and d != s for d, s in zip(dims, array.shape, strict=True))
    ):
        raise UsageError(f"the input has shape {dims}, got a value of shape {list(array.shape)}", option)
    graph.inputs.remove(value)
    value.shape = ir.Shape(array.shape)
    value.const_value = ir.tensor(np.asarray(array.astype(dtype), order="C"), name=value.name)
    graph.register_initializer(value)


def _numbers(text: str) -> list[float] | float:
    """`2`, `0.5` or `1+2+3`."""
    numbers = [int(p) if p.strip().lstrip("-").isdigit() else float(p) for p in text.split("+")]
    return numbers if len(numbers) > 1 else numbers[0]


def _forget_inferred_shapes(graph: ir.Graph) -> None:
    """Declared shapes of intermediate values may hold the batch of the export; they are inferred anew."""
    for node in ir.traversal.RecursiveGraphIterator(graph):
        for value in node.outputs:
            value.shape = None


# ---- what cannot be compiled


def _refuse_types(graph: ir.Graph, where: str) -> None:
    problems = []
    for value in (*graph.inputs, *graph.outputs):
        if value.type is not None and (not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.STRING):
            problems.append(f"{value.name!r} is {value.type}")
    if problems:
        raise UnsupportedError(f"inputs and outputs must be tensors of numbers: {listed(problems)}", where)


def _refuse_unfinished(model: ir.Model, where: str, limits: Limits) -> None:
    problems = [
        f"input {v.name!r} has {_elements(v)} elements, at most {limits.elements} are read (--limit elements=N)"
        for v in model.graph.inputs
        if _elements(v) > limits.elements
    ]
    for node in model.graph:
        what = f"{node.op_type} {node.name!r}"
        if node.domain not in STANDARD_DOMAINS:
            problems.append(f"{what}: no standard ONNX operator does what its attributes and inputs ask for")
            continue
        if has_subgraph(node):
            problems.append(f"{what}: control flow that depends on the input (--bind may fix an input)")
            continue
        ratio, training = [*node.inputs[1:3], None, None][:2] if node.op_type == "Dropout" else (None, None)
        if training is not None and not _is_false(training) and not (ratio is not None and _is_false(ratio)):
            problems.append(f"{what}: may be in training mode; export the model for inference")
        axis = node.attributes.get("axis")
        if axis is not None and axis.type == ir.AttributeType.INT and not -RANK <= axis.as_int() <= RANK:
            problems.append(f"{what}: its axis {axis.as_int()} does not exist")
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not _is_scale(node):
            problems.append(f"{what}: its scale is not a finite number above zero")
        if node.op_type == "MaxPool" and any(y.uses() or y.is_graph_output() for y in node.outputs[1:]):
            problems.append(f"{what}: the Indices of a MaxPool have no lowering")
        if node.op_type in RECURRENT:
            remedy = "give --limit unroll=N, or compile for one step, with the state as input and output"
            problems.append(f"{what}: {refusal(node, limits.unroll)}; {remedy}")
        for value in node.outputs:
            if not value.name:
                continue
            if value.type is None:
                problems.append(f"{what}: the type of its output {value.name!r} is unknown")
            elif not isinstance(value.type, ir.TensorType) or value.dtype == ir.DataType.STRING:
                problems.append(f"{what}: its output {value.name!r} is no tensor of numbers")
            elif static_shape(value) is None:
                problems.append(f"{what}: the shape of its output {value.name!r} depends on the input's values")
            elif _elements(value) > limits.elements:
                text = (
                    f"its output {value.name!r} has {_elements(value)} elements, at most {limits.elements} are computed"
                )
                problems.append(f"{what}: {text} (--limit elements=N)")
    if problems:
        raise UnsupportedError(listed(_roots_first(problems)), where)
    if not len(model.graph):
        raise ModelError("nothing is left to compute: every output is an input or a constant", where)


def _is_scale(node: ir.Node) -> bool:
    """False for a constant scale that no quantization has; a weight whose channel is all zero may have a scale of 0."""
    scale = constant(node.inputs[1])
    if scale is None:
        return True
    numbers = scale.astype(np.float64)
    return bool(np.isfinite(numbers).all() and ((numbers > 0) | (node.op_type == "DequantizeLinear")).all())


def _elements(value: ir.Value) -> int:
    return int(np.prod(static_shape(value) or (), dtype=object))


def _is_false(value: ir.Value) -> bool:
    array = constant(value)
    return array is not None and not array.any()


def _roots_first(problems: list[str]) -> list[str]:
    """Each distinct line once, control flow before what follows from it."""
    distinct = list(dict.fromkeys(problems))
    return sorted(distinct, key=lambda line: "control flow" not in line)


def _tidy(model: ir.Model) -> None:
    """Only what the model computes stays: no documentation strings, no exporter's metadata, no unused domains."""
    for domain in [d for d in model.opset_imports if d]:
        del model.opset_imports[domain]
    common.ClearMetadataAndDocStringPass()(model)
    _name_nodes(model.graph)
    model.graph.name = model.graph.name or "model"
    model.producer_name, model.producer_version = "", ""


def model_bytes(model: ir.Model) -> bytes:
    """The model as an ONNX file, the same bytes for the same model."""
    try:
        return ir.to_proto(model).SerializeToString(deterministic=True)
    except (ValueError, OverflowError) as error:
        raise ModelError("the model is above 2 GB, which one ONNX file cannot hold") from error
