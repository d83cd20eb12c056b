"""Make the peers' virtual environments: `python tools/bench/setup.py [ENGINE...]` (default: all), `--list`, `--remove`."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.places import ENVIRONMENTS, Environment, cache, environment_path, environment_python, find_python


def works(engine: str) -> bool:
    """Whether the environment exists and its package imports."""
    python = environment_python(engine)
    if not python.exists():
        return False
    command = [str(python), "-c", ENVIRONMENTS[engine].check]
    return subprocess.run(command, capture_output=True, check=False, timeout=300).returncode == 0


def create(engine: str, wanted: Environment) -> str:
    """Make one environment; returns what went wrong, or nothing."""
    python = find_python(wanted.python)
    if python is None:
        return f"needs Python {wanted.python}, which is not on this machine"
    path = environment_path(engine)
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(environment_python(engine)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    commands = [[str(python), "-m", "venv", str(path)]]
    commands += [[*pip, *wanted.packages]] if wanted.packages else []
    commands += [[*pip, "--no-deps", *wanted.bare]] if wanted.bare else []
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
            return f"{' '.join(command[2:5])} ...: {lines[-1] if lines else done.returncode}"
    return "" if works(engine) else f"installed, but `{wanted.check}` fails"


def main() -> int:
    """Exit code 1 if an environment that was asked for could not be made."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=f"of {', '.join(ENVIRONMENTS)} (default: all)")
    parser.add_argument("--list", action="store_true", help="only say which exist and work")
    parser.add_argument("--remove", action="store_true", help="remove instead")
    options = parser.parse_args()
    unknown = [name for name in options.engines if name not in ENVIRONMENTS]
    if unknown:
        parser.error(f"unknown engine {unknown[0]!r}; known: {', '.join(ENVIRONMENTS)}")
    failed = False
    print(f"environments in {cache()}")
    for engine in options.engines or ENVIRONMENTS:
        wanted = ENVIRONMENTS[engine]
        if options.remove:
            shutil.rmtree(environment_path(engine), ignore_errors=True)
            print(f"{engine}: removed")
            continue
        if works(engine):
            print(f"{engine}: works")
            continue
        problem = "missing" if options.list else create(engine, wanted)
        failed |= bool(problem) and not options.list
        print(f"{engine}: {problem or 'works'}{f' ({wanted.note})' if wanted.note else ''}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
