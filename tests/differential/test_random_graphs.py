"""Random graphs: the interpreter, unoptimized and optimized onnxruntime give the same integers."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.differential.random_graphs import (
    APPROXIMATE,
    OPERATORS,
    chooser,
    images_for,
    random_graph,
)
from tests.differential.runs import compare

QUICK = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def assert_agreement(model: onnx.ModelProto) -> None:
    found = compare(model, images_for(model))
    operators = [node.op_type for node in model.graph.node]
    assert found.parting is None, operators
    if not APPROXIMATE.intersection(operators):
        assert set(found.steps.values()) == {0.0}, operators


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    return random_graph(lambda options: draw(st.sampled_from(options)))


@QUICK
@given(graphs())
def test_random_graphs(model: onnx.ModelProto) -> None:
    assert_agreement(model)


@pytest.mark.slow
@settings(QUICK, max_examples=3000)
@given(graphs())
def test_thousands_of_random_graphs(model: onnx.ModelProto) -> None:
    assert_agreement(model)


@pytest.mark.parametrize("operator", OPERATORS)
def test_each_operator_is_made_and_agrees(operator: str) -> None:
    """A graph of it alone in a few forms, of which some have different integers."""
    made = 0
    for seed in range(6):
        model = random_graph(chooser(seed), operators=[operator], most=2)
        kinds = {node.op_type for node in model.graph.node}
        made += kinds != {"QuantizeLinear", "DequantizeLinear", "Relu"} or operator == "Relu"
        assert_agreement(model)
    assert made


@pytest.mark.parametrize("operator", sorted(APPROXIMATE))
def test_approximated_operators_are_within_a_step(operator: str) -> None:
    for seed in range(20):
        model = random_graph(chooser(seed), operators=[operator], most=1, wide=False)
        assert max(compare(model, images_for(model)).steps.values()) <= 1


def test_a_graph_is_made_again_from_its_decisions() -> None:
    first, second = (random_graph(chooser(3)).SerializeToString() for _ in range(2))
    assert first == second
    assert first != random_graph(chooser(4)).SerializeToString()


def test_a_wrong_constant_is_found() -> None:
    """The comparison can fail: a weight negated in one of the runs."""
    differing = 0
    for seed in range(5):
        model = random_graph(chooser(seed), operators=["Conv"], most=1, wide=False)
        wrong = onnx.ModelProto()
        wrong.CopyFrom(model)
        for entry in wrong.graph.initializer:
            if entry.name.startswith("w") and entry.name.endswith("_q"):
                values = onnx.numpy_helper.to_array(entry)
                negated = -values.astype(np.int64) - 1
                entry.CopyFrom(
                    onnx.numpy_helper.from_array(negated.astype(values.dtype), entry.name)
                )
        images = images_for(model)
        from graph_tools.integer import IntegerNetwork, first_difference

        runs = [IntegerNetwork(m).run(images).integers for m in (model, wrong)]
        differing += first_difference(IntegerNetwork(model).graph, *runs) is not None
    assert differing >= 3
