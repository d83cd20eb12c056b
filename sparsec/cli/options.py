"""Options that several verbs share. A group of options reaches its verb as one argument.

MACHINE  --target --cpu --os --arch --host --precision --allow-cpu-fallback     machine: Machine
REWRITE  --recipe --pass --plugin --calibration --preprocess    rewriting: Rewriting
SHAPES   --shape --bind --limit                                 fixed: Fixed
REPORT   --json -v                                              as_json: bool, verbose: bool
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from sparsec.cli.arguments import parse_binds, parse_shapes
from sparsec.errors import UsageError
from sparsec.limits import DEFAULT, Limits, parse_limits

if TYPE_CHECKING:
    from sparsec.targets import Target

Decorator = Callable[[Any], Any]


@dataclass(frozen=True)
class Machine:
    """What to compile for, as given; None where it was not."""

    target: str | None
    cpu: str | None
    system: str | None
    arch: str | None
    host: str | None
    precision: str | None
    allow_cpu_fallback: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords of `sparsec.compile`."""
        named = {"target": self.target, "cpu": self.cpu, "os": self.system, "arch": self.arch, "host": self.host}
        more = {"allow_cpu_fallback": True} if self.allow_cpu_fallback else {}
        return {**named, "precision": self.precision or "f32", **more}

    def find(self) -> Target:
        """The target, host where none was named. Raises TargetError."""
        from sparsec.targets import find_target, with_cpu_fallback, with_precision

        found = find_target(self.target or "host", self.cpu, self.system, self.arch, self.host)
        found = with_precision(found, self.precision or "f32")
        return with_cpu_fallback(found) if self.allow_cpu_fallback else found


@dataclass(frozen=True)
class Rewriting:
    """The passes to run and what they are given."""

    recipe: str | None
    passes: tuple[str, ...]
    plugins: tuple[str, ...]
    calibration: str | None
    preprocess: str | None
    dump: str | None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords of `sparsec.compile` and `sparsec.rewrite`."""
        return dict(vars(self))


@dataclass(frozen=True)
class Fixed:
    """Shapes and values that inputs are fixed to, by input name, and what the model may cost to read."""

    shapes: dict[str, tuple[int, ...]]
    bind: dict[str, str]
    limits: Limits

    @property
    def arguments(self) -> dict[str, Any]:
        """Keywords of `sparsec.compile` and `sparsec.rewrite`."""
        return dict(vars(self))


def _fixed(shapes: tuple[str, ...], binds: tuple[str, ...], limits: tuple[str, ...]) -> Fixed:
    return Fixed(parse_shapes(shapes), parse_binds(binds), parse_limits(limits))


def only_for_models(fixed: Fixed, machine: Machine | None = None) -> None:
    """Refuse options that an artifact has already decided."""
    given: dict[str, Any] = {}
    if machine is not None:
        given = {name.replace("_", "-").replace("system", "os"): value for name, value in vars(machine).items()}
    given |= {"shape": fixed.shapes, "bind": fixed.bind, "limit": fixed.limits != DEFAULT}
    for name, value in given.items():
        if value:
            raise UsageError("is decided in an artifact; give a MODEL.onnx, or leave it out", f"--{name}")


def _options(*options: Decorator) -> Decorator:
    def decorate(verb: Any) -> Any:
        for option in reversed(options):
            verb = option(verb)
        return verb

    return decorate


def _group(name: str, make: Callable[..., Any], *options: Decorator) -> Decorator:
    """Options whose values `make` turns into the verb's one argument `name`."""
    keys = list(inspect.signature(make).parameters)

    def decorate(verb: Any) -> Any:
        @functools.wraps(verb)
        def grouped(**values: Any) -> Any:
            made = make(**{key: values.pop(key) for key in keys})
            return verb(**{name: made}, **values)

        return _options(*options)(grouped)

    return decorate


PREPROCESS = click.option(
    "--preprocess", metavar="SPEC", help="resize=256,crop=224,scale=255,mean=...,std=...,color=rgb"
)
PLUGINS = click.option(
    "--plugin", "plugins", multiple=True, metavar="FILE.py", help="A Python file with passes of your own."
)
RUNTIME = click.option(
    "--runtime", metavar="NAME", help="native, emulated, adb[:SERIAL], ssh:[USER@]HOST, node, chromium, ort, torch."
)
REPORT = _options(
    click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
    click.option("-v", "--verbose", is_flag=True, help="More detail; tracebacks of errors."),
)
REWRITE = _group(
    "rewriting",
    Rewriting,
    click.option("--recipe", metavar="NAME|FILE.yaml", help="Passes to run, from a built-in or written recipe."),
    click.option("--pass", "passes", multiple=True, metavar="SPEC", help="NAME[:key=value,...]; see `sparsec passes`."),
    PLUGINS,
    click.option("--calibration", metavar="DATA", help="An .npz, or a folder of images with --preprocess."),
    PREPROCESS,
    click.option("--dump", metavar="DIR", help="Write what each step made."),
)
SHAPES = _group(
    "fixed",
    _fixed,
    click.option("--shape", "shapes", multiple=True, metavar="INPUT:1x3x224x224", help="Fix an input's shape."),
    click.option("--bind", "binds", multiple=True, metavar="INPUT=VALUE", help="Fix an input to a constant."),
    click.option(
        "--limit",
        "limits",
        multiple=True,
        metavar="NAME=N",
        help="What a model may cost to read: memory=8G, nodes=1000k, ...",
    ),
)
MACHINE = _group(
    "machine",
    Machine,
    click.option("--target", metavar="NAME", help="host, arm, ...; see `sparsec targets`.  [default: host]"),
    click.option("--cpu", metavar="NAME", help="The target's CPU; see `sparsec targets`."),
    click.option("--os", "system", metavar="NAME", help="android or linux."),
    click.option("--arch", metavar="NAME", help="cuda: the GPU's architecture, sm_87, sm_90, ..."),
    click.option("--host", metavar="NAME", help="cuda: the processor beside the GPU, x86_64 or aarch64."),
    click.option("--precision", metavar="f32|f16", help="What layers store and compute in.  [default: f32]"),
    click.option("--allow-cpu-fallback", is_flag=True, help="cuda: run operators that the GPU lacks on the host."),
)
