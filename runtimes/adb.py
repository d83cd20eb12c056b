"""`adb[:SERIAL]`: an Android device at the other end of adb."""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path

from sparsec.errors import RuntimeUnavailable, UsageError
from sparsec.runtimes.base import Compiled, Runtime
from sparsec.runtimes.batch import Done, RemoteSession, call, last_line, marked, unmarked

ROOT = "/data/local/tmp"  # the one folder where a shell user may write and execute


class AdbSession(RemoteSession):
    """Pushes with `adb push`, runs with `adb shell`, reads back with `adb pull`."""

    def __init__(self, artifact: Compiled, threads: int | None, adb: str, serial: str) -> None:
        self._adb = [adb, "-s", serial] if serial else [adb]
        super().__init__(artifact, threads, f"adb:{serial}" if serial else "adb", ROOT)

    def _shell(self, command: str, stdin: bytes = b"") -> Done:
        done = call([*self._adb, "shell", marked(command)], self._where, stdin)
        return unmarked(done.stdout, done.stderr, self._where, done.returncode)

    def _transfer(self, arguments: list[str]) -> None:
        done = call([*self._adb, *arguments], self._where)
        if done.returncode:
            text = last_line((done.stderr + done.stdout).decode(errors="replace"))
            raise RuntimeUnavailable(f"adb {arguments[0]} failed: {text}", self._where)

    def _put(self, content: bytes, path: str) -> None:
        with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
            file = Path(folder) / "file"
            file.write_bytes(content)
            self._transfer(["push", str(file), path])

    def _get(self, path: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="sparsec-") as folder:
            file = Path(folder) / "file"
            self._transfer(["pull", path, str(file)])
            return file.read_bytes()


class Adb(Runtime):
    """The only device, or the one with this serial."""

    name = "adb"
    takes_argument = True

    def open(self, artifact: Compiled, threads: int | None = None) -> AdbSession:
        if self.argument and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:\[\]-]*", self.argument):
            raise UsageError(f"not a device serial: {self.argument!r}; see `adb devices`", "--runtime")
        adb = shutil.which("adb")
        if adb is None:
            raise RuntimeUnavailable("adb is not installed: apt-get install adb, or Android's platform-tools", "adb")
        return AdbSession(artifact, threads, adb, self.argument)
