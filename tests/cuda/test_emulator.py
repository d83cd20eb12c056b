"""The emulation itself: barriers, exchange and tensor cores against NumPy, and that it finds what is wrong."""

from __future__ import annotations

import numpy as np
from cuda_emulator import run_cuda
from tvm.tirx.script.builder import ir as T

from sparsec.cuda.source import launch_of
from sparsec.kernels.cuda import emit


def reversal(synchronized: bool):
    """y[b][i] = x[b][127 - i] through shared memory."""

    def body(x, y, blocks, threads):
        (b,), (t,) = blocks, threads
        room = emit.shared(128)
        T.buffer_store(room, x[b * 128 + t], [t])
        if synchronized:
            emit.barrier()
        T.buffer_store(y, room[127 - t], [b * 128 + t])

    return emit.function([("x", 384, "float32"), ("y", 384, "float32")], 3, 128, body)


def test_threads_exchange_through_shared_memory():
    x = np.arange(384, dtype=np.float32)
    func = reversal(True)
    assert (launch_of(func).grid, launch_of(func).block) == ((3, 1, 1), (128, 1, 1))
    y = run_cuda(func, [x, np.zeros(384, np.float32)])[1]
    np.testing.assert_array_equal(y, x.reshape(3, 128)[:, ::-1].ravel())


def test_tensor_core_product_is_a_matrix_product():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 16)).astype(np.float16), rng.standard_normal((16, 8)).astype(np.float16)

    def body(x, w, y, _, threads):
        (t,) = threads
        group, part = t // 4, t % 4
        left, right, sums = emit.local(8, "float16"), emit.local(4, "float16"), emit.local(4)
        for i in range(8):
            T.buffer_store(left, x[(group + 8 * (i // 2 % 2)) * 16 + 2 * part + i % 2 + 8 * (i // 4)], [i])
        for i in range(4):
            T.buffer_store(right, w[(2 * part + i % 2 + 8 * (i // 2)) * 8 + group], [i])
            T.buffer_store(sums, T.float32(0), [i])
        emit.call("sparsec_mma_f16", emit.address(sums, 0), emit.address(left, 0), emit.address(right, 0))
        for i in range(4):
            T.buffer_store(y, sums[i], [(group + 8 * (i // 2)) * 8 + 2 * part + i % 2])

    func = emit.function([("x", 256, "float16"), ("w", 128, "float16"), ("y", 128, "float32")], 1, 32, body)
    y = run_cuda(func, [a.ravel(), b.ravel(), np.zeros(128, np.float32)])[2]
    exact = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(y.reshape(16, 8), exact, atol=16 * 2.0**-23 * np.abs(exact).max())
