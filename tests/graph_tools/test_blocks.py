"""Blocks are found on the graph: known architectures, and random graphs that must still run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graph_tools.blocks import find_blocks, find_layers
from graph_tools.model import load
from graph_tools.prepare import prepare_for_quantization
from graph_tools.torch_graph import TorchGraph

RNG = np.random.default_rng(0)


class Network:
    """Writes convolutions, named by their order, and joins, and returns the graph."""

    def __init__(self, channels: int = 4) -> None:
        self.nodes: list = []
        self.weights: list = []
        self.input_channels = channels

    def conv(self, x, out, inner, *, kernel=3, stride=1, group=1):
        name = f"conv{len(self.convs)}"
        shape = (out, inner // group, kernel, kernel)
        values = RNG.normal(0, 1 / np.sqrt(np.prod(shape[1:])), shape).astype(np.float32)
        self.weights.append(numpy_helper.from_array(values, f"{name}_w"))
        pads, strides = [kernel // 2] * 4, [stride] * 2
        return self.op("Conv", [x, f"{name}_w"], name, pads=pads, strides=strides, group=group)

    def op(self, kind, inputs, name="", outputs=1, **attributes):
        name = name or f"{kind.lower()}{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, values):
        name = f"constant{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    @property
    def convs(self):
        return [node.name for node in self.nodes if node.op_type == "Conv"]

    def graph(self, *outputs):
        info = helper.make_tensor_value_info
        x = info("x", TensorProto.FLOAT, [2, self.input_channels, 8, 8])
        results = [info(name, TensorProto.FLOAT, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", [x], results, self.weights)
        return TorchGraph(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        )


def layers_of(blocks):
    return [[int(name.removeprefix("conv")) for name in block.layers] for block in blocks]


def test_a_chain_is_cut_behind_every_activation():
    n = Network()
    y = "x"
    for _ in range(3):
        y = n.op("Relu", [n.conv(y, 4, 4)])
    blocks = find_blocks(n.graph(y), n.convs)
    assert layers_of(blocks) == [[0], [1], [2]]
    assert [len(block.steps) for block in blocks] == [2, 2, 2]
    assert blocks[1].inputs == blocks[0].outputs


@pytest.mark.parametrize("shortcut", ["identity", "convolution", "slice and pad"])
def test_residual_blocks(shortcut):
    n = Network()
    stem = n.op("Relu", [n.conv("x", 4, 4)])
    inner = n.op("Relu", [n.conv(stem, 4, 4)])
    other = stem
    if shortcut == "convolution":
        other = n.conv(stem, 4, 4, kernel=1)
    if shortcut == "slice and pad":
        ends = n.constant([0]), n.constant([3]), n.constant([1])
        other = n.op(
            "Pad", [n.op("Slice", [stem, *ends]), n.constant([0, 0, 0, 0, 0, 1, 0, 0])]
        )
    joined = n.op("Relu", [n.op("Add", [n.conv(inner, 4, 4), other])])
    last = n.conv(joined, 4, 4)
    blocks = find_blocks(n.graph(last), n.convs)
    middle = [1, 2, 3] if shortcut == "convolution" else [1, 2]
    found = [sorted(layers) for layers in layers_of(blocks)]
    assert found == [[0], middle, [middle[-1] + 1]]
    assert (blocks[1].inputs, blocks[1].outputs) == ((stem,), (joined,))
    layers = find_layers(n.graph(last), n.convs)
    assert [len(block.layers) for block in layers] == [1] * len(n.convs)


def test_inverted_residuals_with_and_without_a_sum():
    n = Network()
    y = n.conv("x", 4, 4)
    for joined in (True, False):
        wide = n.op("Relu", [n.conv(y, 16, 4, kernel=1)])
        deep = n.op("Relu", [n.conv(wide, 16, 16, group=16)])
        narrow = n.conv(deep, 4, 16, kernel=1)
        y = n.op("Add", [y, narrow]) if joined else narrow
    assert layers_of(find_blocks(n.graph(y), n.convs)) == [[0], [1, 2, 3], [4, 5, 6]]


def test_depthwise_separable_convolutions_stay_together():
    n = Network()
    y, channels = n.op("Relu", [n.conv("x", 4, 4)]), 4
    for _ in range(3):
        deep = n.op("Relu", [n.conv(y, channels, channels, group=channels)])
        y, channels = (
            n.op("Relu", [n.conv(deep, 2 * channels, channels, kernel=1)]),
            2 * channels,
        )
    assert layers_of(find_blocks(n.graph(y), n.convs)) == [[0], [1, 2], [3, 4], [5, 6]]


def test_squeeze_and_excitation_is_a_block_behind_the_layer_it_scales():
    n = Network()
    y = n.conv("x", 4, 4)
    gate = n.op("GlobalAveragePool", [y])
    gate = n.op("Relu", [n.conv(gate, 2, 4, kernel=1)])
    gate = n.op("Sigmoid", [n.conv(gate, 4, 2, kernel=1)])
    scaled = n.op("Mul", [y, gate])
    last = n.conv(scaled, 4, 4)
    assert layers_of(find_blocks(n.graph(last), n.convs)) == [[0], [1, 2], [3]]


@pytest.mark.parametrize("split", ["Split", "Gather"])
def test_shuffle_units_begin_in_front_of_the_split(split):
    n = Network()
    y = n.conv("x", 4, 4)
    for _ in range(2):
        if split == "Split":
            left, right = n.op("Split", [y], outputs=2, axis=1, num_outputs=2)
        else:
            left, right = (
                n.op("Gather", [y, n.constant(half)], axis=1) for half in ([0, 1], [2, 3])
            )
        right = n.op("Relu", [n.conv(right, 2, 2, kernel=1)])
        right = n.conv(right, 2, 2, group=2)
        right = n.op("Relu", [n.conv(right, 2, 2, kernel=1)])
        y = n.op("Concat", [left, right], axis=1)
        y = n.op("Reshape", [y, n.constant([0, 2, 2, 8, 8])])
        y = n.op(
            "Reshape", [n.op("Transpose", [y], perm=[0, 2, 1, 3, 4]), n.constant([0, 4, 8, 8])]
        )
    blocks = find_blocks(n.graph(n.conv(y, 4, 4)), n.convs)
    assert layers_of(blocks) == [[0], [1, 2, 3], [4, 5, 6], [7]]
    assert [len(block.outputs) for block in blocks] == [1, 1, 1, 1]


def test_a_pyramid_keeps_the_blocks_of_its_backbone():
    n = Network()
    levels, y = [], n.op("Relu", [n.conv("x", 4, 4)])
    for _ in range(3):
        inner = n.op("Relu", [n.conv(y, 4, 4)])
        y = n.op("Relu", [n.op("Add", [n.conv(inner, 4, 4), y])])
        y = n.op("Relu", [n.conv(y, 4, 4, stride=2)])
        levels.append(y)
    top, heads = None, []
    scales = n.constant(np.array([1, 1, 2, 2], np.float32))
    for level in reversed(levels):
        lateral = n.conv(level, 4, 4, kernel=1)
        top = (
            lateral
            if top is None
            else n.op("Add", [lateral, n.op("Resize", [top, "", scales])])
        )
        heads.append(n.conv(top, 2, 4, kernel=1))
    found = layers_of(find_blocks(n.graph(*heads), n.convs, max_layers=4))
    assert found[:7] == [[0], [1, 2], [3], [4, 5], [6], [7, 8], [9]]
    assert sorted(layer for layers in found for layer in layers) == list(range(len(n.convs)))


def test_far_joins_fall_back_to_layers():
    n = Network()
    first = n.op("Relu", [n.conv("x", 4, 4)])
    y = first
    for _ in range(5):
        y = n.op("Relu", [n.conv(y, 4, 4)])
    joined = n.op("Add", [y, first])
    assert layers_of(find_blocks(n.graph(joined), n.convs, max_layers=3)) == [
        [i] for i in range(6)
    ]
    assert layers_of(find_blocks(n.graph(joined), n.convs, max_layers=5)) == [
        [0],
        [1, 2, 3, 4, 5],
    ]


def test_nodes_kept_apart_are_in_no_block_with_weights():
    n = Network()
    y = n.conv("x", 4, 4)
    decoded = n.op("Exp", [n.op("Mul", [y, n.constant(np.float32(0.5))], "scale")], "exp")
    z = n.conv(y, 4, 4)
    blocks = find_blocks(n.graph(decoded, z), n.convs, apart={"scale", "exp"})
    assert [s.name for b in blocks if not b.layers for s in b.steps] == ["scale", "exp"]
    assert [b.outputs for b in blocks if b.layers] == [("conv0",), ("conv1",)]


@st.composite
def random_networks(draw):
    """Convolutions and elementwise nodes that read any earlier tensors."""
    n = Network()
    tensors = ["x"]
    for _ in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["conv", "depthwise", "Relu", "Add", "Mul", "Split"]))
        a = draw(st.sampled_from(tensors))
        if kind in ("conv", "depthwise"):
            tensors.append(n.conv(a, 4, 4, group=4 if kind == "depthwise" else 1))
        elif kind == "Relu":
            tensors.append(n.op("Relu", [a]))
        elif kind == "Split":
            halves = n.op("Split", [a], outputs=2, axis=1, num_outputs=2)
            tensors.append(n.op("Concat", list(reversed(halves)), axis=1))
        else:
            tensors.append(n.op(kind, [a, draw(st.sampled_from(tensors))]))
    outputs = draw(st.lists(st.sampled_from(tensors[1:]), min_size=1, max_size=3, unique=True))
    return n, outputs


def run_in_order(graph, blocks, image):
    passed = {"x": image}
    for block in blocks:
        values = {name: passed[name] for name in block.inputs}
        for step in block.steps:
            inputs = {i: values[i] for i in step.inputs if i in values}
            values.update(zip(step.outputs, graph.run_step(step, inputs), strict=False))
        passed.update((name, values[name]) for name in block.outputs)
    return passed


@settings(max_examples=150, deadline=None)
@given(random_networks(), st.integers(1, 6))
def test_blocks_run_one_after_the_other_give_what_the_graph_gives(network, max_layers):
    n, outputs = network
    graph = n.graph(*outputs)
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    wanted = graph(image)
    for blocks in (
        find_layers(graph, n.convs),
        find_blocks(graph, n.convs, max_layers=max_layers),
    ):
        assert sorted(s.name for b in blocks for s in b.steps) == sorted(
            s.name for s in graph.steps
        )
        assert all(len(b.layers) <= max_layers or len(b.layers) == 1 for b in blocks)
        passed = run_in_order(graph, blocks, image)
        for name, value in wanted.items():
            assert torch.equal(passed[name], value)


def test_a_node_stays_where_a_sum_of_its_own_layer_reads_it():
    n = Network()
    first = n.conv("x", 4, 4)
    rectified, beside = n.op("Relu", [first]), n.op("Relu", ["x"])
    later = n.conv(rectified, 4, 4)
    graph = n.graph(first, n.op("Add", [rectified, beside]), later)
    image = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    passed = run_in_order(graph, find_layers(graph, n.convs), image)
    for name, value in graph(image).items():
        assert torch.equal(passed[name], value)


def test_blocks_of_a_real_residual_network(shared_models):
    model = prepare_for_quantization(load(shared_models / "cifar10_resnet20.onnx"))
    graph = TorchGraph(model.proto)
    weighted = [s.name for s in graph.steps if s.op_type in ("Conv", "Gemm")]
    blocks = find_blocks(graph, weighted)
    assert [len(block.layers) for block in blocks] == [1, *[2] * 9, 1]
    assert all(len(block.inputs) == len(block.outputs) == 1 for block in blocks)
