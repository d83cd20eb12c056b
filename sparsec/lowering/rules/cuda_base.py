"""What rules for CUDA devices share: the emitter of a layer that is one launch or several.

A rule binds a node to `DeviceCall`s (`sparsec.kernels.cuda.base`). Their roles are bound to ONNX values, to the group's
output (role "y") or, between launches of one layer, to values that the layer declares itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from sparsec.kernels.cuda.base import DeviceCall
from sparsec.lowering.calls import Calls
from sparsec.lowering.match import Group
from sparsec.lowering.rules.base import Emitter, declare, node_names, record
from sparsec.program import Candidate


@dataclass(frozen=True)
class Launched:
    """One launch of a layer. `bound`: for a role the name of an input, "y" or a key of the layer's `between`; a role that is
    missing stands for itself. `writes`: roles. `offsets`: bytes to add to a role's base.
    """

    call: DeviceCall
    bound: Mapping[str, str] = field(default_factory=dict)
    writes: tuple[str, ...] = ("y",)
    offsets: Mapping[str, int] = field(default_factory=dict)


def emit_device(
    group: Group,
    call: DeviceCall | Sequence[Launched],
    inputs: Mapping[str, ir.Value],
    reason: str,
    us: float,
    *,
    between: Mapping[str, tuple[tuple[int, ...], str]] | None = None,
    weight: np.ndarray | None = None,
    structure: str = "",
    candidates: tuple[Candidate, ...] = (),
    element: str | None = None,
) -> Emitter:
    """The emitter of a group that is one call, or several in order: `inputs` by role, the group's output as role "y".

    between: shape and dtype of values that launches of the layer pass on, by name. us: predicted, of all launches. element:
    how the kernels hold float32 values, by default as the program does. weight, structure: for the report.
    """
    launches = [Launched(call)] if isinstance(call, DeviceCall) else list(call)

    def emit(calls: Calls) -> None:
        names = {role: declare(calls, value, element) for role, value in inputs.items()}
        names["y"] = declare(calls, group.output, element)
        for key, (shape, dtype) in (between or {}).items():
            names[key] = calls.value(calls.fresh(f"{group.name}/{key}"), shape, dtype)
        stored = {}
        for number, item in enumerate(launches):
            own = {*item.call.constants, *item.call.rooms}
            bound = {role: names[item.bound.get(role, role)] for role in item.call.roles if role not in own}
            owner = group.name if len(launches) == 1 else f"{group.name}/{number}"
            calls.launch(item.call, bound, item.writes, node_names(group), owner, item.offsets)
            stored.update({id(array): array.nbytes for array in item.call.constants.values()})
        record(
            calls, group, launches[-1].call.name, reason,
            zeros=float(np.mean(weight == 0)) if weight is not None else 0.0, structure=structure, candidates=candidates,
            bytes=sum(stored.values()), predicted_us=us,
        )  # fmt: skip

    return emit


__all__ = ["Launched", "emit_device"]
