"""What the fuzzer found, each as the smallest file that showed it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from graph_tools.errors import ModelError
from pipeline.proving import verify_file
from pipeline.settings import VerifySettings
from pipeline.verify import Proof
from tests.pipeline.qdq_builder import residual_network


def proof_of(proto: onnx.ModelProto, folder: Path) -> Proof:
    path = folder / "case.onnx"
    path.write_bytes(proto.SerializeToString())
    settings = VerifySettings(max_images=2, interpreter_images=2, threads=1)
    return verify_file(path, None, settings)[0]


def test_verify_of_nodes_in_the_wrong_order(tmp_path: Path) -> None:
    """onnxruntime sorts them; the interpreter made nothing, and a KeyError came out."""
    proto = residual_network()
    nodes = list(reversed(proto.graph.node))
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    refused = proof_of(proto, tmp_path).interpreted.refused
    assert "the interpreter has no integers for" in refused


def test_a_dropout_whose_training_mode_is_no_scalar(make_model) -> None:
    """The truth of several values was a ValueError."""
    with pytest.raises(ModelError, match="Dropout in training mode"):
        make_model(
            "g (float[N,3,4,4] x) => (float[N,3,4,4] y) { y = Dropout(x, r, t) }",
            r=np.float32(0.5),
            t=np.array([False, True]),
        )
