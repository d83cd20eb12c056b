"""How a spec such as `prune:sparsity=0.8,block=4x1`, a recipe or a pass object becomes a step of the pipeline.

Any `onnx_ir.passes` pass and any onnxscript rewrite rule set is accepted too. `sparsec.rewriting.pipeline` runs the steps.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onnx_ir.passes import PassBase

from sparsec.errors import RecipeError, SparsecError
from sparsec.rewriting.pass_options import REQUIRED, convert, option_values, options_of, type_text
from sparsec.rewriting.pass_registry import Registered, first_line, pass_registry
from sparsec.targets import suggest


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


def build_step(entry: Registered, given: Mapping[str, Any], where: str) -> PassStep:
    """A known pass with the options that are given; raises RecipeError about `where` if they do not fit."""
    cls = entry.load()
    options = {o.name: o for o in options_of(cls)}
    arguments = {}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name not in options:
            known = list(options)
            hint = suggest(name, known) if known else "; it has no options"
            raise RecipeError(f"pass {entry.name!r} has no option {str(key)!r}{hint}", where)
        try:
            arguments[name] = convert(value, options[name].type)
        except (TypeError, ValueError):
            expected = type_text(options[name].type)
            raise RecipeError(f"{entry.name}: {name} must be {expected}, got {value!r}", where) from None
    for option in options.values():
        if option.default is REQUIRED and option.name not in arguments:
            raise RecipeError(f"pass {entry.name!r} needs option {option.name!r} ({type_text(option.type)})", where)
    try:
        made = cls(**arguments) if callable(cls) else cls
    except SparsecError:
        raise
    except Exception as error:
        raise RecipeError(f"pass {entry.name!r} refuses its options: {first_line(error)}", where) from error
    return PassStep(entry.name, _as_pass(made, where), option_values(made), entry.origin, entry.version)


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
    return build_step(registry[name], options, where)


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
                return build_step(entry, {}, where)
            return PassStep(entry.name, item, option_values(item), entry.origin, entry.version)
    name = getattr(cls, "name", "") or cls.__name__
    origin = f"object {cls.__module__}.{cls.__qualname__}"
    if inspect.isclass(item):
        return build_step(Registered(str(name), origin, "", lambda: item), {}, where)
    return PassStep(str(name), _as_pass(item, where), option_values(item), origin)


def resolve_passes(
    passes: Iterable[Any] = (),
    recipe: Any = None,
    plugins: Sequence[str | os.PathLike[str]] = (),
) -> list[PassStep]:
    """The recipe's passes, then `passes` (specs, pass objects or classes), as steps for `run_passes`.

    `recipe`: None, a `sparsec.rewriting.recipe.Recipe`, a recipe's name or the path of its YAML file. Raises RecipeError.
    """
    from sparsec.rewriting.recipe import load_recipe

    registry = pass_registry(plugins)
    steps = []
    if recipe is not None:
        loaded = load_recipe(recipe)
        for name, options in loaded.passes:
            steps.append(_step(name, options, registry, loaded.source))
    if isinstance(passes, (str, bytes)):
        raise RecipeError(f"passes must be a list, got {passes!r}; write [{passes!r}]", "passes")
    return steps + [as_step(item, registry) for item in passes]
