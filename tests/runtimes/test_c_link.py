"""What the linked files need and show, and that two models go into one program."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import c_api
import hand_programs
import numpy as np
import pytest

from sparsec.building import elf
from sparsec.building.build import C_FLAGS, HEADERS, LIBRARY_SOURCES, build
from sparsec.building.emit import c_prefix, c_string, checksum, sparsec_version, weights_payload
from sparsec.errors import BuildError
from sparsec.program import Arg, Tensor
from sparsec.targets import find_target

SOURCES = Path(__file__).parents[2] / "runtimes" / "c"
TARGETS = [("host", None), ("arm", "android"), ("arm", "linux")]
API = {f"sparsec_{name}" for name in c_api.FUNCTIONS}
GCC = shutil.which("gcc")
needs_gcc = pytest.mark.skipif(GCC is None, reason="gcc is not installed")
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]
ZIG = [sys.executable, "-m", "ziglang", "cc"]


@pytest.mark.parametrize(("target", "os"), TARGETS)
def test_library_needs_only_libc_libm_and_threads(target, os):
    data = (c_api.built(target, os) / "libmodel.so").read_bytes()
    allowed = {"libc.so", "libm.so"} if os == "android" else {"libc.so.6", "libm.so.6", "libpthread.so.0"}
    assert set(elf.needed(data)) <= allowed
    assert elf.needed(data)[0].startswith("libc.so") or "libc.so.6" in elf.needed(data)
    assert min(elf.load_alignments(data)) >= 16384


@pytest.mark.parametrize("target", [find_target("host"), find_target("arm"), find_target("arm", os="linux")], ids=str)
def test_library_with_mathematics_needs_libm(target):
    folder = c_api.build_program(hand_programs.math_program(target))
    names = elf.needed((folder / "libmodel.so").read_bytes())
    assert ("libm.so" if target.os == "android" else "libm.so.6") in names
    assert len(names) <= 3


@pytest.mark.parametrize(("target", "os"), TARGETS)
def test_library_exports_only_the_api(target, os):
    symbols = elf.symbols((c_api.built(target, os) / "libmodel.so").read_bytes(), dynamic=True)
    assert {s.name for s in symbols if s.defined} == API
    assert not elf.symbols((c_api.built(target, os) / "libmodel.so").read_bytes())  # stripped


@pytest.mark.parametrize(("target", "os"), TARGETS)
def test_bench_is_static(target, os):
    assert elf.needed((c_api.built(target, os) / "bench").read_bytes()) == []


def members(path: Path) -> dict[str, bytes]:
    """Members of a GNU archive by name."""
    data = path.read_bytes()
    assert data[:8] == b"!<arch>\n"
    found, at = {}, 8
    while at < len(data):
        name, size = data[at : at + 16].decode().strip(), int(data[at + 48 : at + 58])
        found[name] = data[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    return {name.rstrip("/"): content for name, content in found.items() if name not in ("/", "//")}


@pytest.mark.parametrize(("target", "os"), TARGETS)
def test_archive_has_only_prefixed_symbols(target, os):
    objects = members(c_api.built(target, os) / "libmodel.a")
    runtime = [Path(source).with_suffix(".o").name for source in LIBRARY_SOURCES]
    assert sorted(objects) == sorted(["kernels.o", "program.o", *runtime])
    symbols = [symbol for data in objects.values() for symbol in elf.symbols(data)]
    own = {s.name for s in symbols if s.defined}
    assert {f"hand_{name}" for name in API} <= own
    assert all(name.startswith("hand_sparsec_") for name in own)
    assert all(s.hidden for s in symbols if s.defined)
    foreign = {s.name for s in symbols if not s.defined} - own
    assert not any("sparsec" in name for name in foreign)


@pytest.mark.parametrize(("target", "os"), TARGETS)
def test_same_bytes_twice(target, os, monkeypatch, tmp_path):
    first = c_api.built(target, os)
    monkeypatch.chdir(tmp_path)
    second = tmp_path / "elsewhere"
    second.mkdir()
    build(hand_programs.program(find_target(target, os=os)), second)
    for name in ("weights.bin", "libmodel.so", "libmodel.a", "model.h", "bench"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
        assert str(tmp_path).encode() not in (second / name).read_bytes()
        assert b"/tmp" not in (second / name).read_bytes(), name


def test_an_empty_cache_makes_the_same_bytes(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(Path.home() / ".cache/zig")))
    folder = tmp_path / "out"
    folder.mkdir()
    build(hand_programs.program(), folder)
    runtime = [Path(source).with_suffix(".o").name for source in LIBRARY_SOURCES]
    assert sorted(p.name for p in (tmp_path / "cache/runtime").glob("*/*")) == sorted(["bench.o", *2 * runtime])
    assert (folder / "libmodel.so").read_bytes() == (c_api.built() / "libmodel.so").read_bytes()


def test_a_cache_of_ours_that_cannot_be_written_is_no_problem(monkeypatch, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "runtime").write_text("in the way")
    monkeypatch.setenv("SPARSEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", os.environ.get("ZIG_GLOBAL_CACHE_DIR", str(Path.home() / ".cache/zig")))
    build(hand_programs.program(), tmp_path)
    assert (tmp_path / "libmodel.so").exists()


def test_a_cache_of_the_compiler_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SPARSEC_CACHE", str(tmp_path / "file"))
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR", raising=False)
    with pytest.raises(BuildError, match="set SPARSEC_CACHE"):
        build(hand_programs.program(), tmp_path)


# Valid C and valid C++.
MAIN = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "first/model.h"
#include "second/model.h"

static unsigned char bytes_read[1 << 16], x[1 << 16], y[1 << 16], row[1 << 16];

static size_t read_file(const char *path, unsigned char *data) {
    FILE *file = fopen(path, "rb");
    size_t bytes = file ? fread(data, 1, 1 << 16, file) : 0;
    if (file) fclose(file);
    return bytes;
}

int main(void) {
    sparsec_model *a, *b;
    sparsec_options options;
    sparsec_tensor_info info;
    const void *inputs[1] = {x};
    void *outputs[2] = {y, row};
    size_t bytes = read_file("first/weights.bin", bytes_read);
    memset(&options, 0, sizeof options);
    options.threads = 2;
    if (second_1_sparsec_open(bytes_read, bytes, NULL, &b) != SPARSEC_BAD_WEIGHTS) return 1;
    if (hand_sparsec_open(bytes_read, bytes, &options, &a)) return 2;
    if (second_1_sparsec_open_file("second/weights.bin", &options, &b)) return 3;
    if (!read_file("x", x)) return 4;
    for (int i = 0; i < 2; i++) {
        if (i ? second_1_sparsec_run(b, inputs, outputs) : hand_sparsec_run(a, inputs, outputs)) return 5;
        if (hand_sparsec_output_info(a, 0, &info) || fwrite(y, 1, info.bytes, stdout) != info.bytes) return 6;
        if (second_1_sparsec_output_info(b, 1, &info) || fwrite(row, 1, info.bytes, stdout) != info.bytes) return 7;
    }
    hand_sparsec_close(a);
    second_1_sparsec_close(b);
    return 0;
}
"""

SHARED = """
#define SPARSEC_SHARED
#include <stdio.h>
#include "first/model.h"

int main(void) {
    printf("%s %d", hand_sparsec_version(), (int)hand_sparsec_input_count(NULL));
    return 0;
}
"""


@pytest.fixture(scope="module")
def two_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for name, seed in (("hand", 0), ("second-1", 1)):
        out = folder / name.split("-")[0].replace("hand", "first")
        out.mkdir()
        build(hand_programs.program(seed=seed), out, name=name)
    (folder / "x").write_bytes(hand_programs.sample().tobytes())
    for main in ("main.c", "main.cpp"):
        (folder / main).write_text(MAIN)
    return folder


needs_gpp = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


@pytest.mark.parametrize(
    "compiler", [pytest.param("gcc", marks=needs_gcc), pytest.param("g++", marks=needs_gpp), "zig-glibc", "zig-musl"]
)
def test_two_models_statically_in_one_program(two_models, compiler):
    arch = find_target("host").arch
    command = {
        "gcc": ["gcc", *WARNINGS],
        "g++": ["g++", *WARNINGS[1:]],
        "zig-glibc": [*ZIG, *WARNINGS, "-target", f"{arch}-linux-gnu.2.17"],
        "zig-musl": [*ZIG, *WARNINGS, "-target", f"{arch}-linux-musl"],
    }[compiler]
    main = "main.cpp" if compiler == "g++" else "main.c"
    libraries = ["first/libmodel.a", "second/libmodel.a", "-lm", "-lpthread"]
    subprocess.run([*command, main, *libraries, "-o", compiler], cwd=two_models, check=True)
    done = subprocess.run([two_models / compiler], cwd=two_models, capture_output=True, check=False)
    assert done.returncode == 0
    x = hand_programs.sample()
    wanted = [array for seed in (0, 1) for array in hand_programs.reference(hand_programs.program(seed=seed), x)]
    assert done.stdout == b"".join(array.tobytes() for array in wanted)


@needs_gcc
def test_header_against_the_shared_library(two_models):
    (two_models / "shared.c").write_text(SHARED)
    libraries = ["-Lfirst", "-lmodel", "-Wl,-rpath,$ORIGIN/first"]
    subprocess.run(["gcc", *WARNINGS, "shared.c", *libraries, "-o", "shared"], cwd=two_models, check=True)
    done = subprocess.run([two_models / "shared"], capture_output=True, text=True, check=True)
    assert done.stdout == f"{sparsec_version()} 1"


@needs_gcc
@pytest.mark.parametrize("flags", [["-O2"], ["-O0"], ["-O2", "-DSPARSEC_NO_FUTEX"]], ids=" ".join)
def test_runtime_compiles_without_a_warning(tmp_path, flags):
    for name in (*HEADERS, *LIBRARY_SOURCES, "bench.c"):
        shutil.copy(SOURCES / name, tmp_path)
    for name in (*LIBRARY_SOURCES, "bench.c"):
        subprocess.run([GCC, *WARNINGS, *flags, "-c", name, "-o", "out.o"], cwd=tmp_path, check=True)


@pytest.mark.parametrize("triple", ["x86_64-linux-gnu.2.17", "aarch64-linux-android", "aarch64-linux-musl"])
def test_runtime_compiles_without_a_warning_in_clang(tmp_path, triple):
    names = LIBRARY_SOURCES if "android" in triple else (*LIBRARY_SOURCES, "bench.c")
    for name in names:
        command = [*ZIG, "-target", triple, *C_FLAGS, *WARNINGS, "-c", SOURCES / name, "-o", tmp_path / "out.o"]
        subprocess.run(command, check=True)


HOSTILE = [
    '"); system("x', "*/ int x; /*", "a\\", "??/", "a\nb", "\\x41", "100%s%n", "é\u2028", "../../x", "'",
    "\x00after",
]  # fmt: skip


def test_hostile_names_stay_names(tmp_path):
    made = hand_programs.program()
    tensor = made.outputs[0]
    made = dataclasses.replace(
        made,
        name=HOSTILE[0],
        outputs=tuple(dataclasses.replace(tensor, name=name) for name in HOSTILE),
        steps=tuple(dataclasses.replace(step, nodes=tuple(HOSTILE)) for step in made.steps),
    )
    build(made, tmp_path)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert files == ["bench", "libmodel.a", "libmodel.so", "model.h", "weights.bin"]
    library = c_api.Library(tmp_path / "libmodel.so")
    for i, name in enumerate(HOSTILE):
        info = c_api.TensorInfo()
        library.c.sparsec_output_info(None, i, ctypes.byref(info))
        assert info.name == name.encode().split(b"\0")[0]


def test_prefixes():
    assert c_prefix("mobilenet-v2.1x") == "mobilenet_v2_1x"
    assert c_prefix("3d") == "model_3d"
    assert c_prefix("_x") == "model__x"
    assert c_prefix("") == "model"
    assert c_prefix("été") == "model__t"
    assert c_prefix(c_prefix("3d")) == c_prefix("3d")


def test_strings():
    assert c_string("plain text/1") == '"plain text/1"'
    assert c_string('"\\?\n1') == '"\\042\\134\\077\\0121"'


def test_checksum_is_the_polynomial():
    words = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint64)
    total = 1
    for word in words.tolist():
        total = (total * 0x9E3779B97F4A7C15 + word) % 2**64
    assert checksum(words.astype("<u4").tobytes()) == total


def test_payload_has_slack_behind_the_last_constant():
    made = hand_programs.program()
    payload = weights_payload(made)
    row = made.constants[0]
    assert payload[64 : 64 + row.data.nbytes] == row.data.tobytes()
    assert len(payload) >= 64 + row.data.nbytes + 256
    assert len(payload) % 64 == 0


def test_what_android_lacks_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("sparsec.building.build.ANDROID_LIBM", frozenset({"powf"}))
    with pytest.raises(BuildError, match="erff"):
        build(hand_programs.math_program(find_target("arm")), tmp_path)


def test_tool_output_is_attached(monkeypatch, tmp_path):
    monkeypatch.setattr("sparsec.building.build._EMBED", "this is no assembly\n")
    with pytest.raises(BuildError, match="ziglang failed") as caught:
        build(hand_programs.program(), tmp_path, embed_weights=True)
    assert "\n" not in str(caught.value)
    assert "weights.S" in caught.value.__notes__[0]


def test_unsupported_signatures(tmp_path):
    made = hand_programs.program()
    deep = Tensor("deep", (1,) * 9, "float32", Arg("arena", 0))
    with pytest.raises(BuildError, match="at most 8"):
        build(dataclasses.replace(made, outputs=(deep,)), tmp_path)
    odd = Tensor("odd", (1,), "complex64", Arg("arena", 0))
    with pytest.raises(BuildError, match="complex64"):
        build(dataclasses.replace(made, outputs=(odd,)), tmp_path)


def test_a_directory_that_cannot_be_written(tmp_path):
    with pytest.raises(BuildError, match="cannot write"):
        build(hand_programs.program(), tmp_path / "absent")
