"""Train the demo model and write models/demo.onnx. Needs the extra [torch]; about ten minutes on one CPU core.

    python tools/train_demo.py [--images 30000] [--epochs 30] [--seed 0] [--threads 1] [-o models/demo.onnx]

Prints the accuracy on held-out images, of the model as written, dense and with 4x1 blocks of least magnitude removed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from sparsec.models import demo_data
from sparsec.models.demo import HEAD, LAYERS, assemble

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

    def folded(self) -> dict[str, NDArray[np.float32]]:
        """Weights for `assemble`: w' = w * g, b' = beta - mean * g with g = gamma / sqrt(var + eps)."""
        weights = {}
        for layer, conv, norm in zip(LAYERS, self.convs, self.norms, strict=True):
            gain = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
            weights[f"{layer.name}.weight"] = (conv.weight.detach() * gain[:, None, None, None]).numpy()
            weights[f"{layer.name}.bias"] = (norm.bias.detach() - norm.running_mean * gain).numpy()
        weights[f"{HEAD}.weight"] = self.head.weight.detach().numpy()
        weights[f"{HEAD}.bias"] = self.head.bias.detach().numpy()
        return weights


def train(images: int, epochs: int, seed: int, batch: int = 64, rate: float = 5e-3) -> Net:
    torch.manual_seed(seed)
    x_all, y_all = (torch.from_numpy(array) for array in demo_data.generate("train", images, seed))
    x_held, y_held = (torch.from_numpy(array) for array in demo_data.generate("calibration", 1000, seed))
    net = Net().to(memory_format=torch.channels_last)
    # Weight decay is what lets half of the blocks go without retraining.
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.05)
    steps = epochs * (images // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    started = time.time()
    for epoch in range(epochs):
        net.train()
        order = torch.randperm(images)
        total = 0.0
        for chosen in order[: images // batch * batch].split(batch):
            # The classes are those of shapes up to rotation and mirroring.
            x = torch.rot90(x_all[chosen], int(torch.randint(4, ())), (2, 3))
            if torch.randint(2, ()):
                x = x.flip(3)
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(net(x.contiguous(memory_format=torch.channels_last)), y_all[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        net.eval()
        with torch.inference_mode():
            held = (net(x_held).argmax(1) == y_held).float().mean().item()
        loss = total * batch / images
        print(f"epoch {epoch + 1:3} loss {loss:.4f} held-out {held:.4f} {time.time() - started:.0f} s", flush=True)
    return net


def accuracy(model: onnx.ModelProto, count: int = 2000) -> float:
    """Share of test images right, under ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x, y = demo_data.generate("test", count)
    logits = np.concatenate([session.run(None, {"input": image[None]})[0] for image in x])
    return float((logits.argmax(1) == y).mean())


def without_blocks(weights: dict[str, NDArray[np.float32]], sparsity: float) -> dict[str, NDArray[np.float32]]:
    """In each prunable layer drop the share `sparsity` of its blocks of 4 output channels x 1, the smallest first."""
    pruned = dict(weights)
    for layer in LAYERS[1:]:
        if layer.groups == 1:
            weight = weights[f"{layer.name}.weight"]
            blocks = weight.reshape(layer.outputs // 4, 4, -1)
            score = np.abs(blocks).sum(axis=1)
            limit = np.sort(score, axis=None)[int(sparsity * score.size)]
            pruned[f"{layer.name}.weight"] = (blocks * (score >= limit)[:, None, :]).reshape(weight.shape)
    return pruned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=30000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parents[1] / "models" / "demo.onnx")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    weights = train(options.images, options.epochs, options.seed).folded()
    model = assemble(weights)
    onnx.save(model, options.output)
    print(f"{options.output}: {options.output.stat().st_size} bytes, test accuracy {accuracy(model):.4f}")
    for sparsity in (0.3, 0.5, 0.8, 0.9):
        print(f"4x1 sparsity {sparsity:.0%}: {accuracy(assemble(without_blocks(weights, sparsity))):.4f}")


if __name__ == "__main__":
    main()
