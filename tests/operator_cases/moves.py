"""What moves, picks or makes values."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from operator_cases.case import F32, IMAGE, INTS, Case, floats, ints

CASES = [
    Case("Transpose", (floats(3, 4, 5),), attributes={"perm": [2, 0, 1]}),
    Case("Transpose", (floats(1, 6, 40, 5),), attributes={"perm": [0, 2, 3, 1]}, name="nhwc"),
    Case("Transpose", (floats(3, 4),), name="default"),
    Case("Reshape", (floats(2, 3, 8),), (ints(0, -1),)),
    Case("Flatten", (floats(2, 3, 8),), attributes={"axis": 1}),
    Case("Squeeze", (floats(1, 3, 1, 8),), (ints(0, 2),)),
    Case("Unsqueeze", (floats(3, 8),), (ints(0, 2),)),
    Case("Identity", (floats(3, 8),)),
    Case("Slice", (floats(3, 20),), (ints(2), ints(17), ints(1))),
    Case("Slice", (floats(8, 20),), (ints(1, 2), ints(8, 19), ints(0, 1), ints(2, 3)), name="strided"),
    Case("Slice", (floats(3, 20),), (ints(-1), ints(-21), ints(1), ints(-1)), name="reversed"),
    Case("Slice", (floats(3, 20),), (ints(-5), ints(2**62), ints(-1)), name="open end"),
    Case("Gather", (floats(9, 5),), (ints(0, 3, -1, 8),), {"axis": 0}),
    Case("Gather", (floats(4, 9),), (np.array(2),), {"axis": 1}, "scalar"),
    Case("Gather", (floats(4, 9),), (np.array([[0, 1], [8, -9]]),), {"axis": 1}, "matrix"),
    Case("GatherElements", (floats(3, 4),), (np.array([[0, 1], [2, -1]]),), {"axis": 0}),
    Case("GatherND", (floats(3, 4, 5),), (np.array([[0, 1], [2, 3]]),)),
    Case("Concat", (floats(1, 2, 5), floats(1, 3, 5, seed=1)), attributes={"axis": 1}),
    Case("Concat", (floats(2, 3), floats(2, 1), floats(2, 4)), attributes={"axis": -1}, name="three"),
    Case("Concat", tuple(floats(1, 2, 5, seed=i) for i in range(11)), attributes={"axis": 1}, name="eleven"),
    Case("Split", (floats(2, 9, 4),), (ints(2, 3, 4),), {"axis": 1}, outputs=3),
    Case("Split", (floats(2, 10),), (), {"axis": 1}, "equal", outputs=2),
    Case("Split", (floats(2, 20),), (ints(*[2] * 10),), {"axis": 1}, "ten", outputs=10),
    Case("Pad", (floats(3, 8),), (ints(1, 2, 0, 3), np.array(1.5, F32)), {"mode": "constant"}),
    Case("Pad", (floats(1, 2, 6, 8),), (ints(0, 0, 2, 1, 0, 0, 3, 2),), {"mode": "reflect"}, "reflect"),
    Case("Pad", (floats(1, 2, 6, 8),), (ints(0, 0, 2, 1, 0, 0, 3, 2),), {"mode": "edge"}, "edge"),
    Case("Pad", (floats(3, 8),), (ints(-1, 2, 0, -3),), {"mode": "constant"}, "negative"),
    *(
        Case(
            "Resize",
            (floats(1, 3, 5, 7),),
            (None, np.array([1, 1, *scale], F32)),
            {"mode": mode, "coordinate_transformation_mode": coordinates, **extra},
            f"{mode}-{coordinates}-{scale[0]}",
            depth=16,
        )
        for mode, coordinates, scale, extra in (
            ("nearest", "asymmetric", (2.0, 2.0), {"nearest_mode": "floor"}),
            ("nearest", "half_pixel", (2.0, 2.0), {}),
            ("nearest", "half_pixel", (0.6, 0.6), {}),
            ("linear", "half_pixel", (2.0, 3.0), {}),
            ("linear", "align_corners", (2.0, 2.0), {}),
            ("linear", "pytorch_half_pixel", (1.7, 0.6), {}),
            ("linear", "asymmetric", (2.0, 2.0), {}),
            ("nearest", "asymmetric", (2.5, 1.3), {"nearest_mode": "round_prefer_ceil"}),
            ("nearest", "align_corners", (3, 2), {"nearest_mode": "ceil"}),
            ("cubic", "align_corners", (2.0, 3.0), {}),
            ("cubic", "asymmetric", (0.6, 2.3), {"exclude_outside": 1}),
            ("cubic", "half_pixel", (2.0, 2.0), {"cubic_coeff_a": -0.75}),
        )
    ),
    Case("Resize", (floats(1, 3, 5, 7),), (None, None, ints(1, 3, 10, 14)), {"mode": "linear"}, "sizes", depth=4),
    Case("Expand", (floats(3, 1),), (ints(2, 3, 4),)),
    Case("Tile", (floats(3, 4),), (ints(2, 3),)),
    Case("DepthToSpace", (floats(1, 8, 3, 5),), attributes={"blocksize": 2}),
    Case("DepthToSpace", (floats(1, 8, 3, 5),), attributes={"blocksize": 2, "mode": "CRD"}, name="crd"),
    Case("SpaceToDepth", (floats(1, 2, 6, 10),), attributes={"blocksize": 2}),
    Case("ArgMax", (floats(4, 30),), attributes={"axis": 1}),
    Case("ArgMax", (floats(4, 30),), attributes={"axis": 0, "keepdims": 0}, name="columns"),
    Case("ArgMin", (floats(4, 30),), attributes={"axis": 1}),
    Case("OneHot", (np.array([[1, 0], [3, 2]]),), (np.array(4), np.array([0, 1], F32)), {"axis": -1}),
    Case("Trilu", (floats(5, 7),), (), {"upper": 1}),
    Case("ScatterND", (floats(5, 4),), (ints(1, 3).reshape(2, 1), floats(2, 4, seed=8))),
    *(
        Case(
            "TopK",
            (INTS if "int" in name else floats(2, 10, 7).round(),),
            (ints(3),),
            {"axis": axis, "largest": largest},
            name,
            1,
            2,
            21,
        )
        for name, axis, largest in (("ties", 1, 1), ("smallest", -1, 0), ("int64", 1, 1), ("int-smallest", 0, 0))
    ),
    *(
        Case(
            "Resize",
            (IMAGE,),
            (None, np.array(scales, F32)),
            {"mode": mode, "antialias": 1, **extra},
            f"antialias-{name}",
            8,
            1,
            18,
        )
        for name, mode, scales, extra in (
            ("linear", "linear", (1, 1, 0.5, 0.37), {}),
            ("cubic", "cubic", (1, 1, 0.4, 2.2), {}),
            ("outside", "cubic", (1, 1, 0.7, 0.3), {"exclude_outside": 1}),
        )
    ),
    Case(
        "Resize",
        (IMAGE,),
        (np.array([0, 0, 0.2, -0.2, 1, 1, 0.9, 1.3], F32), None, ints(1, 6, 5, 7)),
        {"mode": "linear", "coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 3.0},
        "crop",
        4,
    ),
    *(
        Case(
            "Resize",
            (IMAGE,),
            (None, None, ints(17, 13)),
            {"mode": "linear", "axes": [2, 3], "keep_aspect_ratio_policy": p},
            p,
            4,
            1,
            18,
        )
        for p in ("not_larger", "not_smaller")
    ),
    Case(
        "Col2Im",
        (floats(2, 3 * 6, 6),),
        (ints(5, 6), ints(2, 3)),
        {"pads": [0, 1, 1, 0], "strides": [2, 2], "dilations": [1, 2]},
        depth=6,
        opset=21,
    ),
    Case("EyeLike", (floats(4, 6),), (), {"k": 1, "dtype": int(TensorProto.INT64)}, opset=21),
    Case("AffineGrid", (floats(2, 2, 3),), (ints(2, 1, 4, 5),), {}, depth=3, opset=20),
    Case(
        "TfIdfVectorizer",
        (np.random.default_rng(1).integers(0, 4, (3, 12)),),
        (),
        {
            "mode": "TFIDF",
            "min_gram_length": 1,
            "max_gram_length": 2,
            "max_skip_count": 2,
            "ngram_counts": [0, 4],
            "ngram_indexes": [3, 0, 1, 4, 2, 6, 5],
            "pool_int64s": [0, 1, 2, 3, 0, 1, 2, 2, 1, 3],
            "weights": [1.0, 2.0, 0.5, 1.5, 3.0, 1.0, 2.5],
        },
        opset=21,
    ),
]
