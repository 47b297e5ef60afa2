from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from graph_tools.errors import SettingsError
from pipeline.images import ImageWriter
from pipeline.report import write_report
from pipeline.report.advice import advise
from pipeline.report.distribution import distribution
from pipeline.report.engines import engines
from pipeline.report.figures import Series, histogram_chart, line_chart, thumbnails
from pipeline.report.numbers import format_bytes, format_number, format_seconds, to_json_values
from pipeline.report.verdict import judge
from pipeline.report_targets import add_targets, describe_targets
from pipeline.verify.accumulators import Accumulator
from pipeline.verify.cpu import Cpu
from pipeline.verify.differences import Difference
from pipeline.verify.kernels import Kernels, NodeKernel
from pipeline.verify.proof import Proof, Saturation, TensorProof
from pipeline.verify.rows import Agreement, TargetRow
from pipeline.verify.scales import ScaleCheck

SECTIONS = (
    "accuracy sensitivity size tensors outputs float proof images loss statistics model "
    "reproduce"
).split()


def _tensor(index: int, kind: str) -> dict[str, Any]:
    return {
        "name": f"/layer{index // 6 + 1}/block{index % 6}/conv/Conv_{kind}",
        "node": f"/layer{index // 6 + 1}/block{index % 6}/conv/Conv",
        "op_type": "Conv",
        "kind": kind,
        "bits": 32 if kind == "bias" else 8,
        "signed": kind != "activation" or index % 3 == 0,
        "exponent": [-9, -5] if kind == "weight" else -4 - index % 4,
        "threshold": None if kind == "bias" else 2.0 ** (3 - index % 4),
        "sqnr_db": None if kind == "bias" else 44.0 - 0.4 * index + 3 * math.sin(index),
        "clipped_percent": 0.004 * index if kind == "activation" else None,
        "shares_with": "images" if kind == "activation" and index == 1 else None,
        "histogram": None if kind == "bias" else _histogram(index, kind == "weight"),
    }


def _histogram(index: int, relative: bool) -> dict[str, Any]:
    centers = np.linspace(-1, 1, 48)
    counts = np.round(1e4 * np.exp(-(centers**2) * (8 + index % 5))).astype(int)
    high = 1.2 if relative else 1.4 * 2.0 ** (3 - index % 4)
    found = {"low": -high, "high": high, "counts": counts.tolist()}
    return {**found, "relative": True} if relative else found


def _cost(index: int, kind: str) -> dict[str, Any]:
    tensor = _tensor(index, kind)
    name = tensor["node"] if kind == "weight" else tensor["name"]
    wider = 16 if kind == "activation" else None
    return {
        "name": tensor["name"],
        "kind": kind,
        "node": tensor["node"],
        "bits": 8,
        "wider": wider,
        "error": 0.03 / (1 + index + (kind == "weight")),
        "pattern": name,
        "flag": f"{name}=A16" if wider else None,
    }


def make_agreement() -> Agreement:
    """What zsq verify --targets found of three compilers."""
    exact = TargetRow(
        target="iree", version="3.13.0", compiled=True, ran=True, elements=640,
        integer_kernels=(0, 21), seconds_per_image=0.0021,
    )  # fmt: skip
    far = TargetRow(
        target="tvm", version="0.25", compiled=True, ran=True, elements=640, differing=12,
        largest_steps=math.inf,
    )  # fmt: skip
    absent = TargetRow(
        target="openvino", skipped="not installed: zsq targets install openvino"
    )
    return Agreement(
        model="q.onnx", images=64, batch=16, rows=(exact, far, absent), tensors=("logits",),
        float_nodes=(), cpu=Cpu(machine="x86_64", name="Some CPU", vnni=False, flags=()),
    )  # fmt: skip


def _difference(first: str, second: str, differing: int) -> Difference:
    return Difference(
        first=first,
        second=second,
        elements=5000,
        differing=differing,
        largest_steps=2.0 if differing else 0.0,
        largest_absolute=0.25 if differing else 0.0,
        largest_relative=0.1 if differing else 0.0,
        rows=500,
        top1_changes=3 if differing else 0,
    )


def make_proof(
    *, differing: int = 0, failures: tuple[str, ...] = (), num_layers: int = 27
) -> Proof:
    """Return the proof of a small ResNet whose CPU saturates."""
    nodes = [
        NodeKernel(
            node=f"/conv{i}/Conv",
            op_type="Conv",
            kernel="QLinearConv",
            integer=True,
            reason="",
        )
        for i in range(num_layers)
    ]
    absorbed = [
        NodeKernel(node=f"/relu{i}/Relu", op_type="Relu", kernel="", integer=True, reason="")
        for i in range(19)
    ]
    return Proof(
        model="resnet20.w8a8.onnx",
        onnxruntime="1.31.1",
        images=500,
        tensors=(
            TensorProof(
                name="logits",
                kind="integer output",
                scale=0.125,
                feeds=(),
                differences=(
                    _difference("unoptimized", "optimized", differing),
                    _difference("unoptimized", "default", 96),
                    _difference("optimized", "default", 96),
                ),
            ),
        ),
        kernels=Kernels(nodes=(*nodes, *absorbed), counts={"QLinearConv": num_layers}),
        saturation=Saturation(
            saturates=True,
            share=96 / 5000,
            largest_steps=2.0,
            rows=500,
            top1_changes=3,
            nodes_at_risk=("/conv3/Conv",),
            cpu=Cpu(machine="x86_64", name="Some CPU", vnni=False, flags=("avx2",)),
        ),
        scales=ScaleCheck(
            num_scales=140,
            num_biases=num_layers,
            not_power_of_two=(),
            asymmetric_zero_points=(),
            bias_mismatches=(),
            pair_mismatches=(),
            float_biases=(),
        ),
        accumulators=tuple(
            Accumulator(
                node=f"/conv{i}/Conv",
                op_type="Conv",
                largest=2**20 + i,
                bits=22,
                simulation_exact=True,
                overflows_int32=False,
                may_saturate=i == 3,
            )
            for i in range(num_layers)
        ),
        failures=failures,
        warnings=(),
        seconds=4.1,
    )


def make_report(num_layers: int = 19, num_iterations: int = 40) -> dict[str, Any]:
    """Return a report like those of a small ResNet; every part ran."""
    edges = np.linspace(-12, 18, 41)
    centers = (edges[1:] + edges[:-1]) / 2
    counts = np.round(9000 * np.exp(-((centers - 1) ** 2) / 18))
    kinds = [(i, kind) for i in range(num_layers) for kind in ("activation", "weight", "bias")]
    return {
        "tool": {
            "name": "onnx-zsq",
            "version": "0.1.0",
            "created": "2026-01-31T12:00:00+00:00",
        },
        "model": {
            "path": "exports/cifar10_resnet20.onnx",
            "sha256": "5f1d" * 16,
            "input": {
                "name": "images",
                "shape": [3, 32, 32],
                "layout": "NCHW",
                "batch": None,
            },
            "outputs": ["logits"],
            "num_nodes": 72,
            "num_batch_norms": 19,
            "operators": {
                "Conv": 21,
                "BatchNormalization": 19,
                "Relu": 19,
                "Add": 9,
                "Gemm": 1,
            },
            "notes": ["opset 17 converted to 21"],
        },
        "settings": {
            "method": "dgh",
            "num_images": 256,
            "seed": 0,
            "device": "cpu",
            "bias_correction": "empirical",
            "data": None,
            "threshold": "mse",
        },
        "preprocessing": {
            "mean": [0.4914, 0.4822, 0.4465],
            "std": [0.247, 0.243, 0.261],
            "channels": "rgb",
            "source": "given",
        },
        "generation": {
            "method": "dgh",
            "num_images": 256,
            "iterations": num_iterations,
            "batch_size": 128,
            "seconds": 93.4,
            "notes": ["statistics are matched over all images at once"],
            "history": [
                {
                    "iteration": i,
                    "total": 40 * math.exp(-i / num_iterations * 5) + 0.9 + 0.1 * math.sin(i),
                    "statistics": 32 * math.exp(-i / num_iterations * 5) + 0.7,
                    "output": 8 * math.exp(-i / num_iterations * 4) + 0.01,
                    "unused": 0.0,
                }
                for i in range(num_iterations)
            ],
            "statistics": [
                {
                    "node": f"/layer{i // 6 + 1}/block{i % 6}/bn/BatchNormalization",
                    "tensor": f"/layer{i // 6 + 1}/block{i % 6}/conv/Conv_output_0",
                    "channels": 16 * (1 + i // 6),
                    "mean_error_before": 0.8 + 0.3 * math.sin(i),
                    "mean_error_after": 0.03 + 0.002 * i,
                    "std_error_before": 0.5 + 0.2 * math.cos(i),
                    "std_error_after": 0.02 + 0.003 * i,
                }
                for i in range(num_layers)
            ],
        },
        "quantization": {
            "scheme": "full",
            "weight_bits": 8,
            "activation_bits": 8,
            "seconds": 6.2,
            "power_of_two": True,
            "tensors": [_tensor(index, kind) for index, kind in kinds],
            "float": [
                {
                    "node": "/head/Softmax",
                    "op_type": "Softmax",
                    "reason": "after the last Gemm",
                }
            ],
            "absorbed": [
                {"node": f"/relu{i}/Relu", "op_type": "Relu", "into": f"/conv{i}/Conv"}
                for i in range(num_layers)
            ],
            "outputs": [
                {
                    "name": "logits",
                    "sqnr_db": 31.23,
                    "histogram": {
                        "edges": edges.tolist(),
                        "float": counts.tolist(),
                        "quantized": np.roll(counts, 1).tolist(),
                    },
                }
            ],
            "bytes": {"float": 1_103_000, "quantized": 312_400},
            "notes": ["bias correction moved 19 biases"],
        },
        "command": "zsq quantize exports/cifar10_resnet20.onnx -o q.onnx --mean 0.5 --std 0.5",
        "output": {"file": "q.onnx", "sha256": "ab12" * 16},
        "cost": {
            "macs": 40_600_000,
            "macs_by_width": [
                {"weights": 8, "activations": 8, "macs": 40_000_000},
                {"weights": None, "activations": None, "macs": 600_000},
            ],
            "parameters": 270_000,
            "parameter_bytes": {"float": 1_080_000, "quantized": 280_000},
        },
        "sensitivity": {
            "images": 16,
            "costs": [_cost(i, kind) for i, kind in kinds if kind != "bias"],
            "unmeasured": 0,
            "error": 0.045,
            "widened": [_tensor(i, "activation")["name"] for i in range(3)],
            "widened_error": 0.021,
        },
        "fidelity": {
            "measures": [
                {"kind": "calibration", "images": 256, "agreement": 0.98, "sqnr_db": 27.0},
                {"kind": "prior", "images": 256, "agreement": 0.92, "sqnr_db": 24.3},
            ],
            "estimate": None,
        },
        "proof": make_proof().to_dict(),
        "targets": None,
        "evaluation": [
            {
                "model": "resnet20.onnx",
                "top1": 81.0,
                "top5": 99.0,
                "count": 2000,
                "seconds": 3.1,
            },
            {"model": "w8a8.onnx", "top1": 80.9, "top5": 99.1, "count": 2000, "seconds": 2.0},
        ],
        "warnings": [],
        "times": {"load": 0.3, "generate": 93.4, "quantize": 6.2, "verify": 4.1},
        "versions": {"python": "3.11.2", "onnx": "1.23.2", "onnxruntime": "1.31.1"},
    }


def make_images(num: int = 20, side: int = 32, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (num, 4, 4, channels), dtype=np.uint8)
    return coarse.repeat(side // 4, axis=1).repeat(side // 4, axis=2)


class Page(HTMLParser):
    """A page's elements, texts and references, read as a browser would."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[tuple[str, str]] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._stack: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in {"meta", "link", "img", "wbr", "br", "input"}:
            self._stack.append(tag)
        for name, value in attrs:
            if name in {"src", "href", "srcset", "action", "data", "poster"}:
                self.references.append((tag, value or ""))
            if name == "id":
                self.ids.append(value or "")
            assert not name.startswith("on"), "an inline event handler"

        if tag in {"td", "th", "dt", "dd", "span"}:
            self.words.append(" ")  # they stand apart

    def handle_endtag(self, tag: str) -> None:
        while self._stack and self._stack.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "script" in self._stack:
            self.scripts.append(data)
        elif "style" not in self._stack:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def write(tmp_path: Path, report: dict[str, Any], images: Any = None) -> tuple[Page, str]:
    path = write_report(tmp_path, report, make_images() if images is None else images)
    text = path.read_text(encoding="utf-8")
    return Page(text), text


def test_json_holds_the_report_exactly(tmp_path: Path) -> None:
    report = make_report()
    write_report(tmp_path, report, make_images())
    text = (tmp_path / "report.json").read_text(encoding="utf-8")
    assert json.loads(text) == report
    assert list(json.loads(text)) == list(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_json_is_strict_about_numbers() -> None:
    values = {
        "sqnr_db": math.inf,
        "worst": -np.inf,
        "mean": np.float32("nan"),
        "bits": np.int64(8),
        "edges": np.array([0.5, np.nan]),
        "exact": np.True_,
        "path": Path("a") / "b",
        "shape": (1, 2),
    }
    assert to_json_values(values) == {
        "sqnr_db": "inf",
        "worst": "-inf",
        "mean": None,
        "bits": 8,
        "edges": [0.5, None],
        "exact": True,
        "path": str(Path("a") / "b"),
        "shape": [1, 2],
    }
    with pytest.raises(TypeError, match="object"):
        to_json_values(object())


def test_all_sections_are_present_and_linked(tmp_path: Path) -> None:
    page, _ = write(tmp_path, make_report())
    assert page.ids == SECTIONS
    links = [value for tag, value in page.references if tag == "a"]
    assert links == ["#accuracy", *(f"#{section}" for section in SECTIONS)]  # first: skip
    report = make_report()
    report["quantization"]["float"] = []
    page, _ = write(tmp_path, report)
    assert "every node works on quantized tensors" in page.text


def test_verdict_says_the_essentials(tmp_path: Path) -> None:
    page, _ = write(tmp_path, make_report())
    assert (
        "W8A8, power of two, proved bit-exact on 500 images in onnxruntime "
        "On 2,000 labeled images top-1 goes from 81.00 to 80.90 % (−0.10 points). "
        "Weights take 280 kB instead of 1.08 MB; 98.5 % of 40.6 M multiply-accumulates an image "
        "are in integers (8×8 bits). "
        "In onnxruntime 27 of 27 compute nodes are integer kernels."
    ) in page.text
    clauses = judge(make_report()).clauses
    assert clauses == (
        "27 of 27 compute nodes are integer kernels",
        "output SQNR 31.2 dB",
        "top-1 81.0 → 80.9",
    )


def test_without_labels_the_verdict_estimates(tmp_path: Path) -> None:
    report = make_report()
    report["evaluation"] = None
    report["fidelity"]["estimate"] = {
        "drop": 1.25,
        "low": 0.2,
        "high": 3.41,
        "note": "So far.",
    }
    page, _ = write(tmp_path, report)
    assert "top-1 falls by 1.2 points (most likely 0.2 to 3.4)." in page.text
    assert "of five files four lie between 0.2 and 3.4. So far." in page.text
    report["fidelity"]["estimate"] = None
    page, _ = write(tmp_path, report)
    assert "signal-to-noise ratio of 31.2 dB on the calibration images" in page.text
    assert "98.0 % 27.0" in page.text


def test_what_costs_most_is_named_with_its_flags(tmp_path: Path) -> None:
    page, _ = write(tmp_path, make_report())
    assert "These three tensors cost most: try 16 bits here." in page.text
    names = [f"/layer1/block{i}/conv/Conv_activation" for i in range(3)]
    flags = [f"--bits {name}=A16" for name in names]
    for words in (*flags, " ".join(flags)):
        assert words in page.text
    assert "the error of the outputs is 2.1 % instead of 4.5 %" in page.text
    assert "spread over many" not in page.text
    report = make_report()
    report["sensitivity"] |= {"widened_error": 0.044}
    page, _ = write(tmp_path, report)
    assert "spread over many tensors: more bits everywhere will do more" in page.text
    report["settings"]["rounding"] = "nearest"
    for cost in report["sensitivity"]["costs"]:
        cost["bits"] = 4
    page, _ = write(tmp_path, report)
    assert "--rounding adaround) will do more" in page.text
    report["sensitivity"] = None
    page, _ = write(tmp_path, report)
    assert "was not measured" in page.text


def test_flags_are_quoted_for_a_shell() -> None:
    report = make_report()
    report["sensitivity"]["costs"][0]["flag"] = "a b;c=A16"
    advice = advise(report)
    assert advice is not None
    assert shlex.split(advice.suggestions[0].flag) == ["--bits", "a b;c=A16"]


def test_engines_and_targets_have_their_rows(tmp_path: Path) -> None:
    report = make_report()
    page, _ = write(tmp_path, report)
    kernels = "integer kernels, exact sums (session.x64quantprecision = 1)"
    assert f"optimized {kernels} exact 0 of 5,000" in page.text
    assert "as this CPU has them differs 96 of 5,000 2 500" in page.text
    assert "zsq verify q.onnx --targets all runs them" in page.text
    report["targets"] = describe_targets(make_agreement())
    page, _ = write(tmp_path, report)
    assert "iree 3.13.0 exact 0 of 640 0 0 of 21 2.1" in page.text
    assert "tvm 0.25 differs should be exact 12 of 640 not finite" in page.text
    assert (
        "openvino not installed skipped not installed: zsq targets install openvino"
        in page.text
    )


def test_targets_come_into_the_report_of_their_file(tmp_path: Path) -> None:
    model, report = tmp_path / "q.onnx", make_report()
    model.write_bytes(b"a quantized file")
    report["output"]["sha256"] = hashlib.sha256(b"a quantized file").hexdigest()
    with ImageWriter(tmp_path / "images.npz", count=3, shape=(3, 32, 32)) as writer:
        writer.append(np.zeros((3, 3, 32, 32), np.float32))
    assert add_targets(model, make_agreement()) is None  # no report beside it
    (tmp_path / "q").mkdir()
    (tmp_path / "images.npz").rename(tmp_path / "q" / "images.npz")
    write_report(tmp_path / "q", report, make_images())
    page = add_targets(model, make_agreement())
    assert page == tmp_path / "q" / "report.html"
    parsed = Page(page.read_text(encoding="utf-8"))
    assert "tvm 0.25 differs" in parsed.text
    assert parsed.tags.count("img") == 3
    written = json.loads((tmp_path / "q" / "report.json").read_text())
    targets = written.pop("targets")
    assert written == {k: v for k, v in report.items() if k != "targets"}
    assert [row["verdict"] for row in targets["rows"]] == ["exact", "differs", "skipped"]
    model.write_bytes(b"another file")
    before = page.read_bytes()
    assert add_targets(model, make_agreement()) is None
    (tmp_path / "q" / "report.json").write_text('{"output": 3}')
    assert add_targets(model, make_agreement()) is None
    assert page.read_bytes() == before


def test_an_interpreter_that_refused_says_why() -> None:
    proof = make_proof().to_dict()
    proof["interpreter"]["refused"] = "Softmax has no integer form"
    row = engines(proof)[-1]
    assert (row.verdict, row.note) == ("not run", "Softmax has no integer form")
    assert engines({}) == ()


def test_a_failed_proof_leads(tmp_path: Path) -> None:
    report = make_report()
    failure = "logits: 12 elements differ between the unoptimized and the optimized run"
    report["proof"] = make_proof(differing=12, failures=(failure,)).to_dict()
    page, text = write(tmp_path, report)
    lead = "W8A8, power of two, not bit-exact: 12 of 5,000 elements differ in onnxruntime"
    assert lead in page.text
    assert 'class="verdict bad"' in text
    assert page.text.count(failure) == 2


def test_an_exact_but_poor_network_is_no_success(tmp_path: Path) -> None:
    report = make_report()
    assert judge(report).tone == "good"
    report["quantization"]["outputs"][0]["sqnr_db"] = 0.1
    assert judge(report).tone == "warn"
    page, _ = write(tmp_path, report)
    assert "Output SQNR 0.1 dB" in page.text


def test_proof_says_what_was_measured(tmp_path: Path) -> None:
    page, _ = write(tmp_path, make_report())
    proof = page.text[
        page.text.index("Proof The quantized") : page.text.index("Generated images 256")
    ]
    for words in (
        "500 images in onnxruntime 1.31.1",
        "QLinearConv × 27",
        "27 work on integers, 19 vanished",
        "none stays in float",
        "1.9 %, by up to 2 steps; first choice changes in 3 of 500",
        "This CPU saturates by default",
        "140 of 140 scales are powers of two; every zero point is 0, the middle of its type",
        "needs more than 22 bits",
    ):
        assert words in proof


def test_page_is_self_contained(tmp_path: Path) -> None:
    page, text = write(tmp_path, make_report())
    assert page.tags.count("img") == 20
    for tag, value in page.references:
        assert value.startswith("#" if tag == "a" else "data:"), (tag, value[:60])
    assert not re.search(r"@import|url\(|https?:", text)
    assert "default-src 'none'" in text
    for word in ("iframe", "object", "embed", "base"):
        assert word not in page.tags


def test_only_the_template_script_may_run(tmp_path: Path) -> None:
    page, text = write(tmp_path, make_report())
    digest = base64.b64encode(hashlib.sha256("".join(page.scripts).encode()).digest())
    assert page.tags.count("script") == 1
    assert f"script-src 'sha256-{digest.decode()}'" in text


def test_pictures_are_the_images(tmp_path: Path) -> None:
    images = make_images()
    page, _ = write(tmp_path, make_report(), images)
    uris = [value for tag, value in page.references if tag == "img"]
    for uri, image in zip(uris, images, strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
        np.testing.assert_array_equal(np.asarray(picture), image)
    assert "The first 20 are shown" in page.text


@pytest.mark.parametrize(
    ("shape", "count", "size"),
    [
        ((70, 32, 32, 1), 64, (32, 32)),
        ((30, 224, 448, 3), 24, (112, 56)),
        ((0, 8, 8, 3), 0, ()),
    ],
)
def test_pictures_are_few_and_small(
    shape: tuple[int, ...], count: int, size: tuple[int, ...]
) -> None:
    uris = thumbnails(np.zeros(shape, np.uint8))
    assert len(uris) == count
    for uri in uris:
        assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == size


@pytest.mark.parametrize(
    "images",
    [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 2), "u1")],
)
def test_other_arrays_are_refused(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match="images must be uint8"):
        write_report(tmp_path, make_report(), images)
    assert not list(tmp_path.iterdir())


def _with_hostile_strings(value: Any, hostile: str) -> Any:
    if isinstance(value, str):
        return hostile + value
    if isinstance(value, dict):
        return {
            key: item if key in {"kind"} else _with_hostile_strings(item, hostile)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_with_hostile_strings(item, hostile) for item in value]
    return value


@pytest.mark.parametrize(
    "hostile",
    [
        "<script>alert(1)</script>",
        "\"'><img src=http://example.org/x onerror=alert(1)>",
        "</title></style></script><b>",
        "{{ 7 * 7 }}{% raw %}",
    ],
)
def test_hostile_names_are_shown_as_text(tmp_path: Path, hostile: str) -> None:
    plain, _ = write(tmp_path / "plain", make_report())
    report = _with_hostile_strings(make_report(), hostile)
    report["warnings"] = [hostile]
    report["model"]["operators"] = {hostile: 1}
    page, _ = write(tmp_path / "hostile", report)
    assert page.tags.count("script") == plain.tags.count("script") == 1
    assert page.tags.count("img") == plain.tags.count("img")
    assert set(page.tags) <= set(plain.tags)
    assert hostile in page.text


def test_parts_that_did_not_run_are_sentences(tmp_path: Path) -> None:
    report = make_report()
    report.update(generation=None, proof=None, evaluation=None, preprocessing=None)
    page, _ = write(tmp_path, report, np.zeros((0, 32, 32, 3), np.uint8))
    assert page.ids == SECTIONS
    for sentence in (
        "No images were generated",
        "There are no pictures to show.",
        "so there is no loss curve.",
        "so no statistics were compared.",
        "was not verified",
        "Accuracy was not measured",
        "No preprocessing is known",
    ):
        assert sentence in page.text
    assert "None" not in page.text
    assert "undefined" not in page.text.lower()


def _without_values(value: Any, empty: bool) -> Any:
    if isinstance(value, dict):
        return {key: _without_values(item, empty) for key, item in value.items()}
    if isinstance(value, list):
        return [] if empty else [_without_values(item, empty) for item in value]
    return value if isinstance(value, str | bool) else None


@pytest.mark.parametrize("empty", [True, False])
def test_missing_numbers_and_empty_lists_survive(tmp_path: Path, empty: bool) -> None:
    page, _ = write(tmp_path, _without_values(make_report(), empty))
    assert page.ids == SECTIONS
    assert "None" not in page.text


def test_unbounded_sqnr_survives(tmp_path: Path) -> None:
    report = make_report()
    for tensor in report["quantization"]["tensors"]:
        tensor["sqnr_db"] = math.inf
    report["quantization"]["outputs"][0]["sqnr_db"] = math.inf
    report["generation"]["history"][3]["total"] = math.nan
    page, _ = write(tmp_path, report)
    assert "Output SQNR ∞ dB" in page.text
    written = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert written["quantization"]["outputs"][0]["sqnr_db"] == "inf"
    assert written["generation"]["history"][3]["total"] is None


def test_tensors_are_listed_worst_first(tmp_path: Path) -> None:
    report = make_report()
    _, text = write(tmp_path, report)
    section = text[text.index('id="tensors"') : text.index('id="outputs"')]
    shown = [float(value) for value in re.findall(r"</span>([\d.]+)</td>", section)]
    expected = [
        sorted(t["sqnr_db"] for t in report["quantization"]["tensors"] if t["kind"] == kind)
        for kind in ("activation", "weight")
    ]
    assert shown == pytest.approx([*expected[0], *expected[1]], abs=0.051)


def test_a_distribution_shows_values_and_threshold() -> None:
    row = {"histogram": {"low": -2.0, "high": 2.0, "counts": [0, 5, 9, 1]}, "threshold": 1.0}
    drawing = distribution(row)
    edges = sorted(float(x) for x in re.findall(r'class="edge" x1="([\d.]+)"', drawing))
    assert edges == [33, 99]  # of 132 units, -2 to 2
    assert len(re.findall('class="cut"', drawing)) == 2
    assert "values from −2 to 2, threshold 1" in drawing
    tops = [float(y) for y in re.findall(r"V([\d.]+)", drawing)]
    assert min(tops) == 3  # the fullest bin
    assert tops[0] == 30  # the empty one
    unsigned = {"histogram": {"low": 0, "high": 4, "counts": [1, 1]}, "threshold": 4.0}
    assert 'class="cut"' not in distribution(unsigned)
    for nothing in (None, {}, {"low": 0, "high": 0, "counts": [1]}, {"low": 0, "high": 1}):
        assert distribution({"histogram": nothing}) == ""


def test_equal_reports_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_report(tmp_path / name, make_report(), make_images())
    for name in ("report.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_large_networks_stay_readable(tmp_path: Path) -> None:
    report = make_report(num_layers=200, num_iterations=20_000)
    _, text = write(tmp_path, report)
    assert len(text) < 2_000_000
    assert len(max(re.findall(r' d="([^"]*)"', text), key=len)) < 10_000


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingsError, match="cannot be written") as caught:
        write_report(tmp_path / "file", make_report(), make_images())
    assert "\n" not in str(caught.value)


def test_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_report(tmp_path, make_report(), make_images())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SettingsError, match="No space left"):
        write_report(tmp_path, make_report(num_layers=3), make_images())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        ("inf", "∞"),
        (0, "0"),
        (1234567, "1,234,567"),
        (0.00012345, "0.0001234"),
        (-1.5, "−1.5"),
    ],
)
def test_numbers_are_written_plainly(value: Any, text: str) -> None:
    assert format_number(value) == text


def test_fixed_digits_units_and_durations() -> None:
    assert format_number(-0.04, 1) == "0.0"
    assert format_number(31.25, 1) == "31.2"
    assert [format_bytes(n) for n in (999, 312_400, 1_103_000)] == [
        "999 bytes",
        "312 kB",
        "1.1 MB",
    ]
    assert [format_seconds(s) for s in (0.25, 41.2, 93.4, 7300)] == [
        "0.25 s",
        "41 s",
        "1 min 33 s",
        "2 h 01 min",
    ]


def test_charts_choose_their_axis_and_skip_what_they_cannot_draw() -> None:
    steep = line_chart(
        [Series(xs=[0, 1, 2], ys=[1.0, None, 1e-4])], label="loss", x_label="iteration"
    )
    assert steep is not None
    assert "0.001" in steep
    assert "nan" not in steep
    nothing = Series(xs=[0, 1], ys=[None, math.nan])
    assert line_chart([nothing], label="loss", x_label="iteration") is None
    flat = Series(xs=[3], ys=[0.0])
    assert line_chart([flat], label="loss", x_label="iteration") is not None


def test_histogram_outlines_both_counts() -> None:
    chart = histogram_chart([0, 1, 2], [4, 0], [3, 1], label="x", x_label="value")
    assert chart is not None
    assert chart.count("<path") == 2
    assert "log" not in chart
    peaked = histogram_chart(
        range(6), [9000, 3, 2, 2, 1], [9000, 3, 2, 2, 1], label="", x_label="v"
    )
    assert peaked is not None
    assert "counts on a log scale" in peaked
    assert histogram_chart([], [], [], label="x", x_label="value") is None
    assert histogram_chart([0, 1], [0], [0], label="x", x_label="value") is None
