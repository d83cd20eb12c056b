"""What every kernel family shares: the call a family returns for one layer, activations, the machine it is built for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

CHAIN = 128  # terms of a float16 sum: without this limit 512 terms cost 2 % less and err twice as much
LATE = 64  # terms: one more addition behind so many costs at most 1 %


@dataclass(frozen=True)
class Machine:
    """The facts about a CPU that kernels and the cost model need; a subset of a target.

    `lanes`: lanes of `element` (float32, float16, or int32 as words of four 8-bit values) in a vector register.
    `registers`: architectural vector registers.
    `fma`, `loads`, `uops`: sustained per cycle, for full vectors. `lane_fma`: FMA takes one lane of a register as
    multiplier (Arm), so that weights are loaded as vectors instead of broadcast. `group_cycles`: start and end of a
    register tile. `row_cycles`: start of one row's copy into the panel. `dot`: the instruction of 8-bit sums
    (`sparsec.kernels.dots`), `dots` of them a cycle for full vectors. `byte_permute`: one instruction takes any bytes
    of a 64-byte vector, or of two (AVX512-VBMI).
    """

    lanes: int
    registers: int
    fma: float
    loads: float
    uops: float
    ghz: float
    l1_bytes: int
    l2_bytes: int
    l2_bytes_per_cycle: float
    memory_gbps: float
    lane_fma: bool
    group_cycles: float = 10.0
    row_cycles: float = 2.0
    dot: str = "portable"
    dots: float = 0.5
    byte_permute: bool = False
    element: str = "float32"

    def half(self) -> Machine:
        """The machine computing in float16: twice the lanes."""
        return replace(self, lanes=2 * self.lanes, element="float16")

    def words(self) -> Machine:
        """The machine computing 8-bit sums: a lane is a word of four products."""
        single = self.single()
        return replace(single, fma=single.dots, element="int32")

    @property
    def signed_dot(self) -> bool:
        """Whether `dot` takes signed activations."""
        return self.dot in ("sdot", "smull")

    def single(self) -> Machine:
        """The machine computing in float32."""
        return self if self.element == "float32" else replace(self, lanes=self.lanes // 2, element="float32")

    @property
    def item(self) -> int:
        """Bytes of an element."""
        return 2 if self.element == "float16" else 4

    @property
    def vector_bytes(self) -> int:
        """Bytes of a vector register."""
        return self.lanes * self.item

    def chain(self, terms: int) -> int:
        """How many of a sum's `terms` may follow each other before it is set aside; 0: all of them."""
        return CHAIN if self.element == "float16" and 2 * terms > 3 * CHAIN else 0

    def bias_last(self, terms: int) -> bool:
        """Whether a bias joins a sum of `terms` at its end: at the beginning every term would be rounded in the bias's size."""
        return terms >= LATE and self.element.startswith("float")

    def named(self, text: str) -> str:
        """A name of the kernel tables, all float32, for this element: `conv_f32_4x1` is `conv_f16_4x1` in float16."""
        return text.replace("_f32", "_f16") if self.element == "float16" else text

    def array(self, values: np.ndarray) -> np.ndarray:
        """Weights rounded to `element`; lowering refuses those beyond its range."""
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(values, self.element)


@dataclass(frozen=True)
class Format:
    """A row of a family's table: what a variant computes, how its weights are stored, what it requires.

    `rows` x `columns`: the blocks of zeros that are left out (`sparsec.kernels.blocks`); 0 x 1: none are.
    """

    name: str
    op: str
    format: str
    dtype: str
    text: str
    requires: str = ""
    rows: int = 0
    columns: int = 1

    @property
    def sparse(self) -> bool:
        """Whether blocks of zeros are left out."""
        return self.rows > 0


def variant(table: Sequence[Format], format: str) -> Format:
    """The row of a table whose weights are stored as `format`: "dense", "4x1", ..."""
    return next(row for row in table if row.format == format)


@dataclass(frozen=True)
class KernelCall:
    """One layer bound to one kernel.

    `func` is a `tvm.tirx.PrimFunc(buffers in the order of roles..., begin: int32, end: int32)`. Roles name what the caller
    must bind: "x", "y", "residual", ... are activations; the keys of `constants` are packed arrays; "scratch" is
    `scratch` bytes private to the worker.
    """

    name: str
    func: Any = field(repr=False)
    roles: tuple[str, ...]
    constants: dict[str, np.ndarray] = field(repr=False)
    tiles: int
    scratch: int = 0
    text: str = ""


def unique(stem: str, *facts: Any) -> str:
    """A kernel name that begins with `stem` and differs where any of the facts that its code depends on differs."""
    return f"{stem}_{hashlib.sha256(repr(facts).encode()).hexdigest()[:10]}"


def roofline_us(machine: Machine, flops: float, moved: float) -> float:
    """Time by arithmetic or by bytes from L2, whichever is longer; for kernels without a model of their own.

    `moved`: bytes if elements are float32.
    """
    moved *= machine.item / 4
    cycles = max(flops / (2 * machine.lanes * machine.fma), moved / machine.l2_bytes_per_cycle)
    return cycles / (machine.ghz * 1e3)
