"""Moments behind folded convolutions, against those of what BatchNormalization reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper

from graph_tools.batchnorm import find_batch_norms
from graph_tools.folded_taps import fold_taps
from graph_tools.model import Model
from graph_tools.torch_graph import TorchGraph
from tests.graph_tools.test_batchnorm import batch_norm, build, statistics, weight


def chain(path: Path, *, read_twice: bool = False, dead: bool = False) -> Model:
    """Conv, BN, Relu, Conv, BN; perhaps the first sum is read once more, or a scale is tiny."""
    weights = {"w": weight(5, 4, 3, 3), "u": weight(3, 5, 1, 1), "c": weight(3)}
    weights |= statistics(5, "one_") | statistics(3, "two_")
    if dead:
        weights["two_s"][1] = 1e-9
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv1", pads=[1] * 4),
        batch_norm("a", "b", "one_"),
        helper.make_node("Relu", ["b"], ["r"], name="relu"),
        helper.make_node("Conv", ["r", "u", "c"], ["d"], name="conv2"),
        batch_norm("d", "y", "two_"),
    ]
    if read_twice:
        nodes.append(helper.make_node("Sigmoid", ["a"], ["z"], name="reader"))
    return build(path, nodes, weights, outputs=("y", "z") if read_twice else ("y",))


@pytest.mark.parametrize(
    ("read_twice", "dead", "seen"),
    [
        (False, False, {"a": "b", "d": "y"}),
        (True, False, {"d": "y"}),
        (False, True, {"a": "b"}),
    ],
)
def test_moments_through_taps_are_those_of_the_inputs(
    tmp_path: Path, read_twice: bool, dead: bool, seen: dict[str, str]
) -> None:
    model = chain(tmp_path, read_twice=read_twice, dead=dead)
    sites = find_batch_norms(model)
    folded, taps = fold_taps(model, sites)

    assert {name: tap.tensor for name, tap in taps.items()} == seen
    images = torch.from_numpy(weight(6, 4, 6, 6))
    before = TorchGraph(model.proto, outputs=["a", "d", "y"])(images)
    after = TorchGraph(folded.proto, outputs=["y", *seen.values()])(images)
    torch.testing.assert_close(after["y"], before["y"], rtol=1e-4, atol=1e-4)
    for site in sites:
        if site.tensor not in taps:
            assert site.node in {node.name for node in folded.proto.graph.node}
            continue
        tap = taps[site.tensor]
        values = after[tap.tensor].double().numpy()
        mean = site.mean + tap.gain * (values.mean((0, 2, 3)) - tap.center)
        variance = tap.gain**2 * values.var((0, 2, 3))
        wanted = before[site.tensor].double().numpy()
        sigma = np.sqrt(site.variance)
        np.testing.assert_allclose(
            (mean - wanted.mean((0, 2, 3))) / sigma, 0, atol=1e-4 * (1 + tap.gain.max())
        )
        np.testing.assert_allclose(variance, wanted.var((0, 2, 3)), rtol=1e-3)


def test_of_two_nodes_in_a_row_the_first_is_folded(tmp_path: Path) -> None:
    weights = {"w": weight(5, 4, 3, 3)} | statistics(5, "one_") | statistics(5, "two_")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv1"),
        batch_norm("a", "b", "one_"),
        batch_norm("b", "y", "two_"),
    ]
    model = build(tmp_path, nodes, weights)
    folded, taps = fold_taps(model, find_batch_norms(model))
    assert {name: tap.tensor for name, tap in taps.items()} == {"a": "b"}
    images = torch.from_numpy(weight(3, 4, 6, 6))
    after = TorchGraph(folded.proto, outputs=["b", "y"])(images)
    before = TorchGraph(model.proto, outputs=["b", "y"])(images)
    for name in ("b", "y"):
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-4)


def test_nodes_that_are_not_watched_are_folded_without_a_tap(tmp_path: Path) -> None:
    model = chain(tmp_path)
    folded, taps = fold_taps(model, find_batch_norms(model)[:1])
    assert list(taps) == ["a"]
    assert all(node.op_type != "BatchNormalization" for node in folded.proto.graph.node)
