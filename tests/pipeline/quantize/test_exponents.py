"""Learned exponents, against all exponents that there are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from graph_tools.quantizer import TensorQuantizer
from graph_tools.torch_graph import TorchGraph
from pipeline.quantize.exponents import learn_exponents, output_difference
from pipeline.quantize.lockstep import Lockstep
from pipeline.quantize.simulate import fake_quantize

RNG = np.random.default_rng(3)
TEXT = (
    "g (float[N,4,1,1] x) => (float[N,5] y) {"
    " i = Flatten(x) c = Gemm(i, w, b) r = Relu(c) f = Flatten(r) y = Gemm(f, v, d) }"
)
LINKED = {"f": "r"}


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def graph(make_model):
    weights = {"w": normal(4, 8), "b": normal(8), "v": normal(8, 5), "d": normal(5)}
    return TorchGraph(make_model(TEXT, **weights).proto)


def quantizers(exponents):
    hidden = TensorQuantizer(bits=4, signed=False, exponent=exponents[0])
    logits = TensorQuantizer(bits=4, signed=True, exponent=exponents[1])
    return {"r": hidden, "f": hidden, "y": logits}


def difference(graph, image, tensors):
    def quantize(name, value):
        return fake_quantize(value, tensors[name]) if name in tensors else value

    with torch.no_grad():
        return output_difference(graph(image), graph(image, hook=quantize))


@pytest.mark.parametrize("start", list(itertools.product((-4, 0), (-2, 2))))
def test_exponents_go_one_step_each_to_the_best_that_is_near(graph, start):
    image = torch.from_numpy(normal(64, 4, 1, 1))
    tensors = quantizers(start)
    changes = learn_exponents(Lockstep(graph, tensors, {}, [image]), LINKED)
    found = (tensors["r"].exponent, tensors["y"].exponent)
    assert tensors["f"] == tensors["r"]
    assert changes == sum(a != b for a, b in zip(start, found, strict=True))
    assert changes > 0  # these beginnings are bad
    hidden = {
        e: difference(graph, image, quantizers((e, start[1])))
        for e in (start[0] - 1, start[0], start[0] + 1)
    }
    assert hidden[found[0]] <= 1.01 * min(hidden.values())
    logits = {
        e: difference(graph, image, quantizers((found[0], e)))
        for e in (start[1] - 1, start[1], start[1] + 1)
    }
    assert logits[found[1]] <= 1.01 * min(logits.values())


def test_fixed_exponents_stay(graph):
    tensors = quantizers((-4, 2))
    image = torch.from_numpy(normal(64, 4, 1, 1))
    learn_exponents(Lockstep(graph, tensors, {}, [image]), LINKED, fixed={"f", "y"})
    assert tensors == quantizers((-4, 2))


def test_outputs_that_are_computed_early_count_to_the_end(make_model):
    """Their error is no reason to change exponents behind them."""
    graph = TorchGraph(
        make_model(
            "g (float[N,4,1,1] x) => (float[N,8] early, float[N,5] y) {"
            " i = Flatten(x) early = Gemm(i, u, b) c = Gemm(i, w, b) y = Gemm(c, v, d) }",
            u=normal(4, 8),
            w=normal(4, 8),
            b=normal(8),
            v=normal(8, 5),
            d=normal(5),
        ).proto
    )
    image = torch.from_numpy(normal(64, 4, 1, 1))

    def with_exponents(early, hidden, logits):
        return {
            "early": TensorQuantizer(bits=4, signed=True, exponent=early),  # the largest error
            "c": TensorQuantizer(bits=8, signed=True, exponent=hidden),
            "y": TensorQuantizer(bits=8, signed=True, exponent=logits),
        }

    ranges = range(-3, 1), range(-7, -2), range(-7, -1)
    choices = [with_exponents(*chosen) for chosen in itertools.product(*ranges)]
    tensors = min(choices, key=lambda chosen: difference(graph, image, chosen))
    best = dict(tensors)
    assert learn_exponents(Lockstep(graph, tensors, {}, [image]), {}) == 0
    assert tensors == best


def test_difference_is_the_squared_error_in_units_of_the_variance():
    exact = {"y": torch.tensor([[0.0, 2.0]]), "z": torch.tensor([[10.0], [30.0]])}
    found = {"y": torch.tensor([[0.0, 3.0]]), "z": torch.tensor([[10.0], [40.0]])}
    assert output_difference(exact, {"y": found["y"]}) == pytest.approx(0.5)
    assert output_difference(exact, found) == pytest.approx(1.0)
    assert output_difference(exact, {"y": found["y"] * np.nan}) == np.inf
