"""ONNX -> ONNX rewrites, one file a technique. No pass calls another; a list decides the order."""

from __future__ import annotations

from sparsec.passes.channels.prune_channels import PruneChannels
from sparsec.passes.channels.rearrange import Rearrange
from sparsec.passes.low_rank.compress import Compress
from sparsec.passes.low_rank.factorize import Factorize
from sparsec.passes.normalization.cancel_transposes import CancelTransposes
from sparsec.passes.normalization.explicit_pads import ExplicitPads
from sparsec.passes.normalization.fold_batch_norm import FoldBatchNorm
from sparsec.passes.normalization.fold_constants import FoldConstants
from sparsec.passes.normalization.fuse_layer_norm import FuseLayerNorm
from sparsec.passes.normalization.import_qoperator import ImportQOperator
from sparsec.passes.normalization.normalize_qdq import NormalizeQdq
from sparsec.passes.normalization.remove_no_ops import RemoveNoOps
from sparsec.passes.normalization.unroll_recurrent import UnrollRecurrent
from sparsec.passes.normalization.widen import Widen
from sparsec.passes.pruning.prune import Prune
from sparsec.passes.quantization.quantize import Quantize
from sparsec.passes.training.recover import Recover
from sparsec.rewriting.passes_api import Pass

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
