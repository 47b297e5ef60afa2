"""4-bit types hold the values of 8-bit containers, and what onnxruntime cannot run is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from graph_tools.containers import container_type
from graph_tools.errors import TargetError
from graph_tools.model import load, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.quantizer import TensorQuantizer
from pipeline.images import ImageWriter, open_images
from pipeline.quantize import quantize
from pipeline.settings import QuantizeSettings, VerifySettings
from pipeline.verify import verify

RNG = np.random.default_rng(0)
BODY = (
    " c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, w2)"
    " t = ConvTranspose<strides=[2,2]>(d, up) a = AveragePool<kernel_shape=[2,2],strides=[2,2]>(t)"
    " e = Add(a, d) m = MaxPool<kernel_shape=[2,2]>(e) p = GlobalAveragePool(m) f = Flatten(p)"
    " y = Gemm<transB=1>(f, fc) "
)
ARRAYS = {
    "w": RNG.normal(size=(4, 3, 3, 3)),
    "b": RNG.normal(size=4),
    "w2": RNG.normal(size=(4, 4, 3, 3)),
    "up": RNG.normal(size=(4, 4, 2, 2)),
    "fc": RNG.normal(size=(5, 4)),
}


def run(proto, image, *, optimized: bool):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    )
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: image})[0]


@pytest.fixture
def images(tmp_path):
    with ImageWriter(tmp_path / "images.npz", count=32, shape=(3, 8, 8)) as writer:
        writer.append(RNG.normal(size=(32, 3, 8, 8)).astype(np.float32))
    return open_images(tmp_path / "images.npz")


@pytest.fixture
def network(make_model):
    def build(body: str = BODY):
        text = f"g (float[N,3,8,8] x) => (float[N,5] y) {{{body}}}"
        arrays = {
            k: v.astype(np.float32) for k, v in ARRAYS.items() if f"{k})" in body or k in "wb"
        }
        return prepare_for_quantization(make_model(text, **arrays))

    return build


@pytest.mark.parametrize(
    ("bits", "signed", "midpoint", "eight", "four"),
    [
        (8, True, False, np.int8, np.int8),
        (4, True, False, np.int8, ml_dtypes.int4),
        (4, False, False, np.uint8, ml_dtypes.uint4),
        (4, True, True, np.uint8, ml_dtypes.uint4),
        (2, True, False, np.int8, ml_dtypes.int4),
        (16, False, False, np.uint16, np.uint16),
        (32, True, False, np.int32, np.int32),
    ],
)
def test_the_type_of_a_quantizer(bits, signed, midpoint, eight, four):
    quantizer = TensorQuantizer(bits=bits, signed=signed, exponent=0)
    assert container_type(quantizer, "int8", midpoint=midpoint) == eight
    assert container_type(quantizer, "int4", midpoint=midpoint) == four


@pytest.mark.parametrize("weights", [4, 3, 2])
@pytest.mark.parametrize("activations", [4, 8])
@pytest.mark.parametrize("zero_point", ["auto", "zero"])
def test_both_containers_give_the_same_outputs(
    network, images, weights, activations, zero_point
):
    body = BODY.replace(
        "m = MaxPool<kernel_shape=[2,2]>(e) p = GlobalAveragePool(m)",
        "p = GlobalAveragePool(e)",
    )
    model = network(body if activations == 4 else BODY)
    settings = QuantizeSettings(
        weights=weights, activations=activations, zero_point=zero_point
    )
    plan = quantize(model, images, settings).plan
    eight, four = (write_qdq(model, plan, container=c) for c in ("int8", "int4"))
    types = {entry.name: entry.data_type for entry in four.graph.initializer}
    weight_types = [
        kind
        for name, kind in types.items()
        if name.endswith("_q") and kind != onnx.TensorProto.INT32
    ]
    assert set(weight_types) == {onnx.TensorProto.INT4}
    expected = run(eight, images.load(), optimized=False)
    for optimized in (False, True):
        assert np.array_equal(run(four, images.load(), optimized=optimized), expected)
    assert len(np.unique(expected)) > 3


@pytest.mark.parametrize(
    ("body", "settings", "named"),
    [
        (BODY, {"weights": 4, "activations": 4}, "MaxPool"),
        (BODY.replace("MaxPool<kernel_shape=[2,2]>", "Identity"), {"activations": 4}, "Conv"),
    ],
)
def test_what_onnxruntime_cannot_run_is_refused_by_name(
    network, images, body, settings, named
):
    model = network(body)
    plan = quantize(model, images, QuantizeSettings(**settings)).plan
    with pytest.raises(TargetError, match=f"cannot run {named}") as caught:
        write_qdq(model, plan, container="int4")
    assert caught.value.hint
    write_qdq(model, plan, container="int8")


def test_onnxruntime_still_cannot_run_what_is_refused(network, images, monkeypatch):
    """When this fails, the refusal can go."""
    monkeypatch.setattr("graph_tools.qdq.refuse_unsupported", lambda model, plan: None)
    for body, settings in (
        (BODY, {"weights": 4, "activations": 4}),
        (BODY.replace("MaxPool<kernel_shape=[2,2]>", "Identity"), {"activations": 4}),
    ):
        model = network(body)
        plan = quantize(model, images, QuantizeSettings(**settings)).plan
        proto = write_qdq(model, plan, container="int4")
        run(proto, images.load(), optimized=False)
        with pytest.raises(Exception, match="int4"):
            run(proto, images.load(), optimized=True)


@pytest.mark.parametrize("name", ["cifar10_resnet20", "mcunet_cifar10_32"])
@pytest.mark.parametrize("activations", [8, 4])
def test_real_networks_in_both_containers(shared_models, tmp_path, name, activations):
    model = prepare_for_quantization(load(shared_models / f"{name}.onnx"))
    shape = model.input.shape
    with ImageWriter(tmp_path / "i.npz", count=16, shape=shape) as writer:
        writer.append(RNG.normal(size=(16, *shape)).astype(np.float32))
    images = open_images(tmp_path / "i.npz")
    settings = QuantizeSettings(weights=4, activations=activations, bias_correction=False)
    plan = quantize(model, images, settings).plan
    outputs, sizes = [], []
    for container in ("int8", "int4"):
        path = tmp_path / f"{container}.onnx"
        save(write_qdq(model, plan, container=container), path)
        proof = verify(path, images, VerifySettings(max_images=8))
        assert proof.passed, proof.failures
        outputs.append(run(onnx.load(path), images.load(), optimized=True))
        sizes.append(path.stat().st_size)
    assert np.array_equal(*outputs)
    assert outputs[0].std() > 0
    weights = sum(c.integers.size for c in plan.constants.values() if c.role == "weight")
    assert sizes[0] - sizes[1] > 0.45 * weights  # bytes: half of one a weight
