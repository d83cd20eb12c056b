"""Recipes: a YAML file (or one of the named recipes below) that lists passes with their options.

version: 1
passes:
  - fold-constants
  - prune: {sparsity: 0.8, block: 4x1}
calibration: calibration.npz      # optional, relative to the recipe file
shapes: {input: [1, 3, 224, 224]} # optional
target: arm                       # optional
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sparsec.errors import RecipeError
from sparsec.targets import suggest

RECIPE_BYTES = 1 << 20
KEYS = ("version", "passes", "calibration", "shapes", "target")

RECIPES: dict[str, dict[str, Any]] = {
    "dense": {"version": 1, "passes": []},
    "4x1-50": {"version": 1, "passes": [{"prune": {"sparsity": 0.5, "block": "4x1"}}]},
    "4x1-80": {"version": 1, "passes": [{"prune": {"sparsity": 0.8, "block": "4x1"}}]},
}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `passes`: (name, options) in order. `calibration`: a path or None. `source`: for errors."""

    passes: tuple[tuple[str, dict[str, Any]], ...] = ()
    calibration: str | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    target: str | None = None
    source: str = "recipe"

    def document(self) -> dict[str, Any]:
        """The recipe in JSON's types, without paths: what the manifest's digest is taken of."""
        return {
            "version": 1,
            "passes": [{name: options} for name, options in self.passes],
            "shapes": {name: list(shape) for name, shape in sorted(self.shapes.items())},
            "target": self.target,
        }


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (a few lines of which can expand to gigabytes), repeated keys and numbers to base 60
    (`nm: 2:4` would be 124)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key, _ in getattr(node, "value", []):
            if key.value in seen if isinstance(key.value, str) else False:
                raise yaml.MarkedYAMLError(problem=f"key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


def _plain_numbers(loader: type[yaml.SafeLoader]) -> None:
    numbers = {
        "tag:yaml.org,2002:int": re.compile(r"[-+]?[0-9]+$"),
        "tag:yaml.org,2002:float": re.compile(r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    }
    loader.yaml_implicit_resolvers = {
        first: [(tag, numbers.get(tag, pattern)) for tag, pattern in resolvers]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_plain_numbers(_Loader)


def load_recipe(recipe: str | os.PathLike[str] | Mapping[str, Any] | Recipe) -> Recipe:
    """The recipe called or stored in `recipe`; raises RecipeError in one line."""
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return _check(dict(recipe), "recipe", None)
    text = os.fspath(recipe)
    if isinstance(recipe, str) and recipe in RECIPES:
        return _check(RECIPES[recipe], f"recipe {recipe}", None)
    path = Path(text)
    if not path.exists() and path.suffix not in (".yaml", ".yml") and os.sep not in text:
        raise RecipeError(f"no such file, and no recipe of this name{suggest(text, list(RECIPES))}", f"recipe {text}")
    where = f"recipe {path.name}"
    try:
        with path.open("rb") as stream:
            data = stream.read(RECIPE_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}", where) from error
    if len(data) > RECIPE_BYTES:
        raise RecipeError(f"a recipe is a YAML file below {RECIPE_BYTES} bytes", where)
    try:
        document = yaml.load(data, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f" at line {mark.line + 1}" if mark else ""
        raise RecipeError(f"not valid YAML{line}: {error.problem}", where) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise RecipeError(
            f"not valid YAML: {str(error).splitlines()[0] if str(error) else 'too deep'}", where
        ) from error
    return _check(document, where, path.parent)


def _check(document: Any, where: str, folder: Path | None) -> Recipe:
    if not isinstance(document, dict):
        raise RecipeError("expected a mapping with `version: 1` and `passes:`", where)
    for key in document:
        if key not in KEYS:
            raise RecipeError(f"unknown key {key!r}{suggest(str(key), list(KEYS))}", where)
    version = document.get("version")
    if version != 1 or isinstance(version, bool):
        raise RecipeError(f"expected `version: 1`, got {version!r}", where)
    passes = document.get("passes")
    if not isinstance(passes, list):
        raise RecipeError("`passes` must be a list of NAME or {NAME: {option: value}}", where)
    steps = tuple(_check_pass(item, index, where) for index, item in enumerate(passes))
    calibration = document.get("calibration")
    if calibration is not None:
        if not isinstance(calibration, str):
            raise RecipeError(f"`calibration` must be a path, got {calibration!r}", where)
        calibration = str((folder or Path()) / calibration)
    target = document.get("target")
    if target is not None and not isinstance(target, str):
        raise RecipeError(f"`target` must be a name, got {target!r}", where)
    return Recipe(steps, calibration, _check_shapes(document.get("shapes"), where), target, where)


def _check_pass(item: Any, index: int, where: str) -> tuple[str, dict[str, Any]]:
    expected = "NAME or {NAME: {option: value}}"
    if isinstance(item, str):
        return item, {}
    if not isinstance(item, dict) or len(item) != 1:
        raise RecipeError(f"passes[{index}]: expected {expected}, got {item!r}", where)
    ((name, options),) = item.items()
    options = {} if options is None else options
    if not isinstance(name, str) or not isinstance(options, dict) or not all(isinstance(k, str) for k in options):
        raise RecipeError(f"passes[{index}]: expected {expected}, got {item!r}", where)
    return name, options


def _check_shapes(shapes: Any, where: str) -> dict[str, tuple[int, ...]]:
    if shapes is None:
        return {}
    if not isinstance(shapes, dict):
        raise RecipeError("`shapes` must map input names to lists of integers", where)
    checked = {}
    for name, shape in shapes.items():
        dims = shape.split("x") if isinstance(shape, str) else shape
        try:
            checked[str(name)] = tuple(int(str(d)) for d in dims)
        except (TypeError, ValueError):
            raise RecipeError(
                f"shapes: {name} must be like [1, 3, 224, 224] or 1x3x224x224, got {shape!r}", where
            ) from None
        if any(d < 1 for d in checked[str(name)]):
            raise RecipeError(f"shapes: {name} must have positive dimensions, got {shape!r}", where)
    return checked
