from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graph_tools.compare import Histogram, compare_tensors, with_outputs
from graph_tools.errors import DataError, ModelError


def scaled(factor: float, *, batch: int | str = "N") -> onnx.ModelProto:
    """x [N, 2, 4, 4] -> Mul(factor) "y" -> Relu "z"; factor as float32."""
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["x", "factor"], ["y"]),
            helper.make_node("Relu", ["y"], ["z"]),
            helper.make_node("Flatten", ["y"], ["flat"]),
        ],
        "scaled",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2, 4, 4])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [batch, 2, 4, 4])],
        [numpy_helper.from_array(np.float32(factor), "factor")],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10
    )
    onnx.checker.check_model(model)
    return model


def images(count: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 2, 4, 4)).astype(np.float32)


def in_batches(values: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def test_sqnr_and_error_are_those_of_numpy() -> None:
    x = images()
    found = compare_tensors(scaled(1.0), scaled(0.9), {"y": "y", "z": "z"}, in_batches(x, 6))
    q = x * np.float32(0.9)
    for name, s, other in (("y", x, q), ("z", np.maximum(x, 0), np.maximum(q, 0))):
        noise = np.sum((s.astype(np.float64) - other) ** 2)
        expected = 10 * math.log10(np.sum(s.astype(np.float64) ** 2) / noise)
        assert found[name].sqnr_db == pytest.approx(expected, rel=1e-12)
        assert found[name].max_abs_error == np.abs(s - other).max()
        assert found[name].noise_power == pytest.approx(noise / s.size)
        assert found[name].elements == s.size
    assert list(found) == ["y", "z"]


def test_equal_models_have_infinite_sqnr_and_zero_signal_minus_infinity() -> None:
    same = compare_tensors(scaled(1.0), scaled(1.0), {"z": "z"}, [images()])
    assert same["z"].sqnr_db == math.inf
    assert same["z"].max_abs_error == 0
    lost = compare_tensors(scaled(0.0), scaled(1.0), {"z": "z"}, [images()])
    assert lost["z"].sqnr_db == -math.inf


def test_result_does_not_depend_on_batches_or_on_a_fixed_batch() -> None:
    x = images()
    whole = compare_tensors(scaled(1.0), scaled(0.9), {"y": "z"}, [x], histograms=["y"])["y"]
    for batch in (1, 8):
        part = compare_tensors(
            scaled(1.0, batch=batch),
            scaled(0.9),
            {"y": "z"},
            in_batches(x, 7),
            histograms=["y"],
        )["y"]
        assert part.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-12)
        assert part.elements == whole.elements
        assert part.histogram is not None
        assert whole.histogram is not None
        assert np.array_equal(part.histogram.float, whole.histogram.float)


@pytest.mark.parametrize("spread", [1.0, 1e-4, 300.0])
def test_histogram_counts_are_those_of_numpy(spread: float) -> None:
    x = images(30) * np.float32(spread)
    x[:10] *= np.float32(0.01)  # the range grows while streaming
    x[:4] = 0
    found = compare_tensors(
        scaled(1.0), scaled(0.5), {"y": "y"}, in_batches(x, 4), histograms=["y"]
    )["y"].histogram
    assert isinstance(found, Histogram)
    assert len(found.edges) == 65
    assert np.allclose(np.diff(found.edges), found.edges[1] - found.edges[0])
    for counts, values in ((found.float, x), (found.quantized, x * np.float32(0.5))):
        expected, _ = np.histogram(values.astype(np.float64), bins=found.edges)
        assert np.array_equal(counts, expected)
        assert counts.sum() == x.size
    used = np.flatnonzero(found.float + found.quantized)
    assert used[-1] - used[0] >= 31  # at least half of the bins are used
    assert set(found.to_dict()) == {"edges", "float", "quantized"}


def test_histogram_of_zeros() -> None:
    zeros = np.zeros((3, 2, 4, 4), np.float32)
    found = compare_tensors(scaled(1), scaled(1), {"z": "z"}, [zeros], histograms=["z"])
    histogram = found["z"].histogram
    assert histogram is not None
    assert histogram.float.sum() == zeros.size
    assert np.count_nonzero(histogram.float) == 1


def test_the_graph_input_can_be_compared() -> None:
    found = compare_tensors(scaled(1.0), scaled(0.5), {"x": "y"}, [images()])
    assert found["x"].sqnr_db == pytest.approx(10 * math.log10(4))


def test_faults_name_the_tensor() -> None:
    with pytest.raises(ModelError, match="nowhere"):
        compare_tensors(scaled(1.0), scaled(1.0), {"z": "nowhere"}, [images()])
    with pytest.raises(ModelError, match=r"y: has shape \[20, 2, 4, 4\]"):
        compare_tensors(scaled(1.0), scaled(1.0), {"y": "flat"}, [images()])
    with pytest.raises(ModelError, match="batch of 20"):
        compare_tensors(scaled(1.0), scaled(1.0), {"y": "y"}, [images()[:, :, :3]])
    with pytest.raises(ModelError, match="different batch sizes"):
        compare_tensors(scaled(1, batch=2), scaled(1, batch=3), {"y": "y"}, [images()])
    with pytest.raises(DataError, match="no images"):
        compare_tensors(scaled(1.0), scaled(1.0), {"y": "y"}, [])
    broken = scaled(1.0)
    broken.graph.node[1].op_type = "Reluu"
    with pytest.raises(ModelError, match="refuses"):
        compare_tensors(scaled(1.0), broken, {"y": "y"}, [images()])


def test_with_outputs_leaves_the_model_alone() -> None:
    model = scaled(1.0)
    before = model.SerializeToString()
    assert [entry.name for entry in with_outputs(model, ["y", "x"]).graph.output] == ["y", "x"]
    assert model.SerializeToString() == before


def test_the_same_largest_value_is_counted_where_there_is_one_row_an_image() -> None:
    x = images()
    first, second = scaled(1.0), scaled(-1.0)
    found = compare_tensors(first, second, {"flat": "flat", "y": "y"}, in_batches(x, 6))
    flat = x.reshape(len(x), -1)
    assert found["flat"].same_top1 == (flat.argmax(1) == (-flat).argmax(1)).mean() == 0
    assert found["y"].same_top1 is None
    equal = compare_tensors(first, scaled(0.5), {"flat": "flat"}, in_batches(x, 7))
    assert equal["flat"].same_top1 == 1
