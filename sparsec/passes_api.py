"""What a pass is, where passes come from, and how a spec such as `prune:sparsity=0.8,block=4x1` becomes one.

A pass is a frozen dataclass derived from `Pass`: its fields are its options. Passes are built in, registered by
installed packages (entry-point group `sparsec.passes`), or read from a file that the user names (`--plugin FILE.py`);
never from a model. Any `onnx_ir.passes` pass and any onnxscript rewrite rule set is accepted too. `sparsec.pipeline`
runs them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import PassBase, PassResult

from sparsec.errors import RecipeError, SparsecError
from sparsec.targets import suggest

__all__ = [
    "Context",
    "Pass",
    "PassResult",
    "PassStep",
    "Registered",
    "Samples",
    "Stacked",
    "as_step",
    "describe_passes",
    "option_values",
    "parse_spec",
    "pass_registry",
    "resolve_passes",
]

GROUP = "sparsec.passes"
META_KEY = "sparsec"
PLUGIN_BYTES = 1 << 20  # a pass file is about 120 lines

Progress = Callable[[str, int, int], None]  # what, done, total
Price = Callable[[Any, np.ndarray], float]  # a `sparsec.passes.layers.WeightedLayer` and its weight; microseconds


class Samples(Protocol):
    """A finite stream of samples, input name -> array of the model's input shape; iterating again starts again."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]: ...


@dataclass(frozen=True)
class Stacked:
    """Samples in arrays [N, ...] by input name, for inputs whose own first dimension is 1."""

    arrays: Mapping[str, np.ndarray] = field(repr=False)

    def __len__(self) -> int:
        return max(len(array) for array in self.arrays.values())

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for i in range(len(self)):
            yield {name: array[i if len(array) > 1 else 0][None] for name, array in self.arrays.items()}


@dataclass
class Context:
    """What a pass may read besides the model, and where it reports; found in `model.meta["sparsec"]`.

    `calibration`: samples that can be iterated again and again, each a dict input name -> array of the input's shape,
    or None (arrays [N, ...] by input name, as given outside the pipeline, are wrapped). `target`: a
    `sparsec.targets.Target`, or None where only ONNX is written. `records`: a pass appends JSON-able dicts that say
    what it did (one a layer); they go into the manifest, so no times and no absolute paths. `original`: ONNX bytes of
    the last model that still computed what the loaded one does: the loaded model after the exact passes before the
    first inexact one; None outside the pipeline. `price`: (layer, weight [OC, IC, KH, KW]) -> microseconds that the
    target's cost model predicts, or None without a target.
    """

    calibration: Samples | None = None
    target: Any = None
    progress: Progress | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    original: bytes | None = field(default=None, repr=False)
    price: Price | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.calibration, Mapping):
            self.calibration = Stacked(self.calibration)

    @staticmethod
    def of(model: ir.Model) -> Context:
        """The model's context; an empty one if the pass runs outside the pipeline."""
        return model.meta.setdefault(META_KEY, Context())

    def tell(self, what: str, done: int, total: int) -> None:
        """Report progress, if anybody listens."""
        if self.progress is not None:
            self.progress(what, done, total)


@dataclass(frozen=True)
class Pass(ir.passes.InPlacePass):
    """A rewrite of an ONNX model in place.

    Derive a frozen dataclass, set `name`, write the one-line summary as first docstring line, and implement
    `call(model) -> PassResult`. `exact` claims that the outputs stay equal up to rounding: the pipeline then compares
    ONNX Runtime before and after.
    """

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = False

    def call(self, model: ir.Model) -> PassResult:
        """Rewrite `model` in place; `PassResult(model, modified)`."""
        raise NotImplementedError(f"{type(self).__name__}.call")


@dataclass(frozen=True)
class PassStep:
    """One pass of a pipeline, with what the manifest says about it."""

    name: str
    run: PassBase = field(repr=False)
    options: dict[str, Any]
    origin: str  # "built-in", "plugin FILE", "entry point DISTRIBUTION", "object MODULE"
    version: str = ""

    @property
    def exact(self) -> bool:
        """Whether the pass claims equal outputs."""
        return bool(getattr(self.run, "exact", False))


@dataclass(frozen=True)
class Registered:
    """A known pass. `load` returns its class; it raises RecipeError if the package that offers it is broken."""

    name: str
    origin: str
    version: str
    load: Callable[[], Any] = field(repr=False, compare=False)


# ---- where passes come from


def _built_in() -> dict[str, Registered]:
    from sparsec import __version__
    from sparsec.passes import BUILT_IN

    return {cls.name: Registered(cls.name, "built-in", __version__, partial(_same, cls)) for cls in BUILT_IN}


def _same(cls: Any) -> Any:
    return cls


def _from_entry_points() -> dict[str, Registered]:
    found = {}
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda p: (p.name, p.value)):
        dist = point.dist
        origin = f"entry point {dist.name if dist else point.value}"

        def load(point=point, origin=origin) -> Any:
            try:
                return point.load()
            except Exception as error:
                raise RecipeError(f"cannot be loaded from {origin}: {_one_line(error)}", point.name) from error

        found[point.name] = Registered(point.name, origin, dist.version if dist else "", load)
    return found


def _is_own_pass(cls: Any, module: str) -> bool:
    return inspect.isclass(cls) and issubclass(cls, Pass) and cls.__module__ == module and bool(cls.name)


def _from_plugin(path: str | os.PathLike[str]) -> dict[str, Registered]:
    """Every `Pass` subclass of one Python file. The file is code that the user chose to run."""
    file = Path(path)
    where = f"--plugin {file}"
    try:
        with file.open("rb") as stream:
            source = stream.read(PLUGIN_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot read the plugin: {error.strerror}", where) from error
    if len(source) > PLUGIN_BYTES:
        raise RecipeError(f"a plugin is a Python file below {PLUGIN_BYTES} bytes", where)
    digest = hashlib.sha256(source).hexdigest()
    module_name = f"sparsec_plugin_{digest[:16]}"
    module = sys.modules.get(module_name)
    if module is None:
        module = types.ModuleType(module_name)
        module.__file__ = str(file)
        sys.modules[module_name] = module  # dataclasses look their module up while the class is made
        try:
            exec(compile(source, str(file), "exec"), module.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            line = _line_in(error, str(file))
            raise RecipeError(f"the plugin fails at import{line}: {_one_line(error)}", where) from error
    classes = [cls for cls in vars(module).values() if _is_own_pass(cls, module_name)]
    if not classes:
        raise RecipeError("no subclass of sparsec.Pass with a `name` in this file", where)
    for cls in classes:
        if inspect.isabstract(cls) or not dataclasses.is_dataclass(cls):
            raise RecipeError(f"{cls.__name__} must be a frozen dataclass that implements call(model)", where)
    origin = f"plugin {file.name}"
    return {c.name: Registered(c.name, origin, f"sha256:{digest}", partial(_same, c)) for c in classes}


def _line_in(error: BaseException, filename: str) -> str:
    if isinstance(error, SyntaxError):
        return f" at line {error.lineno}"
    frame, line = error.__traceback__, 0
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == filename:
            line = frame.tb_lineno
        frame = frame.tb_next
    return f" at line {line}" if line else ""


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def pass_registry(plugins: Sequence[str | os.PathLike[str]] = ()) -> dict[str, Registered]:
    """Every pass by name: built-in ones, then entry points, then `plugins`; a name may be taken only once."""
    registry = _built_in()
    for name, entry in _from_entry_points().items():
        registry.setdefault(name, entry)  # our own distribution lists the built-in ones as entry points too
    for path in plugins:
        for name, entry in _from_plugin(path).items():
            taken = registry.get(name)
            if taken is not None and taken.version != entry.version:
                raise RecipeError(
                    f"pass name {name!r} is already taken by {taken.origin}; rename it", f"--plugin {path}"
                )
            registry[name] = entry
    return registry


def describe_passes(plugins: Sequence[str | os.PathLike[str]] = ()) -> list[dict[str, Any]]:
    """What `sparsec passes` prints: `{name, summary, options: {name: default}, origin}` for each known pass."""
    table = []
    for entry in pass_registry(plugins).values():
        try:
            cls = entry.load()
        except RecipeError as error:
            table.append({"name": entry.name, "summary": str(error), "options": {}, "origin": entry.origin})
            continue
        options = {o.name: _plain(o.default) for o in _options(cls) if o.default is not _REQUIRED}
        summary = (inspect.getdoc(cls) or "").split("\n", 1)[0]
        table.append({"name": entry.name, "summary": summary, "options": options, "origin": entry.origin})
    return table


# ---- options


_REQUIRED = object()


@dataclass(frozen=True)
class _Option:
    name: str
    type: Any
    default: Any
    recorded: bool = True  # False, by the field's metadata: where something lies, which the manifest does not say


def _options(cls: Any) -> list[_Option]:
    if inspect.isclass(cls) and dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        options = []
        for f in dataclasses.fields(cls):
            if not f.init or f.name in ("name", "exact"):
                continue
            default = f.default if f.default is not dataclasses.MISSING else _REQUIRED
            if f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            options.append(_Option(f.name, hints.get(f.name, str), default, f.metadata.get("recorded", True)))
        return options
    function = cls.__init__ if inspect.isclass(cls) else None
    if function is None or function is object.__init__:
        return []
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # annotations of foreign code may name things that are not imported
        hints = {}
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [p for p in list(inspect.signature(function).parameters.values())[1:] if p.kind in kinds]
    return [
        _Option(p.name, hints.get(p.name, str), _REQUIRED if p.default is p.empty else p.default) for p in parameters
    ]


def _type_text(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_text(a) for a in args if a is not type(None))
    if origin in (tuple, list, Sequence, frozenset):
        return f"a list of {_type_text(args[0]) if args else 'values'} (joined by +)"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def _convert(value: Any, kind: Any) -> Any:
    """`value` (text, or a YAML value) as `kind`. Raises ValueError or TypeError."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        for choice in args:
            if str(value) == str(choice):
                return choice
        raise ValueError(value)
    if origin in (typing.Union, types.UnionType):
        if value is None or (value in ("", "none") and type(None) in args):
            if type(None) in args:
                return None
            raise ValueError(value)
        for choice in (a for a in args if a is not type(None)):
            try:
                return _convert(value, choice)
            except (TypeError, ValueError):
                continue
        raise ValueError(value)
    if origin in (tuple, list, Sequence, frozenset):
        parts = value.split("+") if isinstance(value, str) else value
        if isinstance(parts, (bool, int, float)):
            parts = [parts]
        parts = [_convert(p, args[0] if args else str) for p in parts if p != ""]
        return parts if origin is list else frozenset(parts) if origin is frozenset else tuple(parts)
    if kind is bool:
        words = {
            "true": True,
            "yes": True,
            "1": True,
            "on": True,
            "false": False,
            "no": False,
            "0": False,
            "off": False,
        }
        return words[str(value).lower()] if str(value).lower() in words else _refuse(value)
    if isinstance(value, (bool, dict, list)):
        return _refuse(value)
    if kind is int:
        return int(value) if not isinstance(value, float) or value.is_integer() else _refuse(value)
    if kind is float:
        number = float(value)
        return number if number == number and abs(number) != float("inf") else _refuse(value)
    return str(value) if kind is str else value


def _refuse(value: Any) -> Any:
    raise ValueError(value)


def _build(entry: Registered, given: Mapping[str, Any], where: str) -> PassStep:
    cls = entry.load()
    options = {o.name: o for o in _options(cls)}
    arguments = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in options:
            known = list(options)
            hint = suggest(name, known) if known else "; it has no options"
            raise RecipeError(f"pass {entry.name!r} has no option {str(key)!r}{hint}", where)
        try:
            arguments[name] = _convert(value, options[name].type)
        except (TypeError, ValueError):
            expected = _type_text(options[name].type)
            raise RecipeError(f"{entry.name}: {name} must be {expected}, got {value!r}", where) from None
    for option in options.values():
        if option.default is _REQUIRED and option.name not in arguments:
            raise RecipeError(f"pass {entry.name!r} needs option {option.name!r} ({_type_text(option.type)})", where)
    try:
        made = cls(**arguments) if callable(cls) else cls
    except SparsecError:
        raise
    except Exception as error:
        raise RecipeError(f"pass {entry.name!r} refuses its options: {_one_line(error)}", where) from error
    return PassStep(entry.name, _as_pass(made, where), option_values(made), entry.origin, entry.version)


def _plain(value: Any) -> Any:
    """`value` in JSON's types."""
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(v) for v in value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return type(value).__name__


def option_values(instance: Any) -> dict[str, Any]:
    """The options of a pass object in JSON's types, paths left out; {} for passes that are no dataclasses."""
    if not dataclasses.is_dataclass(instance) or isinstance(instance, type):
        return {}
    return {o.name: _plain(getattr(instance, o.name)) for o in _options(type(instance)) if o.recorded}


# ---- specs and steps


def _split_spec(spec: str) -> tuple[str, dict[str, str]]:
    name, colon, rest = spec.partition(":")
    options: dict[str, str] = {}
    for item in rest.split(",") if colon else []:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"expected NAME[:key=value,...], got {item!r} in {spec!r}", "--pass")
        if key.strip() in options:
            raise RecipeError(f"option {key.strip()!r} is given twice in {spec!r}", "--pass")
        options[key.strip()] = value.strip()
    return name.strip(), options


def _step(name: str, options: Mapping[str, Any], registry: Mapping[str, Registered], where: str) -> PassStep:
    if name not in registry:
        raise RecipeError(f"unknown pass {name!r}{suggest(name, list(registry))}", where)
    return _build(registry[name], options, where)


def parse_spec(spec: str, plugins: Sequence[str | os.PathLike[str]] = ()) -> PassBase:
    """The pass that `NAME[:key=value,...]` means; lists inside a value use `+`.

    >>> parse_spec("prune:sparsity=0.8,block=4x1").block
    '4x1'

    Raises RecipeError for an unknown pass or option (with the nearest name) or a value of the wrong type.
    """
    name, options = _split_spec(spec)
    return _step(name, options, pass_registry(plugins), "--pass").run


def _as_pass(made: Any, where: str) -> PassBase:
    if isinstance(made, PassBase):
        return made
    from onnxscript import rewriter

    rules = rewriter.pattern
    if isinstance(made, (rules.RewriteRuleSet, rules.RewriteRule)):
        return rewriter.RewritePass(made if isinstance(made, rules.RewriteRuleSet) else [made])
    raise RecipeError(
        f"expected a pass (sparsec.Pass, onnx_ir pass, onnxscript rules), got {type(made).__name__}", where
    )


def as_step(item: Any, registry: Mapping[str, Registered] | None = None, where: str = "passes") -> PassStep:
    """A `PassStep` from a spec, a pass object, a pass class without required options, or a step."""
    if isinstance(item, PassStep):
        return item
    registry = pass_registry() if registry is None else registry
    if isinstance(item, str):
        return _step(*_split_spec(item), registry, where)
    cls = item if inspect.isclass(item) else type(item)
    for entry in registry.values():
        if entry.origin.startswith(("built-in", "plugin")) and entry.load() is cls:
            if inspect.isclass(item):
                return _build(entry, {}, where)
            return PassStep(entry.name, item, option_values(item), entry.origin, entry.version)
    name = getattr(cls, "name", "") or cls.__name__
    origin = f"object {cls.__module__}.{cls.__qualname__}"
    if inspect.isclass(item):
        return _build(Registered(str(name), origin, "", lambda: item), {}, where)
    return PassStep(str(name), _as_pass(item, where), option_values(item), origin)


def resolve_passes(
    passes: Iterable[Any] = (),
    recipe: Any = None,
    plugins: Sequence[str | os.PathLike[str]] = (),
) -> list[PassStep]:
    """The recipe's passes, then `passes` (specs, pass objects or classes), as steps for `run_passes`.

    `recipe`: None, a `sparsec.recipe.Recipe`, a recipe's name or the path of its YAML file. Raises RecipeError.
    """
    from sparsec.recipe import load_recipe

    registry = pass_registry(plugins)
    steps = []
    if recipe is not None:
        loaded = load_recipe(recipe)
        for name, options in loaded.passes:
            steps.append(_step(name, options, registry, loaded.source))
    if isinstance(passes, (str, bytes)):
        raise RecipeError(f"passes must be a list, got {passes!r}; write [{passes!r}]", "passes")
    return steps + [as_step(item, registry) for item in passes]
