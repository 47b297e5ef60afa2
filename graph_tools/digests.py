"""Digests of what a file holds, written into the file: whoever reads it sees what was changed.

``metadata_props`` has one entry, ``zsq.digests``: compact JSON with the first 8 hexadecimal digits
of SHA-256 of each initializer (type, shape and values) and of each node (operator, attributes,
inputs and outputs). It finds damage and mistakes, not forgery.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from graph_tools.weights import values_of

__all__ = ["KEY", "Changes", "find_changes", "stamp"]

KEY = "zsq.digests"
_DIGITS = 8


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What is not as it was written.

    Attributes:
        tensors: initializers whose type, shape or values differ.
        nodes: nodes whose operator, attributes, inputs or outputs differ.
        missing: initializers and nodes that are gone.
    """

    tensors: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, list[str]]:
        """Plain data: the fields."""
        return {name: list(names) for name, names in vars(self).items()}


def stamp(proto: onnx.ModelProto) -> None:
    """Write the digests of a model into its metadata, in place of older ones."""
    text = json.dumps(_digests(proto), separators=(",", ":"), sort_keys=True)
    for entry in list(proto.metadata_props):
        if entry.key == KEY:
            proto.metadata_props.remove(entry)
    proto.metadata_props.add(key=KEY, value=text)


def find_changes(proto: onnx.ModelProto) -> Changes | None:
    """Compare a model with the digests in it.

    Returns:
        None for a file without digests, or with some that cannot be read.
    """
    text = next((entry.value for entry in proto.metadata_props if entry.key == KEY), "")
    try:
        written = json.loads(text)
        tensors, nodes = dict(written["tensors"]), dict(written["nodes"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    found = _digests(proto)
    return Changes(
        tensors=_differing(tensors, found["tensors"]),
        nodes=_differing(nodes, found["nodes"]),
        missing=tuple(
            name
            for before, now in ((tensors, found["tensors"]), (nodes, found["nodes"]))
            for name in before
            if name not in now
        ),
    )


def _differing(before: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(name for name, value in now.items() if before.get(name, value) != value)


def _digests(proto: onnx.ModelProto) -> dict[str, dict[str, str]]:
    graph = proto.graph
    return {
        "tensors": {entry.name: _of_array(values_of(entry)) for entry in graph.initializer},
        "nodes": {node.name or node.output[0]: _of_node(node) for node in graph.node},
    }


def _of_array(values: np.ndarray[Any, Any]) -> str:
    found = hashlib.sha256(f"{values.dtype.name}{list(values.shape)}".encode())
    found.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:_DIGITS]


def _of_node(node: onnx.NodeProto) -> str:
    attributes = sorted(
        (entry.name, entry.SerializeToString(deterministic=True)) for entry in node.attribute
    )
    parts = (node.domain, node.op_type, list(node.input), list(node.output), attributes)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:_DIGITS]
