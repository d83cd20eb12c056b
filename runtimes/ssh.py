"""`ssh:[USER@]HOST[:PORT]`: a board at the other end of ssh. Needs nothing there but a shell, cat, tar and rm.

Keys, jump hosts and the like come from the user's ssh configuration, further options (`-i KEY -o ...`) from the
environment variable SPARSEC_SSH_OPTIONS.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import tarfile
from pathlib import Path

from sparsec.errors import RuntimeUnavailable, UsageError
from sparsec.runtimes.base import Compiled, Runtime
from sparsec.runtimes.batch import Done, RemoteSession, call, last_line, marked, unmarked

OPTIONS_VARIABLE = "SPARSEC_SSH_OPTIONS"
ROOT = "/tmp"
_DESTINATION = re.compile(
    r"(?P<host>(?:[A-Za-z0-9_.-]+@)?(?:[A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.%]+\]))(?::(?P<port>\d+))?"
)


class SshSession(RemoteSession):
    """Files travel as a tar stream or through `cat`: no sftp server is needed, and no path is parsed by scp."""

    def __init__(self, artifact: Compiled, threads: int | None, command: list[str], where: str) -> None:
        self._ssh = command
        super().__init__(artifact, threads, where, ROOT)

    def _shell(self, command: str, stdin: bytes = b"") -> Done:
        done = call([*self._ssh, marked(command)], self._where, stdin)
        return unmarked(done.stdout, done.stderr, self._where, done.returncode)

    def _install(self, paths: list[Path]) -> None:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as archive:
            for path in paths:
                member = tarfile.TarInfo(path.name)
                member.size, member.mode = path.stat().st_size, 0o755
                with path.open("rb") as file:
                    archive.addfile(member, file)
        command = f"mkdir {self._folder} && chmod 700 {self._folder} && tar -xf - -C {self._folder}"
        self._expect(command, stream.getvalue())

    def _feed(self, command: str, samples: bytes) -> Done:
        return self._shell(f"cat > {self._folder}/input.bin && {command}", samples)

    def _put(self, content: bytes, path: str) -> None:
        self._expect(f"cat > {path}", content)

    def _get(self, path: str) -> bytes:
        done = call([*self._ssh, f"cat {path}"], self._where)
        if done.returncode:
            raise RuntimeUnavailable(f"cannot read {path} there: {_text(done.stderr)}", self._where)
        return done.stdout


def _text(stderr: bytes) -> str:
    return last_line(stderr.decode(errors="replace")) or "no message"


class Ssh(Runtime):
    """A machine that `ssh` reaches without asking for a password."""

    name = "ssh"
    takes_argument = True

    def open(self, artifact: Compiled, threads: int | None = None) -> SshSession:
        match = _DESTINATION.fullmatch(self.argument)
        if match is None:
            raise UsageError(f"expected ssh:[USER@]HOST[:PORT], got {str(self)!r}", "--runtime")
        ssh = shutil.which("ssh")
        if ssh is None:
            raise RuntimeUnavailable("ssh is not installed: apt-get install openssh-client", "ssh")
        command = [ssh, "-T", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10"]
        command += shlex.split(os.environ.get(OPTIONS_VARIABLE, ""))
        if match["port"]:
            command += ["-p", match["port"]]
        host = match["host"].replace("[", "").replace("]", "")
        return SshSession(artifact, threads, [*command, "--", host], str(self))
