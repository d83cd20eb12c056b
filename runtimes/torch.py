"""`torch`: PyTorch on the artifact's model.onnx, to compare with: `torch`, `torch:cpu`, `torch:cuda`, `torch:cuda:N`.

Without an argument it runs where the artifact does: on the GPU for artifacts of target cuda, else on the CPU. What makes
the comparison fair:

    graph      operator by operator (`TorchGraph`), without gradients; on a GPU recorded as one CUDA graph, as the artifact
               is, so that neither pays for single launches
    numbers    float32 without TF32; float16 on a GPU where the artifact's layers or most of the model's own weights are
    layout     contiguous or channels-last, whichever a trial finds faster; cuDNN tries its algorithms too
    times      host memory to host memory, on a GPU through pinned memory and up to a synchronization; the device's own
               from events behind the copy of the inputs and before that of the outputs

A session compares its outputs for the parity sample with ONNX Runtime's when it is opened, so no wrong answer is timed.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, cast

import onnx
import onnx_ir as ir

from sparsec.errors import CheckError, ModelError, RuntimeUnavailable, UnsupportedError, UsageError, one_line
from sparsec.proving.parity import tallies_of
from sparsec.proving.samples import parity_outputs, read_parity
from sparsec.runtimes.base import Arrays, Compiled, DeviceTime, Runtime, Session, Stats

try:
    import torch
except ImportError as error:
    raise RuntimeUnavailable('PyTorch is missing: pip install "sparsec[torch]"', "torch") from error

from sparsec.passes.training.torch_graph import TorchGraph, as_tensor

if TYPE_CHECKING:
    from sparsec.artifact import Artifact

Feeds = dict[str, torch.Tensor]
Step = Callable[[Feeds], Sequence[torch.Tensor]]  # outputs in order, in host memory, of inputs in host memory

# Of the artifact's tolerance: torch sums in another order than ONNX Runtime, and rounds float16 after every operator.
FACTOR = {torch.float32: 2.0, torch.float16: 4.0}
TRIES = 5  # runs of each layout; the fastest counts
SPINNING = 0.02  # seconds until OpenMP's idle threads sleep
_REAL = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


class TorchSession(Session):
    """A model in PyTorch on the CPU, with `threads` threads: those of the whole process until it is closed."""

    interleaves = True

    def __init__(self, artifact: Artifact, threads: int, device: torch.device) -> None:
        self._device, self._threads, self._specs = device, threads, artifact.outputs
        self._where = str(artifact.path / "model.onnx")
        sample = read_parity(artifact)
        with contextlib.ExitStack() as held, _told(self._where):
            held.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
            held.enter_context(torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False))
            held.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
            if device.type == "cuda":
                held.enter_context(torch.cuda.device(device))
            self._graph = _graph(artifact, device, self._where)
            feeds = _tensors(sample)
            steps = [self._step(layout, feeds) for layout in _layouts(self._graph)]
            self._run = min(steps, key=lambda step: min(_seconds(step, feeds) for _ in range(TRIES)))
            self._agree(artifact, sample)
            self._held = held.pop_all()

    def _step(self, layout: torch.memory_format, feeds: Feeds) -> Step:
        """The graph with weights and inputs of four axes in `layout`; outputs are contiguous, in the model's types."""
        graph = copy.copy(self._graph)
        graph.constants = {name: _laid(x, graph.floats, layout) for name, x in graph.constants.items()}
        kinds = {spec.name: _REAL.get(spec.dtype) for spec in self._specs}

        @torch.inference_mode()
        def step(feeds: Feeds) -> list[torch.Tensor]:
            values = graph.run_one({name: _laid(x, graph.floats, layout) for name, x in feeds.items()})
            return [values[name].to(kind).contiguous() for name, kind in kinds.items()]

        return step

    def _agree(self, artifact: Artifact, sample: Arrays) -> None:
        tallies = tallies_of(artifact)
        tallies.add(sample, self.run(sample), parity_outputs(artifact))
        for found in tallies.result():
            if not found.max_relative_error <= FACTOR[self._graph.floats] * found.tolerance:
                raise CheckError(f"output {found.output!r} in PyTorch {found.text()}; it is not timed", self._where)

    def run(self, inputs: Arrays) -> Arrays:
        with _told(self._where):
            outputs = self._run(_tensors(inputs))
        return {s.name: y.numpy().astype(s.dtype) for s, y in zip(self._specs, outputs, strict=True)}

    def once(self, inputs: Arrays) -> Callable[[], object]:
        step, feeds = self._run, _tensors(inputs)
        return lambda: step(feeds)

    def settle(self) -> None:
        if self._threads > 1:
            time.sleep(SPINNING)

    def close(self) -> None:
        self._held.close()


class CudaTorchSession(TorchSession):
    """A model in PyTorch on a GPU, which is torch's current device until it is closed."""

    def _step(self, layout: torch.memory_format, feeds: Feeds) -> Step:
        return Recorded(super()._step(layout, feeds), feeds, self._device)

    def device_time(self, inputs: Arrays, runs: int, warmup: int = 1) -> DeviceTime:
        step, feeds = cast(Recorded, self._run), _tensors(inputs)
        seconds = [step.device_seconds(feeds) for _ in range(warmup + runs)][warmup:]
        how = "CUDA graph" if step.recorded else "launch by launch"
        return DeviceTime(f"{torch.cuda.get_device_name(self._device)}, {how}", Stats.of(seconds))


class Recorded:
    """`compute` between buffers on a GPU: a copy in, one CUDA graph, a copy out."""

    recorded = True

    def __init__(self, compute: Step, feeds: Feeds, device: torch.device) -> None:
        self._pinned = {name: x.pin_memory() for name, x in feeds.items()}
        self._inputs = {name: x.to(device) for name, x in feeds.items()}
        self._outputs: Sequence[torch.Tensor] = ()
        self._record(compute)
        self._results = [y.cpu().pin_memory() for y in self._outputs]

    def _record(self, compute: Step) -> None:
        side = torch.cuda.Stream()  # libraries allocate and choose algorithms here, which no graph can hold
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._outputs = compute(self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer one puts the stream back after a failure, which the inner does not.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                outputs = compute(self._inputs)
        except RuntimeError:  # something in it waits for the device
            torch.cuda.synchronize()
            self._compute, self.recorded = compute, False
        else:
            self._graph, self._outputs = graph, outputs

    def _send(self, feeds: Feeds) -> None:
        for name, x in feeds.items():
            self._pinned[name].copy_(x)
            self._inputs[name].copy_(self._pinned[name], non_blocking=True)

    def _launch(self) -> None:
        if self.recorded:
            self._graph.replay()
        else:
            self._outputs = self._compute(self._inputs)

    def __call__(self, feeds: Feeds) -> list[torch.Tensor]:
        self._send(feeds)
        self._launch()
        for result, y in zip(self._results, self._outputs, strict=True):
            result.copy_(y, non_blocking=True)
        torch.cuda.synchronize()
        return [result.clone() for result in self._results]  # the buffers are the next run's

    def device_seconds(self, feeds: Feeds) -> float:
        """What the device needs between the copies."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._send(feeds)
        begin.record()
        self._launch()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


def _graph(artifact: Artifact, device: torch.device, where: str) -> TorchGraph:
    model = ir.from_proto(onnx.load_model_from_string((artifact.path / "model.onnx").read_bytes()))
    sizes = {ir.DataType.FLOAT: 0, ir.DataType.FLOAT16: 0}
    for value in model.graph.initializers.values():
        if value.dtype in sizes and value.const_value is not None:
            sizes[value.dtype] += value.const_value.size
    stored = sizes[ir.DataType.FLOAT16] > sizes[ir.DataType.FLOAT]
    half = device.type == "cuda" and (stored or artifact.manifest["target"]["precision"] == "f16")
    try:
        return TorchGraph(model, device, torch.float16 if half else torch.float32)
    except UnsupportedError as error:
        raise UnsupportedError(error.message, where, error.problems) from error


def _layouts(graph: TorchGraph) -> list[torch.memory_format]:
    images = any(x.dim() == 4 and x.is_floating_point() for x in graph.constants.values())
    return [torch.contiguous_format, *([torch.channels_last] if images else [])]


def _laid(x: torch.Tensor, floats: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
    if not x.is_floating_point():
        return x
    return x.to(floats, memory_format=layout) if x.dim() == 4 else x.to(floats)


def _tensors(inputs: Arrays) -> Feeds:
    return {name: as_tensor(array) for name, array in inputs.items()}


def _seconds(step: Step, feeds: Feeds) -> float:
    start = time.perf_counter()
    step(feeds)
    return time.perf_counter() - start


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, IndexError, ValueError, TypeError) as error:  # what torch's operators raise
        raise ModelError(f"PyTorch fails: {one_line(error)}", where) from error


class Torch(Runtime):
    """PyTorch on the artifact's model.onnx; behind the colon cpu, cuda or cuda:N."""

    name = "torch"
    takes_argument = True

    def open(self, artifact: Compiled, threads: int | None = None) -> TorchSession:
        device = self._device(artifact)
        session = CudaTorchSession if device.type == "cuda" else TorchSession
        return session(cast("Artifact", artifact), threads or artifact.manifest["threads"], device)

    def _device(self, artifact: Compiled) -> torch.device:
        kind, colon, number = self.argument.partition(":")
        if kind not in ("", "cpu", "cuda") or (colon and not (kind == "cuda" and number.isdecimal())):
            raise UsageError(f"expected torch:cpu, torch:cuda or torch:cuda:N, got {str(self)!r}", "torch")
        if kind == "cpu" or (not kind and artifact.manifest["target"]["runtime"] != "cuda"):
            return torch.device("cpu")
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:
            found = f"it finds {count} here" if count else "it finds none here; torch:cpu runs on the CPU"
            raise RuntimeUnavailable(f"PyTorch has no CUDA device {number or 0}: {found}", str(self))
        return torch.device("cuda", int(number or 0))
