"""Targets against the interpreter, with engines that are exact, wrong in one place, or refuse."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from graph_tools.errors import SettingsError, VerificationError
from pipeline.cli import main
from pipeline.images import ImageWriter, open_images
from pipeline.settings import VerifySettings
from pipeline.target_profiles import Check
from pipeline.verify import agreement, causes, findings
from pipeline.verify.agreement import compare_targets, measure_target
from pipeline.verify.compilers import onnxruntime as ort
from pipeline.verify.compilers.engine import Ran, Refusal
from pipeline.verify.compilers.onnxruntime_engine import OnnxruntimeEngine
from pipeline.verify.cpu import Cpu
from pipeline.verify.engines import parse_targets
from pipeline.verify.reference import Reference, static_copy
from tests.pipeline.qdq_builder import QdqBuilder, residual_network


@dataclass
class Fake:
    """Unoptimized onnxruntime, with one constant changed and one model refused."""

    constant: str = ""
    refuse: bool = False
    only_whole: bool = False
    name: str = "fake"
    version: str = "1.0"
    asked: list[int] = field(default_factory=list)

    def run(self, proto: onnx.ModelProto, images: np.ndarray) -> Ran:
        self.asked.append(len(proto.graph.output))
        if self.refuse:
            raise Refusal("RuntimeError: no", compiled=False)
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        fused = not self.only_whole or len(proto.graph.output) == 1
        for tensor in copy.graph.initializer if fused else ():
            if tensor.name == self.constant:
                changed = numpy_helper.to_array(tensor) + np.array(900, np.int32)
                tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
        return OnnxruntimeEngine(mode="unoptimized", threads=1).run(copy, images)


def images(count: int = 3, batch: int = 1) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(count, batch, 3, 16, 16)).astype(np.float32)


@pytest.fixture(scope="module", params=["integer", "float"])
def reference(request) -> Reference:
    return Reference.measure(static_copy(residual_network(tail=request.param), 1), images())


def test_an_exact_target_is_exact(reference):
    row = measure_target(Fake(), reference, Check())
    assert (row.verdict, row.differing, row.failed) == ("exact", 0, False)
    assert row.elements == 30
    assert row.first is None
    assert row.seconds_per_image > 0
    assert row.note() == ""


@pytest.mark.parametrize("only_whole", [False, True])
@pytest.mark.parametrize(
    ("constant", "made_by"), [("c2_b_q", "Conv"), ("dw_b_q", "Relu"), ("fc_b_q", "Gemm")]
)
def test_a_difference_is_found_and_its_place_named(constant, made_by, only_whole):
    """``only_whole``: it shows with one output only, as where a compiler fuses operators."""
    reference = Reference.measure(static_copy(residual_network(), 1), images())
    row = measure_target(Fake(constant, only_whole=only_whole), reference, Check())
    assert (row.verdict, row.failed) == ("differs", True)
    assert row.differing
    assert row.largest_steps >= 1
    assert row.first.op_type == made_by
    assert row.first.tensor.startswith({"Relu": "r3"}.get(made_by, constant[:2]))
    assert "should be exact; parts at " in row.note()


def test_a_float_tail_is_compared_in_front_of_it():
    proto = static_copy(residual_network(tail="float"), 1)
    reference = Reference.measure(proto, images())
    assert [len(piece.wanted) for piece in reference.pieces] == [0, 1]
    assert reference.pieces[1].wanted[0].name == "fc"
    assert measure_target(Fake("fc_b_q"), reference, Check()).verdict == "differs"


def test_what_a_profile_allows_is_no_failure():
    reference = Reference.measure(static_copy(residual_network(), 1), images())
    far = measure_target(Fake("fc_b_q"), reference, Check()).largest_steps
    within = measure_target(Fake("fc_b_q"), reference, Check(steps=int(far), cause="ties"))
    assert (within.verdict, within.failed) == ("explained", False)
    assert f"ties ({far:g} steps allowed)" in within.note()
    assert measure_target(Fake("fc_b_q"), reference, Check(steps=int(far) - 1)).failed
    assert not measure_target(Fake("fc_b_q"), reference, Check(steps=-1)).failed


@pytest.mark.parametrize(
    ("gain", "moved", "verdict"),
    [(1.002, False, "explained"), (1.002, True, "explained"), (1.2, False, "differs")],
)
def test_a_step_at_a_softmax_is_named(gain, moved, verdict):
    """The interpreter computes it in float, too: last digits are no one's fault."""
    g = QdqBuilder((3, 16, 16))
    soft = g.node("Softmax", [g.image], "soft", axis=1)
    soft = g.node("Transpose", [soft], "turned", perm=[0, 1, 3, 2]) if moved else soft
    g.quantize(soft, -8, np.uint8, output="out")
    reference = Reference.measure(static_copy(g.model({"out": 4}), 1), images())

    class Other(Fake):
        def run(self, proto, images):
            copy = onnx.ModelProto()
            copy.CopyFrom(proto)
            for at, node in enumerate(copy.graph.node):
                if node.op_type == "Softmax":
                    factor = numpy_helper.from_array(np.float32(gain), "gain")
                    copy.graph.initializer.append(factor)
                    mul = onnx.helper.make_node("Mul", [node.input[0], "gain"], ["warmer"])
                    node.input[0] = "warmer"
                    copy.graph.node.insert(at, mul)
                    break
            return super().run(copy, images)

    row = measure_target(Other(), reference, Check())
    assert row.differing
    assert row.verdict == verdict
    assert ("Softmax has no exact integer form" in row.note()) is (verdict == "explained")


@pytest.mark.parametrize(("shift", "verdict"), [(0.3, "explained"), (3.3, "differs")])
def test_an_image_that_is_rounded_otherwise_is_named(shift, verdict):
    """By a step at its own quantizer; more is no matter of rounding."""
    reference = Reference.measure(static_copy(residual_network(), 1), images())
    graph = reference.graph
    (entry,) = [node for node in graph.quantizers if node.input[0] == graph.inputs[0].name]
    step = float(graph.scale(entry))

    class Other(Fake):
        def run(self, proto, images):
            return super().run(proto, images + np.float32(shift * step))

    row = measure_target(Other(), reference, Check())
    assert (row.verdict, row.failed) == (verdict, verdict == "differs")
    assert ("next to the middle of two steps" in row.note()) == (verdict == "explained")


def test_known_causes_count_only_where_the_file_has_their_pattern(monkeypatch):
    reference = Reference.measure(static_copy(residual_network(), 1), images())
    row = measure_target(Fake("fc_b_q"), reference, Check(fuses_add=True))
    assert (row.verdict, row.allowed_steps) == ("explained", None)
    assert "skips the rounding" in row.cause
    monkeypatch.setattr(causes, "has_rounded_branch", lambda graph: False)
    assert measure_target(Fake("fc_b_q"), reference, Check(fuses_add=True)).failed

    class Old:
        vnni = False

    monkeypatch.setattr(causes, "read_cpu", Old)
    row = measure_target(Fake("fc_b_q"), reference, Check(saturates=True))
    assert (row.verdict, "saturation" in row.cause) == ("explained", True)
    Old.vnni = True
    assert measure_target(Fake("fc_b_q"), reference, Check(saturates=True)).failed


def test_a_refusal_is_a_line_and_a_failure(reference):
    row = measure_target(Fake(refuse=True), reference, Check())
    assert (row.verdict, row.failed, row.compiled) == ("refused", True, False)
    assert row.note() == "RuntimeError: no"
    json.dumps(row.to_dict())


def test_nan_is_infinitely_far(reference):
    class Nan(Fake):
        def run(self, proto, images):
            ran = super().run(proto, images)
            for values in ran.outputs:
                values[...] = np.nan
            return ran

    for steps in (100, -1):  # any finite number of steps
        row = measure_target(Nan(), reference, Check(steps=steps))
        assert (row.verdict, row.failed) == ("differs", True)
        assert row.to_dict()["largest_steps"] is None


def test_another_shape_is_refused(reference):
    class Short(Fake):
        def run(self, proto, images):
            ran = super().run(proto, images)
            cut = tuple(values[:, :, :-1] for values in ran.outputs)
            return Ran(**(vars(ran) | {"outputs": cut}))

    assert measure_target(Short(), reference, Check()).verdict == "refused"


def test_names_of_targets():
    assert [p.name for p in parse_targets("tvm, iree,tvm")] == ["tvm", "iree"]
    assert {"onnxruntime", "openvino", "iree", "tvm", "rknn", "imx500"} == {
        p.name for p in parse_targets("all")
    }
    for text, message in [
        ("nosuch", "there is no target"),
        ("qonnx", "can neither run nor compile"),
        (",", "names no target"),
    ]:
        with pytest.raises(SettingsError, match=message):
            parse_targets(text)


@pytest.mark.parametrize("batch", ["N", 4])
def test_a_file_on_onnxruntime_and_on_what_is_missing(tmp_path, monkeypatch, batch):
    monkeypatch.setenv("ZSQ_TARGETS", str(tmp_path))
    onnx.save(residual_network(batch=batch), tmp_path / "q.onnx")
    with ImageWriter(tmp_path / "i.npz", count=6, shape=(3, 16, 16)) as writer:
        writer.append(images(6)[:, 0])
    found = compare_targets(
        tmp_path / "q.onnx",
        open_images(tmp_path / "i.npz"),
        VerifySettings(threads=1),
        "onnxruntime,openvino",
    )
    assert found.passed
    assert (found.images, found.batch) == (6, 4 if batch == 4 else 1)
    verdicts = {row.target: row.verdict for row in found.rows}
    assert verdicts.pop("onnxruntime default") in ("exact", "explained")
    assert verdicts == {
        "onnxruntime unoptimized": "exact",
        "onnxruntime optimized": "exact",
        "openvino": "skipped",
    }
    assert "zsq targets install openvino" in found.rows[-1].note()
    integer = {row.target: row.integer_kernels for row in found.rows[:2]}
    assert integer["onnxruntime unoptimized"][0] == 0
    assert integer["onnxruntime optimized"][0] > 0


def test_a_float_file_is_refused(tmp_path, digits_models):
    with ImageWriter(tmp_path / "i.npz", count=1, shape=(1, 8, 8)) as writer:
        writer.append(np.zeros((1, 1, 8, 8), np.float32))
    with pytest.raises(VerificationError, match="is not quantized"):
        compare_targets(
            digits_models / "digits_resnet.onnx",
            open_images(tmp_path / "i.npz"),
            VerifySettings(),
            "onnxruntime",
        )


def command(capsys, *arguments) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_a_table_and_exits_by_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZSQ_TARGETS", str(tmp_path))
    path = tmp_path / "q.onnx"
    onnx.save(residual_network(), path)
    few = ("--max-images", 3, "--threads", 1)
    targets = ("--targets", "onnxruntime,tvm")
    code, out, _ = command(capsys, "verify", path, *targets, *few)
    assert code == 0
    for text in (
        "onnxruntime optimized",
        "exact",
        "zsq targets install tvm",
        "PASSED: 3 of 3",
    ):
        assert text in out
    code, out, _ = command(capsys, "verify", path, *targets, *few, "--json")
    facts = json.loads(out)["targets"]
    assert code == 0
    assert facts["passed"]
    assert [row["verdict"] for row in facts["rows"]][::3] == ["exact", "skipped"]

    engine = Fake("fc_b_q")
    monkeypatch.setattr(
        agreement, "engines_of", lambda profile, settings: [("fake", engine, Check())]
    )
    code, out, _ = command(capsys, "verify", path, "--targets", "tvm", *few)
    assert code == 1
    assert "fake: should be exact; parts at Gemm gemm_fc" in out
    assert "FAILED: 0 of 1 runs" in out


def test_a_cpu_that_saturates_is_named(tmp_path, monkeypatch, capsys):
    """A default run that is a step off, as on a CPU without VNNI: a warning, not a failure."""
    run = ort.run

    def saturating(compiled, batch):
        values = run(compiled, batch)
        if compiled.mode == "default":
            values = {name: value - 2.0**-3 for name, value in values.items()}
        return values

    old = Cpu(machine="x86_64", name="Old CPU", vnni=False, flags=("avx2",))
    monkeypatch.setattr(ort, "run", saturating)
    for module in (causes, findings):
        monkeypatch.setattr(module, "read_cpu", lambda: old)
    path = tmp_path / "q.onnx"
    onnx.save(residual_network(), path)
    words = ("--targets", "onnxruntime", "--max-images", 3, "--threads", 1)
    code, out, _ = command(capsys, "verify", path, *words)
    assert code == 0
    said = " ".join(out.split())
    for text in (
        "this CPU (Old CPU, without VNNI) saturates: without session.x64quantprecision=1",
        "100.00 % of elements change, by up to 1 steps",
        "`zsq quantize --weight-range 7bit` rules out",
        "onnxruntime default: saturation: x64 without VNNI adds pairs",
    ):
        assert text in said
    monkeypatch.setattr(ort, "run", run)
    _, out, _ = command(capsys, "verify", path, *words)
    assert "saturation: none measured on this CPU (Old CPU" in " ".join(out.split())


def test_the_commands_refuse_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZSQ_TARGETS", str(tmp_path))
    path = tmp_path / "q.onnx"
    onnx.save(residual_network(), path)
    for arguments in (
        ("verify", path, "--targets", "nosuch"),
        ("verify", path, "--targets", "qonnx"),
        ("targets", "install"),
        ("targets", "install", "nosuch"),
        ("targets", "install", "onnxruntime"),
        ("targets", "remove"),
    ):
        code, out, err = command(capsys, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), err


def test_targets_are_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ZSQ_TARGETS", str(tmp_path))
    code, out, _ = command(capsys, "targets", "list", "--json")
    listed = {entry["name"]: entry for entry in json.loads(out)["targets"]}
    assert code == 0
    assert listed["openvino"]["version"] is None
    assert listed["openvino"]["install"].startswith("`zsq targets install openvino`")
    assert listed["onnxruntime"]["install"] == "nothing to install"
    code, out, _ = command(capsys, "targets", "list", "iree")
    assert code == 0
    assert "iree" in out
    assert "openvino" not in out
