from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graph_tools.errors import DataError
from graph_tools.quantizer import FloatNode, Plan, QuantizedConstant, TensorQuantizer

quantizers = st.one_of(
    st.builds(
        TensorQuantizer,
        bits=st.sampled_from([2, 3, 4, 8, 16]),
        signed=signed,
        exponent=st.integers(-20, 10),
        lifted=lifted,
    )
    for signed, lifted in ((st.booleans(), st.just(False)), (st.just(True), st.just(True)))
)


@given(quantizers, st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
def test_error_is_at_most_half_a_step_inside_the_range(quantizer, values):
    array = np.array(values, np.float32)
    scale = float(quantizer.scale)
    inside = (array >= quantizer.qmin * scale) & (array <= quantizer.qmax * scale)
    restored = quantizer.dequantize(quantizer.quantize(array)).astype(np.float64)
    assert np.all(np.abs(restored - array)[inside] <= scale / 2)


@given(quantizers)
def test_integers_survive_a_round_trip(quantizer):
    integers = np.unique(np.linspace(quantizer.qmin, quantizer.qmax, 50).astype(np.int32))
    assert np.array_equal(quantizer.quantize(quantizer.dequantize(integers)), integers)


def test_ties_go_to_even_and_the_ends_saturate():
    quantizer = TensorQuantizer(bits=8, signed=True, exponent=0)
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e9, -1e9], np.float32)
    assert quantizer.quantize(values).tolist() == [0, 2, 2, 0, -2, 127, -128]


def test_scale_is_the_exact_power_of_two():
    for exponent in range(-126, 100):
        quantizer = TensorQuantizer(bits=8, signed=True, exponent=exponent)
        assert float(quantizer.scale) == math.ldexp(1.0, exponent)


def test_threshold_is_hptqs():
    assert TensorQuantizer(bits=8, signed=True, exponent=-7).threshold == 1.0
    assert TensorQuantizer(bits=8, signed=False, exponent=-8).threshold == 1.0


def test_per_channel_scale_broadcasts_along_its_axis():
    quantizer = TensorQuantizer(bits=8, signed=True, exponent=(0, -1), axis=1)
    assert quantizer.quantize(np.ones((3, 2, 4), np.float32))[0].tolist() == [[1] * 4, [2] * 4]


@pytest.mark.parametrize(("bits", "low", "high"), [(8, -126, 129), (4, -8, 7)])
def test_a_lifted_quantizer_keeps_its_scale_and_fits_its_type(bits, low, high):
    quantizer = TensorQuantizer(bits=bits, signed=True, exponent=-3, lifted=True)
    assert (quantizer.qmin, quantizer.qmax) == (low, high)
    assert float(quantizer.scale) == 2.0**-3
    assert -128 <= quantizer.qmin - quantizer.lift <= quantizer.qmax - quantizer.lift <= 127
    assert TensorQuantizer.from_dict(quantizer.to_dict()) == quantizer
    with pytest.raises(ValueError, match="only signed"):
        TensorQuantizer(bits=bits, signed=False, exponent=0, lifted=True)


def test_axis_and_exponents_belong_together():
    with pytest.raises(ValueError, match="axis"):
        TensorQuantizer(bits=8, signed=True, exponent=(1, 2))


def _plan() -> Plan:
    return Plan(
        tensors={"x": TensorQuantizer(bits=8, signed=False, exponent=-8)},
        constants={
            "w": QuantizedConstant(
                integers=np.arange(6, dtype=np.int32).reshape(2, 3),
                quantizer=TensorQuantizer(bits=8, signed=True, exponent=(-3, -4), axis=0),
                role="weight",
                node="conv",
            )
        },
        absorbed={"relu": "x"},
        shares={"y": "x"},
        float_nodes=(FloatNode(node="exp", op_type="Exp", reason="decoding"),),
    )


def test_plan_loads_as_it_was_saved(tmp_path: Path):
    plan = _plan()
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded.tensors == plan.tensors
    assert loaded.absorbed == plan.absorbed
    assert loaded.shares == plan.shares
    assert loaded.float_nodes == plan.float_nodes
    assert loaded.constants["w"].quantizer == plan.constants["w"].quantizer
    assert np.array_equal(loaded.constants["w"].integers, plan.constants["w"].integers)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]


def test_a_plan_that_is_not_one_is_refused(tmp_path: Path):
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(DataError, match="not a readable plan"):
        Plan.load(tmp_path / "plan.json")


def test_free_scales_are_in_force_and_kept(tmp_path):
    scales = tuple(float(np.float32(scale)) for scale in (0.3, 0.7))
    free = TensorQuantizer(bits=4, signed=True, exponent=(-1, 0), axis=0, scales=scales)
    assert not free.power_of_two
    values = np.array([[0.31, -9.0], [0.71, 1.3]], np.float32)
    integers = free.quantize(values)
    assert integers.tolist() == [[1, -8], [1, 2]]
    assert np.array_equal(free.dequantize(integers), integers * np.float32([[0.3], [0.7]]))
    assert TensorQuantizer.from_dict(free.to_dict()) == free
    assert "scales" not in TensorQuantizer(bits=4, signed=True, exponent=0).to_dict()


@pytest.mark.parametrize("exponent", [0, (0,)])
def test_free_scales_are_one_a_channel(exponent):
    axis = None if exponent == 0 else 0
    with pytest.raises(ValueError, match="free scales"):
        TensorQuantizer(bits=4, signed=True, exponent=exponent, axis=axis, scales=(0.3, 0.7))


def test_plans_from_before_float_results_still_load(tmp_path):
    quantizer = TensorQuantizer(bits=8, signed=True, exponent=-3)
    plan = Plan(tensors={"x": quantizer}, constants={})
    plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    del document["float_results"]
    (tmp_path / "plan.json").write_text(json.dumps(document))
    assert Plan.load(tmp_path / "plan.json") == plan
