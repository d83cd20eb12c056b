"""Operators that are rewritten before import, a family a file; `EXPANSIONS` has them all."""

from sparsec.lowering.expansions import arithmetic, layers, quantization, resize, selection, signals
from sparsec.lowering.expansions.context import Context, Expansion, ExpansionError

EXPANSIONS: dict[str, Expansion] = {
    "AffineGrid": layers.affine_grid,
    "BatchNormalization": layers.batch_norm,
    "Col2Im": layers.col2im,
    "Concat": arithmetic.chain_of_many,
    "ConvInteger": quantization.conv_integer,
    "ConvTranspose": layers.conv_transpose,
    "DFT": signals.dft,
    "DequantizeLinear": quantization.dequantize,
    "Det": arithmetic.determinant,
    "Dropout": layers.dropout,
    "EyeLike": selection.eye_like,
    "IsInf": arithmetic.is_inf,
    "LayerNormalization": layers.layer_norm,
    "LpNormalization": arithmetic.lp_normalization,
    "Max": arithmetic.chain_of_many,
    "Mean": arithmetic.mean,
    "Min": arithmetic.chain_of_many,
    "Mish": arithmetic.mish,
    "OneHot": selection.one_hot,
    "PRelu": arithmetic.prelu,
    "Pad": layers.pad,
    "Pow": arithmetic.power,
    "QuantizeLinear": quantization.quantize,
    "ReduceMax": arithmetic.extreme,
    "ReduceMin": arithmetic.extreme,
    "Resize": resize.resize,
    "RoiAlign": layers.roi_align,
    "STFT": signals.stft,
    "Sum": arithmetic.chain_of_many,
    "TfIdfVectorizer": selection.tf_idf,
    "TopK": selection.top_k,
}

__all__ = ["EXPANSIONS", "Context", "Expansion", "ExpansionError"]
