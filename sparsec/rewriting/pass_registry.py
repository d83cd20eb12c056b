"""Where passes come from: built in, from installed packages (entry-point group `sparsec.passes`), from a plugin.

A plugin is a Python file that the user names (`--plugin FILE.py`); a model never brings a pass.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import os
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from sparsec.errors import RecipeError
from sparsec.rewriting.pass_options import REQUIRED, options_of, plain
from sparsec.rewriting.passes_api import Pass

GROUP = "sparsec.passes"
PLUGIN_BYTES = 1 << 20  # a pass file is about 120 lines


@dataclass(frozen=True)
class Registered:
    """A known pass. `load` returns its class; it raises RecipeError if the package that offers it is broken."""

    name: str
    origin: str
    version: str
    load: Callable[[], Any] = field(repr=False, compare=False)


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
                raise RecipeError(f"cannot be loaded from {origin}: {first_line(error)}", point.name) from error

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
            raise RecipeError(f"the plugin fails at import{line}: {first_line(error)}", where) from error
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


def first_line(error: BaseException) -> str:
    """Class and first line of an error that foreign code raised."""
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
        options = {o.name: plain(o.default) for o in options_of(cls) if o.default is not REQUIRED}
        summary = (inspect.getdoc(cls) or "").split("\n", 1)[0]
        table.append({"name": entry.name, "summary": summary, "options": options, "origin": entry.origin})
    return table
