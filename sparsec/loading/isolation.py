"""Work on untrusted files in a process of its own, with limits on memory and time; a crash there is an error here.

    this process --(socket: a request, three files)--> server --fork--> supervisor --fork--> worker

`Server`: one process for the lifetime of this one, started once with a plain interpreter, that has imported what the tasks
need and has no thread at work, so that forking it is safe and takes milliseconds. Each request gets a worker of its own:
nothing one model does reaches the next. The worker sets its limits, does the task and writes the response into an
anonymous file; its supervisor waits for it and says how it ended:

    RLIMIT_AS     what it may map beyond what it has when it starts            a MemoryError, or a failed allocation
    RLIMIT_CPU    processor seconds                                            SIGXCPU
    wall time     `WALL` times the processor seconds: who waits forever        SIGKILL by the supervisor
    no core dumps, no output; when this process ends, everything behind it does

It is no sandbox: code that took over a worker could do what this user may do. What it guards against is what parsers and
importers written in C++ do with malformed input: abort, loop, eat memory. A response is JSON and raw bytes, read with the
same suspicion as a file; nothing is pickled.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import mmap
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsec import errors
from sparsec.errors import ModelError, RuntimeUnavailable, SparsecError

WALL = 10  # seconds on the clock for one of the processor: machines are shared, and disks slow
HEADER = 1 << 20  # bytes of a response's or a request's JSON
ALIGNMENT = 64  # of the parts behind it
REQUEST = 1 << 16  # bytes of what is sent through the socket
START_SECONDS = 120  # until the server must have imported everything

Task = Callable[["Worker", dict[str, Any], list[memoryview]], None]


class Crashed(ModelError):
    """A worker was ended by a signal that no limit sent: a fault in a library, or memory that it did not get."""

    @property
    def kind(self) -> str:
        return ModelError.__name__


@dataclass(frozen=True)
class Allowance:
    """What a worker may use: bytes beyond what the server has, and processor seconds."""

    memory: int
    seconds: int


def write_message(file: int, header: dict[str, Any], parts: Sequence[Any] = ()) -> None:
    """JSON, padded to `HEADER` bytes, then `parts` (buffers), each at a multiple of `ALIGNMENT`."""
    views = [memoryview(part).cast("B") for part in parts]
    text = json.dumps({**header, "parts": [len(view) for view in views]}).encode()
    if len(text) > HEADER:
        raise ValueError("the header of a message is too long")
    os.ftruncate(file, 0)
    os.ftruncate(file, HEADER + sum(_up(len(view)) for view in views))
    os.pwrite(file, text, 0)
    at = HEADER
    for view in views:
        end = at + _up(len(view))
        while view:
            done = os.pwrite(file, view[: 1 << 30], at)
            view, at = view[done:], at + done
        at = end


def read_message(file: int) -> tuple[dict[str, Any], list[memoryview]]:
    """The header and the parts, mapped and read-only. Raises ValueError."""
    size = os.fstat(file).st_size
    if size < HEADER:
        raise ValueError("incomplete")
    content = memoryview(mmap.mmap(file, size, access=mmap.ACCESS_READ))
    header = json.loads(bytes(content[:HEADER]).rstrip(b"\0"))
    lengths = header.pop("parts", None) if isinstance(header, dict) else None
    if not isinstance(lengths, list) or any(type(n) is not int or n < 0 for n in lengths):
        raise ValueError("not a message")
    if HEADER + sum(map(_up, lengths)) != size:
        raise ValueError("truncated")
    parts, at = [], HEADER
    for length in lengths:
        parts.append(content[at : at + length])
        at += _up(length)
    return header, parts


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class Worker:
    """What a task sees of the process it runs in."""

    def __init__(self, response: int, steps: int) -> None:
        self._response = response
        self._steps = steps

    def step(self, text: str) -> None:
        """What is being done: named if it is the last thing that was."""
        with contextlib.suppress(OSError):
            os.write(self._steps, text.encode()[:200] + b"\n")

    def allow(self, more: int) -> None:
        """Let the task map `more` bytes than it was allowed before."""
        now, most = resource.getrlimit(resource.RLIMIT_AS)
        if now != resource.RLIM_INFINITY:
            resource.setrlimit(resource.RLIMIT_AS, (now + more if most < 0 else min(now + more, most), most))

    def answer(self, header: dict[str, Any], parts: Sequence[Any] = ()) -> None:
        """The response, once."""
        write_message(self._response, header, parts)


# ---- this side


_BOOT = """import json, sys
sys.path[:] = json.loads(sys.argv[1])
from sparsec.loading import isolation
isolation.serve(int(sys.argv[2]), sys.argv[3])
"""


class _Server:
    """The connection to the server of this process."""

    def __init__(self, preload: str) -> None:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = [os.path.abspath(path) for path in sys.path if isinstance(path, str)]
        arguments = [json.dumps(paths), str(there.fileno()), preload]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with there:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, *arguments],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
                pass_fds=[there.fileno()], start_new_session=True, cwd="/",
            )  # fmt: skip
        self.socket = here
        self.owner = os.getpid()

    def send(self, request: dict[str, Any], files: list[int]) -> None:
        data = json.dumps(request).encode()
        if len(data) > REQUEST:
            raise ValueError("the request is too long")
        self.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files).tobytes())])

    def complaint(self) -> str:
        """Why it ended, on one line."""
        self.process.kill()
        text = self.process.communicate()[1].decode(errors="replace").strip().splitlines()
        return text[-1][:300] if text else f"it ended with status {self.process.returncode}"

    def close(self) -> None:
        self.socket.close()
        if self.owner == os.getpid():
            with contextlib.suppress(OSError):
                self.process.kill()
                self.process.wait()
            if self.process.stderr is not None:
                self.process.stderr.close()


def available() -> bool:
    """Whether this system has what workers are made of: anonymous files, descriptors of processes (Linux 5.3)."""
    return all(hasattr(os, name) for name in ("memfd_create", "pidfd_open")) and os.path.exists("/proc/self/statm")


_lock = threading.Lock()
_servers: dict[str, _Server] = {}


def start(preload: str) -> None:
    """Start the server that imports module `preload`, unless it runs; returns at once, while it imports."""
    with _lock:
        if preload not in _servers:
            try:
                _servers[preload] = _Server(preload)
            except OSError as error:
                text = f"a process to read models in cannot be started: {error.strerror}"
                raise RuntimeUnavailable(f"{text}; --limit isolate=0 reads them in this one") from error


@atexit.register
def stop() -> None:
    """End the servers; the next request starts them again."""
    with _lock:
        while _servers:
            _servers.popitem()[1].close()


def call(
    task: str, header: dict[str, Any], parts: Sequence[Any], allowance: Allowance, where: str, server: str | None = None
) -> tuple[dict[str, Any], list[memoryview]]:
    """Run `task` ("module:function", a `Task`) in a worker; its response as `read_message` gives it.

    `server`: the one that imports this module, by default the task's.

    Raises what the task raised, if it is a SparsecError, and a ModelError about `where` if it crashed or went beyond
    `allowance`; RuntimeUnavailable if no worker can be had.
    """
    preload = server or task.partition(":")[0]
    with contextlib.ExitStack() as stack:
        files = [
            os.memfd_create("sparsec-request", os.MFD_CLOEXEC),
            os.memfd_create("sparsec-response", os.MFD_CLOEXEC),
        ]
        for file in files:
            stack.callback(os.close, file)
        write_message(files[0], header, parts)
        reports, theirs = os.pipe2(os.O_CLOEXEC)
        stack.callback(os.close, reports)
        request = {"task": task, "memory": allowance.memory, "seconds": allowance.seconds}
        try:
            _send(preload, request, [*files, theirs])
        finally:
            os.close(theirs)
        ending = _wait(reports, preload, WALL * allowance.seconds)
        _check_ending(ending, allowance, where)
        try:
            response, contents = read_message(files[1])
        except ValueError as error:
            raise ModelError("the process that read it gave no answer; please report this model", where) from error
    if "error" in response:
        raise _error(response["error"])
    return response, contents


def _send(preload: str, request: dict[str, Any], files: list[int]) -> None:
    for attempt in (0, 1):
        start(preload)
        server = _servers[preload]
        if server.owner == os.getpid():
            try:
                server.send(request, files)
                return
            except OSError as error:
                complaint = server.complaint()
                if attempt:
                    text = f"the process that models are read in does not start: {complaint}"
                    raise RuntimeUnavailable(f"{text}; --limit isolate=0 reads them in this one") from error
        with _lock:  # it has ended, or belongs to the process this one was forked from
            _servers.pop(preload, server).close()


def _wait(reports: int, preload: str, seconds: float) -> dict[str, Any]:
    """How the worker ended: status, timeout, step (the last one), peak (bytes), seconds (of the processor)."""
    text, end = b"", time.monotonic() + START_SECONDS + 2 * seconds
    while True:
        left = end - time.monotonic()
        if left <= 0 or not select.select([reports], [], [], min(left, 600.0))[0]:
            if left > 0:
                continue
            raise RuntimeUnavailable("the process that models are read in does not answer", preload)
        part = os.read(reports, 1 << 16)
        if not part:
            break
        text = (text + part)[-(1 << 16) :]
    lines = [line for line in text.decode(errors="replace").splitlines() if line]
    try:
        ending = json.loads(lines[-1])
        return {
            "status": int(ending["status"]),
            "timeout": bool(ending["timeout"]),
            "peak": int(ending["peak"]),
            "seconds": float(ending["seconds"]),
            "step": lines[-2] if len(lines) > 1 else "",
        }
    except (ValueError, LookupError, TypeError):
        server = _servers.get(preload)
        complaint = server.complaint() if server is not None else "it ended"
        stop()
        text_ = f"the process that models are read in does not work: {complaint}"
        raise RuntimeUnavailable(f"{text_}; --limit isolate=0 reads them in this one") from None


def _check_ending(ending: dict[str, Any], allowance: Allowance, where: str) -> None:
    status, step = ending["status"], ending["step"] or "starting"
    if status == 0:
        return
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if ending["timeout"] or killed == signal.SIGXCPU:
        seconds = allowance.seconds * (WALL if ending["timeout"] else 1)
        raise ModelError(f"gave up after {seconds} seconds of {step} (--limit seconds=N)", where)
    if killed:
        text = f"{step} ended with {signal.Signals(killed).name}"
        raise Crashed(
            f"{text}: the model is damaged, or needs more than {allowance.memory >> 20} MB (--limit memory=N)", where
        )
    raise ModelError(f"{step} ended with status {os.waitstatus_to_exitcode(status)}; please report this model", where)


def _error(said: object) -> SparsecError:
    if not isinstance(said, dict):
        return ModelError("the process that read it gave no answer")
    kind = getattr(errors, str(said.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, SparsecError)):
        kind = ModelError
    return kind(str(said.get("message"))[: 1 << 16], str(said.get("where"))[:4096])


# ---- the other side


def serve(file: int, preload: str) -> None:
    """The server's loop; returns when the process that started it ends."""
    module = importlib.import_module(preload)
    getattr(module, "warm", lambda: None)()  # imports of the first time
    gc.freeze()  # what is there stays shared with the workers
    with socket.socket(fileno=file) as requests:
        while True:
            data, ancillary, _, _ = requests.recvmsg(
                REQUEST, socket.CMSG_SPACE(3 * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
            _reap()
            if not data:
                return
            files = array.array("i")
            for _, _, packed in ancillary:
                files.frombytes(packed)
            if os.fork() == 0:
                code = 1
                try:
                    requests.close()
                    _supervise(json.loads(data), *files)
                    code = 0
                finally:
                    os._exit(code)
            for each in files:
                os.close(each)


def _reap() -> None:
    """Wait for the supervisors that have ended, so that what they used counts as this process's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _supervise(request: dict[str, Any], question: int, response: int, reports: int) -> None:
    os.dup2(1, 2)  # nowhere: what libraries print must not fill a pipe that nobody reads
    worker = os.fork()
    if worker == 0:
        code = 1
        try:
            code = _work(request, question, response, reports)
        finally:
            os._exit(code)
    handle = os.pidfd_open(worker)
    watch = select.poll()
    watch.register(handle, select.POLLIN)
    watch.register(reports, 0)  # POLLERR when nobody reads any more
    events = dict(watch.poll(WALL * request["seconds"] * 1000))
    timeout = not events
    if handle not in events:
        os.kill(worker, signal.SIGKILL)
    _, status, used = os.wait4(worker, 0)
    ending = {
        "status": status,
        "timeout": timeout,
        "peak": used.ru_maxrss << 10,
        "seconds": used.ru_utime + used.ru_stime,
    }
    with contextlib.suppress(OSError):
        os.write(reports, b"\n" + json.dumps(ending).encode())


def _work(request: dict[str, Any], question: int, response: int, reports: int) -> int:
    os.set_blocking(reports, False)
    _limit(Allowance(request["memory"], request["seconds"]))
    worker = Worker(response, reports)
    module, _, name = request["task"].partition(":")
    header, parts = read_message(question)
    try:
        getattr(importlib.import_module(module), name)(worker, header, parts)
    except SparsecError as error:
        said = {"kind": error.kind, "message": error.message[: 1 << 16], "where": error.where[:4096]}
        worker.answer({"error": said})
    except MemoryError:
        text = f"needs more than {request['memory'] >> 20} MB of memory to load (--limit memory=N)"
        worker.answer({"error": {"kind": "ModelError", "message": text, "where": str(header.get("where", ""))}})
    return 0


def _limit(allowance: Allowance) -> None:
    with open("/proc/self/statm", "rb") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for kind, value in ((resource.RLIMIT_AS, mapped + allowance.memory), (resource.RLIMIT_CPU, allowance.seconds)):
        _, most = resource.getrlimit(kind)
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(kind, (value, most))
