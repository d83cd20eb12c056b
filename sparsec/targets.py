"""Targets: read from `targets.toml` and from the entry-point group `sparsec.targets`. A target is data."""

from __future__ import annotations

import ctypes
import difflib
import platform
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata, resources
from typing import TYPE_CHECKING, Any

from sparsec.errors import TargetError
from sparsec.kernels.base import Machine

if TYPE_CHECKING:
    from sparsec.kernels.cuda.base import Gpu


@dataclass(frozen=True)
class Target:
    """One CPU and operating system to compile for; or a GPU and the processor beside it, which all but `gpu` describes."""

    name: str  # host, arm, ...
    cpu: str  # the stanza in targets.toml; of a GPU its architecture
    arch: str  # x86_64, aarch64
    os: str  # linux, android
    features: tuple[str, ...]  # what the generated code needs; checked when a model is opened
    llvm: dict[str, Any]  # mtriple, mcpu, mattr for TVM
    machine: Machine
    runtime: str  # the runtime adapter that runs its artifacts here
    description: str = ""
    gpu: Gpu | None = None
    cpu_fallback: bool = False  # operators that the GPU lacks run on the processor beside it

    @property
    def precision(self) -> str:
        """What floating-point layers are stored and computed in: f32 or f16."""
        return "f16" if self.machine.element == "float16" else "f32"

    @property
    def container(self) -> str:
        """What the code is linked into: `elf` libraries or a `wasm` module."""
        return container(self.arch)

    @property
    def zig_triple(self) -> str:
        """ziglang's target for shared libraries. glibc 2.17 is what the oldest supported boards carry."""
        if self.container == "wasm":
            return "wasm32-wasi"
        return f"{self.arch}-linux-android" if self.os == "android" else f"{self.arch}-linux-gnu.2.17"

    @property
    def zig_bench_triple(self) -> str:
        """ziglang's target for executables (`bench`): static, except where a driver's library is opened."""
        return self.zig_triple if self.gpu is not None else f"{self.arch}-linux-musl"


def container(arch: str) -> str:
    """What code for `arch` is linked into: `elf` libraries or a `wasm` module."""
    return "wasm" if arch == "wasm32" else "elf"


@cache
def table() -> dict[str, Any]:
    """The merged stanzas: `{"cpu": {...}, "gpu": {...}, "target": {...}}`; installed packages add theirs as a dict of the same form."""
    merged = tomllib.loads(resources.files("sparsec").joinpath("targets.toml").read_text(encoding="utf-8"))
    for point in metadata.entry_points(group="sparsec.targets"):
        extra = point.load()
        for section in ("cpu", "gpu", "target"):
            merged[section].update(extra.get(section, {}))
    return merged


def _cpu(name: str) -> dict[str, Any]:
    stanza = dict(table()["cpu"][name])
    base = stanza.pop("base", None)
    stanza.pop("detect", None)
    return {**_cpu(base), **stanza} if base else stanza


def suggest(word: str, known: list[str]) -> str:
    """` (did you mean X?)`, or nothing if no known word is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


def target_names() -> list[str]:
    """Known target names, in table order."""
    return list(table()["target"])


def cpu_names(target: str) -> list[str]:
    """CPUs that `target` accepts, for `cuda` GPUs' architectures; for `host` those of this machine's architecture."""
    names = list(table()["target"][target]["cpus"])
    return [name for name in names if _cpu(name)["arch"] == host_arch()] if target == "host" else names


def host_arch() -> str:
    """This machine's architecture as targets.toml names it."""
    arch = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(arch, arch)


def host_cpu() -> str:
    """The best CPU stanza for this machine: of those with `detect` the last whose signs it shows, else the first."""
    arch, flags = host_arch(), _host_flags()
    stanzas = table()["cpu"]
    known = [name for name in cpu_names("host") if "detect" in stanzas[name]]
    if not known:
        raise TargetError(f"no code generator for this machine's architecture {arch!r}; use --target arm", "host")
    return next((name for name in reversed(known) if set(stanzas[name]["detect"]) <= flags), known[0])


def _host_flags() -> set[str]:
    for line in _cpuinfo():
        if line.lower().startswith(("flags", "features")):
            return set(line.split(":", 1)[1].split())
    return set()


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return lines.readlines()
    except OSError:
        return []


def host_model() -> str:
    """What the system calls this machine's CPU: `AMD EPYC, family 25, model 17`; on Arm implementer and parts."""
    found: dict[str, set[str]] = {}
    for line in _cpuinfo():
        key, _, value = line.partition(":")
        found.setdefault(key.strip(), set()).add(value.strip())
    if "model name" in found and "cpu family" in found:
        keys = {"model name": "", "cpu family": "family ", "model": "model "}
    else:
        keys = {"CPU implementer": "implementer ", "CPU part": "part "}
    facts = [prefix + " ".join(sorted(found[key])) for key, prefix in keys.items() if found.get(key)]
    return ", ".join(facts) or platform.processor() or platform.machine()


_KERNEL_NAMES = {
    "sse4.2": "sse4_2",
    "neon": "asimd",
    "dotprod": "asimddp",
    "fp16": "asimdhp",
    "avx512vnni": "avx512_vnni",
    "avxvnni": "avx_vnni",
}  # in /proc/cpuinfo


def missing_features(target: Target) -> list[str]:
    """What code for `target` needs and this machine lacks, its architecture first; empty if it runs here."""
    machine = platform.machine().lower()
    if target.arch not in (machine, {"amd64": "x86_64", "arm64": "aarch64"}.get(machine)):
        return [target.arch]
    flags = _host_flags()
    lacking = [feature for feature in target.features if _KERNEL_NAMES.get(feature, feature) not in flags]
    return lacking if target.gpu is None or _cuda_driver() else [*lacking, "a CUDA driver"]


def _cuda_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def find_target(
    name: str, cpu: str | None = None, os: str | None = None, arch: str | None = None, host: str | None = None
) -> Target:
    """The target called `name`, for `cpu` and `os` or their defaults. Raises TargetError with the nearest known name.

    arch: a GPU's architecture, "sm_87"; for `cuda` the same as `cpu`. host: the processor beside it, "x86_64" or
    "aarch64"; by default what the board has.
    """
    targets = table()["target"]
    if name not in targets:
        raise TargetError(f"unknown target {name!r}{suggest(name, list(targets))}", "--target")
    stanza = targets[name]
    hosts = stanza.get("hosts")
    if hosts is None:
        for option, value in (("--arch", arch), ("--host", host)):
            if value is not None:
                raise TargetError(f"target {name!r} has no {option[2:]}; give --target cuda, or leave it out", option)
    elif arch is not None and cpu is not None and arch != cpu:
        raise TargetError(f"says {cpu!r} and --arch {arch!r}; leave it out", "--cpu")
    cpu = arch or cpu
    if cpu is None:
        cpu = host_cpu() if name == "host" else stanza["cpus"][0]
    known = cpu_names(name)
    if cpu not in known:
        elsewhere = [t for t in targets if t != name and cpu in targets[t]["cpus"]]
        hint = f"; it belongs to --target {elsewhere[0]}" if elsewhere else suggest(cpu, known)
        what, option = ("cpu", "--cpu") if hosts is None else ("architecture", "--arch")
        raise TargetError(f"target {name!r} has no {what} {cpu!r}{hint}", option)
    if os is None:
        os = stanza["os"][0]
    if os not in stanza["os"]:
        raise TargetError(f"target {name!r} has no operating system {os!r}{suggest(os, stanza['os'])}", "--os")
    gpu, processor = None, cpu
    if hosts is not None:
        host = host or table()["gpu"][cpu]["host"]
        if host not in hosts:
            raise TargetError(f"target {name!r} has no host {host!r}{suggest(host, list(hosts))}", "--host")
        gpu, processor = _gpu(cpu), hosts[host]
    facts = _cpu(processor)
    machine = Machine(**{key: facts[key] for key in Machine.__dataclass_fields__ if key != "element"})
    llvm = {"mtriple": f"{facts['arch']}-unknown-linux-gnu", **facts["llvm"]}
    return Target(
        name=name, cpu=cpu, arch=facts["arch"], os=os, features=tuple(facts["features"]), llvm=llvm, machine=machine,
        runtime=stanza["runtime"], description=stanza["description"], gpu=gpu,
    )  # fmt: skip


def _gpu(arch: str) -> Gpu:
    from sparsec.kernels.cuda.base import Gpu

    facts = table()["gpu"][arch]
    return Gpu(arch=arch, **{key: facts[key] for key in Gpu.__dataclass_fields__ if key not in ("arch", "element")})


PRECISIONS = ("f32", "f16")


def with_cpu_fallback(target: Target) -> Target:
    """`target` running what its GPU lacks on the processor beside it. Raises TargetError where there is no GPU."""
    if target.gpu is None:
        raise TargetError(
            f"target {target.name!r} has no GPU that could lack operators; leave it out", "--allow-cpu-fallback"
        )
    return replace(target, cpu_fallback=True)


_HALF = frozenset({"fp16", "avx512fp16"})  # features that mean arithmetic, not only conversion


def with_precision(target: Target, precision: str) -> Target:
    """`target` computing in `precision`. Raises TargetError where its CPU has no such arithmetic."""
    if precision not in PRECISIONS:
        raise TargetError(f"unknown precision {precision!r}{suggest(precision, list(PRECISIONS))}", "--precision")
    if precision == target.precision:
        return target
    if target.gpu is not None:
        if precision == "f32":
            return replace(target, machine=target.machine.single(), gpu=target.gpu.single())
        return replace(target, machine=target.machine.half(), gpu=target.gpu.half())
    if precision == "f32":
        return replace(target, machine=target.machine.single())
    if not _HALF & set(target.features):
        names = [name for name in target_names() if "hosts" not in table()["target"][name]]
        able = {name: [cpu for cpu in cpu_names(name) if _HALF & set(_cpu(cpu)["features"])] for name in names}
        way = "; or ".join(f"--target {name} with --cpu {', '.join(cpus)}" for name, cpus in able.items() if cpus)
        raise TargetError(f"cpu {target.cpu!r} has no float16 arithmetic; use {way}", "--precision")
    return replace(target, machine=target.machine.half())
