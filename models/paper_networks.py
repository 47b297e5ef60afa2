"""The networks of the papers, to measure speed on: architectures alone, with random weights.

ResNet-20 for 32x32 pixels, ResNet-18 and ResNet-50 (He et al., Deep Residual Learning for Image
Recognition, 2016; strides in the 3x3 convolutions, as torch's users know them) and MobileNetV2
(Sandler et al., 2018) for 224x224. `build` gives BatchNormalization the statistics that the random
weights really produce, so that losses and gradients are of the usual size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn

__all__ = ["SIDES", "MobileNetV2", "ResNet", "build", "export"]

SIDES = {"resnet20": 32, "resnet18": 224, "resnet50": 224, "mobilenetv2": 224}
"""Height and width of the images that each network takes."""


class ResNet(nn.Module):
    """A residual network.

    Args:
        depths: blocks of each stage.
        width: channels of the first stage; each further one has twice as many.
        bottleneck: blocks of three convolutions that end with four times the channels.
        small: a stem for small images: one 3x3 convolution, no pooling.
        classes: of the classifier.
    """

    def __init__(
        self,
        depths: Sequence[int],
        *,
        width: int = 64,
        bottleneck: bool = False,
        small: bool = False,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.stem = (
            _conv_bn(3, width, 3, act=nn.ReLU())
            if small
            else nn.Sequential(
                _conv_bn(3, width, 7, stride=2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)
            )
        )
        blocks: list[nn.Module] = []
        inputs = width
        for stage, depth in enumerate(depths):
            inner = width * 2**stage
            outputs = inner * (4 if bottleneck else 1)
            for index in range(depth):
                stride = 2 if stage and not index else 1
                blocks.append(_ResidualBlock(inputs, inner, outputs, stride, bottleneck))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(inputs, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, classes] of images [N, 3, H, W]."""
        features = self.pool(self.blocks(self.stem(images)))
        return cast(torch.Tensor, self.classifier(features.flatten(1)))


class MobileNetV2(nn.Module):
    """MobileNetV2 at width 1 for 1000 classes."""

    _STAGES = (  # expansion, channels, blocks, stride
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_conv_bn(3, 32, 3, stride=2, act=nn.ReLU6())]
        inputs = 32
        for expansion, outputs, count, stride in self._STAGES:
            for index in range(count):
                layers.append(
                    _InvertedResidual(inputs, outputs, expansion, 1 if index else stride)
                )
                inputs = outputs
        layers.append(_conv_bn(inputs, 1280, 1, act=nn.ReLU6()))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, 1000] of images [N, 3, H, W]."""
        return cast(torch.Tensor, self.classifier(self.pool(self.features(images)).flatten(1)))


class _ResidualBlock(nn.Module):
    def __init__(
        self, inputs: int, inner: int, outputs: int, stride: int, bottleneck: bool
    ) -> None:
        super().__init__()
        if bottleneck:
            self.residual = nn.Sequential(
                _conv_bn(inputs, inner, 1, act=nn.ReLU()),
                _conv_bn(inner, inner, 3, stride=stride, act=nn.ReLU()),
                _conv_bn(inner, outputs, 1),
            )
        else:
            self.residual = nn.Sequential(
                _conv_bn(inputs, inner, 3, stride=stride, act=nn.ReLU()),
                _conv_bn(inner, outputs, 3),
            )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_bn(inputs, outputs, 1, stride=stride)
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.relu(self.residual(x) + self.shortcut(x)))


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        layers = [_conv_bn(inputs, hidden, 1, act=nn.ReLU6())] if expansion > 1 else []
        self.residual = nn.Sequential(
            *layers,
            _conv_bn(hidden, hidden, 3, stride=stride, groups=hidden, act=nn.ReLU6()),
            _conv_bn(hidden, outputs, 1),
        )
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = cast(torch.Tensor, self.residual(x))
        return x + y if self.has_shortcut else y


def _conv_bn(
    inputs: int,
    outputs: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    act: nn.Module | None = None,
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([] if act is None else [act]))


def build(name: str, seed: int = 0) -> nn.Module:
    """Return a network in evaluation mode, frozen.

    Weights are He's, scales and shifts of BatchNormalization random around 1 and 0, its statistics
    those of the network's own activations on smooth random images.

    Args:
        name: one of ``SIDES``.
        seed: of weights and images.
    """
    torch.manual_seed(seed)
    network: nn.Module
    if name == "resnet20":
        network = ResNet((3, 3, 3), width=16, small=True, classes=10)
    elif name == "resnet18":
        network = ResNet((2, 2, 2, 2))
    elif name == "resnet50":
        network = ResNet((3, 4, 6, 3), bottleneck=True)
    elif name == "mobilenetv2":
        network = MobileNetV2()
    else:
        raise ValueError(f"{name!r} is none of {', '.join(SIDES)}")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
            module.momentum = None  # the plain average over all batches
    side = SIDES[name]
    with torch.no_grad():
        for _ in range(2):
            coarse = torch.randn(8, 3, side // 4, side // 4)
            network(nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear"))
    return network.eval().requires_grad_(False)


def export(network: nn.Module, name: str, path: Path) -> None:
    """Write a network as ONNX with its BatchNormalization nodes and a free batch size."""
    side = SIDES[name]
    torch.onnx.export(
        network,
        (torch.zeros(2, 3, side, side),),
        str(path),
        dynamo=False,
        training=torch.onnx.TrainingMode.PRESERVE,
        do_constant_folding=False,
        opset_version=17,
        input_names=["input"],
        output_names=["logits"],
        dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
    )
