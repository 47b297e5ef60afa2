from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from graph_tools.batchnorm import find_batch_norms
from graph_tools.errors import SettingsError
from graph_tools.model import Model
from graph_tools.torch_graph import TorchGraph
from pipeline.generate import Generated, generate
from pipeline.generate.features import directions, feature_tensors
from pipeline.generate.selection import least_alike
from pipeline.preprocessing import Preprocessing
from pipeline.settings import GenerateSettings


def run(model: Model, path: Path, **options: object) -> Generated:
    settings = {"num_images": 6, "iterations": 5, "batch_size": 4, **options}
    return generate(
        model,
        GenerateSettings(**settings),  # type: ignore[arg-type]
        path,
        preprocessing=Preprocessing(mean=(0.5,), std=(0.5,)),
    )


def test_of_twins_one_goes() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(6, 40))
    vectors = np.concatenate([vectors, vectors[[1, 4]] + 0.01 * rng.normal(size=(2, 40))])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    kept = least_alike(vectors, 6)
    assert kept == sorted(kept)
    assert len({1, 6} & set(kept)) == len({4, 7} & set(kept)) == 1
    assert {0, 2, 3, 5} <= set(kept)
    assert least_alike(vectors, 8) == list(range(8))


def test_the_largest_cosine_left_is_the_smallest_that_pairs_allow() -> None:
    """Vectors on an arc: the pair nearest to each other loses its inner one."""
    angles = np.radians([0, 10, 30, 60, 100])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1)
    assert least_alike(vectors, 4) == [0, 2, 3, 4]
    assert least_alike(vectors, 3) == [0, 3, 4]


def test_directions_are_unit_vectors_of_means(small: Model) -> None:
    assert feature_tensors(small) == ("f",)
    values = {"a": torch.randn(3, 4, 5, 2), "b": torch.randn(3, 6)}
    found = directions(values, ("a", "b")).numpy()
    joined = np.concatenate([values["a"].numpy().mean((2, 3)), values["b"].numpy()], 1)
    expected = joined / np.linalg.norm(joined, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_images_are_chosen_from_more(small: Model, tmp_path: Path) -> None:
    everything = run(small, tmp_path / "all.npz", num_images=12).images.load()
    result = run(small, tmp_path / "kept.npz", oversample=2.0)
    kept = result.images.load()
    places = [int(np.abs(everything - image).sum((1, 2, 3)).argmin()) for image in kept]
    assert len(kept) == 6
    np.testing.assert_array_equal(everything[places], kept)
    features = TorchGraph(small.proto, outputs=["f"])(torch.from_numpy(everything))["f"]
    assert places == least_alike(directions({"f": features}, ("f",)).numpy(), 6)
    assert sorted(path.name for path in tmp_path.glob("*.npz")) == ["all.npz", "kept.npz"]
    assert not list(tmp_path.glob(".*"))

    site, row = find_batch_norms(small)[-1], result.statistics[-1]
    values = TorchGraph(small.proto, outputs=[site.tensor])(torch.from_numpy(kept))
    mean = values[site.tensor].double().mean((0, 2, 3)).numpy()
    error = np.sqrt(np.mean((mean - site.mean) ** 2 / (site.variance + site.epsilon)))
    assert row.mean_error_after == pytest.approx(error, rel=1e-3)


def test_fewer_cannot_be_made() -> None:
    with pytest.raises(SettingsError, match="--oversample"):
        GenerateSettings(oversample=0.5)


def test_what_no_batch_norm_binds_is_stretched_too(
    make_model: Callable[..., Model], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    model = make_model(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) { n = BatchNormalization(x, v, v, v, v) "
        "b = Conv(n, w) r = Relu(b) y = Conv(r, w) }",
        w=rng.normal(size=(4, 4, 1, 1)).astype(np.float32),
        v=np.ones(4, np.float32),
    )
    spans = {}
    for unbound in (False, True):
        options = {"start": "noise", "iterations": 25, "learning_rate": 1.0}
        result = run(model, tmp_path / "x.npz", stretch_unbound=unbound, **options)
        images = torch.from_numpy(result.images.load())
        b = TorchGraph(model.proto, outputs=["b"])(images)["b"].flatten(1)
        spans[unbound] = (b.amax(1) - b.amin(1)).mean().item()
    assert spans[True] != spans[False]
