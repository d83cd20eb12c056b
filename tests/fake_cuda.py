"""A GPU of PyTorch's that is the CPU: its work is queued, and done only when somebody waits for the device.

Tensors "on cuda" lie in ordinary memory. A CUDA graph records the operators executed while it is captured and does them again,
from and into the same tensors. `log` says in which order work was done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ON_THE_HOST = (torch.Tensor.clone, torch.Tensor.copy_, torch.Tensor.numpy)  # see what the device has done until then


class FakeCuda(TorchFunctionMode):
    """Use as a context manager. `refuses`: nothing can be captured, as where an operator waits for the device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, refuses: bool = False) -> None:
        super().__init__()
        self.log: list[str] = []
        self.refuses = refuses
        self.queue: list[Callable[[], object]] = []
        self.streams: list[object] = ["default"]
        self.busy = False
        fake = self

        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

        class Event:
            def __init__(self, enable_timing: bool = False) -> None:
                assert enable_timing

            def record(self) -> None:
                fake.later("event", lambda: setattr(self, "at", len(fake.log)))

            def elapsed_time(self, end: Any) -> float:
                return float(end.at - self.at)  # a millisecond for each piece of work

        class CUDAGraph:
            def __init__(self) -> None:
                self.steps: list[tuple[Any, Any, Any, Any]] = []

            def replay(self) -> None:
                fake.later("replay", self._replay)

            @torch.inference_mode()
            def _replay(self) -> None:
                for function, arguments, options, made in self.steps:
                    again = function(*arguments, **options)
                    for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
                        if isinstance(old, torch.Tensor):
                            old.copy_(new)

        @contextlib.contextmanager
        def stream(one: object) -> Iterator[None]:
            depth = len(fake.streams)
            fake.streams.append(one)
            try:
                yield
            finally:
                del fake.streams[depth:]

        @contextlib.contextmanager
        def graph(recorder: CUDAGraph) -> Iterator[None]:
            fake.synchronize()
            fake.streams.append("capture")
            with _Recording(recorder.steps):
                yield
            if fake.refuses:  # as torch's: the stream stays
                raise RuntimeError("operation failed due to a previous error during capture")
            fake.streams.pop()

        for name, value in {
            "is_available": lambda: True, "device_count": lambda: 1, "get_device_name": lambda device: "Fake GPU",
            "device": contextlib.nullcontext, "current_stream": Stream, "synchronize": self.synchronize,
            "Stream": Stream, "Event": Event, "CUDAGraph": CUDAGraph, "stream": stream, "graph": graph,
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def later(self, name: str, work: Callable[[], object]) -> None:
        """Queue `work`."""
        self.queue.append(lambda: (work(), self.log.append(name)))

    def synchronize(self) -> None:
        """Do all that is queued."""
        if self.busy:  # this is the work
            return
        self.busy = True
        while self.queue:
            self.queue.pop(0)()
        self.busy = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if function is torch.Tensor.pin_memory:
            return args[0].clone()
        if function is torch.Tensor.copy_ and options.pop("non_blocking", False):
            self.later("copy", lambda: args[0].copy_(args[1]))
            return args[0]
        here = [torch.device("cpu") if isinstance(a, torch.device) and a.type == "cuda" else a for a in args]
        if function not in _ON_THE_HOST:
            self.synchronize()  # launched at once, behind what is queued
        return function(*here, **options)


class _Recording(TorchDispatchMode):
    def __init__(self, steps: list[tuple[Any, Any, Any, Any]]) -> None:
        super().__init__()
        self._steps = steps

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self._steps.append((function, args, kwargs or {}, made))
        return made
