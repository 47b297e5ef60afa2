"""Patterns of --bits, and what they name."""

from __future__ import annotations

import numpy as np
import pytest

from graph_tools.errors import SettingsError
from graph_tools.prepare import prepare_for_quantization
from graph_tools.torch_graph import TorchGraph
from pipeline.quantize.placement import place
from pipeline.quantize.widths import choose_widths
from pipeline.settings import QuantizeSettings

BODY = (
    "c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) d = Conv<group=4, pads=[1,1,1,1]>(r, dw)"
    " e = Conv(d, point) a = Add(e, r) m = MaxPool<kernel_shape=[8,8]>(a) f = Flatten(m)"
    " y = Gemm<transB=1>(f, fc)"
)
ARRAYS = {
    "w": np.ones((4, 3, 3, 3), np.float32),
    "dw": np.ones((4, 1, 3, 3), np.float32),
    "point": np.ones((4, 4, 1, 1), np.float32),
    "fc": np.ones((5, 4), np.float32),
}


@pytest.fixture
def widths(make_model):
    def run(*bits: str, **settings):
        text = f"g (float[N,3,8,8] x) => (float[N,5] y) {{ {BODY} }}"
        model = prepare_for_quantization(make_model(text, **ARRAYS))
        steps = TorchGraph(model.proto).steps
        placement = place(model, steps, scheme=settings.get("scheme", "full"))
        found = choose_widths(placement, steps, model, QuantizeSettings(bits=bits, **settings))
        output = {site.node: site.output for site in placement.weighted.values()}
        return {output[node]: bits for node, bits in found.weights.items()}, found.activations

    return run


def test_without_entries_all_have_the_width_of_the_settings(widths):
    weights, activations = widths(weights=4, activations=16)
    assert weights == {"c": 4, "d": 4, "e": 4, "y": 4}
    assert activations == {"x": 16, "r": 16, "d": 16, "e": 16, "a": 16, "y": 16}


@pytest.mark.parametrize(
    ("entry", "layers", "tensors"),
    [
        ("@first=W4A4", {"c"}, {"r"}),
        ("@last=W4A4", {"y"}, {"y"}),
        ("@depthwise=W4A4", {"d"}, {"d"}),
        ("@input=A4", set(), {"x"}),
        ("@output=A4", set(), {"y"}),
        ("@add=A4", set(), {"a"}),
        ("@into-last=A4", set(), {"a"}),  # through the pooling that shares its quantizer
        ("f=A4", set(), {"a"}),
        ("c=A4", set(), {"r"}),  # absorbed
        ("*=w4", {"c", "d", "e", "y"}, set()),
    ],
)
def test_a_pattern_names(widths, entry, layers, tensors):
    weights, activations = widths(entry)
    assert {name for name, bits in weights.items() if bits == 4} == layers
    assert {name for name, bits in activations.items() if bits == 4} == tensors
    assert {*weights.values(), *activations.values()} == {4, 8}


def test_node_names_are_patterns_and_later_entries_win(widths):
    weights, activations = widths("*=W4A4", "*Gemm*=W8", "@input=A8", "*Gemm*=W2")
    assert weights == {"c": 4, "d": 4, "e": 4, "y": 2}
    assert activations["x"] == 8
    assert activations["a"] == 4


@pytest.mark.parametrize(
    "entry", ["stem=W4", "stem=A4", "@frist=W4", "@frist=A4", "@input=W4"]
)
def test_a_pattern_that_names_nothing_is_refused_with_the_nearest_names(widths, entry):
    with pytest.raises(SettingsError, match="--bits") as caught:
        widths(entry)
    assert caught.value.hint
    if entry.startswith("@f"):
        assert "@first" in caught.value.hint


@pytest.mark.parametrize("entry", ["W4A8", "=W4", "a=", "a=8", "a=W4A8x", "a=W5", "a=A2"])
def test_entries_that_are_no_widths_are_refused(entry):
    with pytest.raises(SettingsError, match="--bits"):
        QuantizeSettings(bits=(entry,))


def test_the_academic_scheme_has_8_bits_at_both_ends(widths):
    weights, activations = widths(weights=4, activations=4, scheme="academic")
    assert weights == {"c": 8, "d": 4, "e": 4, "y": 8}
    # e is rounded behind the Add only, y not at all
    assert activations == {"x": 8, "r": 8, "d": 4, "a": 8}


def test_entries_win_over_the_academic_scheme(widths):
    weights, activations = widths("@last=W2", "r=A4", activations=16, scheme="academic")
    assert weights == {"c": 8, "d": 8, "e": 8, "y": 2}
    assert activations == {"x": 16, "r": 4, "d": 16, "a": 16}
