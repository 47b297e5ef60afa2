"""Networks as torch's TorchScript and dynamo exporters write them, over all their opsets."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from graph_tools.batchnorm import find_batch_norms
from graph_tools.equivalence import largest_difference
from graph_tools.errors import ModelError
from graph_tools.model import load
from graph_tools.torch_graph import TorchGraph
from pipeline.run import QuantizeJob, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)
from tests.exporters.checks import equal_to_file
from tests.exporters.export import DYNAMO_OPSETS, SCRIPT_OPSETS, Export, export
from tests.exporters.networks import SIZE, ZOO, build

# Left behind where the target of an Expand or Reshape cannot be spelled without the batch.
SHAPE_OPERATORS = {"Shape", "Size", "ConstantOfShape", "Range", "CastLike", "SequenceAt"}
WITH_SHAPES = {"vit", "vit_fused"}  # a class token repeated for each image


# Their sizes are constants of the network, or torch.export finds that they must be.
NOT_FREE = {"bn1d_head", "swin", "vit", "vit_fused", "yolo", "activations", "resnet"}


def check(what: Export, folder: Path) -> None:
    entry = ZOO[what.network]
    path = export(what, folder)
    model = equal_to_file(
        path,
        batches=(1,) if what.free == "none" else (1, 3),
        input_shape=(1, entry.channels, SIZE, SIZE) if what.free == "all" else None,
    )
    if what.keep:
        assert len(find_batch_norms(model)) == entry.num_batch_norms
    assert model.fixed_batch is None
    left = SHAPE_OPERATORS & {node.op_type for node in model.proto.graph.node}
    assert not left or what.network in WITH_SHAPES


def _script_cover() -> list[Export]:
    """Each network kept and folded, opsets and free axes in turn."""
    cover, free = [], ("batch", "none", "all")
    for index, (network, entry) in enumerate(ZOO.items()):
        opsets = [opset for opset in SCRIPT_OPSETS if opset >= entry.opset]
        for step, keep in enumerate((True, False)):
            opset = opsets[(5 * index + 7 * step) % len(opsets)]
            kind = free[(index + step) % 3]
            if network in NOT_FREE and kind == "all":
                kind = "batch"
            cover.append(
                Export(network=network, exporter="script", opset=opset, keep=keep, free=kind)
            )
    return cover


# torch.export takes over a second a network.
DYNAMO = [
    Export(network="plain", exporter="dynamo", opset=18),
    Export(network="mobilenet_v3", exporter="dynamo", opset=19, free="none"),
    Export(network="shufflenet", exporter="dynamo", opset=20),
    Export(network="unet_bilinear", exporter="dynamo", opset=21, keep=False),
    Export(network="group_norm", exporter="dynamo", opset=21),
    Export(network="detector", exporter="dynamo", opset=22),
    Export(network="bn1d_head", exporter="dynamo", opset=22, keep=False),
    Export(network="vit", exporter="dynamo", opset=23),
    Export(network="bn1d_head", exporter="dynamo", opset=23),
    Export(network="swin", exporter="dynamo", opset=20, keep=False),
    Export(network="convnext", exporter="dynamo", opset=18, keep=False, free="none"),
    Export(network="yolo", exporter="dynamo", opset=19),
]


@pytest.mark.parametrize("what", _script_cover(), ids=str)
def test_torchscript(what: Export, tmp_path: Path) -> None:
    check(what, tmp_path)


@pytest.mark.parametrize("what", DYNAMO, ids=str)
def test_dynamo(what: Export, tmp_path: Path) -> None:
    check(what, tmp_path)


def test_the_cover_meets_every_opset_twice() -> None:
    for opset in SCRIPT_OPSETS:
        assert len({e.network for e in _script_cover() if e.opset == opset}) >= 2
    for opset in DYNAMO_OPSETS:
        assert len({e.network for e in DYNAMO if e.opset == opset}) >= 2
    for network in ZOO:
        assert len([e for e in (*_script_cover(), *DYNAMO) if e.network == network]) >= 2


@pytest.mark.slow
@pytest.mark.skipif("ZSQ_FULL_PRODUCT" not in os.environ, reason="takes twenty minutes")
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "folded"])
@pytest.mark.parametrize("exporter", ["script", "dynamo"])
@pytest.mark.parametrize("network", list(ZOO))
def test_every_opset(network: str, exporter: str, keep: bool, tmp_path: Path) -> None:
    if network == "preprocessing" and exporter == "dynamo" and keep:
        pytest.skip("onnxruntime refuses the file; tested below")
    for opset in DYNAMO_OPSETS if exporter == "dynamo" else SCRIPT_OPSETS:
        if exporter == "dynamo" or opset >= ZOO[network].opset:
            for free in ("batch", "none") if exporter == "script" else ("batch",):
                what = Export(
                    network=network, exporter=exporter, opset=opset, keep=keep, free=free
                )
                check(what, tmp_path)


# --------------------------------------------------------------------------- whole pipeline


@pytest.mark.parametrize(
    "what",
    [
        Export(network="mobilenet_v3", exporter="script", opset=11),
        Export(network="detector", exporter="script", opset=13, free="none"),
        Export(network="unet_transposed", exporter="script", opset=17, keep=False),
        Export(network="shufflenet", exporter="dynamo", opset=18),
        Export(network="vit_fused", exporter="script", opset=17),
        Export(network="padded", exporter="script", opset=12),
    ],
    ids=str,
)
def test_quantize(what: Export, tmp_path: Path) -> None:
    path, output = export(what, tmp_path), tmp_path / "quantized.onnx"
    result = quantize_file(
        QuantizeJob(
            model=path,
            output=output,
            input=InputSettings(mean=("0",), std=("1",)),
            generation=GenerateSettings(method="noise", num_images=8),
            quantization=QuantizeSettings(),
            verification=VerifySettings(max_images=8, threads=1),
            threads=1,
        )
    )
    assert result.proof.passed
    original, quantized = onnx.load(path), onnx.load(output)
    assert [o.name for o in quantized.graph.output] == [o.name for o in original.graph.output]
    image = np.load(result.folder / "images.npz")["images"][:1]
    sessions = [onnxruntime.InferenceSession(str(file)) for file in (path, output)]
    expected, actual = (s.run(None, {"image": image}) for s in sessions)
    for a, b in zip(actual, expected, strict=True):
        # The same network at 8 bits: an error of at most a fifth of the signal.
        assert np.linalg.norm(a - b) <= 0.2 * np.linalg.norm(b)


# --------------------------------------------------------------------------- training mode


def _trained_export(
    net: nn.Module, path: Path, *, constant_folding: bool = False
) -> onnx.ModelProto:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.randn(2, 3, SIZE, SIZE),),
            path,
            dynamo=False,
            input_names=["image"],
            dynamic_axes={"image": {0: "batch"}},
            training=torch.onnx.TrainingMode.TRAINING,
            do_constant_folding=constant_folding,
            opset_version=17,
        )
    return onnx.load(path)


def test_export_in_training_mode_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "training.onnx"
    proto = _trained_export(build("plain"), path)
    nodes = [node for node in proto.graph.node if node.op_type == "BatchNormalization"]
    assert all(len(node.output) == 3 for node in nodes)
    with pytest.raises(ModelError, match="is in training mode") as caught:
        load(path)
    assert "model.eval()" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_active_dropout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dropout.onnx"
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.ReLU())
    proto = _trained_export(net, path)
    assert "Dropout" in {node.op_type for node in proto.graph.node}
    with pytest.raises(ModelError, match="Dropout in training mode"):
        load(path)


def test_training_export_of_a_network_in_evaluation_mode(tmp_path: Path) -> None:
    """PRESERVE keeps Dropout nodes (training_mode false) and momentum: neither matters."""
    path = export(
        Export(network="mobilenet_v2", exporter="script", opset=17, keep=True), tmp_path
    )
    model = equal_to_file(path)
    assert "Dropout" not in {node.op_type for node in model.proto.graph.node}


# --------------------------------------------------------------------------- found defects


def test_name_used_for_a_weight_and_a_result(tmp_path: Path) -> None:
    """The dynamo exporter calls ``x.mean()`` like the buffer ``mean``; onnxruntime refuses."""
    what = Export(network="preprocessing", exporter="dynamo", opset=18)
    path = export(what, tmp_path)
    with pytest.raises(Exception, match="Duplicate definition of name"):
        onnxruntime.InferenceSession(str(path))
    model = load(path)
    assert any("defined twice" in note for note in model.notes)
    image = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = [build("preprocessing")(image).numpy()]
        actual = [TorchGraph(model.proto)(image)[model.outputs[0]].numpy()]
    assert largest_difference(actual, expected) <= 1e-4
