from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_tools.errors import DataError, SettingsError, VerificationError
from graph_tools.quantized_graph import QuantizedGraph
from pipeline.images import ImageSet, ImageWriter, open_images
from pipeline.settings import VerifySettings
from pipeline.verify import Proof, verify
from pipeline.verify.accumulators import measure_accumulators
from pipeline.verify.compilers import onnxruntime as compiler
from pipeline.verify.cpu import read_cpu
from pipeline.verify.differences import DifferenceMeter
from pipeline.verify.scales import is_power_of_two
from tests.pipeline.qdq_builder import QdqBuilder, residual_network

SHAPE = (3, 16, 16)
Check = Callable[..., Proof]


def write_images(path: Path, images: np.ndarray) -> ImageSet:
    with ImageWriter(path, count=len(images), shape=images.shape[1:]) as writer:
        writer.append(images)
    return open_images(path)


def normal(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


@pytest.fixture
def check(tmp_path: Path) -> Check:
    """Write a model and images and verify them; settings as keywords."""

    def run(
        model: onnx.ModelProto,
        images: np.ndarray | None = None,
        on_step: Any = None,
        **settings: Any,
    ) -> Proof:
        onnx.save(model, tmp_path / "model.onnx")
        given = write_images(tmp_path / "images.npz", normal(50) if images is None else images)
        return verify(
            tmp_path / "model.onnx", given, VerifySettings(**settings), on_step=on_step
        )

    return run


def replace(model: onnx.ModelProto, name: str, value: Any) -> onnx.ModelProto:
    entry = next(e for e in model.graph.initializer if e.name == name)
    entry.CopyFrom(numpy_helper.from_array(np.asarray(value), name))
    return model


def run_directly(model: onnx.ModelProto, images: np.ndarray, **config: str) -> np.ndarray:
    """First output, by a session of the test's own; no config means no optimization."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    if not config:
        options.graph_optimization_level = level.ORT_DISABLE_ALL
    for key, value in config.items():
        options.add_session_config_entry(f"session.{key}", value)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"image": images})[0]


def test_an_exact_network_passes_on_integer_kernels_only(check: Check) -> None:
    proof = check(residual_network())
    assert proof.passed
    assert proof.failures == proof.warnings == ()
    assert proof.images == 50
    (output,) = proof.tensors
    assert (output.name, output.kind, output.scale) == ("logits", "integer output", 0.125)
    pair = output.between("unoptimized", "optimized")
    assert (pair.elements, pair.differing, pair.largest_steps) == (500, 0, 0)
    assert (pair.rows, pair.top1_changes) == (50, 0)
    assert proof.kernels.all_integer
    wanted = {
        "QLinearConv": 3,
        "QLinearAdd": 1,
        "QLinearConcat": 1,
        "QLinearGlobalAveragePool": 1,
        "QGemm": 1,
    }
    assert wanted.items() <= proof.kernels.counts.items()
    absorbed = [node.node for node in proof.kernels.nodes if not node.kernel]
    assert absorbed == ["relu_r1", "relu_r2", "relu_r3"]
    assert proof.scales.power_of_two
    assert (proof.scales.num_scales, proof.scales.num_biases) == (18, 4)
    assert [a.node for a in proof.accumulators] == ["conv_c1", "conv_c2", "conv_dw", "gemm_fc"]
    assert all(a.simulation_exact and not a.overflows_int32 for a in proof.accumulators)
    assert proof.summary_lines()[-1].startswith("PASSED: 0 of 500 integer elements differ")


def test_the_proof_is_plain_json(check: Check) -> None:
    data = json.loads(json.dumps(check(residual_network()).to_dict(), allow_nan=False))
    assert set(data) == {
        "passed",
        "model",
        "onnxruntime",
        "images",
        "seconds",
        "elements",
        "differing",
        "failures",
        "warnings",
        "tensors",
        "kernels",
        "saturation",
        "stepwise",
        "interpreter",
        "changes",
        "scales",
        "accumulators",
    }
    assert (data["passed"], data["elements"], data["differing"]) == (True, 500, 0)
    assert data["kernels"]["num_nodes"] == 12
    assert (data["kernels"]["num_integer"], data["kernels"]["num_absorbed"]) == (9, 3)
    assert data["accumulators"]["simulation_exact"] is True
    assert [(d["first"], d["second"]) for d in data["tensors"][0]["differences"]] == [
        ("unoptimized", "optimized"),
        ("unoptimized", "default"),
        ("optimized", "default"),
    ]


def test_scales_that_are_no_powers_of_two_fail_by_name(check: Check) -> None:
    proof = check(replace(residual_network(), "r3_scale", np.float32(0.12)))
    assert not proof.passed
    assert not proof.scales.power_of_two
    assert proof.scales.not_power_of_two == ("r3_scale",)
    assert "not a power of two, scale (1): r3_scale" in proof.failures
    assert any(line.startswith("FAILED") for line in proof.summary_lines())


def test_zero_points_and_pairs_fail_by_name(check: Check) -> None:
    model = replace(residual_network(), "r1_zero", np.uint8(3))
    other = numpy_helper.from_array(np.float32(0.5), "other")
    model.graph.initializer.append(other)
    node = next(n for n in model.graph.node if n.name == "dequantizelinear_r2_dq")
    node.input[1] = "other"
    scales = check(model).scales
    assert scales.asymmetric_zero_points == ("quantizelinear_r1_q", "dequantizelinear_r1_dq")
    assert scales.pair_mismatches == ("dequantizelinear_r2_dq",)


def test_a_wrong_bias_scale_fails_by_node(check: Check) -> None:
    model = residual_network()
    scale = next(e for e in model.graph.initializer if e.name == "c2_b_scale")
    proof = check(replace(model, "c2_b_scale", numpy_helper.to_array(scale) * 2))
    assert not proof.passed
    assert proof.scales.bias_mismatches == ("conv_c2",)
    assert any("bias scale" in text and "conv_c2" in text for text in proof.failures)


def test_a_float_tail_is_compared_in_front_of_it(check: Check) -> None:
    proof = check(residual_network(tail="softmax"))
    assert proof.passed
    output, integers = proof.tensors
    assert (output.name, output.kind, output.scale) == ("probabilities", "float output", None)
    pair = output.between("unoptimized", "optimized")
    assert pair.largest_steps is None
    assert pair.largest_absolute < 1e-6
    assert (integers.name, integers.kind, integers.scale) == ("fc", "last integers", 0.125)
    assert integers.feeds == ("probabilities",)
    assert integers.between("unoptimized", "optimized").elements == 500
    (node,) = proof.kernels.floats
    assert (node.op_type, node.kernel) == ("Softmax", "Softmax")
    assert "leaves the graph in float" in node.reason


def test_data_movement_before_an_output_keeps_its_scale(check: Check) -> None:
    g = QdqBuilder(SHAPE)
    c = g.quantize(g.weighted("Conv", g.image, "c", (6, 3, 3, 3)), -4)
    g.constant("shape", np.array([0, 2, -1]))
    g.node("Transpose", [g.node("Reshape", [c, "shape"], "moved")], "out", perm=[2, 0, 1])
    proof = check(g.model({"out": 3}))
    assert [(t.kind, t.scale) for t in proof.tensors] == [("integer output", 2.0**-4)]
    assert proof.passed


def test_a_known_refusal_of_onnxruntime_comes_with_a_hint(check: Check) -> None:
    g = QdqBuilder(SHAPE)
    c = g.quantize(g.weighted("Conv", g.image, "c", (6, 3, 3, 3)), -4, np.int8)
    g.node("Transpose", [c], "out", perm=[0, 2, 3, 1])
    model = g.model({"out": 4})
    try:
        run_directly(model, normal(1), x64quantprecision="1")
    except onnxruntime.capi.onnxruntime_pybind11_state.Fail:
        with pytest.raises(VerificationError, match=r"quantize again behind transpose_out"):
            check(model)
    else:  # a version without the fault
        assert check(model).passed


def clipped(bound: float) -> onnx.ModelProto:
    g = QdqBuilder(SHAPE)
    g.weighted("Conv", g.image, "c", (8, 3, 3, 3))
    g.constant("low", np.float32(0))
    g.constant("high", np.float32(bound))
    g.quantize(g.node("Clip", ["c", "low", "high"], "clipped"), -5, output="out")
    return g.model({"out": 4})


def signed_relu() -> onnx.ModelProto:
    g = QdqBuilder(SHAPE)
    g.weighted("Conv", g.image, "c", (8, 3, 3, 3))
    g.quantize(g.node("Relu", ["c"], "r"), -5, np.int8, output="out")
    return g.model({"out": 4})


def bottleneck() -> onnx.ModelProto:
    """The int8 tensor c has two readers."""
    g = QdqBuilder(SHAPE)
    c = g.quantize(g.weighted("Conv", g.image, "c", (8, 3, 1, 1)), -4, np.int8)
    d = g.quantize(g.weighted("Conv", c, "d", (8, 8, 1, 1)), -4, np.int8)
    g.quantize(g.node("Add", [c, d], "a"), -3, np.int8, output="out")
    return g.model({"out": 4})


def sixteen_bits() -> onnx.ModelProto:
    g = QdqBuilder(SHAPE, dtype=np.int16)
    g.weighted("Conv", g.image, "c", (8, 3, 1, 1))
    g.quantize("c", -4, np.int16, output="out")
    return g.model({"out": 4})


def transposed() -> onnx.ModelProto:
    g = QdqBuilder(SHAPE)
    g.weighted("ConvTranspose", g.image, "c", (3, 4, 2, 2), axis=1, strides=[2, 2])
    g.quantize("c", -4, np.int8, output="out")
    return g.model({"out": 4})


@pytest.mark.parametrize(
    ("model", "floats", "reason"),
    [
        (clipped(6.0), ["conv_c", "clip_clipped"], "the bounds of its Clip"),
        (signed_relu(), ["conv_c", "relu_r"], "Relu before the signed"),
        (sixteen_bits(), ["conv_c"], "no integer kernel for int16"),
        (transposed(), ["convtranspose_c"], "no integer kernel for ConvTranspose"),
    ],
)
def test_nodes_in_float_are_listed_with_a_reason(
    check: Check, model: onnx.ModelProto, floats: list[str], reason: str
) -> None:
    proof = check(model)
    assert proof.passed
    assert [node.node for node in proof.kernels.floats] == floats
    assert reason in proof.kernels.floats[0].reason
    assert any(reason in line for line in proof.summary_lines())
    assert "QLinearConv" not in proof.kernels.counts


def test_a_clip_that_the_quantizer_implies_is_absorbed(check: Check) -> None:
    proof = check(clipped(8.0))
    assert proof.kernels.all_integer
    assert proof.kernels.counts["QLinearConv"] == 1


def test_an_int8_tensor_with_two_readers_is_the_reason_on_x64(check: Check) -> None:
    proof = check(bottleneck())
    assert proof.passed
    for node in proof.kernels.floats:  # none where onnxruntime has int8 kernels throughout
        assert "the int8 tensor 'c' has 2 readers" in node.reason


def test_saturation_is_what_two_sessions_of_our_own_measure(check: Check) -> None:
    g = QdqBuilder(SHAPE, dtype=np.uint8)
    weight = np.full((8, 3, 3, 3), 127, np.int8)
    weight[4:] = -127
    g.weighted("Conv", g.image, "c", (8, 3, 3, 3), weight=weight)
    g.quantize("c", 4, np.int8, output="out")
    model = g.model({"out": 4})
    images = np.abs(normal(20)) * 10
    proof = check(model, images)
    assert proof.passed
    exact = run_directly(model, images)
    default = run_directly(model, images, intra_op_allow_spinning="0")
    saturation = proof.saturation
    assert saturation.share == np.mean(exact != default)
    assert saturation.largest_steps == np.abs(exact - default).max() / 16
    assert saturation.saturates == bool(np.any(exact != default))
    assert saturation.nodes_at_risk == ("conv_c",)
    assert saturation.cpu == read_cpu()
    assert saturation.top1_change_share is None


def tampered(
    monkeypatch: pytest.MonkeyPatch, mode: str, name: str, change: Callable[[Any], Any]
) -> None:
    """Make the runs of one mode compute with another constant, as a faulty kernel would."""
    compile_truly = compiler.compile

    def compile_wrongly(model: bytes, given: compiler.Mode, **options: Any) -> Any:
        proto = onnx.ModelProto.FromString(model)
        entry = next((e for e in proto.graph.initializer if e.name == name), None)
        if given == mode and entry is not None:
            replace(proto, name, change(numpy_helper.to_array(entry)))
        return compile_truly(proto.SerializeToString(), given, **options)

    monkeypatch.setattr(compiler, "compile", compile_wrongly)


def test_saturation_counts_elements_steps_and_first_choices(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_class(bias: np.ndarray) -> np.ndarray:
        bias = bias.copy()
        bias[0] += 2**24
        return bias

    tampered(monkeypatch, "default", "fc_b_q", other_class)
    images = normal(30)
    proof = check(residual_network(), images)
    assert proof.passed  # the exact run is exact
    true = run_directly(residual_network(), images)
    wrong_model = residual_network()
    bias = next(e for e in wrong_model.graph.initializer if e.name == "fc_b_q")
    replace(wrong_model, "fc_b_q", other_class(numpy_helper.to_array(bias)))
    wrong = run_directly(wrong_model, images)
    saturation = proof.saturation
    assert saturation.saturates
    assert saturation.share == np.mean(true != wrong)
    assert saturation.largest_steps == np.abs(true - wrong).max() * 8
    changes = int(np.sum(true.argmax(1) != wrong.argmax(1)))
    assert (saturation.rows, saturation.top1_changes) == (30, changes)
    assert changes > 0
    assert any("saturates: without" in line for line in proof.summary_lines())


def test_a_faulty_kernel_is_found_and_located(
    check: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    tampered(monkeypatch, "optimized", "c2_w_q", np.negative)
    proof = check(residual_network())
    assert not proof.passed
    pair = proof.tensors[0].between("unoptimized", "optimized")
    assert pair.differing > 0
    assert proof.to_dict()["differing"] == pair.differing
    assert proof.failures[0].startswith(f"logits: {pair.differing} of 500 integers")
    assert proof.failures[1] == "the two runs part at tensor 'c2' (made by Conv conv_c2)"
    assert "FAILED" in proof.summary_lines()[-1]


def test_differences_agree_with_two_sessions_of_our_own(check: Check) -> None:
    """Scales that are no powers of two, where the runs may or may not round alike."""
    g = QdqBuilder(SHAPE, dtype=np.uint8)
    r = g.quantize(g.node("Relu", [g.weighted("Conv", g.image, "c", (8, 3, 3, 3))], "r"), -5)
    g.quantize(g.node("GlobalAveragePool", [r], "p"), -6, output="out")
    model = g.model({"out": 4})
    images = np.abs(normal(40))
    for scale in ("r_scale", "p_scale"):
        replace(model, scale, np.float32(0.7 * g.constants[scale]))
    proof = check(model, images)
    exact = run_directly(model, images)
    optimized = run_directly(model, images, x64quantprecision="1")
    pair = proof.tensors[0].between("unoptimized", "optimized")
    assert pair.differing == np.sum(exact != optimized)
    assert any("integers" in text for text in proof.failures) == (pair.differing > 0)


@pytest.mark.parametrize(("activation", "passes"), [("Sigmoid", True), ("Relu", False)])
def test_one_step_is_allowed_behind_what_has_no_exact_integer_form(
    check: Check, monkeypatch: pytest.MonkeyPatch, activation: str, passes: bool
) -> None:
    """The optimized run gets a zero point one off: a difference of one step in most elements."""
    g = QdqBuilder(SHAPE, dtype=np.uint8)
    c = g.quantize(g.weighted("Conv", g.image, "c", (8, 3, 3, 3)), -5, dtype=np.uint8)
    g.quantize(g.node(activation, [c], "s"), -8, dtype=np.uint8, output="out")
    model = g.model({"out": 4})
    honest = compiler.run

    def run_wrongly(compiled: Any, images: np.ndarray) -> dict[str, np.ndarray]:
        values = honest(compiled, images)
        if compiled.mode == "optimized" and next(iter(values)).startswith(("out", "s_q")):
            return {name: value + np.float32(2.0**-8) for name, value in values.items()}
        return values

    monkeypatch.setattr(compiler, "run", run_wrongly)
    proof = check(model, np.abs(normal(8)))
    assert proof.passed is passes
    assert any("exact integer form" in text for text in proof.warnings) is passes


def free_network(batch: int | str = "N") -> onnx.ModelProto:
    """The scales of the first layer's weights are no powers of two, and the file says so."""
    model = residual_network(batch=batch)
    for name in ("c1_w_scale", "c1_b_scale"):
        entry = next(e for e in model.graph.initializer if e.name == name)
        replace(model, name, np.float32(0.7) * numpy_helper.to_array(entry))
    helper.set_model_props(model, {"zsq.weight_scale": "free"})
    return model


@pytest.mark.parametrize("batch", ["N", 8])
def test_free_weight_scales_are_proved_tensor_by_tensor(
    check: Check, monkeypatch: pytest.MonkeyPatch, batch: int | str
) -> None:
    """A bias changed by a fifth of a step stands for float sums that round otherwise."""
    tampered(monkeypatch, "optimized", "c1_b_q", lambda bias: bias + 70)
    proof = check(free_network(batch), normal(21))
    assert proof.passed, proof.failures
    assert not proof.scales.power_of_two
    assert proof.scales.free == ("c1_w_scale", "c1_b_scale")
    assert [entry.free_scales for entry in proof.accumulators] == [True, False, False, False]
    assert not proof.accumulators[0].simulation_exact
    assert proof.tensors[0].between("unoptimized", "optimized").differing > 0
    stepwise = proof.stepwise
    assert stepwise is not None
    assert (stepwise.inexact, stepwise.largest_steps, stepwise.worst) == (1, 1.0, "r1_dq")
    assert 0 < stepwise.differing < stepwise.elements / 2
    assert (
        json.loads(json.dumps(proof.to_dict()))["stepwise"]["tensors"]
        == stepwise.tensors
        == 10
    )


@pytest.mark.parametrize(
    ("weight", "change"),
    [
        ("c1_w_q", np.negative),  # by more than a step, where sums round
        ("c2_b_q", lambda bias: bias + 70),  # by a step, where they do not
    ],
)
def test_free_weight_scales_excuse_no_other_difference(
    check: Check, monkeypatch: pytest.MonkeyPatch, weight: str, change: Callable[..., Any]
) -> None:
    tampered(monkeypatch, "optimized", weight, change)
    proof = check(free_network())
    assert not proof.passed
    assert proof.stepwise is not None
    assert bool(proof.stepwise.unexplained) is (weight == "c2_b_q")


def test_free_scales_of_activations_fail_whatever_the_file_says(check: Check) -> None:
    model = free_network()
    replace(model, "r2_scale", np.float32(0.03))
    assert any("r2_scale" in text for text in check(model).failures)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_fixed_batch_is_honoured(check: Check, batch: int) -> None:
    proof = check(residual_network(batch=batch), normal(21))
    assert proof.passed
    assert proof.images == 21
    assert proof.tensors[0].between("unoptimized", "optimized").elements == 210


def test_images_are_limited_and_progress_is_told(check: Check) -> None:
    steps: list[Any] = []
    proof = check(
        residual_network(batch=5),
        on_step=lambda done, total, terms: steps.append((done, total, dict(terms))),
        max_images=12,
        threads=1,
    )
    assert proof.images == 12
    assert steps == [(n, 12, {"differing": 0.0}) for n in (5, 10, 12)]


def test_int32_overflow_fails(check: Check) -> None:
    model = replace(residual_network(), "fc_b_q", np.full(10, 2**31 - 1, np.int32))
    proof = check(model)
    assert not proof.passed
    assert any("gemm_fc" in text and "overflow" in text for text in proof.failures)
    assert any("2^24" in text and "gemm_fc" in text for text in proof.warnings)
    assert proof.accumulators[-1].bits == 33


def test_nothing_is_left_behind(
    check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    check(residual_network(tail="softmax"))
    assert os.listdir(scratch) == []
    assert sorted(os.listdir(tmp_path)) == ["images.npz", "model.onnx", "scratch"]


def test_bad_files_are_refused_in_one_line(check: Check, tmp_path: Path) -> None:
    plain = helper.make_model(
        helper.make_graph(
            [helper.make_node("Relu", ["image"], ["y"])],
            "plain",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", *SHAPE])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", *SHAPE])],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    with pytest.raises(VerificationError, match="is not quantized"):
        check(plain)

    broken = residual_network()
    broken.graph.node[-3].op_type = "Gemmm"
    with pytest.raises(VerificationError, match=r"onnxruntime refuses.*Gemmm") as caught:
        check(broken)
    assert "\n" not in str(caught.value)

    images = write_images(tmp_path / "i.npz", normal(2))
    whole = residual_network().SerializeToString()
    for name, content in {
        "cut.onnx": whole[: len(whole) // 2],
        "empty.onnx": b"",
        "text.onnx": b"not a model",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VerificationError) as caught:
            verify(tmp_path / name, images, VerifySettings())
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(VerificationError, match="no such file"):
        verify(tmp_path / "absent.onnx", images, VerifySettings())


def test_images_of_another_shape_are_refused(check: Check) -> None:
    with pytest.raises(DataError, match=r"3x16x8 do not fit the input 'image'.*3x16x16"):
        check(residual_network(), normal(2, shape=(3, 16, 8)))


def test_settings_are_checked() -> None:
    with pytest.raises(SettingsError, match="--max-images"):
        VerifySettings(max_images=0)
    with pytest.raises(SettingsError, match="--threads"):
        VerifySettings(threads=-1)


def test_meter_agrees_with_numpy() -> None:
    rng = np.random.default_rng(1)
    first = rng.integers(-8, 8, (40, 10)).astype(np.float32)
    second = first + rng.integers(-1, 2, first.shape).astype(np.float32)
    meter = DifferenceMeter("a", "b", 0.5)
    for start in range(0, 40, 16):
        meter.update(first[start : start + 16], second[start : start + 16])
    found = meter.result()
    assert (found.elements, found.differing) == (400, np.sum(first != second))
    assert found.share == np.mean(first != second)
    assert found.largest_steps == 2
    assert found.rows == 40
    assert found.top1_changes == np.sum(first.argmax(1) != second.argmax(1))
    with np.errstate(invalid="ignore"):
        relative = np.abs(first - second) / np.maximum(np.abs(first), np.abs(second))
    assert found.largest_relative == pytest.approx(np.nanmax(relative))


def test_meter_takes_nan_as_equal_to_nan_only() -> None:
    nan = np.array([np.nan, 1.0, np.nan])
    meter = DifferenceMeter("a", "b", None)
    meter.update(nan, np.array([np.nan, 1.0, 2.0]))
    found = meter.result()
    assert found.differing == 1
    assert found.largest_absolute == np.inf
    assert found.to_dict()["largest_absolute"] is None


def test_accumulators_are_the_worst_that_inputs_can_do() -> None:
    """Against the sum that the worst input itself gives, for each output channel."""
    g = QdqBuilder(SHAPE, dtype=np.uint8)
    c = g.quantize(g.weighted("Conv", g.image, "c", (6, 1, 3, 3), group=3), -4, np.int8)
    t = g.quantize(
        g.weighted("ConvTranspose", c, "t", (6, 2, 3, 3), axis=1, exponent=-7), -2, np.int8
    )
    g.node("Flatten", [g.node("GlobalAveragePool", [t], "p")], "f")
    g.weighted("Gemm", g.quantize("f", -4), "y", (2, 5), axis=1)
    g.quantize("y", -4, output="out")
    found = {a.node: a for a in measure_accumulators(QuantizedGraph(g.model({"out": 2})))}

    def worst(columns: np.ndarray, bias: np.ndarray, low: int, high: int) -> int:
        largest = 0
        for weights, b in zip(columns.astype(int), bias.astype(int), strict=True):
            top = sum(max(w * low, w * high, 0) for w in weights) + max(b, 0)
            bottom = sum(min(w * low, w * high, 0) for w in weights) + min(b, 0)
            largest = max(largest, top, -bottom)
        return largest

    k = g.constants
    expected = {
        "conv_c": worst(k["c_w_q"].reshape(6, -1), k["c_b_q"], 0, 255),
        "convtranspose_t": worst(
            np.moveaxis(k["t_w_q"], 1, 0).reshape(2, -1), k["t_b_q"], -128, 127
        ),
        "gemm_y": worst(k["y_w_q"].T, k["y_b_q"], 0, 255),
    }
    assert {name: a.largest for name, a in found.items()} == expected
    for accumulator in found.values():
        assert 2 ** (accumulator.bits - 2) < accumulator.largest <= 2 ** (accumulator.bits - 1)


def test_a_clip_on_integers_narrows_the_range(check: Check) -> None:
    """Four bits in an int8 container, as the QDQ writer stores them."""
    g = QdqBuilder(SHAPE)
    dequantize = g.nodes.pop()
    g.node(
        "Clip",
        ["image_q", g.constant("low", np.int8(-8)), g.constant("high", np.int8(7))],
        "narrow",
    )
    dequantize.input[0] = "narrow"
    g.nodes.append(dequantize)
    g.weighted("Conv", g.image, "c", (4, 3, 1, 1))
    g.quantize("c", -4, np.int8, output="out")
    proof = check(g.model({"out": 4}))
    assert proof.passed
    weights = np.abs(g.constants["c_w_q"].astype(int)).reshape(4, -1).sum(axis=1)
    bound = 8 * weights + np.abs(g.constants["c_b_q"])
    assert proof.accumulators[0].largest <= bound.max()
    assert not proof.accumulators[0].may_saturate
    for node in proof.kernels.floats:
        assert "saturated to fewer bits by a Clip on integers" in node.reason


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0], True),
        ([2.0**-126, 2.0**100], True),
        ([2.0**-130], False),
        ([0.75], False),
        ([0.0], False),
        ([-2.0], False),
        ([np.nan], False),
        ([np.inf], False),
        ([0.5, 0.3], False),
    ],
)
def test_is_power_of_two(values: list[float], expected: bool) -> None:
    assert is_power_of_two(np.array(values, np.float32)) is expected


def test_cpu_flags_are_read(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("model name\t: Some CPU\nflags\t\t: fpu avx2 sse\n\nmodel name\t: other\n")
    cpu = read_cpu(info)
    assert (cpu.name, cpu.vnni, cpu.flags) == ("Some CPU", False, ("avx2",))
    assert "without VNNI" in cpu.describe()
    info = tmp_path / "vnni"
    info.write_text("flags\t: avx2 avx512_vnni\n")
    assert read_cpu(info).vnni is True
    assert read_cpu(tmp_path / "absent").vnni is None
