"""The C API of libmodel.so: right answers whoever owns memory and threads, and a code for every misuse."""

from __future__ import annotations

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import c_api
import hand_programs
import numpy as np
import pytest
from c_api import BAD_ARGUMENT, CPU_FEATURE, OK, Library, Options, TensorInfo

from sparsec.building.emit import arena_bytes, scratch_bytes, sparsec_version


@pytest.fixture(scope="module")
def library() -> Library:
    return c_api.library()


@pytest.fixture(scope="module")
def weights() -> bytes:
    return (c_api.built() / "weights.bin").read_bytes()


def check(model: c_api.Model, seed: int = 0, sample: int = 1) -> None:
    x = hand_programs.sample(sample)
    for got, wanted in zip(model(x), hand_programs.reference(hand_programs.program(seed=seed), x), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("threads", [0, 1, 2, 3, 8, 64])
def test_same_answer_with_any_number_of_threads(library, threads):
    code, model = library.open_file(c_api.built() / "weights.bin", Options(threads=threads))
    assert code == OK
    with model:
        for sample in range(5):
            check(model, sample=sample)


@pytest.mark.parametrize("shift", [0, 1, 4, 32])
def test_weights_in_memory_of_any_alignment(library, weights, shift):
    memory = np.zeros(len(weights) + 128, np.uint8)
    start = -memory.ctypes.data % 64 + shift
    memory[start : start + len(weights)] = np.frombuffer(weights, np.uint8)
    area = (ctypes.c_char * len(weights)).from_address(memory.ctypes.data + start)
    code, model = library.open(area)
    assert code == OK
    with model:
        check(model)


def test_caller_buffers_need_no_alignment(library, weights):
    x = hand_programs.sample()
    raw = [np.zeros(x.nbytes + 8, np.uint8) for _ in range(3)]
    for array in raw[:2]:
        array[3 : 3 + x.nbytes] = np.frombuffer(x.tobytes(), np.uint8)
    code, model = library.open(weights)
    assert code == OK
    with model:
        assert model.run([raw[0][3:]], [raw[1][3:], raw[2][1:]]) == OK
    wanted, row = hand_programs.reference(hand_programs.program(), x)
    np.testing.assert_array_equal(raw[1][3 : 3 + x.nbytes].copy().view(np.float32).reshape(x.shape), wanted)
    np.testing.assert_array_equal(raw[2][1 : 1 + row.nbytes].copy().view(np.float32), row)
    assert not raw[1][3 + x.nbytes :].any()
    assert not raw[2][1 + row.nbytes :].any()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shift", [0, 1, 63])
def test_arena_of_the_caller(library, weights, threads, shift):
    options = Options(threads=threads)
    need = library.c.sparsec_arena_bytes(ctypes.byref(options))
    memory = np.full(need + 64 + 64, 0xA5, np.uint8)
    options.arena = memory.ctypes.data + shift
    options.arena_bytes = need - 1
    assert library.open(weights, options) == (BAD_ARGUMENT, None)
    options.arena_bytes = need
    code, model = library.open(weights, options)
    assert code == OK
    with model:
        check(model)
        check(model, sample=2)
    assert (memory[:shift] == 0xA5).all()
    assert (memory[shift + need :] == 0xA5).all()


def test_every_worker_has_scratch_of_its_own(library, weights):
    """Where the arena's end shows what each part's last tile left there."""
    threads = 4

    def one_after_the_other(ctx, fn, n):
        for i in range(n):
            fn(ctx, i)

    options = Options(threads=threads, parallel_for=c_api.parallel_for(one_after_the_other))
    options.arena_bytes = library.c.sparsec_arena_bytes(ctypes.byref(options))
    memory = np.zeros(options.arena_bytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    options.arena = memory.ctypes.data + start
    code, model = library.open(weights, options)
    assert code == OK
    made, x = hand_programs.program(), hand_programs.sample()
    with model:
        y, _ = model(x)
    for worker in range(threads):
        at = start + arena_bytes(made) + worker * scratch_bytes(made)
        left = memory[at : at + hand_programs.COLUMNS * 4].view(np.float32)
        np.testing.assert_array_equal(left[::-1], y[hand_programs.ROWS * (worker + 1) // threads - 1])


def test_more_threads_need_more_memory(library):
    sizes = [library.c.sparsec_arena_bytes(ctypes.byref(Options(threads=n))) for n in (1, 2, 3)]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] >= 256
    assert library.c.sparsec_arena_bytes(None) == sizes[0]


@pytest.mark.parametrize("threads", [-1, 257, 2**31 - 1])
def test_a_wrong_number_of_threads(library, weights, threads):
    assert library.open(weights, Options(threads=threads)) == (BAD_ARGUMENT, None)
    assert library.c.sparsec_arena_bytes(ctypes.byref(Options(threads=threads))) == 0


def test_null_pointers_and_bad_indices(library, weights):
    c = library.c
    assert c.sparsec_open(weights, len(weights), None, None) == BAD_ARGUMENT
    assert c.sparsec_open_file(b"weights.bin", None, None) == BAD_ARGUMENT
    handle = ctypes.c_void_p(1)
    assert c.sparsec_open_file(None, None, ctypes.byref(handle)) == BAD_ARGUMENT
    assert not handle.value
    assert library.open(None) == (BAD_ARGUMENT, None)
    c.sparsec_close(None)
    info = TensorInfo()
    for index in (-1, 1, 2**31 - 1):
        assert c.sparsec_input_info(None, index, ctypes.byref(info)) == BAD_ARGUMENT
    assert c.sparsec_output_info(None, 0, None) == BAD_ARGUMENT
    code, model = library.open(weights)
    assert code == OK
    with model:
        x = hand_programs.sample()
        one = (ctypes.c_void_p * 1)(x.ctypes.data)
        none = (ctypes.c_void_p * 2)(x.ctypes.data, None)
        assert c.sparsec_run(None, one, none) == BAD_ARGUMENT
        assert c.sparsec_run(model.handle, None, none) == BAD_ARGUMENT
        assert c.sparsec_run(model.handle, one, None) == BAD_ARGUMENT
        assert c.sparsec_run(model.handle, one, none) == BAD_ARGUMENT
        check(model)


def test_signature(library, weights):
    code, model = library.open(weights)
    assert code == OK
    with model:
        assert library.c.sparsec_input_count(model.handle) == 1
        assert library.c.sparsec_output_count(model.handle) == 2
        info = TensorInfo()
        assert library.c.sparsec_input_info(model.handle, 0, ctypes.byref(info)) == OK
        assert (info.name, info.dtype, info.rank, list(info.dims)) == (b"x", 1, 2, [37, 64, 1, 1, 1, 1, 1, 1])
        assert (info.bytes, info.scale, info.zero_point) == (37 * 64 * 4, 1.0, 0)
        assert library.c.sparsec_output_info(model.handle, 1, ctypes.byref(info)) == OK
        assert (info.name, info.dtype, info.rank, info.dims[0], info.bytes) == (b"row", 1, 1, 64, 256)


def test_texts(library):
    assert library.c.sparsec_version().decode() == sparsec_version()
    assert library.c.sparsec_features_needed().decode().split() == list(hand_programs.program().target.features)
    texts = [library.c.sparsec_error_string(code).decode() for code in (0, -1, -2, -3, -4, -5, -6, -7, 99)]
    assert len(set(texts)) == len(texts)
    assert all(texts)


@pytest.mark.parametrize("feature", ["quantum", "avx2fma", "av"])
def test_a_missing_cpu_feature(feature):
    made = hand_programs.program(features=(feature,))
    missing = Library(c_api.build_program(made) / "libmodel.so")
    assert missing.open(b"not even weights")[0] == CPU_FEATURE
    assert missing.open_file(c_api.built() / "weights.bin")[0] == CPU_FEATURE
    assert feature in missing.c.sparsec_features_needed().decode().split()


def test_caller_parallel_for(library, weights):
    calls = []

    def run(ctx, fn, n):
        data = ctypes.cast(ctx, ctypes.POINTER(ctypes.c_void_p))[0]
        threads = [threading.Thread(target=fn, args=(ctx, i)) for i in reversed(range(n))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        fn(ctx, n)  # a part there is not: nothing happens
        fn(ctx, -1)
        calls.append((data, n))

    options = Options(threads=4, parallel_for=c_api.parallel_for(run), parallel_data=1234)
    code, model = library.open(weights, options)
    assert code == OK
    with model:
        check(model)
    assert calls == [(1234, 4)] * 3


def test_one_thread_asks_nobody(library, weights):
    def run(ctx, fn, n):
        raise AssertionError

    options = Options(threads=1, parallel_for=c_api.parallel_for(run))
    code, model = library.open(weights, options)
    assert code == OK
    with model:
        check(model)


def _threads_of_process() -> int:
    """When the number has stayed for a while: a thread that was joined is counted until the kernel has put it away."""
    seen: list[int] = []
    while len(seen) < 10 or len(set(seen[-10:])) > 1:
        with open("/proc/self/status", encoding="utf-8") as lines:
            seen.append(next(int(line.split()[1]) for line in lines if line.startswith("Threads:")))
        time.sleep(0.005)
    return seen[-1]


def test_threads_are_created_and_ended(library, weights):
    before = _threads_of_process()
    code, model = library.open(weights, Options(threads=1))
    assert code == OK
    with model:
        assert _threads_of_process() == before
    code, model = library.open(weights, Options(threads=5))
    assert code == OK
    with model:
        assert _threads_of_process() == before + 4
        check(model)
    assert _threads_of_process() == before


@pytest.mark.parametrize("threads", [1, 3])
def test_instances_in_threads_of_two_models(weights, threads):
    """Two models in one process, two instances of each, all at once: everyone gets the answer they get alone."""

    def work(seed: int) -> None:
        code, model = c_api.library(seed).open_file(c_api.built(seed=seed) / "weights.bin", Options(threads=threads))
        assert code == OK
        with model:
            for sample in range(100):
                check(model, seed, sample % 7)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, [0, 1, 0, 1]))


def test_embedded_weights():
    folder = c_api.build_program(hand_programs.program(), embed_weights=True)
    assert not (folder / "weights.bin").exists()
    code, model = Library(folder / "libmodel.so").open(None)
    assert code == OK
    with model:
        check(model)


def test_default_number_of_threads():
    folder = c_api.build_program(hand_programs.program(), threads=3)
    library = Library(folder / "libmodel.so")
    before = _threads_of_process()
    code, model = library.open_file(folder / "weights.bin")
    assert code == OK
    with model:
        assert _threads_of_process() == before + 2
        check(model)


def test_kernels_may_call_the_mathematics_library():
    import math

    folder = c_api.build_program(hand_programs.math_program())
    x = hand_programs.sample()
    y = np.empty_like(x)
    code, model = Library(folder / "libmodel.so").open_file(folder / "weights.bin")
    assert code == OK
    with model:
        assert model.run([x], [y]) == OK
    wanted = np.vectorize(lambda v: 1.5**v + math.erf(v))(x.astype(np.float64))
    assert np.abs(y - wanted).max() <= 4 * np.finfo(np.float32).eps * np.abs(wanted).max()
