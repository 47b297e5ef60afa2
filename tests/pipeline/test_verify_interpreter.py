"""The integer interpreter in the proof: what it finds that two runs of one runtime cannot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graph_tools.errors import SettingsError
from pipeline.images import ImageWriter, open_images
from pipeline.settings import VerifySettings
from pipeline.verify import Proof, verify
from pipeline.verify.compilers import onnxruntime as compiler
from tests.pipeline.qdq_builder import QdqBuilder, residual_network

Check = Callable[..., Proof]


@pytest.fixture
def check(tmp_path: Path) -> Check:
    def run(model: onnx.ModelProto, count: int = 10, **settings: Any) -> Proof:
        onnx.save(model, tmp_path / "model.onnx")
        shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim[1:]]
        path = tmp_path / "images.npz"
        with ImageWriter(path, count=count, shape=tuple(shape)) as writer:
            values = np.random.default_rng(0).normal(size=(count, *shape))
            writer.append(values.astype(np.float32))
        settings = {"threads": 1, **settings}
        return verify(tmp_path / "model.onnx", open_images(path), VerifySettings(**settings))

    return run


def replaced(model: onnx.ModelProto, name: str, value: Any) -> onnx.ModelProto:
    entry = next(e for e in model.graph.initializer if e.name == name)
    entry.CopyFrom(numpy_helper.from_array(np.asarray(value), name))
    return model


@pytest.mark.parametrize("tail", ["integer", "softmax"])
def test_the_interpreter_agrees_with_both_runs(check: Check, tail: str) -> None:
    proof = check(residual_network(tail=tail))
    assert proof.passed
    found = proof.interpreted
    assert (found.images, found.elements, found.differing) == (10, 100, 0)
    assert (found.refused, found.overflow, found.traced) == ("", "", None)
    (tensor,) = found.tensors
    assert (tensor.unoptimized.first, tensor.unoptimized.second) == (
        "unoptimized",
        "interpreter",
    )
    assert 10 < found.accumulator_bits <= max(entry.bits for entry in proof.accumulators)
    assert any(
        line.startswith("interpreter: 0 of 100 integers differ")
        for line in proof.summary_lines()
    )
    assert json.loads(json.dumps(proof.to_dict(), allow_nan=False))["interpreter"]["images"]


@pytest.mark.parametrize("layer", ["c1", "c2", "dw", "fc"])
def test_an_error_that_both_runs_share_is_found_and_traced(
    check: Check, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    honest = compiler.compile

    def compile_wrongly(model: bytes, mode: compiler.Mode, **options: Any) -> Any:
        proto = onnx.ModelProto.FromString(model)
        stored = next(e for e in proto.graph.initializer if e.name == f"{layer}_w_q")
        values = numpy_helper.to_array(stored).copy()
        values[0] = -values[0]
        stored.CopyFrom(numpy_helper.from_array(values, stored.name))
        return honest(proto.SerializeToString(), mode, **options)

    monkeypatch.setattr(compiler, "compile", compile_wrongly)
    proof = check(residual_network())
    assert not proof.passed
    assert proof.to_dict()["differing"] == 0  # the two runs agree
    assert proof.interpreted.differing > 0
    traced = proof.interpreted.traced
    assert traced is not None
    assert layer in " ".join(traced.behind)
    failures = " ".join(proof.failures)
    assert "differ between the optimized run and the integer interpreter" in failures
    assert f"parts from the integer interpreter at {traced.difference.op_type}" in failures
    assert proof.summary_lines()[-1].startswith("FAILED")


def test_an_overflow_of_the_interpreter_fails_by_name(check: Check) -> None:
    model = replaced(residual_network(), "fc_b_q", np.full(10, 2**31 - 1, np.int32))
    proof = check(model)
    assert proof.interpreted.overflow.startswith("node gemm_fc: Gemm needs 33 bits")
    assert any("gemm_fc" in text and "interpreter" in text for text in proof.failures)


def test_inputs_of_16_bits_have_wider_accumulators(check: Check) -> None:
    g = QdqBuilder((512, 2, 2), dtype=np.int16)
    weight = np.full((2, 512, 1, 1), 127, np.int8)
    g.weighted("Conv", g.image, "c", (2, 512, 1, 1), weight=weight)
    g.constants["image_scale"] = np.float32(2.0**-13)
    g.constants["c_b_scale"] = g.constants["c_w_scale"] * np.float32(2.0**-13)
    g.quantize("c", -4, np.int16, output="out")
    proof = check(g.model({"out": 4}))
    assert proof.interpreted.overflow == ""
    assert proof.interpreted.images == 10
    assert proof.passed


def test_what_the_interpreter_cannot_run_is_said(check: Check) -> None:
    proof = check(replaced(residual_network(), "r3_scale", np.float32(0.12)))
    assert "no power of two" in proof.interpreted.refused
    assert proof.interpreted.images == 0
    assert any("interpreter: did not run" in line for line in proof.summary_lines())


@pytest.mark.parametrize(("limit", "batch", "images"), [(4, 2, 4), (5, 2, 6), (0, 2, 0)])
def test_whole_batches_up_to_the_limit(check, limit: int, batch: int, images: int) -> None:
    proof = check(residual_network(batch=batch), interpreter_images=limit)
    assert proof.images == 10
    assert proof.interpreted.images == images
    assert proof.passed


def test_the_last_batch_may_be_incomplete(check: Check) -> None:
    proof = check(residual_network(batch=4), count=6)
    assert (proof.interpreted.images, proof.interpreted.elements) == (6, 60)
    assert proof.interpreted.differing == 0


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(SettingsError, match="--interpreter-images"):
        VerifySettings(interpreter_images=-1)


def test_an_approximated_operator_is_declared_and_no_failure(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax in front of integers, one step off in both runs."""
    g = QdqBuilder((4, 3, 5))
    g.quantize(g.node("Softmax", [g.image], "y", axis=1), -7, np.uint8, output="out")
    honest = compiler.run

    def run_wrongly(compiled: Any, images: np.ndarray) -> dict[str, np.ndarray]:
        values = honest(compiled, images)
        off = {"out": np.float32(2.0**-7), "y_q": np.uint8(1)}
        return {name: value + off.get(name, 0) for name, value in values.items()}

    monkeypatch.setattr(compiler, "run", run_wrongly)
    proof = check(g.model({"out": 4}))
    assert proof.interpreted.differing == proof.interpreted.elements
    assert proof.passed
    assert any("integer interpreter" in text for text in proof.warnings)
