"""Folded BatchNormalization comes back by value, from any file that holds the statistics."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from dataclasses import fields
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from graph_tools.batchnorm import find_batch_norms, fold_batch_norms
from graph_tools.errors import DataError, ModelError
from graph_tools.model import Model, load, replace_proto
from graph_tools.restore import Restoration, restore_batch_norms
from graph_tools.side_file import read_side_file


class Net(nn.Module):
    """Every kind of layer that a BatchNormalization is folded into."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(8, eps=1e-3)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2, bias=False)
        self.up_norm = nn.BatchNorm2d(6, eps=2e-4)
        self.hidden = nn.Linear(6, 8)
        self.hidden_norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first_norm(self.first(x)))
        x = torch.relu(self.depthwise_norm(self.depthwise(x)))
        x = torch.relu(self.up_norm(self.up(x))).mean((2, 3))
        return self.head(torch.relu(self.hidden_norm(self.hidden(x))))


def trained(network: nn.Module, seed: int = 0) -> nn.Module:
    """Fill in parameters as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            shape = module.running_mean.shape
            module.weight.data = torch.randn(shape, generator=generator)
            module.bias.data = torch.randn(shape, generator=generator)
            module.running_mean = torch.randn(shape, generator=generator)
            module.running_var = torch.rand(shape, generator=generator) + 0.01
        elif hasattr(module, "weight"):
            module.weight.data = 0.3 * torch.randn(module.weight.shape, generator=generator)
            if module.bias is not None:
                module.bias.data = 0.3 * torch.randn(module.bias.shape, generator=generator)
    return network.eval()


def export(network: nn.Module, path: Path) -> Path:
    """Write the network with its BatchNormalization."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.zeros(2, 3, 8, 8),), str(path), dynamo=False,
            do_constant_folding=False, training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["x"], opset_version=17,
        )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``kept.onnx`` and the network's tensors in several forms."""
    folder = tmp_path_factory.mktemp("restore")
    network = trained(Net())
    export(network, folder / "kept.onnx")
    tensors = network.state_dict()
    torch.save(tensors, folder / "tensors.pt")
    moving = OrderedDict((name, value * 0.9) for name, value in tensors.items())
    wrapped = {f"module.{name}": value for name, value in tensors.items()}
    torch.save(
        {"epoch": 3, "ema": moving, "state_dict": wrapped, "note": "x"},
        folder / "checkpoint.pth",
    )
    save_file({name: value.contiguous() for name, value in tensors.items()},
              folder / "tensors.safetensors")  # fmt: skip
    # Names and order say nothing here: only the values do.
    renamed = {}
    for index, (name, value) in enumerate(reversed(tensors.items())):
        stem, _, last = name.rpartition(".")
        is_norm = f"{stem}.running_mean" in tensors
        renamed[f"{stem[::-1]}.{last}" if is_norm else f"t{index}"] = value
    save_file({n: v.contiguous() for n, v in renamed.items()}, folder / "renamed.safetensors")
    torch.save({name: value.half() for name, value in tensors.items()}, folder / "half.bin")
    keras = {}
    for name, value in tensors.items():
        stem, _, last = name.rpartition(".")
        words = {"running_mean": "moving_mean:0", "running_var": "moving_variance:0"}
        if f"{stem}.running_mean" in tensors:
            words |= {"weight": "gamma:0", "bias": "beta:0"}
        if value.ndim == 4 and "up" not in name:
            value = (
                value.permute(2, 3, 1, 0) if "depth" not in name else value.permute(2, 3, 0, 1)
            )
        keras[f"{stem}/{words.get(last, last)}"] = value.contiguous()
    save_file(keras, folder / "keras.safetensors")
    return folder


@pytest.fixture(scope="module")
def kept(folder: Path) -> Model:
    return load(folder / "kept.onnx")


def check(restored: Restoration, kept: Model) -> None:
    """The statistics are those of the network that kept them."""
    found, expected = find_batch_norms(restored.model), find_batch_norms(kept)
    assert len(found) == len(expected) == restored.restored == restored.candidates
    for one, other in zip(found, expected, strict=True):
        # An unusual epsilon follows from float32 weights to their precision.
        assert one.epsilon == pytest.approx(other.epsilon, rel=1e-3)
        for field in fields(one):
            if field.type == "np.ndarray":
                np.testing.assert_array_equal(
                    getattr(one, field.name), getattr(other, field.name)
                )


@pytest.mark.parametrize(
    "name",
    [
        "kept.onnx",
        "tensors.pt",
        "checkpoint.pth",
        "tensors.safetensors",
        "renamed.safetensors",
        "keras.safetensors",
    ],
)
def test_statistics_come_back_exactly(name: str, folder: Path, kept: Model) -> None:
    folded = fold_batch_norms(kept)
    assert not find_batch_norms(folded)
    restored = restore_batch_norms(folded, read_side_file(folder / name))
    check(restored, kept)
    assert restored.difference < 1e-5
    states = [match.state for match in restored.matches]
    assert states == ["restored"] * 4 + ["unchanged"]  # the head never had one
    assert restored.model.notes[-1].startswith("BatchNormalization of 4 of 4 node(s) restored")
    assert min(match.cosine for match in restored.matches) > 0.999999
    assert "ema" not in " ".join(match.norm for match in restored.matches)


def test_half_precision_suffices(folder: Path, kept: Model) -> None:
    restored = restore_batch_norms(fold_batch_norms(kept), read_side_file(folder / "half.bin"))
    found = find_batch_norms(restored.model)
    for one, other in zip(found, find_batch_norms(kept), strict=True):
        np.testing.assert_allclose(one.mean, other.mean, rtol=1e-3, atol=1e-3)


def test_torchs_own_folding_is_undone(folder: Path, tmp_path: Path, kept: Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            trained(Net()), (torch.zeros(2, 3, 8, 8),), str(tmp_path / "folded.onnx"),
            dynamo=False, input_names=["x"], opset_version=17,
        )  # fmt: skip
    folded = load(tmp_path / "folded.onnx")
    assert len(find_batch_norms(folded)) < 4
    restored = restore_batch_norms(folded, read_side_file(folder / "tensors.pt"))
    assert len(find_batch_norms(restored.model)) == 4
    assert restored.difference < 1e-5


def test_what_is_left_unfolded_stays(folder: Path, kept: Model) -> None:
    side = read_side_file(folder / "kept.onnx")
    again = restore_batch_norms(kept, side)
    assert again.restored == 0
    assert len(find_batch_norms(again.model)) == 4


def folded_from(network: nn.Module, path: Path) -> Model:
    return fold_batch_norms(load(export(network, path)))


def test_an_output_that_is_a_constant_stays(folder: Path, kept: Model) -> None:
    """Detection networks give out their anchors."""
    proto = onnx.ModelProto()
    proto.CopyFrom(fold_batch_norms(kept).proto)
    anchors = np.arange(6, dtype=np.float32).reshape(3, 2)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(anchors, "anchors"))
    proto.graph.output.add(name="anchors").CopyFrom(
        onnx.helper.make_tensor_value_info("anchors", onnx.TensorProto.FLOAT, [3, 2])
    )
    onnx.save(proto, folder / "anchors.onnx")
    model = load(folder / "anchors.onnx")
    restored = restore_batch_norms(model, read_side_file(folder / "kept.onnx"))
    assert restored.restored == 4
    assert restored.model.outputs == model.outputs


def test_channels_with_gamma_zero(tmp_path: Path) -> None:
    network = trained(Net())
    network.first_norm.weight.data[2] = 0
    network.up_norm.weight.data[:] = 0
    torch.save(network.state_dict(), tmp_path / "t.pt")
    folded = folded_from(network, tmp_path / "n.onnx")
    restored = restore_batch_norms(folded, read_side_file(tmp_path / "t.pt"))
    sites = find_batch_norms(restored.model)
    assert len(sites) == 4
    np.testing.assert_array_equal(sites[0].mean, network.first_norm.running_mean.numpy())
    np.testing.assert_array_equal(sites[2].mean, network.up_norm.running_mean.numpy())


def test_layers_that_are_alike_take_statistics_in_order(tmp_path: Path) -> None:
    convolutions = [nn.Conv2d(3, 3, 1, bias=False) for _ in range(3)]
    norms = [nn.BatchNorm2d(3) for _ in range(3)]
    pairs = [module for pair in zip(convolutions, norms, strict=True) for module in pair]
    network = trained(nn.Sequential(*pairs))
    for other, norm in zip(convolutions[1:], norms[1:], strict=True):
        other.load_state_dict(convolutions[0].state_dict())
        norm.load_state_dict(norms[0].state_dict())
    # Folded alike, but not the same: gamma and the deviation doubled, and back.
    norms[1].weight.data *= 2
    norms[1].running_var = 4 * (norms[1].running_var + 1e-5) - 1e-5
    torch.save(network.state_dict(), tmp_path / "t.pt")
    folded = folded_from(network, tmp_path / "n.onnx")
    restored = restore_batch_norms(folded, read_side_file(tmp_path / "t.pt"))
    assert [match.norm for match in restored.matches] == ["1", "3", "5"]
    assert [match.weight for match in restored.matches] == ["0.weight", "2.weight", "4.weight"]


def test_mul_and_add_behind_a_convolution_are_a_batch_norm(folder: Path, kept: Model) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(kept.proto)
    expected = find_batch_norms(kept)
    for site in expected:
        node = next(n for n in proto.graph.node if n.name == site.node)
        factor = site.scale / np.sqrt(site.variance + site.epsilon)
        shape = (-1, 1, 1) if "hidden" not in site.node else (-1,)
        for name, values in (("m", factor), ("a", site.bias - factor * site.mean)):
            tensor = onnx.numpy_helper.from_array(values.reshape(shape), f"{site.node}{name}")
            proto.graph.initializer.append(tensor)
        place = list(proto.graph.node).index(node)
        middle = f"{site.node}/middle"
        mul = onnx.helper.make_node("Mul", [node.input[0], f"{site.node}m"], [middle])
        add = onnx.helper.make_node("Add", [f"{site.node}a", middle], [node.output[0]])
        proto.graph.node.remove(node)
        proto.graph.node.insert(place, add)
        proto.graph.node.insert(place, mul)
    written = replace_proto(kept, proto)
    assert not find_batch_norms(written)
    check(restore_batch_norms(written, read_side_file(folder / "tensors.pt")), kept)


def test_mul_and_add_on_their_own(tmp_path: Path) -> None:
    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.relu(self.norm(x)))

    network = trained(Before())
    torch.save(network.state_dict(), tmp_path / "t.pt")
    kept = load(export(network, tmp_path / "n.onnx"))
    site = find_batch_norms(kept)[0]
    factor = (site.scale / np.sqrt(site.variance + site.epsilon)).reshape(-1, 1, 1)
    proto = onnx.ModelProto()
    proto.CopyFrom(kept.proto)
    node = next(n for n in proto.graph.node if n.op_type == "BatchNormalization")
    shift = site.bias.reshape(-1, 1, 1) - factor * site.mean.reshape(-1, 1, 1)
    for name, values in (("m", factor), ("a", shift)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    output = node.output[0]
    proto.graph.node.remove(node)
    proto.graph.node.insert(0, onnx.helper.make_node("Add", ["b", "a"], [output]))
    proto.graph.node.insert(0, onnx.helper.make_node("Mul", ["x", "m"], ["b"]))
    written = replace_proto(kept, proto)
    restored = restore_batch_norms(written, read_side_file(tmp_path / "t.pt"))
    np.testing.assert_array_equal(find_batch_norms(restored.model)[0].mean, site.mean)


def test_a_network_that_kept_its_statistics_is_told_so(digits_models: Path) -> None:
    model = load(digits_models / "digits_resnet.onnx")
    other = read_side_file(digits_models / "digits_mobilenet.onnx")
    with pytest.raises(ModelError, match="the network still has 8 BatchNormalization node"):
        restore_batch_norms(model, other)


def test_a_batch_norm_folded_forward_is_named(tmp_path: Path) -> None:
    network = trained(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)))
    torch.save(network.state_dict(), tmp_path / "t.pt")
    norm, conv = network[0], network[1]
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    forward = nn.Conv2d(3, 5, 3)
    forward.weight.data = conv.weight.data * factor.detach().view(1, -1, 1, 1)
    folded = folded_from(nn.Sequential(forward), tmp_path / "n.onnx")
    with pytest.raises(ModelError, match="nothing in it belongs to this network"):
        restore_batch_norms(folded, read_side_file(tmp_path / "t.pt"))

    # Beside a node that does match, it is reported.
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.n, self.b = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), forward

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.n(self.a(x))))

    both = trained(Both(), seed=1)
    both.b.weight.data = conv.weight.data * factor.detach().view(1, -1, 1, 1)
    tensors = both.state_dict() | {
        f"x.{name}": value for name, value in network.state_dict().items()
    }
    del tensors["b.weight"]
    torch.save(tensors, tmp_path / "both.pt")
    folded = folded_from(both, tmp_path / "both.onnx")
    restored = restore_batch_norms(folded, read_side_file(tmp_path / "both.pt"))
    assert [match.state for match in restored.matches] == ["restored", "unmatched"]
    assert "folded forward" in restored.matches[1].reason
    assert "1 of 2 node(s)" in restored.model.notes[-1]


def test_the_file_of_another_network_is_refused(kept: Model, tmp_path: Path) -> None:
    torch.save(trained(Net(), seed=5).state_dict(), tmp_path / "other.pt")
    with pytest.raises(ModelError) as caught:
        restore_batch_norms(fold_batch_norms(kept), read_side_file(tmp_path / "other.pt"))
    for part in ("other.pt", "compared 5 node(s)", "8x27", "4 BatchNormalization"):
        assert part in str(caught.value)


def test_other_statistics_for_the_same_weights_are_no_match(
    kept: Model, tmp_path: Path
) -> None:
    tensors = trained(Net()).state_dict()
    for name, value in tensors.items():
        if name.endswith("running_mean"):
            value += 0.5
    torch.save(tensors, tmp_path / "later.pt")
    restored = restore_batch_norms(
        fold_batch_norms(kept), read_side_file(tmp_path / "later.pt")
    )
    assert restored.restored == 0  # only the head is the same
    assert "no statistics explain" in restored.matches[0].reason


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, capsys) -> None:
    torch.save({"w": Trap()}, tmp_path / "trap.pt")
    torch.save(Net(), tmp_path / "whole.pt")
    for name in ("trap.pt", "whole.pt"):
        with pytest.raises(DataError, match="more than tensors"):
            read_side_file(tmp_path / name)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x.onnx"])
def test_damaged_and_missing_files(name: str, tmp_path: Path) -> None:
    for content in (None, b"", b"\x00garbage" * 10):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises((DataError, ModelError)) as caught:
            read_side_file(tmp_path / name)
        assert name in str(caught.value)


def test_a_file_without_statistics_says_so(tmp_path: Path) -> None:
    torch.save(nn.Conv2d(3, 3, 1).state_dict(), tmp_path / "x.pt")
    with pytest.raises(DataError, match="no BatchNormalization statistics"):
        read_side_file(tmp_path / "x.pt")


def test_a_real_network(shared_models: Path) -> None:
    kept = load(shared_models / "cifar10_resnet20.onnx")
    side = read_side_file(shared_models / "cifar10_resnet20.onnx")
    restored = restore_batch_norms(load(shared_models / "cifar10_resnet20_folded.onnx"), side)
    check(restored, kept)
    for match in restored.matches[:-1]:  # names say the same, though they were not asked
        assert (
            match.norm
            == match.node.replace("conv", "bn").replace("Conv", "BatchNormalization")
            or "shortcut" in match.node
        )
