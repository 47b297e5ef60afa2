from __future__ import annotations

import json
import sys
import zipfile

import numpy as np
import onnx
import pytest

from graph_tools.errors import TargetError
from pipeline.cli import main
from pipeline.environments import find_environment
from pipeline.export.converter import memory_of, refused_nodes
from pipeline.export.cut import cut_before
from pipeline.export.fake_quantized import FakeQuantized
from pipeline.export.imx500 import to_imx500
from pipeline.images import open_images
from pipeline.target_profiles import load_profile
from tests.pipeline.export.dialects import differing, run_dialect


def first_image(path):
    return open_images(path.with_suffix("") / "images.npz").load(1)


@pytest.mark.parametrize("name", ["residual", "chain", "shuffle"])
def test_the_dialect_computes_the_same_integers(name, request):
    path = request.getfixturevalue(name)
    quantized, image = onnx.load(path), first_image(path)
    network = FakeQuantized(quantized)
    proto = to_imx500(network, network.graph.outputs)
    different, total = differing(quantized, run_dialect(proto, image), image)
    assert total > 200
    assert different == 0


def test_a_threshold_that_is_doubled_is_seen(residual):
    """The comparison above can fail."""
    quantized, image = onnx.load(residual), first_image(residual)
    network = FakeQuantized(quantized)
    proto = to_imx500(network, network.graph.outputs)
    node = next(n for n in proto.graph.node if n.op_type == "ActivationPOTQuantizer")
    next(a for a in node.attribute if a.name == "threshold").f *= 2
    assert differing(quantized, run_dialect(proto, image), image)[0] > 0


def test_the_converter_gets_a_batch_of_one_and_all_shapes(residual):
    network = FakeQuantized(onnx.load(residual))
    proto = to_imx500(network, network.graph.outputs)
    known = {value.name: value for value in [*proto.graph.value_info, *proto.graph.output]}
    for node in proto.graph.node:
        for name in node.output:
            dims = known[name].type.tensor_type.shape.dim
            assert all(dim.dim_value > 0 for dim in dims), name
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 1
    assert proto.producer_name == "pytorch"


def test_channels_that_a_chain_of_movement_takes_become_a_slice(shuffle):
    network = FakeQuantized(onnx.load(shuffle))
    proto = to_imx500(network, network.graph.outputs)
    kinds = {node.op_type for node in proto.graph.node}
    assert "Gather" not in kinds
    assert "Slice" in kinds


def test_what_is_refused_is_cut_off_with_all_behind_it(residual):
    network = FakeQuantized(onnx.load(residual))
    pool = next(n.name for n in network.operators if n.op_type == "GlobalAveragePool")
    cut = cut_before(network, refused=[pool])
    assert [node.op_type for node in cut.nodes] == ["GlobalAveragePool", "Flatten", "Gemm"]
    image, quantized = first_image(residual), onnx.load(residual)
    found = run_dialect(to_imx500(network, cut.ends), image)
    assert set(cut.ends) <= set(found)
    assert differing(quantized, found, image)[0] == 0


def test_nothing_left_is_an_error(residual):
    network = FakeQuantized(onnx.load(residual))
    with pytest.raises(TargetError, match="no part"):
        cut_before(network, operators=["Softmax"])


def test_the_log_of_the_converter_names_refused_nodes():
    log = "Node [Framework.onnx] op: Gather, id: /a b/Gather, errors:\n\tParam error\n"
    assert refused_nodes(f"x\n{log}-----\n{log}") == ["/a b/Gather", "/a b/Gather"]
    log = "ERROR : CODE: [USOP] The network contains unsupported ops: Elu, PRelu [/x/logger.py:185]"
    assert refused_nodes(log) == ["Elu", "PRelu"]


def test_a_report_that_is_none_is_named(tmp_path):
    path = tmp_path / "x_MemoryReport.json"
    path.write_text(json.dumps({"Memory Report": {"Memory Usage": "1KB"}}))
    with pytest.raises(TargetError, match="Total Memory"):
        memory_of(path)


def test_without_the_converter_the_file_stays_and_says_how(
    residual, tmp_path, capsys, no_converter
):
    folder = tmp_path / "out"
    assert main(["export", str(residual), "--target", "imx500", "-o", str(folder)]) == 0
    assert [item.name for item in folder.iterdir()] == ["model.onnx"]
    said = capsys.readouterr().out
    assert "zsq targets install imx500" in said


def test_free_scales_are_refused_and_nothing_is_written(tmp_path, capsys, no_converter):
    from tests.pipeline.export.conftest import CHAIN, quantized

    path = quantized(tmp_path, CHAIN, "--weight-scale", "free")
    folder = tmp_path / "out"
    assert main(["export", str(path), "--target", "imx500", "-o", str(folder)]) == 2
    assert "--weight-scale pot" in capsys.readouterr().err
    assert not folder.exists()


def fake_converter(folder, monkeypatch, script):
    """A program in place of the converter; it says what the real one was seen to say."""
    profile = load_profile("imx500")
    home = folder / "targets" / "imx500"
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "python").write_text("")
    mark = {"version": "0.1", "requirements": list(profile.install.requirements)}
    (home / "installed.json").write_text(json.dumps(mark))
    program = home / "bin" / "imxconv-pt"
    program.write_text(f"#!{sys.executable}\nimport json, pathlib, sys, zipfile\n{script}")
    program.chmod(0o755)
    monkeypatch.setenv("ZSQ_TARGETS", str(folder / "targets"))
    monkeypatch.setattr("pipeline.export.converter.missing_commands", lambda install: ())


REFUSES_GEMM = """
text = pathlib.Path(sys.argv[2]).read_bytes()
out = pathlib.Path(sys.argv[4])
if b"Gemm" in text:
    sys.exit("ERROR : CODE: [USOP] The network contains unsupported ops: Gemm [/x.py:1]")
out.mkdir()
zipfile.ZipFile(out / "packerOut.zip", "w").writestr("a", "b")
sizes = "Model Memory Physical Size", "Runtime Memory Physical Size", "Memory Usage"
report = {**dict.fromkeys(sizes, "1KB"), "Total Memory Available On Chip": "8MB"}
report |= {"Memory Utilization": "1%", "Fit In Chip": True}
(out / "model_MemoryReport.json").write_text(json.dumps({"Memory Report": report}))
"""


def test_what_the_converter_refuses_is_cut_and_named(residual, tmp_path, monkeypatch, capsys):
    fake_converter(tmp_path, monkeypatch, REFUSES_GEMM)
    folder = tmp_path / "out"
    assert main(["export", str(residual), "--target", "imx500", "-o", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "cut off" in said
    assert "Gemm" in said
    assert "1KB of 8MB" in said
    kinds = {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}
    assert "Gemm" not in kinds
    assert "Conv" in kinds


@pytest.mark.parametrize(
    ("script", "message"),
    [("sys.exit('ERROR no heap')", "no heap"), ("import time; time.sleep(60)", "not done")],
)
def test_a_converter_that_fails_leaves_nothing(
    residual, tmp_path, monkeypatch, capsys, script, message
):
    fake_converter(tmp_path, monkeypatch, script)
    folder = tmp_path / "out"
    words = ["--target", "imx500", "-o", str(folder), "--timeout", "3"]
    assert main(["export", str(residual), *words]) == 2
    assert message in capsys.readouterr().err
    assert not folder.exists()
    assert [item.name for item in tmp_path.iterdir()] == ["targets"]


def row_of(capsys, path) -> tuple[int, dict, str]:
    words = ["verify", str(path), "--targets", "imx500", "--max-images", "2", "--threads", "1"]
    code = main([*words, "--timeout", "3"])
    table = capsys.readouterr().out
    assert main([*words, "--timeout", "3", "--json"]) == code
    (row,) = json.loads(capsys.readouterr().out)["targets"]["rows"]
    return code, row, table


def test_verify_has_a_row_for_the_converter(residual, tmp_path, monkeypatch, capsys):
    fake_converter(tmp_path, monkeypatch, REFUSES_GEMM)
    code, row, table = row_of(capsys, residual)
    assert code == 0
    assert (row["verdict"], row["compiled"], row["ran"]) == ("compiled", True, False)
    assert row["packed"].startswith("1KB of 8MB, ")
    assert "nodes cut off" in row["packed"]
    assert "imx500: 1KB of 8MB" in table
    assert "0.1" in table


def test_verify_says_why_the_converter_fails_or_is_not_there(
    residual, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ZSQ_TARGETS", str(tmp_path / "none"))
    code, row, table = row_of(capsys, residual)
    assert (code, row["verdict"]) == (0, "skipped")
    assert "zsq targets install imx500" in table
    fake_converter(tmp_path, monkeypatch, "sys.exit('ERROR no heap')")
    code, row, table = row_of(capsys, residual)
    assert (code, row["verdict"], row["compiled"]) == (1, "refused", False)
    assert "no heap" in table


def test_an_unrounded_branch_is_refused_by_name(tmp_path, capsys, no_converter):
    """Sony's converter 3.19.2 fails on it: "Layer Conv2D: ... is not quantized" in its log."""
    from tests.pipeline.export.conftest import RESIDUAL, quantized

    path = quantized(tmp_path, RESIDUAL, "--target", "openvino")
    folder = tmp_path / "out"
    assert main(["export", str(path), "--target", "imx500", "-o", str(folder)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "unrounded, which the converter refuses" in said
    assert "--target imx500" in said
    assert not folder.exists()


@pytest.mark.slow
def test_the_real_converter_packs_a_network(residual, tmp_path, capsys):
    if find_environment(load_profile("imx500")) is None:
        pytest.skip("zsq targets install imx500")
    folder = tmp_path / "out"
    assert (
        main(["export", str(residual), "--target", "imx500", "-o", str(folder), "--json"]) == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert facts["converted"]
    assert facts["memory"]["Fit In Chip"]
    assert zipfile.is_zipfile(folder / "packerOut.zip")


@pytest.mark.slow
def test_a_real_network_in_the_dialect(shared_models, tmp_path):
    model, output = shared_models / "cifar10_resnet20.onnx", tmp_path / "q.onnx"
    words = ["--method", "noise", "--num-images", "4", "--verify-images", "4", "--quiet"]
    assert main(["quantize", str(model), "-o", str(output), *words]) == 0
    quantized, image = onnx.load(output), first_image(output)
    network = FakeQuantized(quantized)
    found = run_dialect(to_imx500(network, network.graph.outputs), image)
    different, total = differing(quantized, found, np.asarray(image))
    assert total > 200_000
    assert different == 0
