"""Small networks of every kind that people export, with random weights and plausible statistics.

Each function builds one architecture; `ZOO` names them. `build` seeds the weights and runs
random images through the network, so that BatchNormalization holds the statistics of the
activations that it sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SIZE", "ZOO", "Entry", "build"]

SIZE = 32
"""Height and width of the images."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One network of the zoo.

    Attributes:
        make: builds it, weights random.
        num_batch_norms: BatchNormalization nodes in an export that keeps them.
        channels: of the image.
        opset: the oldest in which the TorchScript exporter can spell it.
        any_batch: whether it takes any batch size.
    """

    make: Callable[[], nn.Module]
    num_batch_norms: int
    channels: int = 3
    opset: int = 9
    any_batch: bool = True


def build(name: str) -> nn.Module:
    """Build a network of the zoo in evaluation mode, the same weights each time."""
    entry = ZOO[name]
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        net = entry.make()
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 1.5)
                nn.init.uniform_(norm.bias, -0.5, 0.5)
            norm.momentum = None  # cumulative average: the statistics of the images below
        net.train()
        with torch.no_grad():
            net(torch.randn(16, entry.channels, SIZE, SIZE))
        for norm in norms:
            norm.momentum = 0.1
    return net.eval()


def _conv_bn(inputs: int, outputs: int, kernel: int = 3, **kwargs: int) -> nn.Sequential:
    padding = kernel // 2 * kwargs.get("dilation", 1)
    conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, bias=False, **kwargs)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


def _conv_bn_act(
    inputs: int, outputs: int, kernel: int = 3, act: nn.Module | None = None, **kwargs: int
) -> nn.Sequential:
    return nn.Sequential(*_conv_bn(inputs, outputs, kernel, **kwargs), act or nn.ReLU())


def _classifier(channels: int, classes: int = 10) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]


def plain() -> nn.Module:
    return nn.Sequential(
        _conv_bn_act(3, 8), nn.MaxPool2d(2), _conv_bn_act(8, 16, stride=2), *_classifier(16)
    )


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn_act(3, 8)
        self.first, self.second = _conv_bn_act(8, 16, stride=2), _conv_bn(16, 16)
        self.down = _conv_bn(8, 16, 1, stride=2)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.second(self.first(x)) + self.down(x))
        x = F.avg_pool2d(x, SIZE // 2)
        return self.head(x.view(x.size(0), -1))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, gate: nn.Module) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    def __init__(self, channels: int, act: nn.Module, gate: nn.Module | None) -> None:
        super().__init__()
        wide = 3 * channels
        self.body = nn.Sequential(
            _conv_bn_act(channels, wide, 1, act),
            _conv_bn_act(wide, wide, 3, act, groups=wide),
            *([SqueezeExcite(wide, gate)] if gate else []),
            _conv_bn(wide, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def mobilenet_v2() -> nn.Module:
    act = nn.ReLU6()
    return nn.Sequential(
        _conv_bn_act(3, 8, act=act, stride=2),
        InvertedResidual(8, act, None),
        nn.Dropout(0.2),
        *_classifier(8),
    )


def mobilenet_v3() -> nn.Module:
    act = nn.Hardswish()
    return nn.Sequential(
        _conv_bn_act(3, 8, act=act, stride=2),
        InvertedResidual(8, act, nn.Hardsigmoid()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 16),
        nn.Hardswish(),
        nn.Dropout(0.2),
        nn.Linear(16, 10),
    )


def efficientnet() -> nn.Module:
    act = nn.SiLU()
    return nn.Sequential(
        _conv_bn_act(3, 8, act=act, stride=2),
        InvertedResidual(8, act, nn.Sigmoid()),
        *_classifier(8),
    )


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            _conv_bn_act(8, 8, 1), _conv_bn(8, 8, groups=8), _conv_bn_act(8, 8, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=1)
        x = torch.cat((a, self.branch(b)), dim=1)
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


def shufflenet() -> nn.Module:
    return nn.Sequential(_conv_bn_act(3, 16, stride=2), Shuffle(), Shuffle(), *_classifier(16))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(8 + 4 * k), nn.ReLU(), nn.Conv2d(8 + 4 * k, 4, 3, padding=1)
            )
            for k in range(3)
        )
        self.last = nn.BatchNorm2d(20)
        self.head = nn.Linear(20, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [F.avg_pool2d(self.stem(x), 2)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        x = F.relu(self.last(torch.cat(features, 1)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn_act(3, 8, stride=2)
        self.branches = nn.ModuleList(
            [
                _conv_bn_act(8, 4, 1),
                nn.Sequential(_conv_bn_act(8, 4, 1), _conv_bn_act(4, 4, 5)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv_bn_act(8, 4, 1)),
                nn.Sequential(nn.AvgPool2d(3, 1, 1), _conv_bn_act(8, 4, 1)),
            ]
        )
        self.tail = nn.Sequential(*_classifier(16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([branch(x) for branch in self.branches], 1)
        return F.log_softmax(self.tail(x), dim=1)


class UNet(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.down1, self.down2 = _conv_bn_act(3, 8), _conv_bn_act(8, 16)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.fuse = _conv_bn_act(24, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        x = self.down2(F.max_pool2d(skip, 2))
        if self.mode == "transposed":
            x = self.up(x)
        elif self.mode == "nearest":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        else:  # sizes taken from another tensor at run time
            x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
        return self.head(self.fuse(torch.cat([x, skip], dim=1)))


class Detector(nn.Module):
    """Feature pyramid with box and class heads at two scales, as SSD and RetinaNet join them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv_bn_act(3, 8, stride=2)
        self.c3, self.c4 = _conv_bn_act(8, 16, stride=2), _conv_bn_act(16, 16, stride=2)
        self.lateral = nn.Conv2d(16, 16, 1)
        self.boxes, self.scores = nn.Conv2d(16, 2 * 4, 3, padding=1), nn.Conv2d(16, 2 * 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c3 = self.c3(self.stem(x))
        c4 = self.c4(c3)
        p3 = self.lateral(c3) + F.interpolate(c4, size=c3.shape[-2:], mode="nearest")
        levels = (p3, c4)
        boxes = [self.boxes(p).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4) for p in levels]
        scores = [
            self.scores(p).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 3) for p in levels
        ]
        return torch.cat(boxes, 1), torch.cat(scores, 1).softmax(-1), c4


class Yolo(nn.Module):
    """Anchors and grid as constants, decoding arithmetic in the graph."""

    grid: Tensor
    anchors: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv_bn_act(3, 8, act=nn.SiLU(), stride=2),
            _conv_bn_act(8, 16, act=nn.SiLU(), stride=2),
        )
        self.head = nn.Conv2d(16, 2 * 8, 1)
        ys, xs = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
        self.register_buffer("grid", torch.stack((xs, ys), 2).view(1, 1, 8, 8, 2))
        self.register_buffer(
            "anchors", torch.tensor([[1.0, 2.0], [3.0, 2.0]]).view(1, 2, 1, 1, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.body(x))
        n, _, h, w = x.shape
        x = x.view(n, 2, 8, h, w).permute(0, 1, 3, 4, 2).contiguous()
        xy, wh, rest = x.split((2, 2, 4), dim=4)
        xy = (xy.sigmoid() * 2 - 0.5 + self.grid) * 4
        wh = wh.clamp(max=4).exp() * self.anchors
        return torch.cat((xy, wh, rest.sigmoid()), 4).view(n, -1, 8)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fused = fused
        if fused:
            self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        else:
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def attend(self, x: Tensor) -> Tensor:
        if not self.fused:
            return self.attention(x, x, x, need_weights=False)[0]
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.project(x.transpose(1, 2).reshape(n, length, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, stride=8)
        self.token = nn.Parameter(torch.randn(1, 1, 16) * 0.1)
        self.position = nn.Parameter(torch.randn(1, 17, 16) * 0.1)
        self.blocks = nn.Sequential(TransformerBlock(16, fused), TransformerBlock(16, fused))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class SwinBlock(nn.Module):
    def __init__(self, width: int, shift: int) -> None:
        super().__init__()
        self.shift, self.norm = shift, nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(1, 2, 16, 16) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        y = torch.roll(self.norm(x), (-self.shift, -self.shift), (1, 2)) if self.shift else x
        y = y.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        qkv = self.qkv(y).reshape(-1, 16, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        weights = (q @ k.transpose(-2, -1) * (c // 2) ** -0.5 + self.bias).softmax(-1)
        y = self.project((weights @ v).transpose(1, 2).reshape(-1, 16, c))
        y = y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return x + (torch.roll(y, (self.shift, self.shift), (1, 2)) if self.shift else y)


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.Sequential(SwinBlock(8, 0), SwinBlock(8, 2))
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).permute(0, 2, 3, 1)).mean((1, 2)))


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        y = self.scale * self.mlp(self.norm(y))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), ConvNeXtBlock(8), ConvNeXtBlock(8), *_classifier(8)
    )


def group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(2, 8),
        nn.Mish(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.InstanceNorm2d(8, affine=True),
        nn.ELU(),
        *_classifier(8),
    )


def activations() -> nn.Module:
    """One of each activation, and pooling to more than one pixel."""
    return nn.Sequential(
        _conv_bn_act(3, 8, act=nn.PReLU(8), stride=2),
        _conv_bn_act(8, 8, act=nn.LeakyReLU(0.1)),
        nn.Conv2d(8, 8, 1),
        nn.Softplus(),
        nn.Conv2d(8, 8, 1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d((4, 2)),
        nn.Flatten(),
        nn.Linear(64, 10),
        nn.Softmax(dim=-1),
    )


class SuperResolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        base = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
        return (base + F.pixel_shuffle(self.body(x), 2)).clamp(0, 1)


class PaddedNet(nn.Module):
    """Reflection, constant and uneven padding; grouped and dilated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.grouped = _conv_bn_act(8, 16, groups=4)
        self.dilated = _conv_bn_act(16, 16, dilation=2)
        self.tail = nn.Sequential(nn.Dropout2d(0.3), *_classifier(16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(F.pad(x, (0, 1, 0, 1)))))
        x = self.grouped(F.pad(x, (1, 1, 1, 1), mode="reflect"))
        return self.tail(F.max_pool2d(self.dilated(x), 3, 2, ceil_mode=True))


def bn1d_head() -> nn.Module:
    """A face-embedding head: Linear, BatchNorm1d without affine parameters."""
    return nn.Sequential(
        _conv_bn_act(3, 8, stride=2),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.BatchNorm1d(128),
        nn.Linear(128, 32, bias=False),
        nn.BatchNorm1d(32, affine=False),
    )


class Embedding(nn.Module):
    """A normalized embedding and logits, as a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv_bn_act(3, 8, stride=4), *_classifier(8, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.body(x)
        return {"embedding": F.normalize(x, dim=1), "logits": self.head(x)}


class Features(nn.Module):
    """A backbone that returns its feature maps, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = _conv_bn_act(3, 8, stride=2), _conv_bn_act(8, 8, stride=2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        a = self.a(x)
        b = self.b(a)
        return a, b, b.mean((2, 3)), b


class Preprocessing(nn.Module):
    """Mean and deviation of the pixels inside the graph, channels swapped."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.2]).view(1, 3, 1, 1))
        self.body = plain()

    def forward(self, x: Tensor) -> Tensor:
        return self.body((x[:, [2, 1, 0]] - self.mean) / self.std)


class Stacked(nn.Module):
    """Strided slices and stacking: the focus layer of early YOLO networks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv_bn_act(12, 8), *_classifier(8))

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.body(torch.cat(parts, 1)).unsqueeze(1).squeeze(1)


class Repeated(nn.Module):
    """One module run twice: shared weights, shared statistics; weights transposed at run time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = _conv_bn_act(3, 8, stride=2), _conv_bn_act(8, 8)
        self.codes = nn.Parameter(torch.randn(10, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.shared(self.stem(x))).mean((2, 3))
        return torch.einsum("nc,kc->nk", x, self.codes)


ZOO: dict[str, Entry] = {
    "plain": Entry(make=plain, num_batch_norms=2),
    "resnet": Entry(make=ResNet, num_batch_norms=4),
    "mobilenet_v2": Entry(make=mobilenet_v2, num_batch_norms=4),
    "mobilenet_v3": Entry(make=mobilenet_v3, num_batch_norms=4),
    "efficientnet": Entry(make=efficientnet, num_batch_norms=4),
    "shufflenet": Entry(make=shufflenet, num_batch_norms=7, opset=11),
    "densenet": Entry(make=Dense, num_batch_norms=4),
    "inception": Entry(make=Inception, num_batch_norms=6),
    "unet_transposed": Entry(make=lambda: UNet("transposed"), num_batch_norms=3),
    "unet_nearest": Entry(make=lambda: UNet("nearest"), num_batch_norms=3),
    "unet_bilinear": Entry(make=lambda: UNet("bilinear"), num_batch_norms=3, opset=11),
    "detector": Entry(make=Detector, num_batch_norms=3),
    "yolo": Entry(make=Yolo, num_batch_norms=2),
    "vit": Entry(make=lambda: ViT(False), num_batch_norms=0, opset=14),
    "vit_fused": Entry(make=lambda: ViT(True), num_batch_norms=0, opset=14),
    "swin": Entry(make=Swin, num_batch_norms=0),
    "convnext": Entry(make=convnext, num_batch_norms=0),
    "group_norm": Entry(make=group_norm, num_batch_norms=0),
    "activations": Entry(make=activations, num_batch_norms=2),
    "super_resolution": Entry(make=SuperResolution, num_batch_norms=0, opset=11),
    "padded": Entry(make=PaddedNet, num_batch_norms=3),
    "bn1d_head": Entry(make=bn1d_head, num_batch_norms=3),
    "embedding": Entry(make=Embedding, num_batch_norms=1),
    "features": Entry(make=Features, num_batch_norms=2),
    "preprocessing": Entry(make=Preprocessing, num_batch_norms=2),
    "stacked": Entry(make=Stacked, num_batch_norms=1, opset=10),
    "repeated": Entry(make=Repeated, num_batch_norms=3, opset=12),
    "gray": Entry(
        make=lambda: nn.Sequential(_conv_bn_act(1, 4), *_classifier(4)),
        num_batch_norms=1,
        channels=1,
    ),
}
