"""The options of a pass: the fields of its dataclass, or the arguments of a foreign pass, by name, type and default.

A value comes as text (from a spec) or as YAML made it (from a recipe); `convert` makes it what the option's type says.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

REQUIRED = object()


@dataclass(frozen=True)
class Option:
    """One option of a pass; its default is `REQUIRED` where there is none."""

    name: str
    type: Any
    default: Any
    recorded: bool = True  # False, by the field's metadata: where something lies, which the manifest does not say


def options_of(cls: Any) -> list[Option]:
    """The options of a pass class, in order."""
    if inspect.isclass(cls) and dataclasses.is_dataclass(cls):
        hints = typing.get_type_hints(cls)
        options = []
        for f in dataclasses.fields(cls):
            if not f.init or f.name in ("name", "exact"):
                continue
            default = f.default if f.default is not dataclasses.MISSING else REQUIRED
            if f.default_factory is not dataclasses.MISSING:
                default = f.default_factory()
            options.append(Option(f.name, hints.get(f.name, str), default, f.metadata.get("recorded", True)))
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
    return [Option(p.name, hints.get(p.name, str), REQUIRED if p.default is p.empty else p.default) for p in parameters]


def type_text(kind: Any) -> str:
    """A type in words, for messages."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_text(a) for a in args if a is not type(None))
    if origin in (tuple, list, Sequence, frozenset):
        return f"a list of {type_text(args[0]) if args else 'values'} (joined by +)"
    words = {int: "an integer", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, getattr(kind, "__name__", str(kind)))


def convert(value: Any, kind: Any) -> Any:
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
                return convert(value, choice)
            except (TypeError, ValueError):
                continue
        raise ValueError(value)
    if origin in (tuple, list, Sequence, frozenset):
        parts = value.split("+") if isinstance(value, str) else value
        if isinstance(parts, (bool, int, float)):
            parts = [parts]
        parts = [convert(p, args[0] if args else str) for p in parts if p != ""]
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


def plain(value: Any) -> Any:
    """`value` in JSON's types."""
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(v) for v in value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return type(value).__name__


def option_values(instance: Any) -> dict[str, Any]:
    """The options of a pass object in JSON's types, paths left out; {} for passes that are no dataclasses."""
    if not dataclasses.is_dataclass(instance) or isinstance(instance, type):
        return {}
    return {o.name: plain(getattr(instance, o.name)) for o in options_of(type(instance)) if o.recorded}
