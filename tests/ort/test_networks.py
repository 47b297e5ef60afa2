"""Real networks: gradients to the image, through taps and outputs, agree with torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graph_tools.batchnorm import find_batch_norms
from graph_tools.model import Model, load
from graph_tools.ort_graph import OrtGraph
from graph_tools.torch_graph import TorchGraph

pytestmark = pytest.mark.ort

INPUT_SHAPES = {"yunet_n_dynamic": (1, 3, 160, 192)}


def _gradients(model: Model, names: list[str], images: torch.Tensor) -> list[torch.Tensor]:
    """Gradient of a loss on all the tensors, by torch in double precision and by both engines."""
    exact = TorchGraph(model.proto, outputs=names).double()
    with torch.no_grad():
        values = exact(images.double())
    generator = torch.Generator().manual_seed(1)
    slopes = {
        name: torch.randn(value.shape, generator=generator) / max(float(value.std()), 0.01)
        for name, value in values.items()
    }
    results = []
    engines = (
        exact,
        TorchGraph(model.proto, outputs=names),
        OrtGraph(model.proto, outputs=names),
    )
    for graph in engines:
        leaf = images.to(torch.float64 if graph is exact else torch.float32, copy=True)
        leaf.requires_grad_()
        found = graph(leaf)
        for name, value in found.items():
            # Sigmoid is approximated in onnxruntime, by 1e-7 near 0
            torch.testing.assert_close(
                value.detach().double(),
                values[name],
                rtol=0,
                atol=1e-4 * float(values[name].abs().max()) + 1e-6,
            )
        loss = sum((value * slopes[name]).sum() for name, value in found.items())
        results.append(torch.autograd.grad(loss, leaf)[0].double())
    return results


def _check(path: Path, *, heads: bool = True) -> None:
    model = load(path, input_shape=INPUT_SHAPES.get(path.stem))
    taps = [site.tensor for site in find_batch_norms(model)]
    names = list(dict.fromkeys([*taps, *(model.outputs if heads else ())]))
    images = torch.randn(
        model.fixed_batch or 6,
        *model.input.shape,
        generator=torch.Generator().manual_seed(0),
    )
    exact, ours, ort = _gradients(model, names, images)
    for other in (exact, ours):
        difference, gradient = (ort - other).flatten(1), other.flatten(1)
        # Of an image's largest gradient. An activation within rounding of the kink of a Relu may
        # fall on either side, in either engine: then the gradient of its image differs a little.
        assert (difference.abs().amax(1) / gradient.abs().amax(1)).median() < 1e-4
        assert (difference.norm(dim=1) / gradient.norm(dim=1)).max() < 1e-2


@pytest.mark.parametrize("name", ["digits_mobilenet", "digits_resnet"])
def test_shipped_networks(digits_models: Path, name: str) -> None:
    _check(digits_models / f"{name}.onnx")


@pytest.mark.parametrize(
    "name",
    [
        "cifar10_resnet20",
        "cifar10_resnet20_folded",
        "mcunet_cifar10_32",
        "mlperftiny_resnet8_cifar10_tf2onnx_bn",
        "mobilenet_v1_025_224_imagenet",
        "ultraface_rfb320",
        "yolo_fastestv2_coco",
        "yunet_n_dynamic",
    ],
)
def test_real_networks(shared_models: Path, name: str) -> None:
    _check(shared_models / f"{name}.onnx")


def test_backbone_of_ultraface(shared_models: Path) -> None:
    _check(shared_models / "ultraface_rfb320.onnx", heads=False)
