"""What follows an accumulator before it is stored: bias, residual, activation. Scalar or vector expressions.

    y = act(acc + bias)                residual "none"
    y = act(acc + bias + residual)     residual "before"
    y = act(acc + bias) + residual     residual "after"

Everything is arithmetic that stays in vector registers: libm calls would be made lane by lane. exp follows Cephes:
x = n ln2 + r, |r| <= ln2 / 2, exp(x) = 2^n P(r), with 2^n in two halves so that results reach zero and infinity.
tanh and erf take a polynomial near zero and exp beyond; both sides are computed and one is selected.
Float16 values are computed on as they are where it is plain arithmetic; exp, tanh and erf take them in float32 and round
once. NaN passes through every activation. All of it is written for `emit` code on scalar or vector values: inside a
`T.vectorized` loop a kept value would be one scalar for all lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from sparsec.kernels import emit
from sparsec.kernels.emit import dtype_of, lanes_of

Kind = Literal[
    "none", "relu", "clip", "leaky_relu", "hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "gelu_tanh", "tanh"
]
Residual = Literal["none", "before", "after"]
KINDS: tuple[str, ...] = Kind.__args__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Activation:
    """An elementwise function.

    `clip`: min(max(x, alpha), beta). `leaky_relu`: alpha x below 0. `hardsigmoid`: clip(alpha x + beta, 0, 1).
    `hardswish`: x clip(x / 6 + 1/2, 0, 1). `silu`: x sigmoid(x). `gelu`: x (1 + erf(x / sqrt 2)) / 2; `gelu_tanh` its
    tanh approximation. Kinds for which no alpha or beta is named ignore them.
    """

    kind: Kind = "none"
    alpha: float = 0.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown activation {self.kind!r}; known: {', '.join(KINDS)}")
        if self.kind == "clip" and not self.alpha <= self.beta:
            raise ValueError(f"clip needs min <= max, got {self.alpha} and {self.beta}")

    @property
    def name(self) -> str:
        """A C identifier part, unique for what is computed: float parameters as their exact bits."""
        if self.kind not in ("clip", "leaky_relu", "hardsigmoid"):
            return self.kind
        if (self.kind, self.alpha, self.beta) == ("clip", 0.0, 6.0):
            return "relu6"
        bits = [f"{int(np.float32(v).view(np.uint32)):x}" for v in (self.alpha, self.beta)]
        return "_".join([self.kind, *(bits[:1] if self.kind == "leaky_relu" else bits)])


NONE = Activation()
RELU = Activation("relu")
RELU6 = Activation("clip", 0.0, 6.0)


def activate(activation: Activation, x: Any) -> Any:
    """The TIR expression `activation(x)` of an expression of any number of lanes; emits statements before it."""
    if activation.kind == "none":
        return x
    if activation.kind in _PLAIN:
        return _FUNCTIONS[activation.kind](keep(x), activation)
    return emit.convert(_FUNCTIONS[activation.kind](keep(emit.convert(x, "float32")), activation), _element(x))


def finish(value: Any, activation: Activation, residual: Residual = "none", other: Any = None) -> Any:
    """Residual and activation around `value`, which already holds the bias; `other` is the residual's expression."""
    if residual == "before":
        return activate(activation, value + other)
    if residual == "after":
        return activate(activation, value) + other
    return activate(activation, value)


def reference(activation: Activation, x: np.ndarray) -> np.ndarray:
    """`activation(x)` in float64 by NumPy."""
    x = np.asarray(x, np.float64)
    a, b = activation.alpha, activation.beta
    with np.errstate(over="ignore", invalid="ignore"):
        match activation.kind:
            case "none":
                return x
            case "relu":
                return np.maximum(x, 0)
            case "clip":
                return np.clip(x, a, b)
            case "leaky_relu":
                return np.where(x < 0, a * x, x)
            case "hardsigmoid":
                return np.clip(a * x + b, 0, 1)
            case "hardswish":
                return x * np.clip(x / 6 + 0.5, 0, 1)
            case "sigmoid":
                return 1 / (1 + np.exp(-x))
            case "silu":
                return x / (1 + np.exp(-x))
            case "tanh":
                return np.tanh(x)
            case "gelu":
                return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2)))
            case _:
                return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reference_finish(
    value: np.ndarray, activation: Activation, residual: Residual = "none", other: np.ndarray | None = None
) -> np.ndarray:
    """`finish` in float64 by NumPy."""
    if residual == "before":
        return reference(activation, value + other)
    return reference(activation, value) + (other if residual == "after" else 0)


def keep(value: Any) -> Any:
    """`value` in a local variable, so that a value used more than once is computed once: emits a store, returns a load.

    Not a `Let` or `Bind`: TVM's code generator expands those in its analyses, exponentially where values are used twice.
    LLVM turns the variable into a register.
    """
    if isinstance(value, tirx.FloatImm):
        return value
    cell = T.alloc_buffer((1,), dtype_of(value), scope="local")
    T.buffer_store(cell, value, [0])
    return cell[0]


def exp(x: Any) -> Any:
    """exp(x), at most 2 ulp; 0 at -inf, inf at inf, subnormal results rounded twice."""
    return _exp(keep(x))


def sigmoid(x: Any) -> Any:
    """1 / (1 + exp(-x))."""
    return _sigmoid(keep(x))


def tanh(x: Any) -> Any:
    """tanh(x), absolute error below 1e-7. Cephes: x + x^3 P(x^2) below 0.625, else +-(1 - 2 / (exp(2 |x|) + 1))."""
    return _tanh(keep(x))


def erf(x: Any) -> Any:
    """erf(x), absolute error below 1e-7. N. Juffa: x + x P(x^2) below 0.9277, else +-(1 - exp(|x| Q(|x|) - |x|))."""
    return _erf(keep(x))


# In the following, x is kept or a constant.


def _exp(x: Any) -> Any:
    x = _clamp(x, -104.0, 89.0)
    n = keep(tirx.floor(x * _f(1.44269504088896341, x) + _f(0.5, x)))
    r = keep(x - n * _f(0.693359375, x) + n * _f(2.12194440e-4, x))
    c = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    i = keep(n.astype(_like(x, "int32")))
    half = keep(i >> _i(1, i))
    return (_horner(c, r) * (r * r) + r + _f(1, r)) * _pow2(half) * _pow2(i - half)


def _sigmoid(x: Any) -> Any:
    return _f(1, x) / (_f(1, x) + _exp(keep(_f(0, x) - x)))


def _tanh(x: Any) -> Any:
    c = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
    t, s = keep(_abs(x)), keep(x * x)
    large = _f(1, x) - _f(2, x) / (_exp(keep(t + t)) + _f(1, x))
    return tirx.Select(t < _f(0.625, x), _horner(c, s) * s * x + x, _copysign(large, x))


def _erf(x: Any) -> Any:
    near = (-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1)
    far = (
        -1.72853470e-5, 3.83197126e-4, -3.88396438e-3, 2.42546219e-2, -1.06777877e-1, -6.34846687e-1, -1.28717512e-1
    )  # fmt: skip
    x = _clamp(x, -4.0, 4.0)
    t, s = keep(_abs(x)), keep(x * x)
    large = _f(1, x) - _exp(keep(_horner(far, t) * t - t))
    return tirx.Select(t < _f(0.927734375, x), _horner(near, s) * x + x, _copysign(large, x))


def _horner(coefficients: tuple[float, ...], x: Any) -> Any:
    value = _f(coefficients[0], x)
    for c in coefficients[1:]:
        value = value * x + _f(c, x)
    return value


def _clamp(x: Any, low: float, high: float) -> Any:
    # Not min/max: their lowering keeps the bound where x is NaN.
    raised = keep(tirx.Select(x < _f(low, x), _f(low, x), x))
    return keep(tirx.Select(raised > _f(high, x), _f(high, x), raised))


def _pow2(n: Any) -> Any:
    return tirx.reinterpret(_like(n, "float32"), (n + _i(127, n)) << _i(23, n))


def _bits(x: Any) -> Any:
    return tirx.reinterpret(_like(x, "int32"), x)


def _abs(x: Any) -> Any:
    return tirx.reinterpret(_like(x, "float32"), _bits(x) & _i(0x7FFFFFFF, x))


def _copysign(magnitude: Any, sign: Any) -> Any:
    return tirx.reinterpret(_like(sign, "float32"), _bits(magnitude) | (_bits(sign) & _i(-0x80000000, sign)))


def _hardswish(x: Any) -> Any:
    return x * _clamp(keep(x * _f(1 / 6, x) + _f(0.5, x)), 0.0, 1.0)


def _gelu(x: Any) -> Any:
    return _f(0.5, x) * x * (_f(1, x) + _erf(keep(x * _f(math.sqrt(0.5), x))))


def _gelu_tanh(x: Any) -> Any:
    # 1 + tanh(u) = 2 sigmoid(2 u): one exp and no branch, and exact to a few ulp where tanh is near -1.
    inner = keep(_f(-2 * math.sqrt(2 / math.pi), x) * (x + _f(0.044715, x) * x * x * x))
    return x / (_f(1, x) + _exp(inner))


_PLAIN = ("relu", "clip", "leaky_relu", "hardsigmoid", "hardswish")  # computed in the type of x
_FUNCTIONS: dict[str, Callable[[Any, Activation], Any]] = {
    "relu": lambda x, _: tirx.Select(x < _f(0, x), _f(0, x), x),
    "clip": lambda x, a: _clamp(x, a.alpha, a.beta),
    "leaky_relu": lambda x, a: tirx.Select(x < _f(0, x), x * _f(a.alpha, x), x),
    "hardsigmoid": lambda x, a: _clamp(keep(x * _f(a.alpha, x) + _f(a.beta, x)), 0.0, 1.0),
    "hardswish": lambda x, _: _hardswish(x),
    "sigmoid": lambda x, _: _sigmoid(x),
    "silu": lambda x, _: x / (_f(1, x) + _exp(keep(_f(0, x) - x))),
    "tanh": lambda x, _: _tanh(x),
    "gelu": lambda x, _: _gelu(x),
    "gelu_tanh": lambda x, _: _gelu_tanh(x),
}


def _element(x: Any) -> str:
    return dtype_of(x).partition("x")[0]


def _like(x: Any, scalar: str) -> str:
    return emit.vector_type(lanes_of(x), scalar)


def _f(value: float, x: Any) -> Any:
    return emit.constant(value, lanes_of(x), _element(x))


def _i(value: int, x: Any) -> Any:
    return emit.splat(tirx.const(value, "int32"), lanes_of(x))
