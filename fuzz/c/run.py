"""`python -m fuzz.c.run [--seconds S]`: the C runtime's readers under AddressSanitizer and UBSan, with gcc or clang.

With clang, libFuzzer drives (`-fsanitize=fuzzer`); with gcc, driver.c does, which is guided by coverage too.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SANITIZE = ["-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def build(folder: Path) -> tuple[Path, bool]:
    """The executable, and whether it is libFuzzer's. Raises RuntimeError with what the compiler said."""
    runtime = HERE.parent.parent / "runtimes" / "c"
    objects = []
    libfuzzer = shutil.which("clang") is not None
    compiler = ["clang", *SANITIZE] if libfuzzer else ["gcc", *SANITIZE]
    guided = ["-fsanitize=fuzzer-no-link"] if libfuzzer else ["-fsanitize-coverage=trace-pc"]
    parts = [(HERE / "harness.c", guided), (runtime / "features.c", guided), (runtime / "threads.c", [])]
    if not libfuzzer:
        parts.append((HERE / "driver.c", []))
    for source, flags in parts:
        target = folder / f"{source.stem}.o"
        _run([*compiler, *flags, "-I", str(runtime), "-c", str(source), "-o", str(target)])
        objects.append(str(target))
    out = folder / "fuzz"
    _run([*compiler, *(["-fsanitize=fuzzer"] if libfuzzer else []), *objects, "-o", str(out), "-lm", "-lpthread"])
    return out, libfuzzer


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)


def fuzz(seconds: int, seed: int = 1) -> str:
    """What the driver says at the end. Raises RuntimeError with the sanitizer's report."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program, libfuzzer = build(folder)
        arguments = (
            [f"-max_total_time={seconds}", f"-seed={seed}"]
            if libfuzzer
            else [str(seconds), str(seed), str(folder / "last")]
        )
        log = f"log_path={folder / 'report'}"
        environment = {
            "ASAN_OPTIONS": f"{log}:detect_leaks=1:max_allocation_size_mb=512:hard_rss_limit_mb=2048",
            "UBSAN_OPTIONS": f"{log}:print_stacktrace=1",
            "PATH": "/usr/bin:/bin",
        }
        done = subprocess.run([str(program), *arguments], env=environment, capture_output=True, text=True, check=False)
        reports = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("report*")))
        if done.returncode:
            last = (folder / "last").read_bytes().hex() if (folder / "last").exists() else ""
            raise RuntimeError(f"status {done.returncode}\n{reports[:8000]}\n{done.stderr[-2000:]}\ninput {last}")
        return (done.stdout or done.stderr).strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(f"C runtime    {fuzz(given.seconds, given.seed)}")


if __name__ == "__main__":
    main()
