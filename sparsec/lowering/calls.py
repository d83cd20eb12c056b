"""What selection emits and planning turns into a Program: kernel calls over named values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from sparsec.building.codegen import argument_bytes
from sparsec.errors import CheckError, UnsupportedError
from sparsec.kernels import elementwise
from sparsec.kernels.base import KernelCall, Machine, roofline_us
from sparsec.program import MAX_ELEMENTS, Kernel, Layer

if TYPE_CHECKING:
    from sparsec.kernels.cuda.base import DeviceCall, Gpu


def check_sizes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UnsupportedError that names every tensor that kernels could not index."""
    large = {name: shape for name, shape in shapes.items() if math.prod(shape) > MAX_ELEMENTS}
    if large:
        found = "; ".join(f"{name!r} has {'x'.join(map(str, s))} = {math.prod(s):,}" for name, s in large.items())
        what = f"kernels index at most {MAX_ELEMENTS:,} elements of a tensor: {found}"
        raise UnsupportedError(f"{what}; compile for a smaller --shape")


@dataclass(frozen=True)
class Ref:
    """An argument before planning: an activation or constant by name, or the worker's scratch; `offset` in bytes."""

    kind: Literal["value", "constant", "scratch"]
    name: str = ""
    offset: int = 0


@dataclass(frozen=True)
class Call:
    """One kernel call. `reads` and `writes` are activation names."""

    kernel: Kernel
    args: tuple[Ref, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    tiles: int
    scratch: int
    nodes: tuple[str, ...]


@dataclass
class Calls:
    """The growing result of selection; one per lowering, never shared.

    `graph_names`: the graph's own, never to be reused. `machine.element` is what kernels hold float32 values in; the
    graph's inputs and outputs and the generic route have them as float32. A value may be held both ways: the second is
    cast from the first where it is first asked for.
    """

    machine: Machine
    graph_names: frozenset[str] = frozenset()
    calls: list[Call] = field(default_factory=list)
    values: dict[str, tuple[tuple[int, ...], str]] = field(default_factory=dict)  # name -> shape, dtype
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    views: dict[str, tuple[str, int]] = field(default_factory=dict)  # name -> (value it lies in, byte offset)
    layers: list[Layer] = field(default_factory=list)
    held: dict[str, dict[str, str]] = field(default_factory=dict)  # graph value -> element type -> name
    gpu: Gpu | None = None  # what kernels run on, where it is not the machine

    def fresh(self, name: str) -> str:
        """`name`, or the first of `name'`, `name''`, ... that nothing has yet."""
        while name in self.graph_names or name in self.values or name in self.constants:
            name += "'"
        return name

    def value(self, name: str, shape: tuple[int, ...], dtype: str) -> str:
        """Declare an activation; returns its name. Raises UnsupportedError where kernels could not index it."""
        check_sizes({name: shape})
        known = self.values.setdefault(name, (shape, dtype))
        if known != (shape, dtype):
            raise CheckError(f"declared as {known[1]}{list(known[0])} and as {dtype}{list(shape)}", name)
        return name

    def hold(self, name: str, shape: tuple[int, ...], dtype: str, element: str) -> str:
        """The name under which graph value `name` lies in memory, as `element` if it is float32; cast if it must be.

        Its first holder is what its producer writes.
        """
        if dtype != "float32":
            return self.value(name, shape, dtype)
        held = self.held.setdefault(name, {})
        if element not in held:
            source = next(iter(held.items()), None)
            held[element] = self.value(name if element == "float32" else self.fresh(name), shape, element)
            if source is not None:
                self._cast(name, *source, held[element], element)
        return held[element]

    def hold_constant(self, name: str, array: np.ndarray, element: str) -> str:
        """The same for a constant of the graph."""
        if array.dtype != np.float32 or element == "float32":
            self.constants.setdefault(name, array)
            return name
        held = self.held.setdefault(name, {})
        if element not in held:
            held[element] = self.fresh(name)
            self.constants[held[element]] = self.machine.array(array)
        return held[element]

    def _cast(self, name: str, source_type: str, source: str, target: str, target_type: str) -> None:
        shape, _ = self.values[source]
        size = int(np.prod(shape, dtype=np.int64))
        bound = {"x": source, "y": target}
        call: KernelCall | DeviceCall
        if self.gpu is not None:
            from sparsec.kernels.cuda import moves

            call = moves.bind_cast(size=size, source=source_type, target=target_type)
            self.launch(call, bound, ("y",), (), name)
        else:
            call = elementwise.bind_cast(self.machine, size=size, source=source_type, target=target_type)
            self.emit(call, bound, ("y",), (), name)
        reason = f"from {source_type} to {target_type}"
        us = self.roofline_us(0.0, 8.0 * size)
        self.layers.append(Layer(name, "Cast", shape, "native", call.name, reason, predicted_us=us))

    def size(self, name: str) -> int:
        """Bytes of an activation."""
        shape, dtype = self.values[name]
        return int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize

    def emit(
        self,
        call: KernelCall,
        bound: dict[str, str],
        writes: tuple[str, ...],
        nodes: tuple[str, ...],
        owner: str,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        """Add a kernel call. `bound`: a value for each role that is neither constant nor scratch; `writes`: roles.

        `owner` prefixes the names of the call's constants; `offsets`: bytes to add to a role's base.
        """
        kernel = Kernel(call.name, call.func, call.text)
        self._add(kernel, call.roles, call.constants, bound, writes, nodes, owner, offsets, call.tiles, call.scratch)

    def launch(
        self,
        call: DeviceCall,
        bound: dict[str, str],
        writes: tuple[str, ...],
        nodes: tuple[str, ...],
        owner: str,
        offsets: Mapping[str, int] | None = None,
    ) -> None:
        """Add a kernel of a CUDA device; as `emit`, and `owner` prefixes the names of the call's rooms too."""
        rooms = {
            role: self.value(self.fresh(f"{owner}/{role}"), (elements,), dtype)
            for role, (elements, dtype) in call.rooms.items()
        }
        kernel = Kernel(call.name, call.func, call.text, call.launch)
        self._add(
            kernel, call.roles, call.constants, {**bound, **rooms}, (*writes, *rooms), nodes, owner, offsets,
            call.launch.blocks, 0,
        )  # fmt: skip

    def _add(
        self, kernel: Kernel, roles: tuple[str, ...], constants: Mapping[str, np.ndarray], bound: Mapping[str, str],
        writes: tuple[str, ...], nodes: tuple[str, ...], owner: str, offsets: Mapping[str, int] | None, tiles: int,
        scratch: int,
    ) -> None:  # fmt: skip
        offsets = offsets or {}
        args: list[Ref] = []
        for role in roles:
            if role in constants:
                key = self.fresh(f"{owner}/{role}")
                self.constants[key] = constants[role]
                args.append(Ref("constant", key))
            elif role == "scratch":
                args.append(Ref("scratch"))
            else:
                args.append(replace(self.ref(bound[role]), offset=offsets.get(role, 0)))
        reads = tuple(name for role, name in bound.items() if role not in writes and name in self.values)
        written = tuple(bound[role] for role in writes)
        for role, size in zip(roles, argument_bytes(kernel), strict=True):
            if role in writes and role not in offsets and size != self.size(bound[role]):
                raise CheckError(f"{kernel.name} writes {size} bytes of {self.size(bound[role])}", bound[role])
        self.calls.append(Call(kernel, tuple(args), reads, written, tiles, scratch, nodes))

    def roofline_us(self, flops: float, moved: float) -> float:
        """Time of a kernel without a model of its own on what kernels run on. `moved`: bytes if elements are float32."""
        if self.gpu is None:
            return roofline_us(self.machine, flops, moved)
        from sparsec.kernels.cuda.base import roofline_us as device_us

        return device_us(self.gpu, flops, moved * self.machine.item / 4, tensor=False)

    def ref(self, name: str) -> Ref:
        """An argument for an activation or a graph constant."""
        return Ref("value", name) if name in self.values else Ref("constant", name)
