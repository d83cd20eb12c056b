"""Train the demo model and write models/demo.onnx. Needs the extra [torch]; about ten minutes on one CPU core.

    python tools/train_demo.py [--images 25000] [--epochs 22] [--seed 0] [--threads 1] [-o models/demo.onnx]

Two phases: ordinary training, then, with BatchNorm folded, half as many epochs in which every second step drops a
random share of the blocks of least magnitude. The second is what lets half of the blocks go later without any
retraining; a network this small that was trained the ordinary way only loses most of its accuracy there (printed for
comparison).

Prints the accuracy on held-out images, of the model as written, dense and with 4x1 blocks of least magnitude removed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn
from torch.nn import functional

from sparsec.models import demo_data
from sparsec.models.demo import HEAD, LAYERS, assemble

Weights = dict[str, torch.Tensor]

ACTIVATIONS = {"Clip": functional.relu6, "Relu": functional.relu, "HardSwish": functional.hardswish}


class Net(nn.Module):
    """`LAYERS` with a BatchNorm behind each convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(a.inputs, a.outputs, a.kernel, a.stride, a.kernel // 2, groups=a.groups, bias=False)
            for a in LAYERS
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(layer.outputs) for layer in LAYERS)
        self.head = nn.Linear(LAYERS[-1].outputs, len(demo_data.LABELS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, conv, norm in zip(LAYERS, self.convs, self.norms, strict=True):
            y = norm(conv(x))
            x = ACTIVATIONS[layer.activation](y + x if layer.residual else y)
        return self.head(x.mean(dim=(2, 3)))

    def folded(self) -> Weights:
        """Weights for `assemble`: w' = w * g, b' = beta - mean * g with g = gamma / sqrt(var + eps)."""
        weights = {}
        for layer, conv, norm in zip(LAYERS, self.convs, self.norms, strict=True):
            gain = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            weights[f"{layer.name}.weight"] = conv.weight * gain[:, None, None, None]
            weights[f"{layer.name}.bias"] = norm.bias - norm.running_mean * gain
        weights[f"{HEAD}.weight"] = self.head.weight
        weights[f"{HEAD}.bias"] = self.head.bias
        return {key: value.detach().clone() for key, value in weights.items()}


def logits(weights: Weights, x: torch.Tensor) -> torch.Tensor:
    """The folded network on [batch, channels, height, width]."""
    for layer in LAYERS:
        weight, bias = weights[f"{layer.name}.weight"], weights[f"{layer.name}.bias"]
        y = functional.conv2d(x, weight, bias, layer.stride, layer.kernel // 2, groups=layer.groups)
        x = ACTIVATIONS[layer.activation](y + x if layer.residual else y)
    return functional.linear(x.mean(dim=(2, 3)), weights[f"{HEAD}.weight"], weights[f"{HEAD}.bias"])


def block_mask(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """0 for the share `sparsity` of the blocks of 4 output channels x 1 with the smallest sum of magnitudes, else 1."""
    score = weight.detach().abs().reshape(weight.shape[0] // 4, 4, -1).sum(dim=1, keepdim=True)
    order = score.flatten().argsort()
    mask = torch.ones(order.shape)
    mask[order[: round(sparsity * len(order))]] = 0
    return mask.reshape(score.shape).expand(-1, 4, -1).reshape(weight.shape)


def without_blocks(weights: Weights, sparsity: Callable[[], float]) -> Weights:
    """Blocks dropped in all layers but the first, the depthwise and the head; gradients pass as if nothing were."""
    pruned = dict(weights)
    for layer in LAYERS[1:]:
        if layer.groups == 1:
            weight = weights[f"{layer.name}.weight"]
            pruned[f"{layer.name}.weight"] = weight - (weight * (1 - block_mask(weight, sparsity()))).detach()
    return pruned


class Batches:
    """Training images in random order, turned by quarters and mirrored: classes are shapes up to both."""

    def __init__(self, images: int, seed: int, batch: int = 64) -> None:
        self._x, self._y = (torch.from_numpy(array) for array in demo_data.generate("train", images, seed))
        self.batch = batch
        self.count = images // batch

    def epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for chosen in torch.randperm(len(self._y))[: self.count * self.batch].split(self.batch):
            x = torch.rot90(self._x[chosen], int(torch.randint(4, ())), (2, 3))
            if torch.randint(2, ()):
                x = x.flip(3)
            yield x.contiguous(memory_format=torch.channels_last), self._y[chosen]


def fit(
    parameters: list[torch.Tensor],
    forward: Callable[[torch.Tensor], torch.Tensor],
    batches: Batches,
    epochs: int,
    rate: float,
) -> None:
    """AdamW, one cycle, cross entropy."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=epochs * batches.count, pct_start=0.2)
    started = time.time()
    for epoch in range(epochs):
        total = 0.0
        for x, y in batches.epoch():
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(forward(x), y)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:3} loss {total / batches.count:.4f} {time.time() - started:.0f} s", flush=True)


def harden(weights: Weights, batches: Batches, epochs: int, most: float = 0.8, rate: float = 1e-3) -> Weights:
    """Fine-tune so that a share of blocks up to about `most` may go: every second step drops a random one."""
    for value in weights.values():
        value.requires_grad_()

    def forward(x: torch.Tensor) -> torch.Tensor:
        if torch.randint(2, ()):
            share = most * float(torch.rand(()))
            # Layers differ a little, as they do when one threshold serves all of them.
            return logits(without_blocks(weights, lambda: min(most, share * float(0.8 + 0.4 * torch.rand(())))), x)
        return logits(weights, x)

    fit(list(weights.values()), forward, batches, epochs, rate)
    return {key: value.detach() for key, value in weights.items()}


def accuracy(weights: Weights, count: int = 4000) -> float:
    """Share of test images right, under ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = assemble({key: value.numpy() for key, value in weights.items()})
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x, y = demo_data.generate("test", count)
    answers = [session.run(None, {"input": image[None]})[0].argmax() for image in x]
    return float((np.array(answers) == y).mean())


def report(title: str, weights: Weights) -> None:
    print(f"{title}: accuracy {accuracy(weights):.4f} dense", end="")
    for share in (0.3, 0.5, 0.8):
        print(f", {accuracy(without_blocks(weights, lambda share=share: share)):.4f} at {share:.0%} 4x1", end="")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=25000)
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parents[1] / "models" / "demo.onnx")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    batches = Batches(options.images, options.seed)
    net = Net().to(memory_format=torch.channels_last)
    fit(list(net.parameters()), net, batches, options.epochs, rate=5e-3)
    weights = net.folded()
    report("trained", weights)
    weights = harden(weights, batches, max(1, options.epochs // 2))
    report("hardened", weights)
    onnx.save(assemble({key: value.numpy() for key, value in weights.items()}), options.output)
    print(f"{options.output}: {options.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
