"""Teach a changed model what the original computes, on unlabelled samples. What `recover` runs, in torch.

    w = w0 + s . m . theta     m: the mask, 1 where the weight is not zero; s: a step's size, below; theta trained from 0
    L = sum over outputs  D(y_t, y_s)  +  a / |F| * sum over f in F  |f_s - f_t|^2 / |f_t - mean f_t|^2

D is the Kullback-Leibler divergence KL(softmax(y_t / T) || softmax(y_s / T)) T^2 of logits (Hinton et al.,
arXiv:1503.02531), the normalized squared error of anything else; the second sum is SquareHead (Kurtic et al.,
arXiv:2310.06927) over the values F that have one name and shape in both models. Zeros have m = 0: they get no gradient
that reaches w and are zero after every step.

Folded batch normalization leaves rows and inputs of very different sizes and inputs with large means. What it did for
training is undone by a change of variables: with m, d the mean and deviation of a layer's inputs x, d_y of its outputs,

    dW[j, k] = m[j, k] theta[j, k] d_y[j] / (K d[k]),   b[j] = beta[j] - dW[j] m        so y = W0 x + dW (x - m) + beta

a step of r in all theta of a row changes its output by at most about r of its deviation, for every layer, and a weight
cannot move the mean. The mask does not disturb it, as it would a full whitening.

What both models compute alike in front of the first change is computed once, without gradients. The learning rate warms
up and falls as half a cosine over the time or steps allowed. An average of the weights over the last steps is what is
judged; the best one is kept, the start included. The judges are views of samples held out, not the samples themselves:
passes before this one may have fitted the model to every calibration sample, and would look perfect on them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F

from sparsec.passes.training.augment import Views, draw_views
from sparsec.passes.training.torch_graph import TorchGraph, as_tensor

Tensor = torch.Tensor
Tell = Callable[[str, float], None]  # what, share done
TINY = 1e-12
EVALUATIONS = 12  # in a run, after the one before it
HELD_OUT = 0.1
JUDGED = 3  # views of each sample held out
WARM_UP = 0.05  # share of the run


@dataclass(frozen=True)
class Settings:
    """`minutes`: of processor time (of a GPU: of the clock). `steps` instead, if positive. `rate`: largest relative
    change of an output in one step. `rank`: 0 trains the weights themselves, r their update as a product of rank r."""

    minutes: float = 30.0
    steps: int = 0
    batch: int = 16
    rate: float = 1e-3
    decay: float = 0.0
    temperature: float = 1.0
    features: float = 1.0
    average: float = 0.98
    patience: int = 4
    rank: int = 0
    seed: int = 0
    optimizer: str = "adamw"
    views: Views | None = None


@dataclass(frozen=True)
class Centre:
    """The mean input of a layer: `mean` broadcasts to its stored weight, sums over `axes` leave one value a row."""

    bias: str  # name of the bias, trained too
    mean: np.ndarray
    axes: tuple[int, ...]


@dataclass(frozen=True)
class Trainable:
    """A constant that may change. `mask` is None where everything may."""

    name: str
    start: np.ndarray
    mask: np.ndarray | None
    scale: np.ndarray  # broadcasts to the constant: a change of 1 in theta
    matrix: tuple[int, int] | None = None  # [rows, K], the shape of an update of low rank
    centre: Centre | None = None


@dataclass(frozen=True)
class Outcome:
    """`weights` by name; held-out divergence before and after; samples seen."""

    weights: dict[str, np.ndarray]
    before: float
    after: float
    steps: int
    samples: int


@dataclass(frozen=True)
class Task:
    """The two models, what they share and what is compared."""

    teacher: TorchGraph
    student: TorchGraph
    shared: tuple[str, ...]  # values that the student takes from the teacher
    taps: tuple[str, ...]
    kinds: tuple[str, ...]  # of every output: logits, probabilities or values


def output_kinds(model: ir.Model) -> tuple[str, ...]:
    """How each output is compared: what a Softmax made is probabilities, [1, C] is logits, anything else values."""
    kinds = []
    for y in model.graph.outputs:
        shape = [] if y.shape is None else list(y.shape)
        producer = y.producer()
        op = "" if producer is None else producer.op_type
        if op == "Softmax":
            kinds.append("probabilities")
        elif len(shape) == 2 and shape[-1] != 1 and op not in ("Sigmoid", "Tanh", "HardSigmoid"):
            kinds.append("logits")
        else:
            kinds.append("values")
    return tuple(kinds)


def divergence(kind: str, teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over samples of the divergence of outputs [N, ...], 0 for equal ones."""
    if kind == "values":
        return _relative(teacher, student)
    if kind == "probabilities":
        teacher, student = teacher.clamp(min=TINY).log(), student.clamp(min=TINY).log()
    p, q = F.log_softmax(teacher / temperature, -1), F.log_softmax(student / temperature, -1)
    return (p.exp() * (p - q)).sum(-1).mean() * temperature**2


def _relative(teacher: Tensor, student: Tensor) -> Tensor:
    spread = (teacher - teacher.mean(0, keepdim=True)).square().mean() + TINY
    if len(teacher) == 1:
        spread = teacher.var(unbiased=False) + TINY
    return (student - teacher).square().mean() / spread


class Samples:
    """Calibration samples in memory, split into training and held-out ones; batches of views."""

    def __init__(self, samples: Sequence[dict[str, np.ndarray]], device: torch.device, seed: int) -> None:
        self.device = device
        self.arrays = {name: np.stack([s[name] for s in samples]) for name in samples[0]}
        order = np.random.default_rng(seed).permutation(len(samples))
        held = min(max(1, round(HELD_OUT * len(samples))), len(samples) - 1)
        self.held, self.train = np.sort(order[:held]), np.sort(order[held:])

    def take(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Inputs [N, *shape] on the device; images with channels last, which is faster in a backward pass."""
        return {name: _channels_last(as_tensor(a[indices]).to(self.device)) for name, a in self.arrays.items()}

    def batches(self, size: int, generator: torch.Generator) -> Iterator[np.ndarray]:
        """Indices for ever: each sample once, in a new order, then again."""
        rest = np.empty(0, np.int64)
        while True:
            while len(rest) < min(size, len(self.train)):
                rest = np.concatenate([rest, self.train[torch.randperm(len(self.train), generator=generator).numpy()]])
            yield rest[:size]
            rest = rest[size:]

    def held_out(self, size: int, views: Views | None) -> Iterator[dict[str, Tensor]]:
        """The held-out samples in batches; with `views`, `JUDGED` fixed views of each instead."""
        generator = torch.Generator().manual_seed(JUDGED)
        for _ in range(1 if views is None else JUDGED):
            for start in range(0, len(self.held), size):
                feeds = self.take(self.held[start : start + size])
                if views is not None:
                    feeds = draw_views(feeds, views, generator)
                yield {name: _channels_last(x) for name, x in feeds.items()}


def _channels_last(x: Tensor) -> Tensor:
    if x.dim() == 5 and x.shape[1] == 1:  # [N, 1, C, H, W]
        return x.squeeze(1).contiguous(memory_format=torch.channels_last).unsqueeze(1)
    return x


class Clock:
    """The share of the run that is over, by processor time (the clock on a GPU) or by steps."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.now = time.process_time if device.type == "cpu" else time.perf_counter
        self.start, self.settings = self.now(), settings
        self.longest = 0.0

    def share(self, steps: int) -> float:
        """0 at the start, 1 when the run has to end."""
        if self.settings.steps:
            return steps / self.settings.steps
        return (self.now() - self.start) / (60 * self.settings.minutes)

    def left(self, steps: int) -> str:
        """Time left, for a person."""
        spent, share = self.now() - self.start, max(self.share(steps), 1e-6)
        seconds = max(spent * (1 - share) / share, 0.0)
        return f"{seconds / 60:.1f} min left" if seconds >= 60 else f"{seconds:.0f} s left"


class _Weights:
    """theta and what the student gets from it."""

    def __init__(self, trainables: Sequence[Trainable], settings: Settings, device: torch.device) -> None:
        self.items = list(trainables)
        self.rank = settings.rank
        self.start = {t.name: as_tensor(t.start).to(device) for t in self.items}
        self.scale = {t.name: as_tensor(t.scale).to(device) for t in self.items}
        self.mean = {t.name: as_tensor(t.centre.mean).to(device) for t in self.items if t.centre is not None}
        self.mask = {t.name: as_tensor(t.mask.astype(np.float32)).to(device) for t in self.items if t.mask is not None}
        self.theta: dict[str, list[Tensor]] = {}
        generator = torch.Generator().manual_seed(settings.seed)
        for t in self.items:
            if self.rank and t.matrix is not None and self.rank < min(t.matrix):
                rows, columns = t.matrix
                a = torch.zeros(rows, self.rank)
                b = torch.randn(self.rank, columns, generator=generator) / math.sqrt(self.rank)
                parts = [a.to(device), b.to(device)]
            else:
                parts = [torch.zeros_like(self.start[t.name])]
            self.theta[t.name] = [p.requires_grad_() for p in parts]

    def parameters(self) -> list[Tensor]:
        return [p for parts in self.theta.values() for p in parts]

    def build(self) -> dict[str, Tensor]:
        """Constants as the student reads them."""
        made: dict[str, Any] = {}
        for t in self.items:
            parts = self.theta[t.name]
            change = parts[0] if len(parts) == 1 else parts[0] @ parts[1]
            change = change.reshape(self.start[t.name].shape) * self.scale[t.name]
            change = change * self.mask[t.name] if t.name in self.mask else change
            made[t.name] = made.get(t.name, 0.0) + self.start[t.name] + change
            if t.centre is not None:
                shift = (change * self.mean[t.name]).sum(t.centre.axes).reshape(self.start[t.centre.bias].shape)
                made[t.centre.bias] = made.get(t.centre.bias, 0.0) - shift
        return made

    def export(self, built: dict[str, Tensor]) -> dict[str, np.ndarray]:
        """NumPy arrays; what the mask excludes is what it was, bit by bit."""
        arrays = {}
        for t in self.items:
            array = built[t.name].detach().cpu().numpy()
            arrays[t.name] = array if t.mask is None else np.where(t.mask, array, t.start)
        return arrays


def held_out_divergence(task: Task, samples: Samples, weights: dict[str, Tensor], settings: Settings) -> float:
    """Mean divergence of the outputs over the held-out samples."""
    total, count = 0.0, 0
    with torch.no_grad():
        for feeds in samples.held_out(settings.batch, settings.views):
            wanted = list(dict.fromkeys([*task.teacher.outputs, *task.shared]))
            truth = task.teacher.run(feeds, wanted)
            found = task.student.run(feeds, None, weights, {name: truth[name] for name in task.shared})
            size = len(next(iter(feeds.values())))
            pairs = zip(task.kinds, task.teacher.outputs, task.student.outputs, strict=True)
            total += size * sum(float(divergence(kind, truth[t], found[s])) for kind, t, s in pairs)
            count += size
    return total / count


def distill(
    task: Task, trainables: Sequence[Trainable], samples: Samples, settings: Settings, tell: Tell = lambda *_: None
) -> Outcome:
    """Train `trainables` of the student; the best weights seen on the held-out samples."""
    device = task.student.device
    generator = torch.Generator().manual_seed(settings.seed)
    weights = _Weights(trainables, settings, device)
    optimizer = _optimizer(weights.parameters(), settings)
    clock = Clock(settings, device)
    before = best = held_out_divergence(task, samples, weights.build(), settings)
    kept = weights.export(weights.build())
    mean = {name: w.detach().clone() for name, w in weights.build().items()}
    steps = seen = stale = 0
    next_check = 1 / EVALUATIONS
    for indices in samples.batches(settings.batch, generator):
        share = clock.share(steps)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * min(1.0, share / WARM_UP + 0.01) * 0.5 * (1 + math.cos(math.pi * share))
        feeds = samples.take(indices)
        if settings.views is not None:
            feeds = {name: _channels_last(x) for name, x in draw_views(feeds, settings.views, generator).items()}
        built = weights.build()
        loss = _loss(task, feeds, built, settings)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights.parameters(), 10.0)
        if torch.isfinite(norm):  # one sample without a gradient must not end the training of all weights
            optimizer.step()
        steps, seen = steps + 1, seen + len(indices)
        fade = min(settings.average, steps / (steps + 9))
        with torch.no_grad():
            for name, w in weights.build().items():
                mean[name].lerp_(w, 1 - fade)
        if clock.share(steps) >= next_check:
            next_check += 1 / EVALUATIONS
            found = held_out_divergence(task, samples, mean, settings)
            tell(
                f"step {steps}, held-out {found:.4g} (was {before:.4g}), {clock.left(steps)}",
                min(clock.share(steps), 1.0),
            )
            if found < best:
                best, kept, stale = found, weights.export(mean), 0
            elif share >= 0.5:  # before, large steps may well hide what small ones will keep
                stale += 1
            if stale >= settings.patience:
                break
    return Outcome(kept, before, best, steps, seen)


def _optimizer(parameters: list[Tensor], settings: Settings) -> torch.optim.Optimizer:
    groups = [{"params": parameters, "base": settings.rate}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.99), weight_decay=settings.decay)


def _loss(task: Task, feeds: dict[str, Tensor], weights: dict[str, Tensor], settings: Settings) -> Tensor:
    taps = task.taps if settings.features else ()
    with torch.no_grad():
        truth = task.teacher.run(feeds, list(dict.fromkeys([*task.teacher.outputs, *taps, *task.shared])))
    found = task.student.run(
        feeds, list(dict.fromkeys([*task.student.outputs, *taps])), weights, {n: truth[n] for n in task.shared}
    )
    pairs = zip(task.kinds, task.teacher.outputs, task.student.outputs, strict=True)
    loss = sum((divergence(kind, truth[t], found[s], settings.temperature) for kind, t, s in pairs), torch.zeros(()))
    if taps:
        loss = loss + settings.features / len(taps) * sum(_relative(truth[tap], found[tap]) for tap in taps)
    return loss
