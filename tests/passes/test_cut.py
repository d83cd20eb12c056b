from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.passes.coupling import couple
from sparsec.passes.cut import cut, silence
from sparsec.pipeline import check_equal
from tests.channel_networks import channel_networks

RNG = np.random.default_rng(5)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def choose(made: ir.Model, seed: int, share: float):
    """A random choice among the units of every free class that a weight reads, one left at least."""
    rng = np.random.default_rng(seed)
    removals = []
    for units in couple(made.graph, cut=True).free:
        removed = rng.random(units.size) < share
        removed[rng.integers(units.size)] = False
        if units.consumers:
            removals.append((units, removed))
    return removals


def equal_to_twin(proto: onnx.ModelProto, seed: int = 0, share: float = 0.5) -> tuple[ir.Model, int]:
    """Cut and masked model agree in ONNX Runtime; the cut model and how many units were removed."""
    whole, twin = ir.from_proto(proto), ir.from_proto(proto)
    silence(twin.graph, choose(twin, seed, share))
    removals = choose(whole, seed, share)
    cut(whole.graph, removals)
    after = ir.to_proto(whole)
    onnx.checker.check_model(after, full_check=True)
    check_equal(ir.to_proto(twin).SerializeToString(), after.SerializeToString(), "cut")
    return whole, sum(int(removed.sum()) for _, removed in removals)


@settings(max_examples=150, deadline=None)
@given(proto=channel_networks(), seed=st.integers(0, 3), share=st.sampled_from([0.3, 0.6, 0.9]))
def test_cut_network_equals_the_masked_one(proto, seed: int, share: float) -> None:
    equal_to_twin(proto, seed, share)
