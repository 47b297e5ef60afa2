from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pipeline.cli import main

HEAD = '<ir_version: 8, opset_import: ["" : 17]> '
RESIDUAL = """net (float[N,4,8,8] x) => (float[N,5] y) {
    a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1)
    b = Conv<kernel_shape=[1,1]>(a, w2, b2)
    c = Add(a, b)
    d = Relu(c)
    e = MaxPool<kernel_shape=[2,2], strides=[2,2]>(d)
    f = GlobalAveragePool(e)
    g = Flatten(f)
    y = Gemm<transB=1>(g, w3, b3)
}"""
CHAIN = """net (float[N,1,8,8] x) => (float[N,10] y) {
    a = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(x, w1, b1)
    b = Relu(a)
    c = MaxPool<kernel_shape=[2,2], strides=[2,2]>(b)
    d = Conv<kernel_shape=[3,3]>(c, w2, b2)
    e = Relu(d)
    f = Flatten(e)
    y = Gemm<transB=1>(f, w3, b3)
}"""
SHUFFLE = """net (float[N,4,4,4] x) => (float[N,4,4,4] y, float[N,4,4,4] z) {
    a = Conv<kernel_shape=[1,1]>(x, w1, b1)
    p = Reshape(a, pairs)
    q = Transpose<perm=[1,0,2]>(p)
    r = Reshape(q, halves)
    s = Gather<axis=0>(r, first)
    t = Gather<axis=0>(r, second)
    y = Conv<kernel_shape=[1,1]>(s, w2, b2)
    z = Conv<kernel_shape=[1,1]>(t, w2, b2)
}"""
SHAPES = {
    RESIDUAL: {
        "w1": (6, 4, 3, 3),
        "b1": (6,),
        "w2": (6, 6, 1, 1),
        "b2": (6,),
        "w3": (5, 6),
        "b3": (5,),
    },
    CHAIN: {
        "w1": (4, 1, 3, 3),
        "b1": (4,),
        "w2": (6, 4, 3, 3),
        "b2": (6,),
        "w3": (10, 24),
        "b3": (10,),
    },
    SHUFFLE: {"w1": (8, 4, 1, 1), "b1": (8,), "w2": (4, 4, 1, 1), "b2": (4,)},
}
INDICES = {"pairs": [-1, 2, 16], "halves": [2, -1, 4, 4, 4], "first": 0, "second": 1}


def write_network(path: Path, text: str) -> Path:
    proto = onnx.parser.parse_model(HEAD + text)
    random = np.random.default_rng(0)
    for name, shape in SHAPES[text].items():
        values = random.standard_normal(shape) * (0.3 if name[0] == "w" else 0.1)
        proto.graph.initializer.append(
            numpy_helper.from_array(values.astype(np.float32), name)
        )
    for name, values in INDICES.items() if text is SHUFFLE else ():
        proto.graph.initializer.append(
            numpy_helper.from_array(np.asarray(values, np.int64), name)
        )
    onnx.save(proto, path)
    return path


def quantized(folder: Path, text: str, *flags: str) -> Path:
    """Quantize one of the networks; the file's folder holds images and plan."""
    source = write_network(folder / "net.onnx", text)
    output = folder / "net.q.onnx"
    words = ["--method", "noise", "--num-images", "16", "--mean", "0.5", "--std", "0.5"]
    assert main(["quantize", str(source), "-o", str(output), "--quiet", *words, *flags]) == 0
    return output


@pytest.fixture(scope="session")
def residual(tmp_path_factory) -> Path:
    return quantized(tmp_path_factory.mktemp("residual"), RESIDUAL)


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Path:
    return quantized(tmp_path_factory.mktemp("chain"), CHAIN, "--weight-granularity", "tensor")


@pytest.fixture(scope="session")
def shuffle(tmp_path_factory) -> Path:
    return quantized(tmp_path_factory.mktemp("shuffle"), SHUFFLE)


@pytest.fixture
def no_converter(monkeypatch, tmp_path):
    monkeypatch.setenv("ZSQ_TARGETS", str(tmp_path / "no-targets"))
