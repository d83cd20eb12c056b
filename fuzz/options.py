"""What a command line says in words: shapes, bound values, limits, passes, budgets, preprocessing, targets.

The first byte of an input chooses the reader, the rest is the text.
"""

from __future__ import annotations

from collections.abc import Callable

from sparsec.budget import Budget
from sparsec.cli.arguments import parse_binds, parse_inputs, parse_shapes
from sparsec.images import Images
from sparsec.limits import parse_limits
from sparsec.passes.pruning.masks import Pattern
from sparsec.rewriting.pass_specs import parse_spec
from sparsec.targets import find_target

READERS: tuple[tuple[Callable[[str], object], tuple[str, ...]], ...] = (
    (lambda text: parse_shapes([text]), ("x:1x3x224x224", "input:0:8")),
    (lambda text: parse_binds([text]), ("sr=16000", "steps=0.5+1")),
    (lambda text: parse_inputs([text], ["x", "y"]), ("x=a.bin", "a.bin")),
    (lambda text: parse_limits([text]), ("folded-bytes=512M", "seconds=300", "nodes=5_000")),
    (parse_spec, (
        "prune:sparsity=0.8,block=4x1", "quantize:weights=int4,group=16,asymmetric=true", "factorize:residual=sparse",
        "prune:nm=2:4,include=a.*+b", "compress:bytes=0.4,methods=sparse+int8", "prune-channels:sparsity=25%",
    )),
    (Budget.parse, ("accuracy=1%", "accuracy=0.01", "speedup=2x")),
    (lambda text: Images.parse("images", text), ("resize=256,crop=224,scale=255,mean=0.485+0.456+0.406,std=0.2+0.2+0.2", "")),
    (lambda text: Pattern.parse(text), ("4x1", "1x1", "16x16")),
    (lambda text: Pattern.parse(nm=text), ("2:4", "1:8")),
    (lambda text: find_target(text), ("host", "arm", "wasm")),
    (lambda text: find_target("arm", cpu=text), ("cortex-a76", "neoverse-n1")),
)  # fmt: skip


def read(data: bytes) -> None:
    """Hand a text to one of `READERS`."""
    if data:
        READERS[data[0] % len(READERS)][0](data[1:].decode("utf-8", "surrogateescape"))


def seeds() -> list[bytes]:
    """What each of them accepts, or nearly."""
    return [bytes([i]) + text.encode() for i, (_, texts) in enumerate(READERS) for text in texts]
