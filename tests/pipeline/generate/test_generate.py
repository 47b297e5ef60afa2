from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch

from graph_tools.batchnorm import find_batch_norms
from graph_tools.errors import DataError, GenerationError, NoBatchNormError, SettingsError
from graph_tools.model import Model, initializers, load
from graph_tools.restore import restore_batch_norms
from graph_tools.side_file import read_side_file
from graph_tools.torch_graph import TorchGraph
from pipeline.generate import Generated, default_batch_size, generate
from pipeline.preprocessing import Preprocessing
from pipeline.settings import GenerateSettings

HALF = Preprocessing(mean=(0.5,), std=(0.5,))


def run(model: Model, path: Path, **options: object) -> Generated:
    settings = {"num_images": 10, "iterations": 12, "batch_size": 4, "learning_rate": 4.0}
    if options.get("method", "dgh") == "dgh":
        settings["start"] = "noise"
    return generate(
        model,
        GenerateSettings(**{**settings, **options}),  # type: ignore[arg-type]
        path,
        preprocessing=HALF,
    )


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_images_are_whole_and_in_the_valid_range(small: Model, tmp_path: Path) -> None:
    path = tmp_path / "out" / "images.npz"
    path.parent.mkdir()
    result = run(small, path)
    images = result.images.load()
    assert images.shape == (10, 3, 12, 10)
    assert np.abs(images).max() <= 1 + 1e-6
    assert images.std() > 0.1
    assert [record.iteration for record in result.history] == list(range(1, 13))
    assert [row.node for row in result.statistics] == ["bn1", "bn2"]
    assert [entry.name for entry in path.parent.iterdir()] == ["images.npz"]


def test_the_same_seed_gives_the_same_bytes(small: Model, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(small, tmp_path / f"{name}.npz", seed=seed)
    a, b, c = (digest(tmp_path / f"{name}.npz") for name in "abc")
    assert a == b
    assert a != c


def test_statistics_after_are_those_of_the_written_images(
    small: Model, tmp_path: Path
) -> None:
    result = run(small, tmp_path / "images.npz")
    images = torch.from_numpy(result.images.load())
    sites = find_batch_norms(small)
    values = TorchGraph(small.proto, outputs=[site.tensor for site in sites])(images)
    for site, row in zip(sites, result.statistics, strict=True):
        variance, mean = torch.var_mean(values[site.tensor].double(), (0, 2, 3), correction=0)
        sigma = np.sqrt(site.variance + site.epsilon)
        error = np.sqrt(np.mean(((mean.numpy() - site.mean) / sigma) ** 2))
        spread = (np.sqrt(variance.numpy() + site.epsilon) - sigma) / sigma
        assert row.mean_error_after == pytest.approx(error, rel=1e-4)
        assert row.std_error_after == pytest.approx(np.sqrt(np.mean(spread**2)), rel=1e-3)
        assert row.channels == site.channels


@pytest.mark.parametrize("start", ["natural", "noise"])
@pytest.mark.parametrize("name", ["digits_resnet", "digits_mobilenet"])
def test_loss_falls_on_the_shipped_networks(
    digits_models: Path, tmp_path: Path, name: str, start: Literal["natural", "noise"]
) -> None:
    model = load(digits_models / f"{name}.onnx")
    settings = GenerateSettings(num_images=32, iterations=100, batch_size=16, start=start)
    result = generate(model, settings, tmp_path / "images.npz")
    first = np.mean([record.statistics for record in result.history[:3]])
    last = np.mean([record.statistics for record in result.history[-3:]])
    assert last < (0.2 if start == "noise" else 0.4) * first
    for kind in ("mean", "std"):
        before, after = (
            np.mean([asdict(row)[f"{kind}_error_{when}"] for row in result.statistics])
            for when in ("before", "after")
        )
        assert after < 0.6 * before


def test_what_starts_natural_stays_smooth(small: Model, tmp_path: Path) -> None:
    likeness = {}
    for start in ("natural", "noise"):
        options = {"start": start, "iterations": 40, "learning_rate": 0.0}
        result = run(small, tmp_path / "x.npz", num_images=16, **options)
        images = result.images.load()
        images = images - images.mean((2, 3), keepdims=True)
        beside = (images[..., 1:] * images[..., :-1]).mean()
        likeness[start] = beside / images.var()
        assert result.history[-1].statistics < result.history[0].statistics
    assert likeness["natural"] > 0.5 > 0.3 > likeness["noise"]


def test_outputs_are_stretched(small: Model, tmp_path: Path) -> None:
    ranges = {}
    for weight in (0.0, None):
        result = run(small, tmp_path / "x.npz", output_weight=weight, iterations=40)
        with torch.no_grad():
            logits = TorchGraph(small.proto, outputs=["g"])(
                torch.from_numpy(result.images.load())
            )["g"]
        ranges[weight] = (logits.amax(1) - logits.amin(1)).mean().item()
        assert (result.history[-1].output == 0) == (weight == 0.0)
    assert ranges[None] > ranges[0.0]


def test_batches_of_a_fixed_size_give_the_same_images(small: Model, tmp_path: Path) -> None:
    whole = run(small, tmp_path / "a.npz", iterations=6)
    single = run(replace(small, fixed_batch=1), tmp_path / "b.npz", iterations=6)
    three = run(replace(small, fixed_batch=3), tmp_path / "c.npz", iterations=6)
    for other in (single, three):
        np.testing.assert_allclose(other.images.load(), whole.images.load(), atol=2e-3)


def test_noise_is_standard_normal_in_standardized_pixels(small: Model, tmp_path: Path) -> None:
    steps: list[int] = []
    result = generate(
        small,
        GenerateSettings(method="noise", num_images=200, batch_size=64),
        tmp_path / "x.npz",
        preprocessing=Preprocessing(mean=(0.0,), std=(1 / 255,)),
        on_step=lambda done, total, terms: steps.append(done),
    )
    pixels = result.images.load() / 255
    assert pixels.mean() == pytest.approx(0.45, abs=0.005)
    assert pixels.std() == pytest.approx(0.226, abs=0.003)
    assert result.history == ()
    row = result.statistics[0]
    assert row.mean_error_before == row.mean_error_after


def test_noise_needs_no_batch_norm(without_batch_norm: Model, tmp_path: Path) -> None:
    settings = GenerateSettings(method="noise", num_images=3)
    result = generate(without_batch_norm, settings, tmp_path / "x.npz")
    assert result.statistics == ()
    assert result.images.count == 3
    assert result.preprocessing.source.startswith("assumed")
    assert result.preprocessing.source in result.notes[0]


def test_without_batch_norm_the_remedies_are_named(
    without_batch_norm: Model, tmp_path: Path
) -> None:
    with pytest.raises(NoBatchNormError) as caught:
        run(without_batch_norm, tmp_path / "x.npz", method="dgh")
    line = str(caught.value)
    assert "\n" not in line
    assert line.index("--bn-from FILE") < line.index("do_constant_folding")
    for remedy in (
        "do_constant_folding=False",
        "optimize=False",
        "--data DIR",
        "--method prior",
        "--method noise",
    ):
        assert remedy in line
    assert list(tmp_path.glob("x*")) == []


def test_without_batch_norm_images_come_from_the_prior(
    small: Model, without_batch_norm: Model, tmp_path: Path
) -> None:
    assert run(small, tmp_path / "a.npz").method == "dgh"
    result = run(without_batch_norm, tmp_path / "b.npz")
    assert result.method == "prior"
    assert "accuracy cannot be promised" in result.warnings[0]
    assert result.statistics == ()
    assert len(result.history) == 12
    low, high = result.preprocessing.valid_range(3)
    images = result.images.load()
    assert (images >= low.reshape(3, 1, 1) - 1e-5).all()
    assert (images <= high.reshape(3, 1, 1) + 1e-5).all()


def test_prior_wakes_features_and_stays_near_its_images(small: Model, tmp_path: Path) -> None:
    options = {"method": "prior", "num_images": 16, "flip": False, "padding": 0}
    start = run(small, tmp_path / "a.npz", **options, iterations=1, learning_rate=1e-9)
    result = run(small, tmp_path / "b.npz", **options, iterations=50, learning_rate=0)
    assert result.history[-1].total < result.history[0].total
    assert result.history[-1].output < result.history[0].output
    before, after = start.images.load(), result.images.load()
    assert 0.01 < np.abs(after - before).mean() / before.std() < 0.3
    np.testing.assert_allclose(after.std(), before.std(), rtol=0.1)


def test_restored_statistics_give_the_same_images(shared_models: Path, tmp_path: Path) -> None:
    kept = load(shared_models / "cifar10_resnet20.onnx")
    side = read_side_file(shared_models / "cifar10_resnet20.onnx")
    folded = load(shared_models / "cifar10_resnet20_folded.onnx")
    restored = restore_batch_norms(folded, side).model
    options = {"method": "dgh", "num_images": 8, "batch_size": 8, "iterations": 8}
    expected = run(kept, tmp_path / "a.npz", **options)
    found = run(restored, tmp_path / "b.npz", **options)
    assert expected.images.load().std() > 0.1
    np.testing.assert_allclose(found.images.load(), expected.images.load(), atol=1e-4)


@pytest.mark.parametrize("norm", ["GroupNormalization", "LayerNormalization"])
def test_prior_takes_networks_that_never_had_batch_norm(norm: str, tmp_path: Path) -> None:
    model = load(transformer_like(norm, tmp_path / "net.onnx"))
    result = run(model, tmp_path / "x.npz", iterations=3, learning_rate=0.1)
    assert result.method == "prior"
    assert np.isfinite(result.images.load()).all()


def transformer_like(norm: str, path: Path) -> Path:
    """Patches, a normalization, attention (not with GroupNormalization), a head, by torch."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = torch.nn.Conv2d(3, 16, 4, stride=4)
            self.group, self.layer = torch.nn.GroupNorm(4, 16), torch.nn.LayerNorm(16)
            self.mix, self.head = torch.nn.Linear(16, 48), torch.nn.Linear(16, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.patches(x)
            if norm == "GroupNormalization":
                return self.head(torch.relu(self.group(x)).mean((2, 3)))
            x = self.layer(x.flatten(2).transpose(1, 2))
            q, k, v = self.mix(x).chunk(3, dim=-1)
            x = x + torch.softmax(q @ k.transpose(1, 2) / 4, dim=-1) @ v
            return self.head(x.mean(1))

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Net().eval(), (torch.zeros(1, 3, 16, 16),), str(path), dynamo=False,
            input_names=["x"], opset_version=17, dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    return path


def test_prior_of_a_fixed_batch_is_the_same(small: Model, tmp_path: Path) -> None:
    options = {"method": "prior", "iterations": 6, "learning_rate": 0.1}
    whole = run(small, tmp_path / "a.npz", **options)
    three = run(replace(small, fixed_batch=3), tmp_path / "b.npz", **options)
    np.testing.assert_allclose(three.images.load(), whole.images.load(), atol=2e-3)


def test_convolutions_that_lost_their_batch_norm_are_named(
    make_model: Callable[..., Model], tmp_path: Path
) -> None:
    one = np.ones((4, 4, 1, 1), np.float32)
    vector = np.ones(4, np.float32)
    model = make_model(
        "g (float[N,4,8,8] x) => (float[N,4,8,8] y) { a = Conv(x, w) r = Relu(a) b = Conv(r, w) "
        "n = BatchNormalization(b, v, v, v, v) m = Mul(n, s) t = Add(m, s) q = Relu(t) "
        "y = Conv(q, w) }",
        w=one,
        v=vector,
        s=vector.reshape(1, 4, 1, 1),
    )
    notes = " ".join(run(model, tmp_path / "x.npz", iterations=1).notes)
    assert "1 convolution(s) such as 'a' have no BatchNormalization" in notes
    assert "1 Mul and Add pair(s)" in notes


def test_nothing_is_left_after_a_failure(small: Model, tmp_path: Path) -> None:
    def fail(done: int, total: int, terms: object) -> None:
        if done == 5:
            raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        generate(
            small,
            GenerateSettings(num_images=8, iterations=9, batch_size=4),
            tmp_path / "x.npz",
            preprocessing=HALF,
            on_step=fail,
        )
    assert set(tmp_path.iterdir()) == before


def test_a_site_that_is_not_finite_is_named(small: Model, tmp_path: Path) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(small.proto)
    huge = np.full_like(initializers(proto)["w2"], 3e38)
    for tensor in proto.graph.initializer:
        if tensor.name == "w2":
            tensor.CopyFrom(onnx.numpy_helper.from_array(huge, "w2"))
    before = set(tmp_path.iterdir())
    with pytest.raises(GenerationError, match="'bn2'"):
        run(replace(small, proto=proto), tmp_path / "x.npz")
    assert set(tmp_path.iterdir()) == before


def test_progress_is_reported_for_every_step(small: Model, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []

    def on_step(done: int, total: int, terms: object) -> None:
        assert isinstance(terms, dict)
        assert {"total", "statistics", "output"} <= set(terms)
        steps.append((done, total))

    generate(
        small,
        GenerateSettings(num_images=10, iterations=3, batch_size=4),
        tmp_path / "x.npz",
        preprocessing=HALF,
        on_step=on_step,
    )
    assert steps == [(done, 9) for done in range(1, 10)]


def test_bad_places_and_devices_are_the_users_fault(small: Model, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        run(small, tmp_path / "nowhere" / "x.npz")
    with pytest.raises(SettingsError, match="--device"):
        run(small, tmp_path / "x.npz", device="tpu9")
    with pytest.raises(SettingsError, match="--mean"):
        generate(
            small,
            GenerateSettings(num_images=1, iterations=1),
            tmp_path / "x.npz",
            preprocessing=Preprocessing(mean=(0.5, 0.5), std=(1.0,)),
        )


@pytest.mark.parametrize(
    "options",
    [
        {"num_images": -1},
        {"learning_rate": -1.0},
        {"std_weight": float("nan")},
        {"output_weight": -1.0},
        {"padding": -2},
        {"site_balance": 2.0},
        {"seed": -1},
    ],
)
def test_settings_are_checked(options: dict[str, float]) -> None:
    field = next(iter(options)).replace("_", "-")
    with pytest.raises(SettingsError, match=f"--{field}"):
        GenerateSettings(**options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_layout_and_range_are_the_models_own(shared_models: Path, tmp_path: Path) -> None:
    model = load(shared_models / "mlperftiny_resnet8_cifar10_tf2onnx_bn.onnx")
    settings = GenerateSettings(num_images=16, iterations=60, batch_size=8)
    result = generate(model, settings, tmp_path / "x.npz")
    images = result.images.load()
    assert images.shape == (16, 32, 32, 3)
    assert images.min() >= -0.01
    assert images.max() <= 255.01
    assert images.std() > 25
    assert result.history[-1].statistics < 0.1 * result.history[0].statistics


def test_batches_shrink_with_the_image() -> None:
    sizes = [default_batch_size(side, side) for side in (8, 32, 128, 224, 352, 2000)]
    assert sizes == [64, 64, 64, 16, 8, 1]
    assert default_batch_size(224, 224, "cuda") == 128
