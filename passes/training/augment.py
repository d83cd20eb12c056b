"""Views of a few samples: what a teacher labels while it is being copied.

The teacher sees the same view as the student, so no label is needed and a view may be far from the original (Beyer et
al. 2021, arXiv:2106.05237: a patient and consistent teacher). For images x[N, C, H, W]:

    crop     x(A u), u in [-1, 1]^2: a window of `area` share and aspect 3/4 to 4/3, mirrored half of the time
    colour   x g + b, gain g and shift b drawn for each sample and channel, in units of the sample's deviation
    mixup    l x + (1 - l) x', x' another sample of the batch (arXiv:1710.09412)
    cutmix   a rectangle of x' replaces that of x (arXiv:1905.04899)

Other inputs know mixup only: a sum of sounds is a sound, a mirrored spectrum is not one. Everything is drawn from one
generator: the same seed gives the same views.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
COLOURS = (1, 3, 4)
SMALLEST = 16  # pixels of the shorter side; below, a crop leaves nothing to see
LONGEST = 4  # times the shorter side; longer is a spectrogram or a strip of text


@dataclass(frozen=True)
class Views:
    """How far views go. `area`: smallest share of an image in a crop. `colour`: largest gain and shift. `mix`: share of
    batches that are mixed, half by mixup and half by cutmix."""

    area: float = 0.3
    colour: float = 0.2
    mix: float = 0.5
    mirror: bool = True


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether an input [1, C, H, W] looks like a picture with its channels in front."""
    if len(shape) != 4 or shape[1] not in COLOURS:
        return False
    low, high = sorted(shape[2:])
    return low >= SMALLEST and high <= LONGEST * low


def draw_views(feeds: Mapping[str, Tensor], views: Views, generator: torch.Generator) -> dict[str, Tensor]:
    """A view of every sample; inputs [N, *shape], float ones changed alike, others as they are."""
    count = len(next(iter(feeds.values())))
    device = next(iter(feeds.values())).device
    draw = _Draw(generator, device)
    made = dict(feeds)
    for name, x in feeds.items():
        if x.is_floating_point() and is_image(tuple(x.shape[1:])):
            made[name] = _colour(_crop(x.squeeze(1), views, draw), views, draw).unsqueeze(1)
    if count > 1 and draw.one() < views.mix:
        order = torch.randperm(count, generator=generator).to(device)
        cut = draw.one() < 0.5
        share = draw.uniform(0.0, 1.0, count)
        for name, x in made.items():
            if not x.is_floating_point() or x.dim() < 2:
                continue
            if cut and is_image(tuple(x.shape[1:])):
                made[name] = _cutmix(x.squeeze(1), x.squeeze(1)[order], share, draw).unsqueeze(1)
            else:
                by = share.reshape(-1, *[1] * (x.dim() - 1))
                made[name] = by * x + (1 - by) * x[order]
    return made


class _Draw:
    """Uniform numbers from a CPU generator, the same on every device."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator, self.device = generator, device

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return (low + (high - low) * torch.rand(*shape, generator=self.generator)).to(self.device)

    def one(self) -> float:
        return float(torch.rand((), generator=self.generator))


def _crop(x: Tensor, views: Views, draw: _Draw) -> Tensor:
    """Windows resampled to the whole: theta maps the output square [-1, 1]^2 into the input's."""
    n = len(x)
    area = draw.uniform(views.area, 1.0, n)
    aspect = torch.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3), n))
    height, width = torch.sqrt(area / aspect).clamp(max=1.0), torch.sqrt(area * aspect).clamp(max=1.0)
    down, right = draw.uniform(-1.0, 1.0, n) * (1 - height), draw.uniform(-1.0, 1.0, n) * (1 - width)
    mirror = torch.where(draw.uniform(0.0, 1.0, n) < 0.5, -1.0, 1.0) if views.mirror else torch.ones(n, device=x.device)
    zero = torch.zeros_like(area)
    theta = torch.stack([torch.stack([width * mirror, zero, right], 1), torch.stack([zero, height, down], 1)], 1)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _colour(x: Tensor, views: Views, draw: _Draw) -> Tensor:
    n, c = x.shape[:2]
    spread = x.std((1, 2, 3), keepdim=True)
    gain = 1 + views.colour * (draw.uniform(-1, 1, n, 1, 1, 1) + 0.5 * draw.uniform(-1, 1, n, c, 1, 1))
    shift = views.colour * (draw.uniform(-1, 1, n, 1, 1, 1) + 0.5 * draw.uniform(-1, 1, n, c, 1, 1))
    return x * gain + shift * spread


def _cutmix(x: Tensor, other: Tensor, share: Tensor, draw: _Draw) -> Tensor:
    """A rectangle of `share` of the area, as wide as high in the units of the image."""
    n, _, h, w = x.shape
    side = torch.sqrt(share)
    top, left = draw.uniform(0, 1, n) * (1 - side), draw.uniform(0, 1, n) * (1 - side)
    rows = (torch.arange(h, device=x.device) + 0.5) / h
    columns = (torch.arange(w, device=x.device) + 0.5) / w
    high = (rows >= top[:, None]) & (rows < (top + side)[:, None])
    wide = (columns >= left[:, None]) & (columns < (left + side)[:, None])
    inside = (high[:, :, None] & wide[:, None, :])[:, None]
    return torch.where(inside, other, x)
