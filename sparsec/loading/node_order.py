"""Nodes in an order in which every value is made before it is read.

ONNX asks for it, some exporters do not keep to it, and ONNX Runtime sorts. The order of what is independent stays.
"""

from __future__ import annotations

import heapq

import onnx


def sort_nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> None:
    """Sort a graph or function, and graphs inside it, in place; one with a cycle is left for the checker to refuse."""
    for node in graph.node:
        for inner in _graphs(node):
            sort_nodes(inner)
    makers = {name: i for i, node in enumerate(graph.node) for name in node.output if name}
    needs = [{makers[name] for name in _read(node) if name in makers} for node in graph.node]
    if all(max(needed, default=-1) < i for i, needed in enumerate(needs)):
        return
    readers: list[list[int]] = [[] for _ in needs]
    for i, needed in enumerate(needs):
        for maker in needed:
            readers[maker].append(i)
    left = [len(needed) for needed in needs]
    ready = [i for i, count in enumerate(left) if not count]
    order: list[int] = []
    while ready:
        order.append(heapq.heappop(ready))
        for reader in readers[order[-1]]:
            left[reader] -= 1
            if not left[reader]:
                heapq.heappush(ready, reader)
    if len(order) == len(needs):
        nodes = [onnx.NodeProto.FromString(graph.node[i].SerializeToString()) for i in order]
        del graph.node[:]
        graph.node.extend(nodes)


def _graphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]


def _read(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, itself or in the graphs inside it."""
    found = set(node.input)
    for graph in _graphs(node):
        found.update(value.name for value in graph.output)
        for inner in graph.node:
            found |= _read(inner)
    return found
