"""weights.bin is checked to the last bit before anything is computed with it."""

from __future__ import annotations

import os

import c_api
import hand_programs
import pytest
from c_api import BAD_WEIGHTS, IO, OK, VERSION
from hypothesis import given, settings
from hypothesis import strategies as st

WEIGHTS = (c_api.built() / "weights.bin").read_bytes()
FIELDS = {"magic": 0, "version": 8, "header": 12, "payload": 16, "checksum": 24, "digest": 32}


@pytest.mark.parametrize("at", range(64))
def test_every_byte_of_the_header_counts(at, tmp_path):
    expected = VERSION if FIELDS["version"] <= at < FIELDS["header"] else BAD_WEIGHTS
    for change in (0x01, 0x80, 0xFF):
        damaged = bytearray(WEIGHTS)
        damaged[at] ^= change
        assert c_api.library().open(bytes(damaged))[0] == expected
    path = tmp_path / "weights.bin"
    path.write_bytes(damaged)
    assert c_api.library().open_file(path)[0] == expected


@pytest.mark.parametrize("field", ["version", "header", "payload", "checksum"])
@pytest.mark.parametrize("value", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_extreme_lengths(field, value):
    damaged = bytearray(WEIGHTS)
    damaged[FIELDS[field] : FIELDS[field] + 4] = value.to_bytes(4, "little")
    assert c_api.library().open(bytes(damaged))[0] == (VERSION if field == "version" else BAD_WEIGHTS)


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(64 * 8, len(WEIGHTS) * 8 - 1), min_size=1, max_size=4))
def test_flipped_bits_of_the_payload(bits):
    damaged = bytearray(WEIGHTS)
    for bit in bits:
        damaged[bit // 8] ^= 1 << bit % 8
    assert c_api.library().open(bytes(damaged))[0] == BAD_WEIGHTS


def test_swapped_words_of_the_payload():
    damaged = bytearray(WEIGHTS)
    damaged[128:132], damaged[192:196] = WEIGHTS[192:196], WEIGHTS[128:132]
    assert damaged != WEIGHTS
    assert c_api.library().open(bytes(damaged))[0] == BAD_WEIGHTS


@pytest.mark.parametrize("size", [0, 1, 8, 63, 64, 65, 128, len(WEIGHTS) - 1])
def test_truncated(size, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(WEIGHTS[:size])
    assert c_api.library().open(WEIGHTS[:size])[0] == BAD_WEIGHTS
    assert c_api.library().open_file(path)[0] == BAD_WEIGHTS


@pytest.mark.parametrize("extra", [1, 64])
def test_trailing_bytes(extra, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(WEIGHTS + bytes(extra))
    assert c_api.library().open(WEIGHTS + bytes(extra))[0] == BAD_WEIGHTS
    assert c_api.library().open_file(path)[0] == BAD_WEIGHTS


def test_weights_of_another_model():
    other = (c_api.built(seed=1) / "weights.bin").read_bytes()
    assert len(other) == len(WEIGHTS)
    assert c_api.library().open(other)[0] == BAD_WEIGHTS
    assert c_api.library(1).open(other)[0] == OK


def test_weights_of_other_code():
    """The same constants, but another kernel: the digest ties both."""
    made = hand_programs.program(features=("popcnt",))
    other = (c_api.build_program(made) / "weights.bin").read_bytes()
    assert other[64:] == WEIGHTS[64:]
    assert c_api.library().open(other)[0] == BAD_WEIGHTS


def test_files_that_are_none(tmp_path):
    assert c_api.library().open_file(tmp_path / "absent")[0] == IO
    assert c_api.library().open_file(tmp_path)[0] in (IO, BAD_WEIGHTS)
    os.mkfifo(tmp_path / "pipe")
    handle = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)  # else the reader waits for a writer
    try:
        assert c_api.library().open_file(tmp_path / "pipe")[0] in (IO, BAD_WEIGHTS)
    finally:
        os.close(handle)
