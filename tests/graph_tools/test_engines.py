"""What both engines promise: the same interface, the same numbers, the same errors."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper, parser
from torch.nn import functional

from graph_tools.errors import ModelError, UnsupportedOperatorError
from graph_tools.ort_graph import OrtGraph
from graph_tools.torch_graph import TorchGraph

ENGINES = [
    pytest.param(TorchGraph, id="torch"),
    pytest.param(OrtGraph, id="ort", marks=pytest.mark.ort),
]
Engine = Callable[..., TorchGraph | OrtGraph]

TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
small (float[N, 2, 6, 6] x) => (float[N, 3] y)
<float low = {0.0}, float high = {0.5}, int64[2] shape = {0, -1}, float[3] extra = {1, 2, 3}>
{
    [conv] c = Conv (x, w)
    [clip] r = Clip (c, low, high)
    [flat] f = Reshape (r, shape)
    [gemm] y = Gemm (f, m)
    [side] s = Sigmoid (c)
    [best] a = ArgMax <axis = 1> (c)
}
"""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return request.param


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(3, 2, 3, 3, generator=generator) / 4,
        "m": torch.randn(48, 3, generator=generator) / 4,
    }


@pytest.fixture
def proto(weights: dict[str, torch.Tensor]) -> onnx.ModelProto:
    model = parser.parse_model(TEXT)
    for name, value in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(value.numpy(), name))
    return model


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(1))


def expected(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    convolved = functional.conv2d(x, weights["w"])
    return convolved.clamp(0, 0.5).flatten(1) @ weights["m"]


def gradient(loss: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(loss(leaf), leaf)[0]


def test_outputs_and_gradients(engine, proto, weights, x) -> None:
    graph = engine(proto)
    assert (graph.input_names, graph.output_names) == (("x",), ("y",))
    assert list(graph(x)) == ["y"]
    torch.testing.assert_close(graph(x)["y"], expected(x, weights))
    torch.testing.assert_close(
        gradient(lambda v: graph(v)["y"].square().sum(), x),
        gradient(lambda v: expected(v, weights).square().sum(), x),
    )


def test_any_tensors_may_be_outputs(engine, proto, weights, x) -> None:
    names = ["s", "x", "c", "w", "extra", "a", "s"]
    results = engine(proto, outputs=names)(x)
    assert list(results) == list(dict.fromkeys(names))
    convolved = functional.conv2d(x, weights["w"])
    torch.testing.assert_close(results["c"], convolved)
    torch.testing.assert_close(results["s"], convolved.sigmoid())
    assert torch.equal(results["a"], convolved.argmax(1, keepdim=True))
    assert results["x"] is x
    assert torch.equal(results["w"], weights["w"])
    assert results["extra"].tolist() == [1, 2, 3]


def test_gradients_flow_from_every_output_alone_and_together(
    engine, proto, weights, x
) -> None:
    graph = engine(proto, outputs=["y", "s", "a"])

    def ours(v: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        results = graph(v)
        assert not results["a"].requires_grad
        return sum(results[name].square().sum() for name in names)

    def reference(v: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        values = {
            "y": expected(v, weights),
            "s": functional.conv2d(v, weights["w"]).sigmoid(),
        }
        return sum(values[name].square().sum() for name in names)

    for names in (("y",), ("s",), ("y", "s")):
        torch.testing.assert_close(
            gradient(lambda v, n=names: ours(v, n), x),
            gradient(lambda v, n=names: reference(v, n), x),
        )


def test_outputs_without_gradient(engine, proto, x) -> None:
    graph = engine(proto, outputs=["a"])
    result = graph(x.requires_grad_())["a"]
    assert not result.requires_grad
    assert result.shape == (4, 1, 4, 4)


def test_outputs_that_need_no_node(engine, proto, weights, x) -> None:
    results = engine(proto, outputs=["x", "w"])(x)
    assert results["x"] is x
    assert torch.equal(results["w"], weights["w"])
    assert engine(proto, outputs=[])(x) == {}


def test_only_what_the_outputs_need_must_be_known(engine, proto) -> None:
    make = onnx.helper.make_node
    magic = make("Magic", ["y"], ["b"], domain="com.acme")
    proto.graph.node.extend([magic, make("StringNormalizer", ["b"], ["d"])])
    assert engine(proto, outputs=["y"]).output_names == ("y",)
    with pytest.raises(UnsupportedOperatorError) as caught:
        engine(proto, outputs=["d"])
    assert {name.split(":")[-1] for name in caught.value.missing} == {
        "Magic",
        "StringNormalizer",
    }


def test_nodes_may_be_in_any_order(engine, proto, weights, x) -> None:
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    torch.testing.assert_close(engine(proto)(x)["y"], expected(x, weights))


def test_the_model_is_not_changed(engine, proto, x) -> None:
    before = proto.SerializeToString()
    engine(proto)(x)
    assert proto.SerializeToString() == before


def test_several_batch_sizes_in_one_run(engine, proto, weights, x) -> None:
    graph = engine(proto)
    leaves = [x[:n].clone().requires_grad_() for n in (4, 1, 4, 3)]
    losses = [graph(leaf)["y"].square().sum() for leaf in leaves]
    for leaf, loss in reversed(list(zip(leaves, losses, strict=True))):
        loss.backward()
        torch.testing.assert_close(
            leaf.grad, gradient(lambda v: expected(v, weights).square().sum(), leaf.detach())
        )


def test_strided_inputs_and_gradients(engine, proto, weights, x) -> None:
    graph = engine(proto, outputs=["c"])
    strided = x.contiguous(memory_format=torch.channels_last)
    factor = torch.randn(4, 4, 4, 3, generator=torch.Generator().manual_seed(2))

    def loss(c: torch.Tensor) -> torch.Tensor:
        return (c.permute(0, 2, 3, 1) * factor).sum()  # its gradient is strided, too

    torch.testing.assert_close(
        gradient(lambda v: loss(graph(v)["c"]), strided),
        gradient(lambda v: loss(functional.conv2d(v, weights["w"])), strided),
    )
    torch.testing.assert_close(  # expanded: a gradient of a single number in memory
        gradient(lambda v: graph(v)["c"].sum(), x),
        gradient(lambda v: functional.conv2d(v, weights["w"]).sum(), x),
    )


def test_a_graph_may_be_differentiated_twice(engine, proto, x) -> None:
    leaf = x.clone().requires_grad_()
    loss = engine(proto)(leaf)["y"].square().sum()
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(first, second)


def test_results_stay_what_they_are(engine, proto, x) -> None:
    graph = engine(proto, outputs=["c", "r", "s", "y"])
    leaf = x.clone().requires_grad_()
    results = graph(leaf)
    copies = {name: value.detach().clone() for name, value in results.items()}
    gradients = [torch.ones_like(value) for value in results.values()]
    graph(x * 2)
    torch.autograd.backward(list(results.values()), gradients)
    received = leaf.grad.clone()
    graph((x * 3).requires_grad_())["y"].sum().backward()
    del graph
    gc.collect()
    for name, value in results.items():
        assert torch.equal(value, copies[name]), name
    assert all(bool((value == 1).all()) for value in gradients)
    assert torch.equal(leaf.grad, received)


def test_changes_in_place_are_noticed(engine, proto, x) -> None:
    graph = engine(proto, outputs=["s", "y"])
    leaf = x.clone().requires_grad_()
    results = graph(leaf)
    with torch.no_grad():
        results["s"].zero_()  # the gradient of Sigmoid is computed from its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results["s"].sum().backward()


def test_no_gradient_is_kept_without_need(engine, proto, x) -> None:
    with torch.no_grad():
        assert not engine(proto)(x.requires_grad_())["y"].requires_grad
    assert not engine(proto)(x.detach())["y"].requires_grad


def test_shape_arithmetic_follows_the_batch(engine) -> None:
    model = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 21]>
    chain (float[N, 4, 3] x) => (float[N, 12] y)
    <int64 first = {0}, int64[1] axis = {0}, int64[1] rest = {-1}>
    {
        shape = Shape (x)
        batch = Gather (shape, first)
        one = Unsqueeze (batch, axis)
        target = Concat <axis = 0> (one, rest)
        flat = Reshape (x, target)
        y = Mul (flat, flat)
    }
    """)
    graph = engine(model)
    for batch in (1, 3):
        x = torch.arange(batch * 12.0).reshape(batch, 4, 3)
        assert torch.equal(graph(x)["y"], x.reshape(batch, 12) ** 2)
        torch.testing.assert_close(gradient(lambda v: graph(v)["y"].sum(), x), 2 * x)


def test_fixed_batch(engine, proto, weights, x) -> None:
    dim = proto.graph.input[0].type.tensor_type.shape.dim[0]
    dim.Clear()
    dim.dim_value = 4
    torch.testing.assert_close(engine(proto)(x)["y"], expected(x, weights))


def test_two_inputs(engine) -> None:
    model = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 21]>
    two (float[N, 3] p, float[N, 3] q) => (float[N, 3] y) { t = Mul (p, q)  y = Exp (t) }
    """)
    p, q = (torch.randn(2, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    p.requires_grad_()
    graph = engine(model)
    assert graph.input_names == ("p", "q")
    result = graph(p, q)["y"]
    torch.testing.assert_close(result, (p * q).exp())
    torch.testing.assert_close(torch.autograd.grad(result.sum(), p)[0], q * (p * q).exp())


def test_unknown_outputs_are_refused(engine, proto) -> None:
    with pytest.raises(ModelError, match="no tensor 'nowhere'"):
        engine(proto, outputs=["nowhere"])


def test_the_number_of_inputs_is_checked(engine, proto, x) -> None:
    with pytest.raises(ModelError, match=r"input\(s\) x, got 2"):
        engine(proto)(x, x)


def test_deep_graphs(engine) -> None:
    names = [f"t{i}" for i in range(1500)]
    nodes = [onnx.helper.make_node("Neg", [a], [b]) for a, b in pairwise(names)]
    info = [onnx.helper.make_tensor_value_info(n, 1, [1]) for n in (names[0], names[-1])]
    made = onnx.helper.make_graph(nodes, "deep", info[:1], info[1:])
    opsets = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(made, opset_imports=opsets, ir_version=10)
    assert np.allclose(engine(model)(torch.ones(1))[names[-1]].numpy(), -1)
