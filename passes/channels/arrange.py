"""Put n units into groups of g so that what a pattern keeps is worth most: the search behind `rearrange`.

A unit u has features F[u, k] >= 0 (scores of its row in every column, of every layer that it is a row of). A group G
is a row of blocks; of all blocks of a layer the `keep` best stay. With the threshold t of that layer

    kept = keep * t + sum over groups G, k of relu(S_G[k] - t),   S_G = sum over u in G of F[u]      (least over t)

so with t held fixed only two groups change when units change places. For two groups P, Q with T = S_P + S_Q and a
split of their 2g units into halves A and B, D = (S_A - S_B) / 2,

    relu(S_A - t) + relu(S_B - t) = max(|D|, |T/2 - t|) + T/2 - t

A round pairs all groups at random, values all (2g)! / (2 g! g!) splits of every pair (only single exchanges where that
is above `SPLITS`) and takes the best ones; t follows every few rounds. The start is a greedy matching of units, then of
pairs, ... by what their masks have in common (or the given order, if that is better). With F in {0, 1} and t = 1 the
same sum is minus the number of stored blocks: that fills the blocks of a pruned model. For N:M a group keeps the N
largest features of its M = g units at every k.

Everything is a fixed number of steps with a fixed seed. Channel permutations for N:M: Pool and Yu, NeurIPS 2021; for
blocks: Ji et al., TETRIS, NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np

SPLITS = 64  # candidate splits of a pair of groups
WORK = 60_000_000  # features of units read over all rounds of one class
ROUNDS = (8, 300)  # fewest, most
CHUNK = 1 << 18  # elements of one candidate array: what the second-level cache holds
REFRESH = 4  # rounds between thresholds
SEED = 0


@dataclass(frozen=True)
class Part:
    """The features [n, k] of one layer. `keep` of its blocks stay, among them those of `others` (block sums elsewhere).

    `threshold`: fixed t instead of one that follows from `keep`.
    """

    features: np.ndarray = field(repr=False)
    others: np.ndarray = field(repr=False, default_factory=lambda: np.zeros(0, np.float32))
    keep: int = 0
    threshold: float | None = None


def arrange(parts: Sequence[Part], group: int, keep_of_group: int = 0) -> np.ndarray:
    """Units [groups, group] for n units that now stand in groups of `group` in their order; n % group == 0.

    `keep_of_group`: N of N:M, 0 for blocks.
    """
    units = len(parts[0].features)
    features = np.concatenate([p.features for p in parts], axis=1, dtype=np.float32)
    table = np.arange(units).reshape(-1, group)
    if len(table) < 2 or not features.any():
        return table
    if not keep_of_group:
        matched = _matched(parts, features, group)
        if matched is not None and _kept(parts, features, matched) > _kept(parts, features, table):
            table = matched
    rng = np.random.default_rng(SEED)
    halves = candidate_halves(group)
    work = WORK // 4 if keep_of_group else WORK
    thresholds = np.zeros(0, np.float32)
    for step in range(int(np.clip(work // features.size, *ROUNDS))):
        if step % REFRESH == 0 and not keep_of_group:
            thresholds = _thresholds(parts, features, table)
        order = rng.permutation(len(table))
        half = len(table) // 2
        pairs = np.concatenate([table[order[:half]], table[order[half : 2 * half]]], axis=1)  # [P, 2g]
        best = _best_halves(features, pairs, halves, thresholds, keep_of_group)
        mask = halves[best]
        table[order[:half]] = pairs[mask].reshape(half, group)
        table[order[half : 2 * half]] = pairs[~mask].reshape(half, group)
    table = np.sort(table, axis=1)
    return table[np.argsort(table[:, 0])]


def candidate_halves(group: int) -> np.ndarray:
    """Masks [C, 2g] of the first half; the first one leaves both groups as they are.

    >>> candidate_halves(4).shape, candidate_halves(8).shape
    ((35, 8), (65, 16))
    """
    start = np.arange(2 * group) < group
    count = int(np.prod([(group + i) / i for i in range(1, group + 1)]).round()) // 2
    if count <= SPLITS:
        chosen = [(0, *rest) for rest in combinations(range(1, 2 * group), group - 1)]
        return np.array([np.isin(np.arange(2 * group), list(c)) for c in chosen])
    masks = [start]
    for i in range(group):
        for j in range(group, 2 * group):
            mask = start.copy()
            mask[[i, j]] = False, True
            masks.append(mask)
    return np.array(masks)


def _best_halves(
    features: np.ndarray, pairs: np.ndarray, halves: np.ndarray, thresholds: np.ndarray, keep: int
) -> np.ndarray:
    """The most valuable candidate of every pair, [P]; 0 unless another one is better by more than rounding."""
    best = np.zeros(len(pairs), np.int64)
    size = max(1, CHUNK // (features.shape[1] * (pairs.shape[1] if keep else len(halves))))
    for start in range(0, len(pairs), size):
        x = features[pairs[start : start + size]]  # [p, 2g, K]
        value = _largest(x, halves, keep) if keep else _blocks(x, halves, thresholds)
        top = value.argmax(axis=1)
        each = np.arange(len(top))
        best[start : start + size] = np.where(value[each, top] > value[:, 0] * (1 + 1e-6), top, 0)
    return best


def _blocks(x: np.ndarray, halves: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """sum over k of max(|D|, |T/2 - t|), [p, C]."""
    signs = np.where(halves, np.float32(0.5), np.float32(-0.5))
    value = np.matmul(signs, x)  # [p, C, K]
    np.abs(value, out=value)
    floor = np.abs(x.sum(axis=1) / 2 - thresholds)
    np.maximum(value, floor[:, None], out=value)
    return value.sum(axis=2)


def _largest(x: np.ndarray, halves: np.ndarray, keep: int) -> np.ndarray:
    """sum over k of the `keep` largest of both halves, [p, C]."""
    group = halves.shape[1] // 2
    value = np.zeros((len(x), len(halves)), np.float32)
    for c, mask in enumerate(halves):
        for half in (np.flatnonzero(mask), np.flatnonzero(~mask)):
            if group == 4 and keep == 2:  # the two largest: both of one pair, or the larger one of each
                a, b, d, e = (x[:, i] for i in half)
                top = np.maximum(a, b)
                top += np.maximum(d, e)
                np.maximum(top, a + b, out=top)
                np.maximum(top, d + e, out=top)
                value[:, c] += top.sum(axis=1)
            else:
                value[:, c] += np.partition(x[:, half], group - keep, axis=1)[:, group - keep :].sum(axis=(1, 2))
    return value


# ---- thresholds


def _sums(part: Part, features: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Sums of all blocks of the layer."""
    total = features[table[:, 0]]
    for i in range(1, table.shape[1]):
        total = total + features[table[:, i]]
    return np.concatenate([total.reshape(-1), part.others])


def _slices(parts: Sequence[Part]) -> list[slice]:
    ends = np.cumsum([p.features.shape[1] for p in parts]).tolist()
    return [slice(b, e) for b, e in zip([0, *ends[:-1]], ends, strict=True)]


def _thresholds(parts: Sequence[Part], features: np.ndarray, table: np.ndarray) -> np.ndarray:
    """t of every feature, [K]."""
    result = np.empty(features.shape[1], np.float32)
    for part, where in zip(parts, _slices(parts), strict=True):
        if part.threshold is not None:
            result[where] = part.threshold
            continue
        sums = _sums(part, features[:, where], table)
        at = int(np.clip(sums.size - part.keep, 0, sums.size - 1))
        result[where] = np.partition(sums, at)[at]
    return result


def _kept(parts: Sequence[Part], features: np.ndarray, table: np.ndarray) -> float:
    total = 0.0
    for part, where in zip(parts, _slices(parts), strict=True):
        sums = _sums(part, features[:, where], table)
        if part.threshold is not None:
            total += float(np.maximum(sums - part.threshold, 0).sum(dtype=np.float64))
        else:
            cut = int(np.clip(sums.size - part.keep, 0, sums.size))
            total += float(np.partition(sums, min(cut, sums.size - 1))[cut:].sum(dtype=np.float64))
    return total


# ---- the start


def _matched(parts: Sequence[Part], features: np.ndarray, group: int) -> np.ndarray | None:
    """Groups by repeated matching, for powers of two: units of one group want the same blocks."""
    if group & (group - 1):
        return None
    table = np.arange(len(features))[:, None]
    while table.shape[1] < group:
        sums = features[table].sum(axis=1)
        # Of this layer's blocks of the final size, `keep` stay; a part of a block has its share of their threshold.
        limits = np.empty(features.shape[1], np.float32)
        for part, where in zip(parts, _slices(parts), strict=True):
            values = sums[:, where].reshape(-1)
            blocks = values.size * table.shape[1] // group + part.others.size
            at = int(values.size * (1 - min(part.keep / max(blocks, 1), 1.0)))
            limits[where] = 0 if part.threshold is not None else np.partition(values, min(at, values.size - 1))[at - 1]
        want = (sums > limits).astype(np.float32)
        if all(part.threshold is not None for part in parts):
            sums = want
        gain = want @ sums.T
        own = np.diagonal(gain)
        gain = gain + gain.T - own[:, None] - own[None]
        table = table[_match(gain)].reshape(-1, 2 * table.shape[1])
    return table


def _match(gain: np.ndarray) -> np.ndarray:
    """Greedy matching of a symmetric gain [n, n], n even: pairs [n/2, 2], locally best first."""
    left = np.arange(len(gain))
    gain = gain.copy()
    np.fill_diagonal(gain, -np.inf)
    pairs = []
    while left.size:
        partner = gain.argmax(axis=1)
        mutual = partner[partner] == np.arange(left.size)
        first = mutual & (np.arange(left.size) < partner)
        if not first.any():  # ties in a circle
            first[0] = True
        ends = np.flatnonzero(first)
        pairs.append(np.stack([left[ends], left[partner[ends]]], axis=1))
        rest = np.ones(left.size, bool)
        rest[ends] = rest[partner[ends]] = False
        left, gain = left[rest], gain[np.ix_(rest, rest)]
    return np.concatenate(pairs)
