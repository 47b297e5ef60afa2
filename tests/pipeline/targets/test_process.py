"""The protocol of runner processes, with runners that misbehave in every way."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline.verify.compilers.engine import Refusal
from pipeline.verify.compilers.process import RUNNERS, ProcessEngine

GOOD = """
import os, sys, time
import numpy as np
def version(): return "1.0"
def compile(model, folder):
    print("noise on stdout")
    assert os.path.exists(model) and os.path.samefile(folder, os.getcwd())
    {compiling}
    return model
def run(compiled, batch):
    {running}
    return [batch * 2]
def integer_kernels(compiled): {kernels}
"""


def model(opset: int = 21) -> onnx.ModelProto:
    tensor = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 3]) for n in "xy"]
    node = helper.make_node("Sigmoid", ["x"], ["y"])
    graph = helper.make_graph([node], "g", tensor[:1], tensor[1:])
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


IMAGES = np.arange(24, dtype=np.float32).reshape(4, 2, 3)


def engine(
    folder: Path,
    *,
    compiling: str = "pass",
    running: str = "pass",
    kernels: str = "return (3, 4)",
    timeout: float = 60,
    **settings,
) -> ProcessEngine:
    script = folder / "fake.py"
    script.write_text(GOOD.format(compiling=compiling, running=running, kernels=kernels))
    return ProcessEngine(
        name="fake",
        version="1.0",
        python=Path(sys.executable),
        script=script,
        timeout=timeout,
        **settings,
    )


def test_outputs_times_and_kernels_come_back(tmp_path):
    ran = engine(tmp_path).run(model(), IMAGES)
    np.testing.assert_array_equal(ran.outputs[0], IMAGES * 2)
    assert ran.integer_kernels == (3, 4)
    assert len(ran.run_seconds) == 4
    assert ran.compile_seconds >= 0


def test_kernels_that_cannot_be_counted_are_unknown(tmp_path):
    assert engine(tmp_path, kernels="1 / 0").run(model(), IMAGES).integer_kernels is None


@pytest.mark.parametrize(
    ("settings", "compiled", "message"),
    [
        (
            {"compiling": "raise ValueError('no such\\n operator')"},
            False,
            r"ValueError: no such operator",
        ),
        (
            {"compiling": "raise RuntimeError('Traceback:\\n File x\\nOSError: disk full')"},
            False,
            "RuntimeError: OSError: disk full",
        ),
        ({"running": "sys.exit(3)"}, True, "SystemExit: 3"),
        ({"running": "os.kill(os.getpid(), 11)"}, True, "was killed by SIGSEGV while running"),
        (
            {"compiling": "print('last words', flush=True); os._exit(7)"},
            False,
            "ended with code 7: last words while compiling",
        ),
        ({"compiling": "os._exit(0)"}, False, "its answer cannot be read"),
        ({"running": "return []"}, True, "gave 0 outputs in place of 1"),
        (
            {"compiling": "time.sleep(60)", "timeout": 3},
            False,
            "took longer than 3 s while compiling",
        ),
        ({"running": "return [np.array([object()])]"}, True, "."),
    ],
)
def test_what_goes_wrong_is_one_line(tmp_path, settings, compiled, message):
    with pytest.raises(Refusal, match=message) as caught:
        engine(tmp_path, **settings).run(model(), IMAGES)
    assert caught.value.compiled is compiled
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_garbage_in_place_of_a_result_is_one_line(tmp_path):
    spoil = "open('result.json', 'w').write('[1, 2'); os._exit(0)"
    with pytest.raises(Refusal, match="its answer cannot be read"):
        engine(tmp_path, running=spoil).run(model(), IMAGES)


def test_a_python_that_is_gone_is_one_line(tmp_path):
    gone = ProcessEngine(
        name="fake",
        version="1.0",
        python=tmp_path / "gone",
        script=tmp_path / "fake.py",
        timeout=5,
    )
    with pytest.raises(Refusal, match="cannot be started"):
        gone.run(model(), IMAGES)


def test_a_copy_says_the_opset_that_the_compiler_reads(tmp_path):
    check = "import onnx; assert onnx.load(model).opset_import[0].version == 19"
    engine(tmp_path, compiling=check, opset=19).run(model(21), IMAGES)
    gelu = model(21)
    gelu.graph.node[0].op_type = "Gelu"  # of opset 20
    with pytest.raises(Refusal, match="reads opset 19, this is 21"):
        engine(tmp_path, opset=19).run(gelu, IMAGES)


@pytest.mark.parametrize("path", sorted(RUNNERS.glob("*.py")), ids=lambda path: path.stem)
def test_runners_import_nothing_of_this_package(path):
    text = path.read_text()
    assert "pipeline" not in text
    assert "graph_tools" not in text
