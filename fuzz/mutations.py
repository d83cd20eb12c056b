"""Random damage: to bytes, and to protobuf messages field by field. Deterministic in the generator that is handed in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

INTERESTING = (
    0,
    1,
    2,
    3,
    7,
    8,
    64,
    127,
    128,
    255,
    256,
    65535,
    65536,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    (1 << 63) - 1,
)


def mutate_bytes(data: bytes, rng: random.Random, seeds: list[bytes]) -> bytes:
    """One to eight of: flip, set, insert, delete, repeat, overwrite with a number, splice with another seed, cut."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) + 1)
        kind = rng.randrange(8)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(out):
            out[at] = rng.choice((0, 1, 9, 10, 32, 34, 44, 45, 58, 91, 123, 127, 128, 255, rng.randrange(256)))
        elif kind == 2:
            out[at:at] = bytes(rng.randrange(256) for _ in range(rng.choice((1, 2, 4, 16))))
        elif kind == 3:
            del out[at : at + rng.choice((1, 2, 4, 16, 256))]
        elif kind == 4:
            piece = out[at : at + rng.choice((1, 4, 32))]
            out[at:at] = piece * rng.choice((1, 2, 50))
        elif kind == 5:
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice((*INTERESTING, -1)) & ((1 << 8 * width) - 1)
            out[at : at + width] = number.to_bytes(width, "little")
        elif kind == 6 and seeds:
            other = rng.choice(seeds)
            start = rng.randrange(len(other) + 1)
            out[at : at + rng.choice((8, 64, 1 << 20))] = other[start : start + rng.choice((8, 64, 1 << 20))]
        elif kind == 7:
            del out[at:]
    return bytes(out[: 1 << 20])


def mutate_model(data: bytes, rng: random.Random, seeds: list[bytes]) -> bytes:
    """The same for an ONNX model, in its fields; what no longer parses is damaged as bytes."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:
        return mutate_bytes(data, rng, seeds)
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        messages = list(_messages(model))
        message = rng.choice(messages)
        fields = message.DESCRIPTOR.fields
        filled = [f for f, _ in message.ListFields()]
        field = rng.choice(filled) if filled and rng.random() < 0.8 else rng.choice(fields)
        _change(message, field, rng, messages)
    try:
        return model.SerializeToString()
    except Exception:  # a string that is none
        return data


def _messages(message: Message, depth: int = 0) -> Iterator[Message]:
    yield message
    if depth > 20:
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else (value,):
                yield from _messages(inner, depth + 1)


def _change(message: Message, field: FieldDescriptor, rng: random.Random, messages: list[Message]) -> None:
    if rng.random() < 0.15:
        message.ClearField(field.name)
        return
    if field.message_type is not None:
        donors = [m for m in messages if m.DESCRIPTOR is field.message_type]
        copy = field.message_type._concrete_class()
        if donors and rng.random() < 0.8:
            copy.CopyFrom(rng.choice(donors))
        if field.is_repeated:
            container = getattr(message, field.name)
            if len(container) and rng.random() < 0.4:
                del container[rng.randrange(len(container))]
            else:
                container.append(copy)
        else:
            getattr(message, field.name).CopyFrom(copy)
        return
    value = _scalar(field, rng, messages)
    if not field.is_repeated:
        setattr(message, field.name, value)
        return
    container = getattr(message, field.name)
    kind = rng.randrange(3)
    if kind == 0 or not len(container):
        container.append(value)
    elif kind == 1:
        container[rng.randrange(len(container))] = value
    else:
        del container[rng.randrange(len(container))]


def _scalar(field: FieldDescriptor, rng: random.Random, messages: list[Message]) -> Any:
    kind = field.cpp_type
    if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64):
        bits = 31 if kind == FieldDescriptor.CPPTYPE_INT32 else 63
        number = rng.choice((*INTERESTING, rng.randrange(30))) & ((1 << bits) - 1)
        return -number if rng.random() < 0.3 else number
    if kind in (FieldDescriptor.CPPTYPE_UINT32, FieldDescriptor.CPPTYPE_UINT64):
        return rng.choice(INTERESTING) & 0xFFFFFFFF
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return (
            rng.randrange(26)
            if field.enum_type.values_by_number.get(25)
            else rng.choice(list(field.enum_type.values_by_number))
        )
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        return rng.choice((0.0, -1.0, 1e30, float("nan"), float("inf"), 0.5))
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return rng.random() < 0.5
    texts = [v for m in messages for f, v in m.ListFields() if f.type == field.type and not f.is_repeated]
    text = rng.choice(texts) if texts else rng.choice(OPERATORS)
    if field.type == FieldDescriptor.TYPE_BYTES:
        return bytes(text if isinstance(text, bytes) else b"x")[: rng.choice((0, 3, 1 << 20))]
    return rng.choice((text, rng.choice(OPERATORS), "", "../../etc/passwd", "x" * 70000))


OPERATORS = [schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""]
