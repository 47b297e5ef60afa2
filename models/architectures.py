"""The networks that the project ships: two for 1x8x8 images of digits, one for CIFAR-10.

All end in a global average over 4x4 values, a power of two, so that the mean is a shift
in integer arithmetic.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

__all__ = ["CifarMobileNet", "DigitsMobileNet", "DigitsResNet"]


class DigitsResNet(nn.Module):
    """A residual network: identity shortcuts, and one strided projection shortcut.

    Takes [N, 1, 8, 8] float32 and returns logits [N, 10]. After He et al., Deep Residual
    Learning for Image Recognition (2016), with a stem of one 3x3 convolution.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn_relu(1, 16)
        self.blocks = nn.Sequential(
            _ResidualBlock(16, 16),
            _ResidualBlock(16, 32, stride=2),
            _ResidualBlock(32, 32),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(32, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, 10] of images [N, 1, 8, 8]."""
        features = self.pool(self.blocks(self.stem(images)))
        return cast(torch.Tensor, self.classifier(features.flatten(1)))


class DigitsMobileNet(nn.Module):
    """A network of inverted residuals with depthwise convolutions and ReLU6.

    Takes [N, 1, 8, 8] float32 and returns logits [N, 10]. After Sandler et al., MobileNetV2:
    Inverted Residuals and Linear Bottlenecks (2018).
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn_relu6(1, 16)
        self.blocks = nn.Sequential(
            _InvertedResidual(16, 16, expansion=2),
            _InvertedResidual(16, 24, expansion=4, stride=2),
            _InvertedResidual(24, 24, expansion=4),
            _InvertedResidual(24, 32, expansion=4),
            _InvertedResidual(32, 32, expansion=4),
        )
        self.head = _conv_bn_relu6(32, 96, size=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(96, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, 10] of images [N, 1, 8, 8]."""
        features = self.pool(self.head(self.blocks(self.stem(images))))
        return cast(torch.Tensor, self.classifier(features.flatten(1)))


class CifarMobileNet(nn.Module):
    """A MobileNetV2 of 0.2 million parameters for CIFAR-10.

    Takes [N, 3, 32, 32] float32 and returns logits [N, 10]. After Sandler et al., MobileNetV2:
    Inverted Residuals and Linear Bottlenecks (2018), with strides for small images, the last
    blocks at 4x4.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn_relu6(3, 16)
        self.blocks = nn.Sequential(
            _InvertedResidual(16, 24, expansion=2, stride=2),
            _InvertedResidual(24, 24, expansion=3),
            _InvertedResidual(24, 40, expansion=4, stride=2),
            _InvertedResidual(40, 40, expansion=4),
            _InvertedResidual(40, 40, expansion=4),
            _InvertedResidual(40, 64, expansion=4, stride=2),
            _InvertedResidual(64, 64, expansion=4),
            _InvertedResidual(64, 64, expansion=4),
        )
        self.head = _conv_bn_relu6(64, 256, size=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(256, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits [N, 10] of images [N, 3, 32, 32]."""
        features = self.pool(self.head(self.blocks(self.stem(images))))
        return cast(torch.Tensor, self.classifier(features.flatten(1)))


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_conv_bn_relu(inputs, outputs, stride=stride), *_conv_bn(outputs, outputs)
        )
        changes_shape = stride != 1 or inputs != outputs
        self.shortcut = (
            _conv_bn(inputs, outputs, size=1, stride=stride)
            if changes_shape
            else nn.Identity()
        )
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.relu(self.residual(x) + self.shortcut(x)))


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int = 1) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.residual = nn.Sequential(
            *_conv_bn_relu6(inputs, hidden, size=1),
            *_conv_bn_relu6(hidden, hidden, stride=stride, groups=hidden),
            *_conv_bn(hidden, outputs, size=1),
        )
        self.has_shortcut = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = cast(torch.Tensor, self.residual(x))
        return x + y if self.has_shortcut else y


def _conv_bn(
    inputs: int, outputs: int, *, size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    convolution = nn.Conv2d(
        inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


def _conv_bn_relu(inputs: int, outputs: int, *, stride: int = 1) -> nn.Sequential:
    return _conv_bn(inputs, outputs, stride=stride).append(nn.ReLU())


def _conv_bn_relu6(
    inputs: int, outputs: int, *, size: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    layers = _conv_bn(inputs, outputs, size=size, stride=stride, groups=groups)
    return layers.append(nn.ReLU6())
