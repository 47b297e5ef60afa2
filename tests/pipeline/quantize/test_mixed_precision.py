"""--target-size: the knapsack, the sensitivities, and both together on a shipped network."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from graph_tools.errors import SettingsError
from graph_tools.model import initializers, load, save
from graph_tools.prepare import prepare_for_quantization
from graph_tools.qdq import write_qdq
from graph_tools.torch_graph import TorchGraph
from pipeline.images import ImageWriter, open_images
from pipeline.quantize import quantize
from pipeline.quantize.knapsack import least_error
from pipeline.quantize.lockstep import Lockstep
from pipeline.quantize.placement import place
from pipeline.quantize.sensitivity import measure_sensitivity
from pipeline.settings import QuantizeSettings, TargetSize


def brute_force(items, budget):
    """Least error of all combinations that fit, None if none does."""
    errors = [
        sum(item[choice][1] for item, choice in zip(items, choices, strict=True))
        for choices in itertools.product(*items)
        if sum(item[c][0] for item, c in zip(items, choices, strict=True)) <= budget
    ]
    return min(errors, default=None)


@pytest.mark.parametrize("seed", range(60))
def test_the_knapsack_finds_what_trying_all_combinations_finds(seed):
    rng = np.random.default_rng(seed)
    items = []
    for _ in range(rng.integers(1, 7)):
        size = int(rng.integers(1, 50))
        errors = np.sort(
            rng.lognormal(0, 3, 4)
        )  # few choices are alike, some are not monotone
        if seed % 3 == 0:
            errors = rng.permutation(errors)
        if seed % 5 == 0:
            errors = np.round(errors)  # ties, zeros
        items.append(
            {b: (b * size, float(e)) for b, e in zip((8, 4, 3, 2), errors, strict=True)}
        )
    sizes = [[size for size, _ in item.values()] for item in items]
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    for budget in (least, *rng.integers(least, most + 1, 3), most):
        chosen = least_error(items, int(budget))
        pairs = [item[choice] for item, choice in zip(items, chosen, strict=True)]
        assert sum(size for size, _ in pairs) <= budget
        assert sum(error for _, error in pairs) == pytest.approx(brute_force(items, budget))
    with pytest.raises(ValueError, match="fits"):
        least_error(items, least - 1)


def test_the_knapsack_is_exact_where_many_layers_leave_many_sums():
    """Equal items: n of them go to the large choice, by whatever order."""
    items = [{"small": (1, 1.0), "large": (7, 0.0)}] * 60
    chosen = least_error(items, 60 + 6 * 25 + 5)
    assert chosen.count("large") == 25


@pytest.fixture
def digits(digits_models, tmp_path):
    model = prepare_for_quantization(load(digits_models / "digits_resnet.onnx"))
    path = tmp_path / "images.npz"
    with ImageWriter(path, count=48, shape=(1, 8, 8)) as writer:
        writer.append(np.random.default_rng(0).normal(size=(48, 1, 8, 8)).astype(np.float32))
    return model, open_images(path, shape=(1, 8, 8))


@pytest.mark.parametrize("correct", [False, True])
def test_sensitivity_is_the_error_of_a_network_with_one_other_weight(
    digits, run_onnx, correct
):
    model, images = digits
    graph = TorchGraph(model.proto)
    sites = place(model, graph.steps).weighted
    names = [site.weight for site in sites.values()]
    values = initializers(model.proto)

    def rounded(site, bits):
        return torch.from_numpy(np.round(values[site.weight] * 2**bits) / np.float32(2**bits))

    def inner(proto, tensor):
        exposed = onnx.ModelProto()
        exposed.CopyFrom(proto)
        del exposed.graph.output[:]
        exposed.graph.output.append(onnx.ValueInfoProto(name=tensor))
        return run_onnx(exposed, pixels)[0]

    batches = [torch.from_numpy(batch) for batch in images.batches(20)]
    found = measure_sensitivity(
        Lockstep(graph, {}, {}, batches),
        sites,
        dict.fromkeys(names, (4, 2)),
        rounded,
        correct_biases=correct,
    )
    assert list(found) == names
    pixels = images.load(48)
    (exact,) = run_onnx(model.proto, pixels)
    for site in list(sites.values())[::3]:  # the first, the last, some between
        proto = onnx.ModelProto()
        proto.CopyFrom(model.proto)
        replace_initializer(proto, site.weight, rounded(site, 2).numpy())
        if correct:  # move the bias by the mean error of the channel
            before, after = (inner(p, site.output) for p in (model.proto, proto))
            axes = tuple(a for a in range(before.ndim) if a != 1)
            bias = values[site.bias] + (before - after).mean(axis=axes)
            replace_initializer(proto, site.bias, bias.astype(np.float32))
        (other,) = run_onnx(proto, pixels)
        expected = np.linalg.norm(other - exact) / np.linalg.norm(exact)
        # float32 sums in another order; the errors themselves are of the order of 0.1
        assert found[site.weight][2] == pytest.approx(expected, rel=1e-3)
        assert found[site.weight][4] < found[site.weight][2]


def test_layers_behind_an_output_do_not_disturb_it(make_model):
    values = {
        "w": np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32),
        "v": np.random.default_rng(2).normal(size=(4, 5)).astype(np.float32),
    }
    model = make_model(
        "g (float[N,4,1,1] x) => (float[N,8] early, float[N,5] y) {"
        " i = Flatten(x) early = MatMul(i, w) y = MatMul(i, v) }",
        **values,
    )
    image = torch.from_numpy(np.random.default_rng(3).normal(size=(16, 4, 1, 1)))
    graph = TorchGraph(model.proto)
    sites = place(model, graph.steps).weighted
    found = measure_sensitivity(
        Lockstep(graph, {}, {}, [image.float()]),
        sites,
        {site.weight: (2,) for site in sites.values()},
        lambda site, bits: graph.constants[site.weight] * 1.25,
        correct_biases=False,
    )
    assert [errors[2] for errors in found.values()] == pytest.approx([0.25, 0.25])


def replace_initializer(proto, name, values):
    (tensor,) = (t for t in proto.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values, name))


def test_a_network_fits_its_budget_and_named_layers_keep_their_bits(digits, tmp_path):
    model, images = digits
    named = TorchGraph(model.proto).steps[0].name
    settings = QuantizeSettings(target_size="0.45x", bits=(f"{named}=W3",))
    found = quantize(model, images, settings)
    mixed = found.mixed
    weights = [c for c in found.plan.constants.values() if c.role == "weight"]
    bits = sum(c.quantizer.bits * c.integers.size for c in weights)
    elements = sum(c.integers.size for c in weights)
    assert mixed.size_w8 == elements
    assert mixed.size == -(-bits // 8) <= mixed.budget == int(0.45 * elements)
    assert {c.node: c.quantizer.bits for c in weights} == mixed.widths
    assert mixed.widths[named] == 3
    assert len(set(mixed.widths.values())) > 1
    first = next(layer for layer in mixed.layers.values() if named in layer.nodes)
    assert first.errors == {}
    assert any("packed weights" in note and "allowed" in note for note in found.notes)
    # a better choice of the same size would have been taken
    free = [layer for layer in mixed.layers.values() if layer.errors]
    total = sum(layer.errors[layer.bits] for layer in free)
    items = [{b: (b * x.elements, x.errors[b]) for b in (8, 4, 3, 2)} for x in free]
    assert total == pytest.approx(brute_force(items, 8 * mixed.budget - 3 * first.elements))
    save(write_qdq(model, found.plan, metadata={}), tmp_path / "q.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "q.onnx"))


def test_a_budget_below_two_bits_names_the_least_size(digits):
    model, images = digits
    with pytest.raises(SettingsError, match=r"least possible is 9,460 bytes \(0\.250x\)"):
        quantize(model, images, QuantizeSettings(target_size="5kB"))
    with pytest.raises(SettingsError, match="least possible"):
        quantize(model, images, QuantizeSettings(target_size="0.6x", bits=("*=W8",)))


@pytest.mark.parametrize(
    ("text", "size"),
    [("0.6x", 600), ("1x", 1000), ("300", 300), ("0.5 kB", 500), ("2MB", 2_000_000)],
)
def test_sizes_are_read(text, size):
    assert TargetSize.parse(text).bytes_of(1000) == size


@pytest.mark.parametrize("text", ["x", "-1x", "0x", "60%", "1e3", "5 TB"])
def test_other_words_are_refused(text):
    with pytest.raises(SettingsError, match="--target-size"):
        QuantizeSettings(target_size=text)
