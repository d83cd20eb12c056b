"""ONNX -> ONNX rewrites, one file a technique. No pass calls another; a list decides the order."""

from __future__ import annotations

from sparsec.passes.channels.prune_channels import PruneChannels
from sparsec.passes.channels.rearrange import Rearrange
from sparsec.passes.low_rank.compress import Compress
from sparsec.passes.low_rank.factorize import Factorize
from sparsec.passes.normalisation.cancel_transposes import CancelTransposes
from sparsec.passes.normalisation.explicit_pads import ExplicitPads
from sparsec.passes.normalisation.fold_batch_norm import FoldBatchNorm
from sparsec.passes.normalisation.fold_constants import FoldConstants
from sparsec.passes.normalisation.fuse_layer_norm import FuseLayerNorm
from sparsec.passes.normalisation.import_qoperator import ImportQOperator
from sparsec.passes.normalisation.normalize_qdq import NormalizeQdq
from sparsec.passes.normalisation.remove_no_ops import RemoveNoOps
from sparsec.passes.normalisation.unroll_recurrent import UnrollRecurrent
from sparsec.passes.normalisation.widen import Widen
from sparsec.passes.pruning.prune import Prune
from sparsec.passes.quantization.quantize import Quantize
from sparsec.passes.training.recover import Recover
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
