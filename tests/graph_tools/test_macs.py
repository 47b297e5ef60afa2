from __future__ import annotations

import numpy as np
import pytest

from graph_tools.macs import count_macs
from graph_tools.model import load

CASES = {
    # text of the node, constants, shape of the output: multiplications written out by hand
    "Conv": ("y = Conv <pads = [1,1,1,1]> (x, w)", (4, 2, 3, 3), "[N,4,6,6]", 4 * 36 * 2 * 9),
    "depthwise": ("y = Conv <group = 2> (x, w)", (2, 1, 3, 3), "[N,2,4,4]", 2 * 16 * 9),
    "strided": ("y = Conv <strides = [2,2]> (x, w)", (3, 2, 2, 2), "[N,3,3,3]", 27 * 2 * 4),
    "ConvTranspose": (
        "y = ConvTranspose <strides = [2,2]> (x, w)", (2, 3, 2, 2), "[N,3,12,12]", 72 * 3 * 4
    ),
    "Gemm": ("f = Flatten (x) y = Gemm <transB = 1> (f, w)", (5, 72), "[N,5]", 5 * 72),
    "MatMul": ("y = MatMul (x, w)", (6, 7), "[N,2,6,7]", 2 * 6 * 6 * 7),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_macs_are_those_counted_by_hand(make_model, name):
    nodes, shape, output, macs = CASES[name]
    model = make_model(
        f"g (float[N,2,6,6] x) => (float{output} y) {{ {nodes} }}",
        w=np.ones(shape, np.float32),
    )
    assert list(count_macs(model).values()) == [macs]


def test_a_fixed_batch_counts_for_one_image(make_model):
    model = make_model(
        "g (float[3,2,6,6] x) => (float[3,4,6,6] y) { y = Conv <pads = [1,1,1,1]> (x, w) }",
        w=np.ones((4, 2, 3, 3), np.float32),
    )
    assert sum(count_macs(model).values()) == 4 * 36 * 2 * 9


def test_mobilenet_v1_has_what_its_authors_count(shared_models):
    """41 million multiply-adds at width 0.25 and 224 pixels (arXiv 1704.04861, table 6)."""
    model = load(shared_models / "mobilenet_v1_025_224_imagenet.onnx")
    assert round(sum(count_macs(model).values()) / 1e6) == 41
