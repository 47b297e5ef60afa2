from __future__ import annotations

import subprocess

import numpy as np
import onnx
import pytest

from pipeline.cli import main
from pipeline.environments import find_environment
from pipeline.export.fake_quantized import FakeQuantized
from pipeline.export.qonnx import DOMAIN, to_qonnx
from pipeline.images import open_images
from pipeline.target_profiles import load_profile
from tests.pipeline.export.dialects import differing, run_dialect

EXECUTE = """
import sys
import numpy as np
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
model, images = ModelWrapper(sys.argv[1]), np.load(sys.argv[2])
name = model.graph.input[0].name
runs = [execute_onnx(model, {name: x[None]}, return_full_exec_context=True) for x in images]
names = [n.output[0] for n in model.graph.node if n.op_type == "Quant"]
kept = {n: np.stack([r[n] for r in runs]) for n in names}
np.savez(sys.argv[3], names=np.array(names), **{str(i): kept[n] for i, n in enumerate(names)})
"""
SIMULATE = """
import sys
import numpy as np
import hls4ml
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.transformation.channels_last import ConvertToChannelsLastAndClean
from qonnx.transformation.gemm_to_matmul import GemmToMatMul
from qonnx.util.cleanup import cleanup_model
model, images = cleanup_model(ModelWrapper(sys.argv[1])), np.load(sys.argv[2])
model = cleanup_model(model.transform(GemmToMatMul()))
model = cleanup_model(model.transform(ConvertToChannelsLastAndClean()))
settings = hls4ml.utils.config.config_from_onnx_model(
    model, granularity="name", backend="Vitis", default_precision="fixed<32,16>"
)
network = hls4ml.converters.convert_from_onnx_model(
    model, hls_config=settings, output_dir=sys.argv[4], backend="Vitis"
)
network.compile()
np.save(sys.argv[3], network.predict(np.ascontiguousarray(images)))
"""


def images_of(path):
    return open_images(path.with_suffix("") / "images.npz").load(8)


@pytest.mark.parametrize("name", ["residual", "chain"])
def test_quant_nodes_compute_the_same_integers(name, request):
    path = request.getfixturevalue(name)
    quantized, image = onnx.load(path), images_of(path)[:1]
    network = FakeQuantized(quantized)
    proto = to_qonnx(network, network.graph.outputs)
    different, total = differing(quantized, run_dialect(proto, image), image)
    assert total > 200
    assert different == 0


def test_windows_have_all_their_attributes(chain):
    network = FakeQuantized(onnx.load(chain))
    for node in to_qonnx(network, network.graph.outputs).graph.node:
        if node.op_type in ("Conv", "MaxPool"):
            names = {entry.name for entry in node.attribute}
            assert {"kernel_shape", "strides", "dilations", "pads"} <= names
            assert node.op_type == "MaxPool" or "group" in names


def test_weights_of_each_channel_have_a_scale_of_their_own(residual):
    network = FakeQuantized(onnx.load(residual))
    proto = to_qonnx(network, network.graph.outputs)
    shapes = {entry.name: tuple(entry.dims) for entry in proto.graph.initializer}
    scales = [shapes[n.input[1]] for n in proto.graph.node if n.domain == DOMAIN]
    assert (6, 1, 1, 1) in scales


def run_in(environment, code, *words):
    done = subprocess.run(
        [str(environment.python), "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["residual", "chain"])
def test_the_qonnx_package_computes_the_same_integers(name, request, tmp_path):
    environment = find_environment(load_profile("qonnx"))
    if environment is None:
        pytest.skip("zsq targets install qonnx")
    path = request.getfixturevalue(name)
    assert main(["export", str(path), "--target", "qonnx", "-o", str(tmp_path / "q")]) == 0
    images, results = images_of(path), tmp_path / "results.npz"
    np.save(tmp_path / "images.npy", images)
    run_in(environment, EXECUTE, tmp_path / "q/model.onnx", tmp_path / "images.npy", results)
    with np.load(results) as found:
        runs = {str(name): found[str(i)] for i, name in enumerate(found["names"])}
    quantized = onnx.load(path)
    for index in range(len(images)):
        values = {name: run[index] for name, run in runs.items()}
        different, total = differing(quantized, values, images[index : index + 1])
        assert total > 200
        assert different == 0


@pytest.mark.slow
def test_hls4ml_simulates_the_same_integers(chain, tmp_path):
    environment = find_environment(load_profile("qonnx"))
    if environment is None:
        pytest.skip("zsq targets install qonnx")
    assert main(["export", str(chain), "--target", "qonnx", "-o", str(tmp_path / "q")]) == 0
    images, results = images_of(chain), tmp_path / "results.npy"
    np.save(tmp_path / "images.npy", images)
    words = tmp_path / "q/model.onnx", tmp_path / "images.npy", results, tmp_path / "hls"
    run_in(environment, SIMULATE, *words)
    outputs = np.load(results).reshape(len(images), -1)
    different, total = differing(onnx.load(chain), {"y": outputs}, images)
    assert total == 80
    assert different == 0


def test_a_network_in_float_is_refused(tmp_path, capsys):
    text = '<ir_version: 8, opset_import: ["" : 17]>'
    text += "g (float[1,3,4,4] x) => (float[1,3,4,4] y) { y = Relu(x) }"
    onnx.save(onnx.parser.parse_model(text), tmp_path / "float.onnx")
    words = ["--target", "qonnx", "-o", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "float.onnx"), *words]) == 2
    assert "is not quantized" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
