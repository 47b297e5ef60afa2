"""Sony IMX500: the dialect that its converter reads.

Every rounding of activations is a node ``mct_quantizers::ActivationPOTQuantizer``, every weight a
float initializer behind a ``WeightsPOTQuantizer`` with a threshold a channel, as Sony's Model
Compression Toolkit exports them (github.com/SonySemiconductorSolutions/mct_quantizers): both
round ``x / scale`` half to even, ``scale = threshold / 2**(bits - signed)``. Biases are float
initializers with the values of their integers. The converter wants a batch of one, all shapes,
and takes the producer for the name of the framework.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from graph_tools.errors import TargetError
from pipeline.export.fake_quantized import FakeQuantized, Rounding, Stored, log2_of
from pipeline.export.static_shapes import with_static_movement

__all__ = ["DOMAIN", "to_imx500"]

DOMAIN = "mct_quantizers"
_VERSION = "1.6.0"  # of mct_quantizers
_PRODUCER = ("pytorch", "2.6.0")


class _Dialect:
    def rounding(self, rounding: Rounding) -> tuple[list[NodeProto], list[TensorProto]]:
        log2_of(rounding.scale, rounding.name)
        node = helper.make_node(
            "ActivationPOTQuantizer",
            [rounding.source],
            [rounding.result],
            rounding.name,
            domain=DOMAIN,
            threshold=rounding.threshold,
            signed=int(rounding.signed),
            num_bits=rounding.bits,
            mctq_version=_VERSION,
        )
        return [node], []

    def stored(self, stored: Stored) -> tuple[list[NodeProto], list[TensorProto]]:
        exponents = log2_of(stored.scale, stored.name)
        if stored.role != "weight":
            return [], [numpy_helper.from_array(stored.values, stored.result)]
        if not stored.signed:
            raise TargetError("weights are unsigned", where=stored.name)
        bits = max(stored.bits, 8)
        thresholds = np.exp2(np.atleast_1d(exponents) + bits - 1.0).astype(np.float32)
        values, threshold = f"{stored.result}_values", f"{stored.result}_threshold"
        node = helper.make_node(
            "WeightsPOTQuantizer",
            [values, threshold],
            [stored.result],
            f"{stored.result}_quantize",
            domain=DOMAIN,
            num_bits=bits,
            per_channel=int(stored.axis is not None),
            channel_axis=stored.axis or 0,
            signed=1,
            mctq_version=_VERSION,
        )
        return [node], [
            numpy_helper.from_array(stored.values, values),
            numpy_helper.from_array(thresholds, threshold),
        ]


def to_imx500(network: FakeQuantized, ends: Sequence[str]) -> onnx.ModelProto:
    """Write a network up to ``ends`` in the converter's dialect.

    Raises:
        TargetError: a scale that is no power of two.
    """
    proto = network.translate(_Dialect(), ends, batch=1, drop_idle=True)
    proto = with_static_movement(proto)
    proto.producer_name, proto.producer_version = _PRODUCER
    return proto
