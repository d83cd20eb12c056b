"""Program -> files: weights.bin, libmodel.so, libmodel.a, model.h, bench; the one module that runs ziglang.

A target whose code is a WebAssembly module is built by `sparsec.building.wasm` with what is here.

Kernels come from `sparsec.building.codegen` as one object. Runtime objects are the same for every model of a target and are kept
in a cache. Nothing in the files depends on where or when they were made.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib import metadata, resources
from pathlib import Path

from sparsec.building import elf
from sparsec.building.codegen import compile_kernels
from sparsec.building.emit import c_prefix, model_header, pack_parity, program_digest, program_source, weights_blob
from sparsec.errors import BuildError
from sparsec.program import Program
from sparsec.targets import Target

__all__ = ["build", "c_prefix", "model_header", "pack_parity", "program_source", "weights_blob"]

Progress = Callable[[str], None]

COMMON_SOURCES = ("open.c", "weights.c", "steps.c", "signature.c")  # every executor's
LIBRARY_SOURCES = ("runtime.c", *COMMON_SOURCES, "threads.c", "features.c")
CUDA_SOURCES = ("cuda.c", "cuda_run.c", "cuda_driver.c", *COMMON_SOURCES, "threads.c", "features.c")  # needs -ldl
HEADERS = ("sparsec.h", "internal.h", "platform.h")
CUDA_HEADERS = (*HEADERS, "cuda.h", "cuda_driver.h", "cuda_model.h")
KERNEL_PREFIX = "sparsec_kernel_"  # before the name of everything that the kernels' object defines
PAGE_BYTES = 65536  # alignment of segments: serves systems with pages of 4, 16 and 64 kB

# What bionic's libc.so and libm.so are asked for. A link that needs more fails here instead of on the phone.
ANDROID_LIBC = frozenset({
    "pthread_create", "pthread_join", "syscall", "getauxval", "malloc", "free", "memcpy", "memmove", "memset", "memcmp",
    "strlen", "strncmp", "open", "close", "lseek", "mmap", "munmap",
})  # fmt: skip
_MATH = (
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "copysign", "cos", "cosh", "erf",
    "erfc", "exp", "exp2", "expm1", "fabs", "floor", "fma", "fmax", "fmin", "fmod", "hypot", "ldexp", "lgamma", "log",
    "log10", "log1p", "log2", "lrint", "llrint", "lround", "llround", "nearbyint", "nextafter", "pow", "remainder",
    "rint", "round", "sin", "sinh", "sqrt", "tan", "tanh", "tgamma", "trunc",
)  # fmt: skip
ANDROID_LIBM = frozenset(name + suffix for name in _MATH for suffix in ("", "f"))

C_FLAGS = (
    "-std=c11", "-O2", "-g0", "-fPIC", "-fno-sanitize=all", "-fno-stack-protector", "-fvisibility=hidden",
    "-ffunction-sections", "-fdata-sections", "-fno-math-errno", "-Wall", "-Wextra",
)  # fmt: skip


def build(
    program: Program,
    directory: Path,
    *,
    name: str | None = None,
    threads: int = 1,
    embed_weights: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the artifact's code and weights into `directory`, which exists.

    Files: weights.bin (unless `embed_weights`), libmodel.so, libmodel.a, model.h, bench. `name`: the model's, from
    which the prefix of C symbols is made (default: the program's); `threads`: workers of an instance that asks for
    none. `progress(text)` is called before each part of the work. Raises BuildError with the tool's output.
    """
    say = progress or (lambda text: None)
    prefix = c_prefix(name or program.name)
    with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
        try:
            if program.target.container == "wasm":
                from sparsec.building.wasm import build_wasm

                build_wasm(program, Path(folder), Path(directory), threads, embed_weights, say)
            else:
                _build(program, Path(folder), Path(directory), prefix, threads, embed_weights, say)
        except OSError as error:
            raise BuildError(f"cannot write: {error.strerror or error}", str(error.filename or directory)) from error


def _build(
    program: Program, work: Path, directory: Path, prefix: str, threads: int, embed_weights: bool, say: Progress
) -> None:
    target = program.target
    library = LIBRARY_SOURCES if target.gpu is None else CUDA_SOURCES
    runtime_sources(work, _headers(library))
    runtimes = ((target.zig_triple, library), (target.zig_bench_triple, (*library, "bench.c")))
    own = tuple(kernel for kernel in program.kernels if kernel.launch is None)
    model_sources, code = ["program.c"], list[bytes]()
    if target.gpu is not None:
        from sparsec.cuda.build import device_code

        device = device_code(program, work, KERNEL_PREFIX, say)
        model_sources += device.sources
        code += device.parts
    if own or target.gpu is None:
        say(f"compiling {len(own)} kernels for {target.cpu if target.gpu is None else target.arch}")
        code.append(kernel_object(replace(program, kernels=own), work / "kernels.o"))

    say("writing weights")
    digest = program_digest(program, code)
    blob = weights_blob(program, digest)
    table = program_source(
        program, KERNEL_PREFIX, digest, threads=threads, embedded_bytes=len(blob) if embed_weights else 0
    )
    (work / "program.c").write_text(table, encoding="utf-8")
    if embed_weights:
        (work / "weights.bin").write_bytes(blob)
        (work / "weights.S").write_text(_EMBED, encoding="utf-8")
        model_sources.append("weights.S")
    else:
        (directory / "weights.bin").write_bytes(blob)
    (directory / "model.h").write_text(model_header(prefix, target.gpu is not None), encoding="utf-8")

    if any(not _kept(triple, sources).is_dir() for triple, sources in runtimes):
        say("compiling the runtime (only this first time; C libraries too, up to a minute)")
    compile_sources(work, model_sources, target.zig_triple)
    model_objects = [Path(source).with_suffix(".o").name for source in model_sources]
    model_objects += ["kernels.o"] if (work / "kernels.o").exists() else []
    shared, static = (
        runtime_objects(triple, sources, work / folder)
        for (triple, sources), folder in zip(runtimes, ("shared", "static"), strict=True)
    )

    say("linking")
    with ThreadPoolExecutor(max_workers=2) as pool:
        jobs = [
            pool.submit(_link_shared, work, target, [*model_objects, *shared], directory / "libmodel.so"),
            pool.submit(_link_bench, work, target, [*model_objects, *static], directory / "bench"),
            pool.submit(_archive, work, prefix, [*model_objects, *shared], directory / "libmodel.a"),
        ]
        for job in jobs:
            job.result()


# The weights as read-only data of the code.
_EMBED = """\
    .section .rodata.sparsec_weights, "a"
    .globl sparsec_embedded_weights
    .hidden sparsec_embedded_weights
    .balign 64
sparsec_embedded_weights:
    .incbin "weights.bin"
    .section .note.GNU-stack, "", %progbits
"""

EXPORTS = (
    "sparsec_open", "sparsec_open_file", "sparsec_run", "sparsec_close", "sparsec_input_count", "sparsec_output_count",
    "sparsec_input_info", "sparsec_output_info", "sparsec_arena_bytes", "sparsec_error_string", "sparsec_version",
    "sparsec_features_needed",
)  # fmt: skip
CUDA_EXPORTS = (
    *EXPORTS, "sparsec_run_device", "sparsec_run_timed", "sparsec_run_steps", "sparsec_step_count", "sparsec_step_name",
    "sparsec_device_name",
)  # fmt: skip


def kernel_object(program: Program, path: Path) -> bytes:
    """Compile the program's kernels to the object `path`, every symbol it defines under KERNEL_PREFIX; its content."""
    compile_kernels(program.kernels, program.target, path)
    code = path.read_bytes()
    own = {symbol.name for symbol in elf.symbols(code) if symbol.defined}
    code = elf.rename_symbols(code, lambda symbol: KERNEL_PREFIX + symbol if symbol in own else symbol)
    path.write_bytes(code)
    return code


def runtime_sources(folder: Path, names: Sequence[str] = (*HEADERS, *LIBRARY_SOURCES, "bench.c")) -> None:
    """Copy the C runtime's sources into `folder`."""
    for name in names:
        (folder / name).write_bytes(_source(name))


def _headers(sources: Sequence[str]) -> tuple[str, ...]:
    return CUDA_HEADERS if "cuda.c" in sources else HEADERS


def _source(name: str) -> bytes:
    return resources.files("sparsec.runtimes.c").joinpath(name).read_bytes()


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def cache_folder() -> Path:
    """Where runtime objects are kept: SPARSEC_CACHE, else a folder in the user's cache."""
    chosen = os.environ.get("SPARSEC_CACHE")
    return Path(chosen) if chosen else _user_cache() / "sparsec"


def _zig_cache() -> Path:
    """Where ziglang keeps the C libraries that it builds: with ours if SPARSEC_CACHE is set, else in its usual place."""
    if chosen := os.environ.get("ZIG_GLOBAL_CACHE_DIR"):
        return Path(chosen)
    return cache_folder() / "zig" if os.environ.get("SPARSEC_CACHE") else _user_cache() / "zig"


def run_zig(arguments: Sequence[str], folder: Path) -> None:
    """Run ziglang in `folder`. Raises BuildError with its output."""
    try:
        cache = _zig_cache()
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        reason = error.strerror if isinstance(error, OSError) else error
        problem = f"the compiler's cache cannot be written ({reason}); set SPARSEC_CACHE to a folder"
        raise BuildError(problem, "ziglang") from error
    environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache.resolve())}
    command = [sys.executable, "-m", "ziglang", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    except OSError as error:
        problem = f"cannot start ziglang: {error.strerror}; reinstall the package 'ziglang'"
        raise BuildError(problem, arguments[0]) from error
    if done.returncode:
        output = (done.stderr + done.stdout).decode("utf-8", "replace").strip()
        lines = output.splitlines() or ["no output"]
        lines = [line for line in lines if "error" in line.lower()] or lines
        failure = BuildError(f"ziglang failed (exit {done.returncode}): {lines[0].strip()}", arguments[0])
        failure.add_note(output)
        raise failure


def c_flags(triple: str) -> tuple[str, ...]:
    """How C is compiled for `triple`; a WebAssembly module is never loaded beside another."""
    return tuple(flag for flag in C_FLAGS if flag != "-fPIC" or not triple.startswith("wasm32"))


def compile_sources(folder: Path, sources: Iterable[str], triple: str) -> None:
    """Compile each source of `folder` to NAME.o beside it."""
    for source in sources:
        flags = c_flags(triple) if source.endswith(".c") else ()
        run_zig(["cc", "-target", triple, *flags, "-c", source, "-o", str(Path(source).with_suffix(".o"))], folder)


def _kept(triple: str, sources: Sequence[str]) -> Path:
    """Where the cache has the objects of these runtime sources, if it has them."""
    key = hashlib.sha256(repr((triple, c_flags(triple), metadata.version("ziglang"))).encode())
    for file in (*_headers(sources), *sources):
        key.update(hashlib.sha256(_source(file)).digest())
    return cache_folder() / "runtime" / key.hexdigest()[:32]


def runtime_objects(triple: str, sources: Sequence[str], into: Path) -> list[str]:
    """The runtime's objects for `triple`, put into the folder `into`, from the cache if they are there."""
    kept = _kept(triple, sources)
    names = [Path(source).with_suffix(".o").name for source in sources]
    into.mkdir()
    if all((kept / name).is_file() for name in names):
        for name in names:
            (into / name).write_bytes((kept / name).read_bytes())
    else:
        runtime_sources(into, (*_headers(sources), *sources))
        compile_sources(into, sources, triple)
        _keep(into, names, kept)
    return [f"{into.name}/{name}" for name in names]


def _keep(folder: Path, names: Sequence[str], kept: Path) -> None:
    """Put objects into the cache, whole or not at all, whoever else does the same. An unwritable cache is none."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as fresh:
            moved = Path(fresh, "objects")
            moved.mkdir()
            for name in names:
                (moved / name).write_bytes((folder / name).read_bytes())
            os.rename(moved, kept)
    except OSError:
        return


def _link_shared(work: Path, target: Target, objects: Sequence[str], path: Path) -> None:
    names = " ".join(f"{name};" for name in (EXPORTS if target.gpu is None else CUDA_EXPORTS))
    (work / "exports.map").write_text(f"{{ global: {names} local: *; }};\n", encoding="utf-8")
    command = ["cc", "-target", target.zig_triple, "-shared", "-s", "-o", "libmodel.so", *objects]
    command += ["-Wl,--version-script=exports.map", "-Wl,--gc-sections", "-Wl,-z,defs", "-Wl,-soname,libmodel.so"]
    command += [f"-Wl,-z,max-page-size={PAGE_BYTES}", "-Wl,--build-id=none"]
    if target.os == "android":
        command += ["-nostdlib", *_android_libraries(work, target, objects)]
    else:
        command += ["-lm", "-lpthread", *(["-ldl"] if target.gpu is not None else [])]
    run_zig(command, work)
    path.write_bytes((work / "libmodel.so").read_bytes())
    path.chmod(0o755)


def _android_libraries(work: Path, target: Target, objects: Sequence[str]) -> list[str]:
    """Stand-ins for bionic's libc.so and libm.so: their SONAMEs and the symbols that `objects` use, no code."""
    found = [symbol for name in objects for symbol in elf.symbols((work / name).read_bytes())]
    missing = {symbol.name for symbol in found if not symbol.defined} - {s.name for s in found if s.defined}
    if unknown := sorted(missing - ANDROID_LIBC - ANDROID_LIBM):
        raise BuildError(f"kernels need what Android's libc and libm may lack: {', '.join(unknown)}", "libmodel.so")
    paths = []
    for library, known in (("libc", ANDROID_LIBC), ("libm", ANDROID_LIBM)):
        text = "".join(f"void {name}(void) {{}}\n" for name in sorted(missing & known))
        (work / f"{library}.c").write_text(text, encoding="utf-8")
        flags = ["-shared", "-nostdlib", "-fno-builtin", "-w", f"-Wl,-soname,{library}.so"]
        (work / "stubs").mkdir(exist_ok=True)
        run_zig(["cc", "-target", target.zig_triple, *flags, "-o", f"stubs/{library}.so", f"{library}.c"], work)
        paths.append(f"stubs/{library}.so")
    return paths


def _link_bench(work: Path, target: Target, objects: Sequence[str], path: Path) -> None:
    command = ["cc", "-target", target.zig_bench_triple, "-s", "-o", "bench", *objects]
    command += ["-static"] if target.gpu is None else ["-ldl", "-lpthread"]
    run_zig([*command, "-Wl,--gc-sections", "-Wl,--build-id=none", "-lm"], work)
    path.write_bytes((work / "bench").read_bytes())
    path.chmod(0o755)


def _archive(work: Path, prefix: str, objects: Sequence[str], path: Path) -> None:
    """libmodel.a: the same objects, each symbol they define under the model's prefix."""
    folder = work / "archive"
    folder.mkdir()
    contents = {Path(name).name: (work / name).read_bytes() for name in objects}
    own = {symbol.name for data in contents.values() for symbol in elf.symbols(data) if symbol.defined}
    for name, data in contents.items():
        renamed = elf.rename_symbols(data, lambda symbol: f"{prefix}_{symbol}" if symbol in own else symbol)
        (folder / name).write_bytes(renamed)
    run_zig(["ar", "rcsD", "libmodel.a", *sorted(contents)], folder)
    path.write_bytes((folder / "libmodel.a").read_bytes())
