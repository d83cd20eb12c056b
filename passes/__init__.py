"""ONNX -> ONNX rewrites, one file a technique. No pass calls another; a list decides the order."""

from __future__ import annotations

from sparsec.passes.cancel_transposes import CancelTransposes
from sparsec.passes.compress import Compress
from sparsec.passes.explicit_pads import ExplicitPads
from sparsec.passes.factorize import Factorize
from sparsec.passes.fold_batch_norm import FoldBatchNorm
from sparsec.passes.fold_constants import FoldConstants
from sparsec.passes.fuse_layer_norm import FuseLayerNorm
from sparsec.passes.import_qoperator import ImportQOperator
from sparsec.passes.normalize_qdq import NormalizeQdq
from sparsec.passes.prune import Prune
from sparsec.passes.prune_channels import PruneChannels
from sparsec.passes.quantize import Quantize
from sparsec.passes.rearrange import Rearrange
from sparsec.passes.recover import Recover
from sparsec.passes.remove_no_ops import RemoveNoOps
from sparsec.passes.unroll_recurrent import UnrollRecurrent
from sparsec.passes.widen import Widen
from sparsec.passes_api import Pass

# Built-in passes by `Pass.name`; adding one is adding a line here.
BUILT_IN: tuple[type[Pass], ...] = (
    FoldConstants,
    RemoveNoOps,
    CancelTransposes,
    ExplicitPads,
    FoldBatchNorm,
    FuseLayerNorm,
    ImportQOperator,
    NormalizeQdq,
    UnrollRecurrent,
    Widen,
    PruneChannels,
    Rearrange,
    Factorize,
    Prune,
    Recover,
    Quantize,
    Compress,
)

__all__ = [
    "BUILT_IN",
    "CancelTransposes",
    "Compress",
    "ExplicitPads",
    "Factorize",
    "FoldBatchNorm",
    "FoldConstants",
    "FuseLayerNorm",
    "ImportQOperator",
    "NormalizeQdq",
    "Prune",
    "PruneChannels",
    "Quantize",
    "Rearrange",
    "Recover",
    "RemoveNoOps",
    "UnrollRecurrent",
    "Widen",
]
