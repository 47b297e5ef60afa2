from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from graph_tools.batchnorm import (
    AffineLeftover,
    expose_inputs,
    find_affine_leftovers,
    find_batch_norms,
    fold_batch_norms,
)
from graph_tools.errors import ModelError
from graph_tools.model import Model, initializers, load, replace_proto

RNG = np.random.default_rng(7)


def weight(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def statistics(channels: int, prefix: str = "") -> dict[str, np.ndarray]:
    return {
        f"{prefix}s": weight(channels),
        f"{prefix}b": weight(channels),
        f"{prefix}m": weight(channels),
        f"{prefix}v": (np.abs(weight(channels)) + 0.1).astype(np.float32),
    }


def batch_norm(
    source: str, target: str, prefix: str = "", **attributes: object
) -> onnx.NodeProto:
    inputs = [source, *(prefix + name for name in "sbmv")]
    return helper.make_node(
        "BatchNormalization", inputs, [target], name=f"{prefix}bn", **attributes
    )


def build(
    path: Path,
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    *,
    channels: int = 4,
    outputs: tuple[str, ...] = ("y",),
) -> Model:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("N", channels, 6, 6))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = path / "net.onnx"
    onnx.save(model, path)
    return load(path)


def run(proto: onnx.ModelProto, images: np.ndarray) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: images})


def deviation(model: Model, other: Model, count: int = 3) -> float:
    images = np.random.default_rng(1).normal(size=(count, *model.input.shape))
    images = images.astype(np.float32)
    pairs = zip(run(model.proto, images), run(other.proto, images), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def ops(model: Model) -> list[str]:
    return [node.op_type for node in model.proto.graph.node]


# ------------------------------------------------------------------------- finding


def test_sites_hold_the_statistics_of_the_file(tmp_path: Path) -> None:
    weights = {"w": weight(5, 4, 1, 1), **statistics(5), **statistics(5, "z")}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        batch_norm("a", "c", epsilon=0.01),
        batch_norm("c", "y", "z"),
    ]
    first, second = find_batch_norms(build(tmp_path, nodes, weights))
    assert (first.node, first.tensor, first.channels) == ("bn", "a", 5)
    assert (second.node, second.tensor) == ("zbn", "c")
    assert first.epsilon == pytest.approx(0.01)
    assert second.epsilon == pytest.approx(1e-5)
    for name, value in zip("sbmv", (first.scale, first.bias, first.mean, first.variance),
                           strict=True):  # fmt: skip
        assert value.dtype == np.float32
        assert np.array_equal(value, weights[name])


def test_statistics_describe_the_exposed_tensor(tmp_path: Path) -> None:
    """The formula of a site, applied to the exposed input, gives the node's output."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        batch_norm("a", "c"),
        helper.make_node("Relu", ["c"], ["y"]),
    ]
    model = build(tmp_path, nodes, {"w": weight(5, 4, 1, 1), **statistics(5)})
    (site,) = find_batch_norms(model)
    exposed = expose_inputs(model, [site])
    output, tensor = run(exposed.proto, weight(2, 4, 6, 6))
    scale, bias, mean, variance = (
        value.reshape(1, -1, 1, 1)
        for value in (site.scale, site.bias, site.mean, site.variance)
    )
    normal = scale * (tensor - mean) / np.sqrt(variance + site.epsilon) + bias
    assert np.abs(np.maximum(normal, 0) - output).max() < 1e-5


def test_exposed_tensors_are_listed_once_behind_the_outputs(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        batch_norm("a", "d"),
        batch_norm("a", "e", "z"),
        helper.make_node("Add", ["d", "e"], ["y"]),
        batch_norm("y", "y2", "q"),
    ]
    weights = statistics(4) | statistics(4, "z") | statistics(4, "q")
    model = build(tmp_path, nodes, weights, outputs=("y", "y2"))
    exposed = expose_inputs(model, find_batch_norms(model))
    assert exposed.outputs == ("y", "y2", "a")
    assert exposed.proto.graph.output[2].type.tensor_type.shape.dim[0].dim_param == "N"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("training", "BatchNormalization 'bn': is in training mode"),
        ("dynamic", "BatchNormalization 'bn': has statistics that are not constants"),
        ("negative", "BatchNormalization 'bn': has a negative variance"),
    ],
)
def test_unusable_batch_norms_are_named(tmp_path: Path, change: str, text: str) -> None:
    nodes = [helper.make_node("GlobalAveragePool", ["x"], ["p"]), batch_norm("x", "y")]
    model = build(tmp_path, nodes[1:], statistics(4))
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    node = proto.graph.node[0]
    if change == "training":
        node.attribute.append(helper.make_attribute("training_mode", 1))
        node.output.extend(["m2", "v2"])
    elif change == "dynamic":
        proto.graph.node.insert(0, helper.make_node("Abs", ["v"], ["v1"], name="abs"))
        proto.graph.node[1].input[4] = "v1"
    else:
        tensor = next(t for t in proto.graph.initializer if t.name == "v")
        tensor.CopyFrom(numpy_helper.from_array(np.full(4, -0.5, np.float32), "v"))
    with pytest.raises(ModelError, match=text):
        find_batch_norms(replace_proto(model, proto))


# ------------------------------------------------------------------------- folding

CONVS = {
    "conv": (helper.make_node("Conv", ["x", "w", "c"], ["a"]), (6, 4, 3, 3), 6),
    "conv without bias": (helper.make_node("Conv", ["x", "w"], ["a"]), (6, 4, 3, 3), 6),
    "grouped": (helper.make_node("Conv", ["x", "w", "c"], ["a"], group=2), (6, 2, 3, 3), 6),
    "depthwise": (helper.make_node("Conv", ["x", "w"], ["a"], group=4), (4, 1, 3, 3), 4),
    "depthwise times two": (
        helper.make_node("Conv", ["x", "w", "c"], ["a"], group=4), (8, 1, 3, 3), 8
    ),
    "transposed": (helper.make_node("ConvTranspose", ["x", "w", "c"], ["a"]), (4, 6, 2, 2), 6),
    "transposed grouped": (
        helper.make_node("ConvTranspose", ["x", "w"], ["a"], group=2), (4, 3, 2, 2), 6
    ),
    "transposed depthwise": (
        helper.make_node("ConvTranspose", ["x", "w", "c"], ["a"], group=4), (4, 1, 2, 2), 4
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVS)
def test_fold_into_convolution(tmp_path: Path, name: str) -> None:
    node, shape, channels = CONVS[name]
    weights = {"w": weight(*shape), "c": weight(channels), **statistics(channels)}
    model = build(tmp_path, [node, batch_norm("a", "y")], weights)
    folded = fold_batch_norms(model)
    assert ops(folded) == [node.op_type]
    assert folded.outputs == model.outputs
    assert deviation(model, folded) < 1e-5
    assert len(folded.proto.graph.initializer) == 2


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", ["none", "vector", "row", "scalar"])
def test_fold_into_gemm(tmp_path: Path, transposed: int, bias: str) -> None:
    inputs = ["f", "w"] if bias == "none" else ["f", "w", "c"]
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", inputs, ["a"], transB=transposed, alpha=0.5, beta=2.0),
        batch_norm("a", "y"),
    ]
    shapes = {"none": (5,), "vector": (5,), "row": (1, 5), "scalar": (1,)}
    weights = {"w": weight(*((5, 4) if transposed else (4, 5))), "c": weight(*shapes[bias])}
    model = build(tmp_path, nodes, weights | statistics(5))
    folded = fold_batch_norms(model)
    assert ops(folded) == ["GlobalAveragePool", "Flatten", "Gemm"]
    assert deviation(model, folded) < 1e-5


def test_two_batch_norms_in_a_row_fold(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        batch_norm("a", "b1"),
        batch_norm("b1", "y", "z"),
    ]
    weights = {"w": weight(5, 4, 3, 3), **statistics(5), **statistics(5, "z")}
    model = build(tmp_path, nodes, weights)
    folded = fold_batch_norms(model)
    assert ops(folded) == ["Conv"]
    assert deviation(model, folded) < 1e-5


def test_shared_weights_are_copied(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="one"),
        batch_norm("a", "b1"),
        helper.make_node("Conv", ["x", "w"], ["c1"], name="two"),
        batch_norm("c1", "d", "z"),
        helper.make_node("Conv", ["x", "w"], ["e"], name="plain"),
        helper.make_node("Sum", ["b1", "d", "e"], ["y"]),
    ]
    weights = {"w": weight(4, 4, 3, 3), **statistics(4), **statistics(4, "z")}
    model = build(tmp_path, nodes, weights)
    folded = fold_batch_norms(model)
    assert ops(folded) == ["Conv", "Conv", "Conv", "Sum"]
    assert np.array_equal(initializers(folded.proto)["w"], weights["w"])
    assert deviation(model, folded) < 1e-5


@pytest.mark.parametrize(
    "case", ["other consumer", "graph output", "no convolution", "rank 2"]
)
def test_what_cannot_fold_stays(tmp_path: Path, case: str) -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["a"])
    weights = {"w": weight(4, 4, 1, 1), "u": weight(4, 4), **statistics(4)}
    outputs: tuple[str, ...] = ("y",)
    match case:
        case "other consumer":
            nodes = [conv, batch_norm("a", "b1"), helper.make_node("Add", ["a", "b1"], ["y"])]
        case "graph output":
            nodes, outputs = [conv, batch_norm("a", "y")], ("y", "a")
        case "no convolution":
            nodes = [helper.make_node("Relu", ["x"], ["a"]), batch_norm("a", "y")]
        case _:
            nodes = [
                helper.make_node("GlobalAveragePool", ["x"], ["p"]),
                helper.make_node("Flatten", ["p"], ["f"]),
                helper.make_node("MatMul", ["f", "u"], ["a"]),
                batch_norm("a", "y"),
            ]
    model = build(tmp_path, nodes, weights, outputs=outputs)
    folded = fold_batch_norms(model)
    assert ops(folded) == ops(model)
    assert deviation(model, folded) == 0
    assert len(find_batch_norms(folded)) == 1


@pytest.mark.parametrize(
    "name",
    [
        "cifar10_resnet20",
        "mcunet_cifar10_32",
        "mlperftiny_resnet8_cifar10_tf2onnx_bn",
        "mobilenet_v1_025_224_imagenet",
        "ultraface_rfb320",
        "yolo_fastestv2_coco",
    ],
)
def test_fold_real_networks(shared_models: Path, name: str) -> None:
    model = load(shared_models / f"{name}.onnx")
    folded = fold_batch_norms(model)
    assert "BatchNormalization" not in ops(folded)
    # Float32 rounding only; scales up to 1e2 in the weights spend some of it.
    assert deviation(model, folded, count=2) < 1e-4


def test_folded_file_equals_torchs_own_folding(tmp_path: Path) -> None:
    """The exporter's folding is the independent reference."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, bias=False),
        torch.nn.BatchNorm2d(8),
        torch.nn.ReLU(),
        torch.nn.ConvTranspose2d(8, 6, 2, groups=2),
        torch.nn.BatchNorm2d(6),
    )
    for module in network:
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.2, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 2)
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(network[0].eval(), network[1].eval())
    path = tmp_path / "net.onnx"
    export(network.eval(), torch.zeros(1, 3, 8, 8), path)
    model = load(path)
    assert len(find_batch_norms(model)) == 2
    assert model.fixed_batch is None
    folded = fold_batch_norms(model)
    assert ops(folded) == ["Conv", "Relu", "ConvTranspose"]
    values = initializers(folded.proto)
    conv = folded.proto.graph.node[0]
    assert np.abs(values[conv.input[1]] - fused.weight.detach().numpy()).max() < 1e-6
    assert np.abs(values[conv.input[2]] - fused.bias.detach().numpy()).max() < 1e-6
    images = torch.randn(2, 3, 8, 8)
    expected = network(images).detach().numpy()
    assert np.abs(run(folded.proto, images.numpy())[0] - expected).max() < 1e-5


def export(network: torch.nn.Module, image: torch.Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (image,), str(path), dynamo=False, do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE, input_names=["x"], opset_version=17,
        )  # fmt: skip


# ------------------------------------------------------------------------- leftovers


def leftovers(
    tmp_path: Path, nodes: list[onnx.NodeProto], **shapes: tuple[int, ...]
) -> object:
    weights = {name: weight(*shape) for name, shape in shapes.items()}
    return find_affine_leftovers(build(tmp_path, nodes, weights))


def test_mul_and_add_per_channel_are_leftovers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Mul", ["a", "s"], ["b"], name="scale"),
        helper.make_node("Add", ["t", "b"], ["y"], name="shift"),
    ]
    found = leftovers(tmp_path, nodes, w=(5, 4, 1, 1), s=(1, 5, 1, 1), t=(5, 1, 1))
    assert found == (AffineLeftover(mul="scale", add="shift", tensor="a"),)


def test_leftovers_of_rank_two(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Mul", ["f", "s"], ["b"], name="scale"),
        helper.make_node("Add", ["b", "t"], ["y"], name="shift"),
    ]
    found = leftovers(tmp_path, nodes, s=(4,), t=(1, 4))
    assert found == (AffineLeftover(mul="scale", add="shift", tensor="f"),)


@pytest.mark.parametrize(
    ("scale", "shift"),
    [((1,), (4, 1, 1)), ((4, 1, 1), ()), ((6,), (6,)), ((1, 4, 6, 6), (1, 4, 1, 1))],
)
def test_other_affine_maps_are_no_leftovers(
    tmp_path: Path, scale: tuple[int, ...], shift: tuple[int, ...]
) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "s"], ["b"]),
        helper.make_node("Add", ["b", "t"], ["y"]),
    ]
    assert leftovers(tmp_path, nodes, s=scale, t=shift) == ()


def test_used_between_mul_and_add_is_no_leftover(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "s"], ["b"]),
        helper.make_node("Add", ["b", "t"], ["c"]),
        helper.make_node("Add", ["b", "c"], ["y"]),
    ]
    assert leftovers(tmp_path, nodes, s=(4, 1, 1), t=(4, 1, 1)) == ()
