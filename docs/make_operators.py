"""Write docs/operators.md: which ONNX operators run, by ONNX's own tests.

``python -m docs.make_operators`` writes the page; a test checks that it is current.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from docs.onnx_cases import (
    EXCLUDED,
    EXCLUDED_MODELS,
    MODEL_KINDS,
    UNSUPPORTED,
    WITHOUT_GRADIENT,
    OnnxCase,
    check_case,
    check_model_case,
    has_image_input,
    is_float_and_static,
    missing_operators,
    model_cases,
    model_of,
    node_cases,
    reason_for,
)
from graph_tools.opset import OPSET
from graph_tools.torch_ops import OPERATORS
from pipeline.quantize.placement import treatment

__all__ = ["PAGE", "VISION", "Result", "node_results", "render"]

PAGE = Path(__file__).resolve().parent / "operators.md"

VISION = frozenset(
    """
    Abs Add AffineGrid ArgMax Attention AveragePool BatchNormalization Cast Ceil Clip Concat
    Constant ConstantOfShape Conv ConvTranspose CumSum DeformConv DepthToSpace
    DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand Flatten Floor Gather
    GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GridSample
    GroupNormalization HardSigmoid HardSwish Identity InstanceNormalization LRN
    LayerNormalization LeakyRelu Less Log LogSoftmax MatMul Max MaxPool Mean Min Mish Mul Neg
    NonMaxSuppression PRelu Pad Pow QuantizeLinear RMSNormalization Range Reciprocal ReduceL2
    ReduceMax ReduceMean ReduceMin ReduceSum Relu Reshape Resize RoiAlign RotaryEmbedding
    ScatterElements ScatterND Selu Shape Sigmoid Slice Softmax Softplus SpaceToDepth Split
    Sqrt Squeeze Sub Sum Swish Tanh Tile TopK Transpose Trilu Unsqueeze Where
    """.split()
)
"""The operators of convolutional networks and vision transformers."""

_NO_FLOATS = ("comparisons and logic", "integers in or out")

PASSED, FAILED, MISSING = "passed", "failed", "unsupported"


@dataclass(frozen=True, kw_only=True)
class Result:
    """Outcome of one test."""

    name: str
    operator: str
    outcome: str


def render(nodes: Sequence[Result]) -> str:
    """Return the page; the model tests are run here."""
    parts = [
        _head(nodes),
        _operator_table(nodes),
        _model_table(),
        _failures(nodes),
        _unsupported(nodes),
    ]
    return "\n".join(parts)


def node_results() -> list[Result]:
    """Run the node tests for float tensors in static graphs."""
    cases = {n: c for n, c in node_cases().items() if is_float_and_static(c.model)}
    return [
        Result(name=name, operator=_operator_of(name), outcome=_outcome(name, case))
        for name, case in cases.items()
    ]


def _operator_of(name: str) -> str:
    """Return the operator that a test is for; its function body is tested under its name."""
    base = node_cases().get(name.partition("_expanded")[0], node_cases()[name])
    return str(base.model.graph.node[0].op_type)


def _outcome(name: str, case: OnnxCase) -> str:
    if missing_operators(case.model):
        return MISSING
    return FAILED if _fails(lambda: check_case(case)) else PASSED


def _fails(run: object) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run()  # type: ignore[operator]
    except Exception:
        return True
    return False


def _head(results: Iterable[Result]) -> str:
    vision = _share(r for r in results if r.operator in VISION)
    return f"""# Operators

Of the node tests of the operators of convolutional networks and vision transformers (**bold**
below) {vision} pass, of all {_share(results)}.

Made by `python -m docs.make_operators` from the backend tests that ship with onnx
{onnx.__version__}; do not edit. Every node test for float tensors in a static graph was run
through `graph_tools.torch_graph.TorchGraph`, twice: with all inputs fed, and with all but the
first as constants. Types and shapes must be equal, values within the test's own tolerance
(and, where products are summed up, two rounding steps of the type: the order is the processor's).

*Float*: some input or output of the test is float16, bfloat16, float32 or float64. *Static*:
inputs and outputs are tensors of numbers, and no node has a subgraph, works on sequences or
optionals, or is of another domain than ai.onnx. The test of an operator's function body counts
with the operator.
"""


def _share(results: Iterable[Result]) -> str:
    outcomes = Counter(result.outcome for result in results)
    passed, total = outcomes[PASSED], outcomes.total()
    return f"{100 * passed / total:.1f} % ({passed} of {total})"


def _operator_table(results: Iterable[Result]) -> str:
    counts: dict[str, Counter[str]] = {}
    for result in results:
        counts.setdefault(result.operator, Counter())[result.outcome] += 1
    lines = [
        "## By operator",
        "",
        "*Gradient*: equal to finite differences. *In `zsq quantize`*: what becomes of the",
        f"operator in the quantized file, whose opset is {OPSET}. *Moves integers*: its output has",
        "its input's quantizer. *Between quantizers*: what it reads and writes is rounded to",
        "integers; runtimes without an integer kernel for it compute it in float.",
        "",
        "| operator | tests | passed | failed | unsupported | gradient | in `zsq quantize` |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in sorted({*counts, *OPERATORS}):
        count = counts.get(name, Counter())
        cells = [
            f"**{name}**" if name in VISION else name,
            *(
                str(n or "")
                for n in (count.total(), *(count[o] for o in (PASSED, FAILED, MISSING)))
            ),
            _gradient(name),
            _quantized(name) if name in OPERATORS else "refused",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _gradient(operator: str) -> str:
    if operator not in OPERATORS:
        return ""
    for reason, names in WITHOUT_GRADIENT.items():
        if operator in names.split():
            return f"none: {reason}"
    return "yes"


def _quantized(operator: str) -> str:
    if operator in ("DequantizeLinear", "QuantizeLinear"):
        return "refused: the model is quantized already"
    if onnx.defs.has(operator, OPSET):
        reason = _gradient(operator).removeprefix("none: ")
        return "no float output" if reason in _NO_FLOATS else treatment(operator)
    schema = onnx.defs.get_schema(operator)
    if schema.has_function or schema.has_context_dependent_function:
        return "as its function body"
    return f"refused: newer than opset {OPSET}"


def _model_table() -> str:
    lines = [
        "## Model tests",
        "",
        "Small files of old exporters. Those whose only input is a float tensor of rank 4 take",
        "the way of a user's file, `graph_tools.model.load`; the others are converted to opset",
        f"{OPSET} and run.",
        "",
        "| kind | files | by `load` | passed | failed |",
        "| --- | --- | --- | --- | --- |",
    ]
    failed: list[str] = []
    for kind in MODEL_KINDS:
        cases = {name: case for name, (k, case) in model_cases().items() if k == kind}
        loaded = sum(has_image_input(model_of(case)) for case in cases.values())
        wrong = [n for n, case in cases.items() if _fails(lambda c=case: check_model_case(c))]
        failed += wrong
        passed = len(cases) - len(wrong)
        lines.append(f"| {kind} | {len(cases)} | {loaded} | {passed} | {len(wrong)} |")
    return "\n".join([*lines, "", *_by_reason(failed, EXCLUDED_MODELS)])


def _failures(results: Iterable[Result]) -> str:
    failed = [result.name for result in results if result.outcome == FAILED]
    return "\n".join(["## Node tests that fail", "", *_by_reason(failed, EXCLUDED)])


def _by_reason(names: Iterable[str], excluded: Mapping[str, tuple[str, ...]]) -> list[str]:
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(reason_for(name, excluded) or "not explained", []).append(name)
    lines = []
    for reason, members in groups.items():
        lines += [f"{_sentence(reason)} ({len(members)}):", ""]
        lines += [*(f"- `{name}`" for name in members), ""]
    return lines


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _unsupported(results: Iterable[Result]) -> str:
    missing = {
        name
        for result in results
        if result.outcome == MISSING
        for name in missing_operators(node_cases()[result.name].model)
    }
    lines = ["## Unsupported operators of these tests", ""]
    for name in sorted(missing):
        reasons = [reason for reason, names in UNSUPPORTED.items() if name in names.split()]
        lines.append(f"- {name}: {reasons[0] if reasons else 'not explained'}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(render(node_results()))
