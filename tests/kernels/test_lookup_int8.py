"""Tables of 256 bytes: every byte at every place, ragged sizes, stored forms and back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from layers import Layer, check_layers

from sparsec.kernels import lookup_int8
from sparsec.targets import find_target

SIZES = (1, 15, 17, 33, 63, 100, 129, 8199, 16500)


def layer(machine, n, x_type, y_type):
    rng = np.random.default_rng(n)
    table = rng.integers(0, 256, 256).astype(np.uint8).view(y_type)
    x = np.concatenate([rng.permutation(256) for _ in range(-(-n // 256))])[:n].astype(np.uint8).view(x_type)
    call = lookup_int8.bind(machine, size=n, table=table, x_type=x_type)
    return Layer(call, lookup_int8.reference(x, table), 0.5, x=x)


@pytest.mark.parametrize(("x_type", "y_type"), [("uint8", "uint8"), ("int8", "uint8"), ("uint8", "int8")])
def test_lookup(dot_target, x_type, y_type):
    sizes = SIZES if x_type == "uint8" else SIZES[::4]
    check_layers([layer(dot_target.machine, n, x_type, y_type) for n in sizes], dot_target)


def test_one_byte_at_a_time():
    """The way of machines without a byte shuffle, run here."""
    target = find_target("host")
    machine = replace(target.machine, dot="portable")
    check_layers([layer(machine, n, "int8", "uint8") for n in SIZES[::2]], target)


@pytest.mark.parametrize("kind", ["words", "rows", "tbl", "bytes"])
def test_stored_form_and_back(kind):
    table = np.random.default_rng(0).integers(0, 256, 256).astype(np.uint8)
    np.testing.assert_array_equal(lookup_int8.unpack(lookup_int8.pack(table, kind), kind), table)
