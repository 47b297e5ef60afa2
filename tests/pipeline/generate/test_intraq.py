from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from graph_tools.batchnorm import find_batch_norms
from graph_tools.errors import SettingsError
from graph_tools.model import Model, load
from pipeline.generate import generate
from pipeline.generate.intraq import IntraqObjective, constants
from pipeline.generate.last_linear import LastLinear, find_last_linear
from pipeline.generate.statistics import SiteTargets
from pipeline.settings import GenerateSettings

LABELS = torch.tensor([0, 1, 0, 0, 1])
WANTED = torch.tensor([1.0, 0.9, 0.95, 1.0, 1.0])


def objective(model: Model) -> IntraqObjective:
    return IntraqObjective(
        targets=SiteTargets(find_batch_norms(model), torch.device("cpu")),
        layer=LastLinear(features="f", logits="g", classes=2),
        labels=LABELS,
        wanted=WANTED,
        low=0.3,
        high=0.8,
    )


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "f": torch.randn(5, 4, 1, 1, generator=generator),
        "g": torch.randn(5, 2, generator=generator),
    }


def expected(own: dict[str, torch.Tensor], seen: torch.Tensor | None) -> np.ndarray:
    """The terms of every image, by numpy; ``seen``: features that the images last had."""
    chances = np.exp(own["g"].numpy())
    chances = chances / chances.sum(1, keepdims=True)
    terms = (chances[np.arange(5), LABELS] - WANTED.numpy()) ** 2
    for image in range(5):
        others = [i for i in range(5) if i != image and LABELS[i] == LABELS[image]]
        if seen is None or not others:
            continue
        mean = seen.flatten(1).numpy()[others].mean(0)
        features = own["f"].flatten(1).numpy()[image]
        cosine = mean @ features / np.linalg.norm(mean) / np.linalg.norm(features)
        terms[image] += max(0.3 - (1 - cosine), 0) + max(1 - cosine - 0.8, 0)
    return terms


def test_terms_of_the_classes_are_the_formulas(small: Model) -> None:
    part = objective(small)
    old, new = values(0), values(1)
    assert part.images(new, 0).item() == pytest.approx(expected(new, None).mean(), rel=1e-5)
    part.remember(old, 0)
    whole = expected(new, old["f"])
    assert part.images(new, 0).item() == pytest.approx(whole.mean(), rel=1e-5)
    rest = {name: value[2:] for name, value in new.items()}  # as a chunk sees them
    assert part.images(rest, 2).item() == pytest.approx(whole[2:].mean(), rel=1e-5)


def test_statistics_are_mean_squares_of_means_and_variances(small: Model) -> None:
    part = objective(small)
    sites = part.targets
    generator = torch.Generator().manual_seed(3)
    observed = {
        site.tensor: torch.randn(4, site.channels, 5, 3, generator=generator)
        for site in sites.sites
    }
    losses = []
    for site in sites.sites:
        array = observed[site.tensor].numpy().astype(np.float64)
        errors = (array.mean((0, 2, 3)) - site.mean) ** 2
        losses.append((errors + (array.var((0, 2, 3)) - site.variance) ** 2).mean())
    loss = part.statistics(part.measure(observed, 0))
    assert loss.item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_published_constants() -> None:
    found = [constants(classes) for classes in (10, 100, 1000)]
    assert found == [(0.95, 0.05, 0.8), (0.6, 0.02, 1.0), (1.0, 0.0, 2.0)]


def test_the_last_linear_layer_is_found(small: Model, digits_models: Path) -> None:
    assert find_last_linear(small) == LastLinear(features="f", logits="g", classes=5)
    layer = find_last_linear(load(digits_models / "digits_mobilenet.onnx"))
    assert layer is not None
    assert layer.classes == 10


@pytest.mark.parametrize(
    "tail",
    [
        "y = Conv(r, w)",  # a map, not a vector
        "p = GlobalAveragePool(r) y = Conv(p, w) z = Conv(p, w)",  # two outputs
        "y = Relu(r)",  # no linear layer
    ],
)
def test_intraq_refuses_what_is_no_classifier(
    make_model: Callable[..., Model], tmp_path: Path, tail: str
) -> None:
    outputs = {"y": "float[N,3,h,k] y"} | ({"z": "float[N,3,h,k] z"} if "z =" in tail else {})
    model = make_model(
        f"g (float[N,3,8,8] x) => ({', '.join(outputs.values())}) "
        "{ n = BatchNormalization(x, v, v, v, v) r = Relu(n) " + tail + " }",
        w=np.ones((3, 3, 1, 1), np.float32),
        v=np.ones(3, np.float32),
    )
    settings = GenerateSettings(method="intraq", num_images=2, iterations=1)
    with pytest.raises(SettingsError, match=r"no classifier.*--method dgh") as caught:
        generate(model, settings, tmp_path / "x.npz")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.glob("*x.npz*")) == []
