"""`ssh:HOST` against a real sshd on the loopback."""

from __future__ import annotations

import getpass
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from samples import agree, pair_artifact, pair_inputs

from sparsec.errors import RuntimeUnavailable, UsageError

SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
needs_sshd = pytest.mark.skipif(
    SSHD is None or shutil.which("ssh") is None or shutil.which("ssh-keygen") is None,
    reason="sshd is not installed (openssh-server)",
)

CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PidFile none
UsePAM no
StrictModes no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
"""


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running sshd; yields HOST:PORT and sets SPARSEC_SSH_OPTIONS."""
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host_key", "user_key"):
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(keygen, check=True)
    shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "config").write_text(CONFIG.format(port=port, folder=folder))
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    assert SSHD is not None
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "config")], stderr=log)
    options = f"-F none -i '{folder}/user_key' -o IdentitiesOnly=yes -o UserKnownHostsFile='{folder}/known'"
    options += " -o StrictHostKeyChecking=accept-new -o LogLevel=ERROR"
    before = os.environ.get("SPARSEC_SSH_OPTIONS")
    os.environ["SPARSEC_SSH_OPTIONS"] = options
    try:
        for _ in range(100):
            if server.poll() is not None:
                pytest.fail(f"sshd ended: {(folder / 'log').read_text()}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield f"{getpass.getuser()}@127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()
        if before is None:
            del os.environ["SPARSEC_SSH_OPTIONS"]
        else:
            os.environ["SPARSEC_SSH_OPTIONS"] = before


def left_behind() -> set[str]:
    return {name for name in os.listdir("/tmp") if re.fullmatch(r"sparsec-[0-9a-f]{16}", name)}


@needs_sshd
def test_ssh(board: str) -> None:
    artifact = pair_artifact()
    before = left_behind()
    agree(artifact, f"ssh:{board}", pair_inputs(3))
    timing = artifact.bench(runs=5, runtime=f"ssh:{board}")
    assert timing.runtime == f"ssh:{board}"
    assert 0 < timing.min_ms <= timing.median_ms <= timing.p90_ms
    assert left_behind() <= before


@needs_sshd
def test_ssh_verifies(board: str) -> None:
    result = pair_artifact().verify(runtime=f"ssh:{board}")
    assert result.passed
    assert result.runtime == f"ssh:{board}"


@needs_sshd
def test_ssh_refused(board: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEC_SSH_OPTIONS", "-F none -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null")
    with pytest.raises(RuntimeUnavailable, match="Permission denied"):
        pair_artifact().run(pair_inputs(1)[0], runtime=f"ssh:{board}")


@needs_sshd
def test_ssh_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(RuntimeUnavailable, match="Connection refused"):
        pair_artifact().run(pair_inputs(1)[0], runtime=f"ssh:127.0.0.1:{port}")


@pytest.mark.parametrize("text", ["ssh", "ssh:", "ssh:-oProxyCommand=touch x", "ssh:a b", "ssh:host;reboot", "ssh:h:x"])
def test_destinations_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="HOST"):
        pair_artifact().run(pair_inputs(1)[0], runtime=text)


def test_ssh_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeUnavailable, match="ssh is not installed"):
        pair_artifact().run(pair_inputs(1)[0], runtime="ssh:board")
