"""Sound files to damage: small networks as exporters write them, and their quantized files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser

from tests.differential.random_graphs import chooser, random_graph
from tests.differential.random_networks import random_network
from tests.pipeline.qdq_builder import residual_network

__all__ = ["float_samples", "quantized_samples"]

_MODELS = Path(__file__).resolve().parents[2] / "models"
_SHAPES = {
    "w": (4, 3, 3, 3), "v": (4, 1, 3, 3), "s": (4,), "b": (4,), "m": (4,), "r": (4,),
    "f": (4, 5), "k": (4, 2, 2, 2), "q": (64, 8),
}  # fmt: skip
_TEXTS = (
    """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,3,8,8] x) => (float[N,5] y) {
      a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w)
      c = BatchNormalization <epsilon = 0.001> (a, s, b, m, r)
      d = Relu (c)
      e = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (d)
      p = GlobalAveragePool (e)
      o = Flatten (p)
      y = Gemm (o, f)
    }""",
    """<ir_version: 7, opset_import: ["" : 13]>
    g (float[1,3,8,8] x) => (float[1,64] y) {
      a = Conv <pads = [1, 1, 1, 1]> (x, w)
      n = Shape (a)
      z = Constant <value = int64 {0}> ()
      i = Gather (n, z)
      ax = Constant <value_ints = [0]> ()
      u = Unsqueeze (i, ax)
      t = Constant <value_ints = [-1]> ()
      l = Concat <axis = 0> (u, t)
      h = Slice (a, st, en, ax2)
      j = Reshape (h, l)
      q1 = Softmax <axis = -1> (j)
      y = Mul (q1, j)
    }""",
    """<ir_version: 8, opset_import: ["" : 11]>
    g (float[1,8,8,3] x) => (float[1,8,8,4] y) {
      a = Transpose <perm = [0, 3, 1, 2]> (x)
      c = Conv <auto_pad = "SAME_UPPER"> (a, w, b)
      d = Clip (c, lo, hi)
      e = Conv <group = 4, pads = [1, 1, 1, 1]> (d, v)
      p = Pad (e, pads)
      u = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (p)
      z = Resize <mode = "nearest"> (u, , sc)
      k2 = Concat <axis = 1> (z, z)
      h1, h2 = Split <axis = 1> (k2)
      o = Add (h1, h2)
      y = Transpose <perm = [0, 2, 3, 1]> (o)
    }""",
    """<ir_version: 10, opset_import: ["" : 21]>
    g (float[N,3,8,8] x) => (float[N,2,10,10] y, int64[N,1,10] best) {
      a = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (x, w)
      c = BatchNormalization (a, s, b, m, r)
      t = Sigmoid (c)
      g1 = Mul (c, t)
      d = ConvTranspose <strides = [2, 2], pads = [0, 0, 0, 0], output_padding = [0, 0]> (g1, k)
      e = HardSwish (d)
      y = Pad <mode = "constant"> (e, pads)
      best = ArgMax <axis = 1, keepdims = 0> (y)
    }""",
)
_CONSTANTS = {
    "st": np.array([0]), "en": np.array([4]), "ax2": np.array([1]),
    "lo": np.float32(0), "hi": np.float32(6), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "sc": np.float32([1, 1, 2, 2]),
}  # fmt: skip


def _parsed(text: str) -> onnx.ModelProto:
    proto = parser.parse_model(text)
    rng = np.random.default_rng(0)
    arrays = {name: np.asarray(value) for name, value in _CONSTANTS.items()}
    for name, shape in _SHAPES.items():
        arrays[name] = rng.uniform(0.1, 1, shape).astype(np.float32)
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used
    )
    return proto


def float_samples() -> Iterator[bytes]:
    """Yield serialized networks in float; the shipped ones last."""
    for text in _TEXTS:
        yield _parsed(text).SerializeToString()
    for seed in range(12):
        yield random_network(chooser(seed)).SerializeToString()
    yield (_MODELS / "digits_resnet.onnx").read_bytes()


def quantized_samples() -> Iterator[bytes]:
    """Yield serialized QDQ files."""
    yield residual_network().SerializeToString()
    yield residual_network(tail="softmax", batch=2).SerializeToString()
    for seed in range(14):
        yield random_graph(chooser(seed)).SerializeToString()
