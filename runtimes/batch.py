"""Sessions that start the artifact's own `bench` executable somewhere: samples in one file, outputs in another.

`bench --input FILE --output FILE` reads raw tensors in signature order, little-endian, sample after sample, and writes
outputs the same way; `bench --json` times. A start is costly (an emulator, a cable), so many samples go into one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import secrets
import subprocess
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparsec.errors import ArtifactError, CheckError, RuntimeUnavailable
from sparsec.ports import InputSpec
from sparsec.runtimes.base import Arrays, Compiled, DeviceTime, Session, Stats

BATCH_BYTES = 64 << 20  # of inputs in one start
BATCH_SAMPLES = 64
TIMEOUT = 1800  # seconds; an emulated ResNet-50 takes tens of seconds a sample


@dataclass(frozen=True)
class Done:
    """How a `bench` ended. `output`: content of its output file, if one was asked for."""

    code: int
    stdout: str
    stderr: str
    output: bytes = b""


def tensor_bytes(specs: Sequence[InputSpec]) -> int:
    """Bytes of one sample."""
    return sum(int(np.prod(s.shape, dtype=np.int64)) * np.dtype(s.dtype).itemsize for s in specs)


def encode(sample: Arrays, specs: Sequence[InputSpec]) -> bytes:
    """One sample as `bench --input` reads it."""
    return b"".join(np.asarray(sample[s.name], np.dtype(s.dtype).newbyteorder("<")).tobytes() for s in specs)


def decode(raw: bytes, specs: Sequence[InputSpec]) -> Arrays:
    """One sample as `bench --output` writes it."""
    arrays, offset = {}, 0
    for spec in specs:
        dtype = np.dtype(spec.dtype).newbyteorder("<")
        count = int(np.prod(spec.shape, dtype=np.int64))
        flat = np.frombuffer(raw, dtype, count, offset).astype(spec.dtype)
        arrays[spec.name] = flat.reshape(spec.shape)
        offset += count * dtype.itemsize
    return arrays


class BenchSession(Session):
    """Runs and times through `bench`; subclasses say how it is started."""

    def __init__(self, artifact: Compiled, threads: int | None, where: str) -> None:
        self._artifact = artifact
        self._threads = threads or artifact.manifest["threads"]
        self._where = where
        self._device: DeviceTime | None = None  # of the last `time`

    @abstractmethod
    def _start(self, arguments: list[str], samples: bytes | None) -> Done:
        """Run `bench` with `arguments`, and with `--input`/`--output` files if there are `samples`."""

    def run(self, inputs: Arrays) -> Arrays:
        return next(iter(self.run_many([inputs])))

    def run_many(self, samples: Iterable[Arrays]) -> Iterator[Arrays]:
        specs, outputs = self._artifact.inputs, self._artifact.outputs
        size = tensor_bytes(outputs)
        limit = max(1, min(BATCH_SAMPLES, BATCH_BYTES // max(1, tensor_bytes(specs))))
        pending = iter(samples)
        while batch := list(itertools.islice(pending, limit)):
            raw = b"".join(encode(sample, specs) for sample in batch)
            done = self._start(["--no-check", "--warmup", "0", "--threads", str(self._threads)], raw)
            self._check(done)
            if len(done.output) != size * len(batch):
                raise ArtifactError(
                    f"bench wrote {len(done.output)} bytes for {len(batch)} samples, expected {size * len(batch)}",
                    self._where,
                )
            for i in range(len(batch)):
                yield decode(done.output[i * size : (i + 1) * size], outputs)

    def time(self, inputs: Arrays, runs: int, warmup: int = 1) -> Stats:
        """Timed on the parity sample by `bench` itself; `inputs` are not used (kernels have no data-dependent cost)."""
        arguments = ["--runs", str(runs), "--warmup", str(warmup), "--threads", str(self._threads), "--json"]
        done = self._start(arguments, None)
        self._check(done)
        try:
            facts: dict[str, Any] = json.loads(done.stdout)
            if device := facts.get("device"):
                self._device = DeviceTime(str(device["name"]), _stats(device, runs))
            return _stats(facts, runs, int(facts["peak_bytes"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"bench printed no times: {last_line(done.stdout)!r}", self._where) from error

    def device_time(self, inputs: Arrays, runs: int, warmup: int = 1) -> DeviceTime | None:
        """Of the runs that `time` has made."""
        return self._device

    def _check(self, done: Done) -> None:
        if done.code == 0:
            return
        text = last_line(done.stderr) or last_line(done.stdout) or "no message"
        if done.code == 1:
            raise CheckError(f"bench's self-check failed: {text}", self._where)
        if done.code == 3:
            raise RuntimeUnavailable(f"cannot run there: {text}", self._where)
        raise RuntimeUnavailable(f"bench ended with code {done.code}: {text}", self._where)


def _stats(facts: dict[str, Any], runs: int, peak_bytes: int | None = None) -> Stats:
    times = {key: float(facts[key]) for key in ("median_ms", "p10_ms", "p90_ms", "min_ms")}
    return Stats(runs, peak_bytes=peak_bytes, **times)


def last_line(text: str) -> str:
    """The last line that is not blank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def call(command: list[str], where: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a program by argument list. Raises RuntimeUnavailable if it cannot be started or hangs."""
    try:
        return subprocess.run(command, input=stdin, capture_output=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailable(f"{command[0]} did not answer within {TIMEOUT} s", where) from error
    except OSError as error:
        raise RuntimeUnavailable(f"{command[0]} cannot be started: {error.strerror}", where) from error


class RemoteSession(BenchSession):
    """`bench` on another machine: a folder there, files put and got, commands in its shell."""

    files = ("bench", "weights.bin", "parity.bin")

    def __init__(self, artifact: Compiled, threads: int | None, where: str, root: str) -> None:
        super().__init__(artifact, threads, where)
        self._folder = f"{root}/sparsec-{secrets.token_hex(8)}"  # shell-safe characters only
        self._made = False
        try:
            self._made = True
            self._install([path for name in self.files if (path := artifact.path / name).exists()])
        except BaseException:
            with contextlib.suppress(RuntimeUnavailable):
                self.close()
            raise

    def _install(self, paths: list[Path]) -> None:
        """Make the folder there and put files into it, `bench` executable."""
        self._expect(f"mkdir {self._folder} && chmod 700 {self._folder}")
        for path in paths:
            self._put(path.read_bytes(), f"{self._folder}/{path.name}")
        self._expect(f"chmod 755 {self._folder}/bench")

    def _feed(self, command: str, samples: bytes) -> Done:
        """Put `samples` into the folder's input.bin, then run `command`."""
        self._put(samples, f"{self._folder}/input.bin")
        return self._shell(command)

    @abstractmethod
    def _shell(self, command: str, stdin: bytes = b"") -> Done:
        """Run `command` in the other machine's shell; its exit code, not the connection's."""

    @abstractmethod
    def _put(self, content: bytes, path: str) -> None:
        """Write a file there."""

    @abstractmethod
    def _get(self, path: str) -> bytes:
        """Read a file there."""

    def _expect(self, command: str, stdin: bytes = b"") -> None:
        done = self._shell(command, stdin)
        if done.code:
            text = last_line(done.stderr) or last_line(done.stdout)
            raise RuntimeUnavailable(f"`{command}` failed there with code {done.code}: {text}", self._where)

    def _start(self, arguments: list[str], samples: bytes | None) -> Done:
        words = ["./bench", *arguments]  # our own words: no character that a shell reads otherwise
        if samples is None:
            return self._shell(f"cd {self._folder} && {' '.join(words)}")
        words += ["--input", "input.bin", "--output", "output.bin"]
        done = self._feed(f"cd {self._folder} && {' '.join(words)}", samples)
        if done.code:
            return done
        return Done(done.code, done.stdout, done.stderr, self._get(f"{self._folder}/output.bin"))

    def close(self) -> None:
        if self._made:
            self._made = False
            self._shell(f"rm -rf {self._folder}")


_MARK = "sparsec-exit="


def marked(command: str) -> str:
    """`command` with its exit code as the last line: not every transport passes the code on."""
    return f"( {command} ); code=$?; echo; echo {_MARK}$code"


def unmarked(stdout: bytes, stderr: bytes, where: str, fallback: int) -> Done:
    """The result of a `marked` command. Raises RuntimeUnavailable if it never ran to its end."""
    text, errors = stdout.decode(errors="replace"), stderr.decode(errors="replace")
    head, mark, code = text.rpartition(_MARK)
    if not mark or not code.strip().isdigit():
        raise RuntimeUnavailable(f"no answer (code {fallback}): {last_line(errors) or last_line(text)}", where)
    return Done(int(code), head.replace("\r\n", "\n"), errors)
