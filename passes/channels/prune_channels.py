"""Remove whole channels, through every layer that they are coupled with.

A unit u of a class (`couple(graph, cut=True)`) is one channel: rows of the layers that make it, columns of those that
read it. Each of these axes of a layer's weight W has an energy, sum of s over the rows or columns that are left, with
s = w^2, or with calibration data w^2 E[x^2] of the input x that the weight multiplies. Removing units costs

    D = - sum over layers and both axes of log(energy left / energy of all)

so halving one layer costs as much as halving another, and emptying one costs more than thinning several. Greedily, the
least important units of a class (least sum of their shares of energy) go in bundles; of all classes the bundle with the
least D per saving goes first, until the asked share of multiply-adds or of weights is gone. Bundles leave every count a
multiple of `round_to`, by default what the target's vectors hold.

With `dead`, nothing is chosen: only channels of an already masked model go that nobody would miss, because every column
that reads them is zero, or they hold a constant (`constant_channels`) that the reading layer's bias can take over

    b'[o] = b[o] + sum over k of W[o, u, k] c[u]          (not where c != 0 meets padding: that channel stays)

and the function stays. The cut model equals the model with the same rows and columns set to zero (`cut.silence`).
DepGraph: Fang et al. 2023, arXiv:2301.12900; OTO: Chen et al. 2023, arXiv:2305.18030; energy of inputs: Wanda, Sun et
al. 2023, arXiv:2306.11695.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir

from sparsec.errors import RecipeError
from sparsec.passes.channels.channel_choice import Choice, input_energy, work
from sparsec.passes.channels.constant_channels import constant_channels
from sparsec.passes.channels.coupling import ChannelClass, couple
from sparsec.passes.channels.cut import Removal, cut
from sparsec.passes.channels.dead_channels import dead_units, fold_into_biases
from sparsec.rewriting.passes_api import Context, Pass, PassResult

DEFAULT_FLOPS = 0.5
DEFAULT_WIDTH = 8  # float32 lanes without a target


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove whole channels through all layers they are coupled with; the model gets smaller and faster anywhere.

    `flops`: share of multiply-adds to remove (0.5 if nothing is asked for), or `sparsity`: share of weights. `dead`:
    only channels that carry nothing in a masked model. `round_to`: counts that stay are multiples of it; 0: the
    target's vector width, 8 without one. `floor`: share of its channels that a class keeps. `importance`: magnitude or
    activation (needs calibration data); empty: activation if there is data. `include`, `exclude`: globs over the nodes
    that make the channels.
    """

    name: ClassVar[str] = "prune-channels"

    flops: float = 0.0
    sparsity: float = 0.0
    dead: bool = False
    round_to: int = 0
    floor: float = 0.1
    importance: Literal["", "magnitude", "activation"] = ""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("flops", "sparsity", "floor"):
            if not 0 <= getattr(self, key) < 1:
                raise RecipeError(f"prune-channels: {key} is a share from 0 to below 1, got {getattr(self, key)}")
        if (self.flops > 0) + (self.sparsity > 0) + self.dead > 1:
            raise RecipeError("prune-channels: give one of flops, sparsity and dead")
        if self.round_to < 0:
            raise RecipeError(f"prune-channels: round_to is a number of channels, got {self.round_to}")
        if self.importance not in ("", "magnitude", "activation"):
            raise RecipeError(f"prune-channels: importance must be magnitude or activation, got {self.importance!r}")

    @property
    def exact(self) -> bool:  # type: ignore[override]  # a constant of other passes; here `dead` keeps the function
        """Whether the outputs stay equal."""
        return self.dead

    def call(self, model: ir.Model) -> PassResult:
        context = Context.of(model)
        before = work(model.graph)
        removals = self.choose(model, context)
        if self.dead and removals:
            fold_into_biases(model.graph, removals)  # may make biases, which are cut as well
            removals = dead_units(self._classes(model), self._width(context), {})
        cut(model.graph, removals)
        after = work(model.graph)
        for units, removed in removals:
            gone = int(removed.sum())
            context.records.append({"channels of": units.name, "before": units.size, "after": units.size - gone})
        context.records.append(
            {"multiply_adds": [before.multiply_adds, after.multiply_adds], "weights": [before.weights, after.weights]}
        )
        return PassResult(model, bool(removals))

    def choose(self, model: ir.Model, context: Context) -> list[Removal]:
        """The channels that go, of one coupling of the graph as it is; nothing is changed."""
        classes, width = self._classes(model), self._width(context)
        if self.dead:
            return dead_units(classes, width, constant_channels(model.graph))
        if self.importance == "activation" and context.calibration is None:
            raise RecipeError("prune-channels: importance=activation needs calibration data (--calibration)")
        energy = {}
        if self.importance != "magnitude" and context.calibration is not None:
            energy = input_energy(model, context)
        choice = Choice(model.graph, classes, energy, width, self.floor, self.sparsity > 0)
        target = self.sparsity or self.flops or DEFAULT_FLOPS
        reached = choice.run(target, context)
        if reached < target:
            what = "weights" if self.sparsity else "multiply-adds"
            raise RecipeError(
                f"at most {reached:.3f} of the {what} can be removed with floor={self.floor} and round_to={width}, "
                f"got {target}; lower one of them"
            )
        return choice.removals()

    def _width(self, context: Context) -> int:
        return self.round_to or (context.target.machine.lanes if context.target is not None else DEFAULT_WIDTH)

    def _classes(self, model: ir.Model) -> list[ChannelClass]:
        """Classes that may be thinned; RecipeError with the most frequent reasons if there is none."""
        classes, refused = [], Counter[str]()
        for units in couple(model.graph, cut=True).classes:
            names = [str(use.node.name) for use in units.producers]
            if units.pinned:
                refused[units.pinned] += 1
            elif not units.consumers:
                refused["are read by no layer with a weight"] += 1
            elif any(fnmatch.fnmatchcase(n, glob) for glob in self.exclude for n in names):
                refused[f"are excluded by {'+'.join(self.exclude)}"] += 1
            elif self.include and not any(fnmatch.fnmatchcase(n, glob) for glob in self.include for n in names):
                refused[f"are not named by include={'+'.join(self.include)}"] += 1
            else:
                classes.append(units)
        if not classes:
            why = "; ".join(f"{count} {reason}" for reason, count in refused.most_common(3)) or "it has no weights"
            raise RecipeError(f"no class of channels may be removed: {why}")
        return classes
