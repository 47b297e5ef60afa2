"""The graph as a torch module: outputs, hooks, memory, replaced constants, real networks."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper, parser
from torch.nn import functional

from graph_tools.errors import ModelError, UnsupportedOperatorError
from graph_tools.model import load
from graph_tools.torch_graph import Step, TorchGraph


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small batches: threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
small (float[N, 2, 6, 6] x) => (float[N, 3] y)
<float[3, 2, 3, 3] w, float low = {0.0}, float high = {0.5}, int64[2] shape = {0, -1},
 float[48, 3] m, float[3] unused = {1.0, 2.0, 3.0}>
{
    [conv] c = Conv <pads = [0, 0, 0, 0]> (x, w)
    [clip] r = Clip (c, low, high)
    [flat] f = Reshape (r, shape)
    [gemm] y = Gemm (f, m)
    [side] s = Sigmoid (c)
}
"""


def _small() -> onnx.ModelProto:
    proto = parser.parse_model(TEXT)
    random = np.random.default_rng(0)
    for tensor, shape in (("w", (3, 2, 3, 3)), ("m", (48, 3))):
        values = random.standard_normal(shape).astype(np.float32) / 4
        proto.graph.initializer.append(numpy_helper.from_array(values, tensor))
    declared = [value for value in proto.graph.input if value.name in ("w", "m")]
    for value in declared:
        proto.graph.input.remove(value)
    return proto


def _constant(proto: onnx.ModelProto, name: str) -> torch.Tensor:
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    return torch.from_numpy(numpy_helper.to_array(tensor).copy())


@pytest.fixture
def proto() -> onnx.ModelProto:
    return _small()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(4, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def test_computes_the_graph_outputs_and_gradients(
    proto: onnx.ModelProto, x: torch.Tensor
) -> None:
    graph = TorchGraph(proto)
    assert (graph.input_names, graph.output_names) == (("x",), ("y",))
    ours, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
    results = graph(ours)
    convolved = functional.conv2d(reference, _constant(proto, "w"))
    expected = convolved.clamp(0, 0.5).flatten(1)[:, :48] @ _constant(proto, "m")
    assert list(results) == ["y"]
    torch.testing.assert_close(results["y"], expected)
    results["y"].square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(ours.grad, reference.grad)


def test_only_needed_steps_and_constants_are_kept(proto: onnx.ModelProto) -> None:
    graph = TorchGraph(proto)
    assert [step.name for step in graph.steps] == ["conv", "clip", "flat", "gemm"]
    assert set(graph.constants) == {"w", "low", "high", "shape", "m"}
    assert not any(value.requires_grad for value in graph.constants.values())
    assert [step.name for step in TorchGraph(proto, outputs=["c"]).steps] == ["conv"]


def test_any_tensors_may_be_outputs(proto: onnx.ModelProto, x: torch.Tensor) -> None:
    results = TorchGraph(proto, outputs=["s", "x", "c", "w"])(x)
    assert list(results) == ["s", "x", "c", "w"]
    torch.testing.assert_close(results["s"], results["c"].sigmoid())
    assert results["x"] is x
    torch.testing.assert_close(results["w"], _constant(proto, "w"))


def test_steps_describe_the_nodes(proto: onnx.ModelProto) -> None:
    step = TorchGraph(proto).steps[0]
    assert (step.op_type, step.inputs, step.outputs) == ("Conv", ("x", "w"), ("c",))
    assert dict(step.attributes) == {"pads": (0, 0, 0, 0)}


def test_nodes_may_be_in_any_order(proto: onnx.ModelProto, x: torch.Tensor) -> None:
    expected = TorchGraph(proto)(x)["y"]
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert torch.equal(TorchGraph(proto)(x)["y"], expected)


def test_graphs_deeper_than_the_recursion_limit() -> None:
    nodes = [onnx.helper.make_node("Neg", [f"t{i}"], [f"t{i + 1}"]) for i in range(3000)]
    info = [onnx.helper.make_tensor_value_info(n, 1, [1]) for n in ("t0", "t3000")]
    graph = onnx.helper.make_graph(nodes, "deep", info[:1], info[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])
    assert TorchGraph(model)(torch.ones(1))["t3000"] == 1


# -- hooks ---------------------------------------------------------------------------------------


def test_hook_sees_inputs_and_step_outputs_in_order(
    proto: onnx.ModelProto, x: torch.Tensor
) -> None:
    seen: dict[str, torch.Size] = {}

    def hook(name: str, value: torch.Tensor) -> torch.Tensor:
        seen[name] = value.shape
        return value

    graph = TorchGraph(proto)
    assert torch.equal(graph(x, hook=hook)["y"], graph(x)["y"])
    assert list(seen) == ["x", "c", "r", "f", "y"]
    assert seen["c"] == (4, 3, 4, 4)


def test_what_the_hook_returns_is_used(proto: onnx.ModelProto, x: torch.Tensor) -> None:
    graph = TorchGraph(proto, outputs=["c", "s"])
    doubled = graph(x, hook=lambda name, value: value * 2 if name == "c" else value)
    plain = graph(x)
    torch.testing.assert_close(doubled["c"], plain["c"] * 2)
    torch.testing.assert_close(doubled["s"], (plain["c"] * 2).sigmoid())


def test_gradients_pass_through_a_hook(proto: onnx.ModelProto, x: torch.Tensor) -> None:
    gates: list[torch.Tensor] = []

    def hook(name: str, value: torch.Tensor) -> torch.Tensor:
        if name == "r":
            gates.append(value * torch.full_like(value, 0.5, requires_grad=True))
            gates[-1].retain_grad()
            return gates[-1]
        return value

    TorchGraph(proto)(x, hook=hook)["y"].sum().backward()
    assert gates[0].grad is not None
    assert gates[0].grad.abs().sum() > 0


# -- one step at a time ----------------------------------------------------------------------------


def test_run_step_equals_forward(proto: onnx.ModelProto, x: torch.Tensor) -> None:
    graph = TorchGraph(proto)
    values = {"x": x}
    for step in graph.steps:
        values.update(zip(step.outputs, graph.run_step(step, values), strict=True))
    assert torch.equal(values["y"], graph(x)["y"])


def test_run_step_takes_other_constants(proto: onnx.ModelProto, x: torch.Tensor) -> None:
    graph = TorchGraph(proto)
    conv, clip, flat, _ = graph.steps
    weight = torch.ones(3, 2, 3, 3, requires_grad=True)
    (c,) = graph.run_step(conv, {"x": x, "w": weight})
    torch.testing.assert_close(c, functional.conv2d(x, weight))
    c.sum().backward()
    assert weight.grad is not None
    # the bounds and the shape were read when the graph was built
    c = c.detach()
    (clipped,) = graph.run_step(clip, {"c": c, "high": torch.tensor(0.25)})
    torch.testing.assert_close(clipped, c.clamp(0, 0.25))
    (row,) = graph.run_step(flat, {"r": clipped, "shape": torch.tensor([-1])})
    assert row.shape == (4 * 48,)
    assert torch.equal(graph.run_step(clip, {"c": c})[0], c.clamp(0, 0.5))


def test_errors_inside_a_step_name_the_node(proto: onnx.ModelProto) -> None:
    with pytest.raises(RuntimeError) as caught:
        TorchGraph(proto)(torch.zeros(1, 5, 6, 6))
    assert "Conv node 'conv'" in "".join(caught.value.__notes__)


# -- types and devices -----------------------------------------------------------------------------


def test_constants_follow_the_module_and_shapes_do_not(proto: onnx.ModelProto) -> None:
    graph = TorchGraph(proto).double()
    assert graph.constants["w"].dtype == torch.float64
    assert graph.constants["shape"].dtype == torch.int64
    assert graph(torch.zeros(1, 2, 6, 6, dtype=torch.float64))["y"].dtype == torch.float64
    moved = TorchGraph(proto).to("meta")
    assert moved.constants["w"].device.type == "meta"
    assert moved.constants["shape"].device.type == "cpu"
    assert moved(torch.zeros(5, 2, 6, 6, device="meta"))["y"].shape == (5, 3)


def test_shape_chains_stay_on_the_cpu_and_indices_follow_the_data() -> None:
    model = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 21]>
    chain (float[N, 4, 3] x) => (float[N, 12] y, float[N, 2, 3] picked)
    <int64 first = {0}, int64[1] axis = {0}, int64[1] rest = {-1}, int64[2] order = {3, -4}>
    {
        shape = Shape (x)
        batch = Gather (shape, first)
        one = Unsqueeze (batch, axis)
        target = Concat <axis = 0> (one, rest)
        y = Reshape (x, target)
        picked = Gather <axis = 1> (x, order)
    }
    """)
    graph = TorchGraph(model, outputs=["y", "picked", "target"]).to("meta")
    for _ in range(2):  # the second time from the cache of moved constants
        results = graph(torch.zeros(2, 4, 3, device="meta"))
        assert results["target"].tolist() == [2, -1]
        assert results["y"].shape == (2, 12)
        assert (results["picked"].shape, results["picked"].device.type) == ((2, 2, 3), "meta")
    x = torch.arange(24.0).reshape(2, 4, 3)
    assert torch.equal(TorchGraph(model)(x)["picked"], x[:, [3, 0]])


def test_a_copy_runs_alone(proto: onnx.ModelProto, x: torch.Tensor) -> None:
    graph = TorchGraph(proto)
    expected = graph(x)["y"]
    duplicate = copy.deepcopy(graph)
    graph.constants["w"].zero_()
    assert torch.equal(duplicate(x)["y"], expected)
    assert not torch.equal(graph(x)["y"], expected)


# -- memory ----------------------------------------------------------------------------------------


def _chain(length: int) -> onnx.ModelProto:
    nodes = [onnx.helper.make_node("Exp", [f"t{i}"], [f"t{i + 1}"]) for i in range(length)]
    info = [onnx.helper.make_tensor_value_info(n, 1, [8]) for n in ("t0", f"t{length}")]
    graph = onnx.helper.make_graph(nodes, "chain", info[:1], info[1:])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)])


def test_values_are_freed_after_their_last_use() -> None:
    values: dict[str, weakref.ref[torch.Tensor]] = {}
    alive: dict[str, set[str]] = {}

    def hook(name: str, value: torch.Tensor) -> torch.Tensor:
        alive[name] = {key for key, reference in values.items() if reference() is not None}
        values[name] = weakref.ref(value)
        return value

    graph = TorchGraph(_chain(6), outputs=["t2", "t6"])
    with torch.no_grad():
        results = graph(torch.zeros(8), hook=hook)
    # t0 is the caller's; a step's input lives while the step runs, an output to the end
    assert [alive[f"t{index}"] - {"t0"} for index in range(1, 7)] == [
        set(),
        {"t1"},
        {"t2"},
        {"t2", "t3"},
        {"t2", "t4"},
        {"t2", "t5"},
    ]
    assert set(results) == {"t2", "t6"}


def test_nothing_outlives_the_backward_pass() -> None:
    values: list[weakref.ref[torch.Tensor]] = []

    def hook(name: str, value: torch.Tensor) -> torch.Tensor:
        values.append(weakref.ref(value))
        return value

    x = torch.zeros(8, requires_grad=True)
    (y,) = TorchGraph(_chain(5))(x, hook=hook).values()
    y.sum().backward()
    del y
    gc.collect()
    assert [reference() for reference in values[1:]] == [None] * 5


# -- refusals --------------------------------------------------------------------------------------


def test_all_missing_operators_are_named_at_once(proto: onnx.ModelProto) -> None:
    make = onnx.helper.make_node
    proto.graph.node.extend(
        [
            make("Magic", ["y"], ["a"], domain="com.acme"),
            make("Multinomial", ["a"], ["b"]),
            make("StringNormalizer", ["b"], ["d"]),
        ]
    )
    proto.graph.output[0].name = "d"
    with pytest.raises(UnsupportedOperatorError) as caught:
        TorchGraph(proto)
    assert caught.value.missing == ("Multinomial", "StringNormalizer", "com.acme:Magic")
    assert TorchGraph(proto, outputs=["y"]).steps  # what is not needed does not matter


def test_unknown_outputs_are_refused(proto: onnx.ModelProto) -> None:
    with pytest.raises(ModelError, match="no tensor 'nowhere'"):
        TorchGraph(proto, outputs=["nowhere"])


def test_the_number_of_inputs_is_checked(proto: onnx.ModelProto, x: torch.Tensor) -> None:
    with pytest.raises(ModelError, match=r"input\(s\) x, got 2"):
        TorchGraph(proto)(x, x)


def test_old_opsets_are_refused_where_they_differ(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 11
    with pytest.raises(ModelError, match=r"opset 11 is too old to run .*Gemm, Reshape"):
        TorchGraph(proto)


def test_training_mode_is_refused() -> None:
    model = parser.parse_model("""
    <ir_version: 10, opset_import: ["" : 21]>
    training (float[N, 2] x, float[2] s) => (float[N, 2] y)
    { [bn] y = BatchNormalization <training_mode = 1> (x, s, s, s, s) }
    """)
    with pytest.raises(ModelError, match=r"'bn'.*training mode"):
        TorchGraph(model)


# -- real networks ---------------------------------------------------------------------------------

NETWORKS = (
    "cifar10_resnet20",
    "cifar10_resnet20_folded",
    "cifar10_resnet56",
    "mcunet_cifar10_32",
    "mlperftiny_resnet8_cifar10_tf2onnx_bn",
    "mobilenet_v1_025_224_imagenet",
    "ultraface_rfb320",
    "yolo_fastestv2_coco",
    "yunet_n_dynamic",
)
INPUT_SHAPES = {"yunet_n_dynamic": (1, 3, 160, 192)}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_equal_onnxruntime_and_run_on_another_device(
    shared_models: Path, name: str
) -> None:
    path = shared_models / f"{name}.onnx"
    model = load(path, input_shape=INPUT_SHAPES.get(name))
    batch = model.fixed_batch or 2
    random = np.random.default_rng(0)
    images = random.standard_normal((batch, *model.input.shape), dtype=np.float32)

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    parts = np.split(images, batch // (model.input.batch or batch))  # as the file wants them
    outputs = [session.run(None, {model.input.name: part}) for part in parts]
    expected = [np.concatenate(values) for values in zip(*outputs, strict=True)]

    graph = TorchGraph(model.proto)
    x = torch.from_numpy(images).requires_grad_()
    results = graph(x)
    for value, wanted in zip(results.values(), expected, strict=True):
        # 1e-6: onnxruntime's Sigmoid is an approximation, off by 1e-7 near 0
        np.testing.assert_allclose(
            value.detach().numpy(), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max() + 1e-6
        )
    torch.stack([value.square().sum() for value in results.values()]).sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()  # every image gets a gradient

    # the meta device refuses any mixture with CPU data and any look at values
    moved = graph.to("meta")(torch.zeros(images.shape, device="meta"))
    for name, value in moved.items():
        assert (value.shape, value.device.type) == (results[name].shape, "meta")


def test_an_entry_changes_what_one_node_reads_and_no_other() -> None:
    proto = _small()
    image = torch.rand(2, 2, 6, 6)
    graph = TorchGraph(proto, outputs=["r", "s", "c"])
    seen = []

    def entry(step: Step, value: torch.Tensor) -> torch.Tensor:
        seen.append(step.name)
        return value * 0 + 0.25 if step.name == "clip" else value

    plain, changed = graph(image), graph(image, entry=entry)
    assert seen == ["conv", "clip", "side"]
    assert torch.equal(changed["r"], torch.full_like(changed["r"], 0.25))
    assert torch.equal(changed["s"], plain["s"])
    assert torch.equal(changed["c"], plain["c"])
