"""Run a quantized file in integers alone, and keep every intermediate integer.

The reference that runtimes are compared with::

    network = IntegerNetwork(onnx.load("model.w8a8.onnx"))
    run = network.run(batch)
    run.integers["conv1_q"]         # as the file stores it
    first_difference(network.graph, run.integers, other)   # None, or the node

Between the input's quantizer and the last integers nothing is floating point: tensors are integers
with a power of two (`arithmetic`), sums fit into 32 bits or an error names the node, and
requantization is a shift that rounds half to even. Means are divisions by the number of elements,
rounded likewise. Operators like Sigmoid are tables of 256 entries. What has no such form is
computed in float32 and listed in `IntegerRun.float_nodes`.
"""

from __future__ import annotations

from graph_tools.errors import IntegerOverflowError
from graph_tools.integer.network import IntegerNetwork, IntegerRun
from graph_tools.integer.trace import FirstDifference, first_difference

__all__ = [
    "FirstDifference",
    "IntegerNetwork",
    "IntegerOverflowError",
    "IntegerRun",
    "first_difference",
]
