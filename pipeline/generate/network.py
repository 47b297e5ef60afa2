"""A network as generation sees it: images in standardized pixel units in, observed tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from graph_tools.batchnorm import BatchNormSite
from graph_tools.errors import SettingsError
from graph_tools.model import Model
from graph_tools.torch_graph import Entry, Hook, TorchGraph
from pipeline.generate.precision import Precision, arithmetic
from pipeline.generate.prior import PIXEL_MEAN, PIXEL_STD
from pipeline.preprocessing import Preprocessing

__all__ = ["PIXELS", "Network", "blank_site", "pixel_site", "standard_range", "torch_device"]

PIXELS = "(pixels)"
"""Name under which the images themselves are observed."""

# Network-wide averages over ImageNet's training images, in 0..1.
_NATURAL_MEAN = np.array([0.485, 0.456, 0.406])
_NATURAL_STD = np.array([0.229, 0.224, 0.225])


class Network:
    """Run the part of a model that observed tensors need, differentiably, with frozen weights.

    Args:
        model: the network.
        tensors: names of the tensors to observe.
        preprocessing: how pixels become the model's input.
        device: where to run.
        engine: what runs it; see `graph_tools.ort_graph` for ``"ort"``.
        precision: of convolutions and matrix products, see `pipeline.generate.precision`; engine
            torch only.
        chunk_size: images that go through it at a time, 0 for any number; what a model of a fixed
            batch takes is its own.

    Raises:
        SettingsError: the engine is not installed, or cannot run on the device.
        UnsupportedOperatorError: an operator that the engine lacks.

    Attributes:
        device: as given.
        chunk: images that go through it at a time, None for any number.
        layout: of the model's input.
    """

    def __init__(
        self,
        model: Model,
        tensors: Sequence[str],
        preprocessing: Preprocessing,
        device: torch.device,
        engine: Literal["torch", "ort"] = "torch",
        precision: Precision = "auto",
        chunk_size: int = 0,
    ) -> None:
        self.device, self._precision = device, precision
        self._fixed = model.fixed_batch
        self.chunk = self._fixed or chunk_size or None
        self.layout = model.input.layout
        outputs = list(dict.fromkeys(tensors))
        if engine == "ort":
            self._graph, self._format = _ort_graph(model, outputs, device)
        else:
            self._graph, self._format = _torch_graph(model, outputs, device)
        self.rescale(preprocessing, model.input.channels)

    def rescale(self, preprocessing: Preprocessing, channels: int) -> None:
        """Feed the model by another preprocessing from now on."""
        low, high = (
            torch.from_numpy(value.astype(np.float64)).view(1, -1, 1, 1)
            for value in preprocessing.valid_range(channels)
        )
        self._gain = ((high - low) * PIXEL_STD).float().to(self.device)
        self._shift = (low + (high - low) * PIXEL_MEAN).float().to(self.device)

    def model_input(self, images: Tensor) -> Tensor:
        """Map images to the model's own range and layout.

        Args:
            images: [N, C, H, W] in standardized pixel units.

        Returns:
            [N, C, H, W] or [N, H, W, C].
        """
        values = torch.addcmul(self._shift, images, self._gain)
        if self.layout == "NHWC":
            return values.permute(0, 2, 3, 1)
        return values.contiguous(memory_format=self._format)

    def pixels(self, values: Tensor) -> Tensor:
        """Map model input back to standardized pixel units; the inverse of `model_input`."""
        if self.layout == "NHWC":
            values = values.permute(0, 3, 1, 2)
        return (values.to(self.device) - self._shift) / self._gain

    def observe(
        self, images: Tensor, *, hook: Hook | None = None, entry: Entry | None = None
    ) -> dict[str, Tensor]:
        """Return the observed tensors, and the images themselves as ``PIXELS``.

        Args:
            images: [N, C, H, W] in standardized pixel units; N at most `chunk`.
            hook: changes tensors, see `TorchGraph.forward`; engine torch only.
            entry: likewise, what single nodes read.
        """
        observed = self.run(self.model_input(images), hook=hook, entry=entry)
        return {**observed, PIXELS: images}

    def run(
        self, values: Tensor, *, hook: Hook | None = None, entry: Entry | None = None
    ) -> dict[str, Tensor]:
        """Return the observed tensors.

        Args:
            values: [N, C, H, W] or [N, H, W, C] as the model takes them; N at most `chunk`.
            hook: as for `observe`.
            entry: likewise.
        """
        count = len(values)
        missing = 0 if self._fixed is None else self._fixed - count
        if missing > 0:
            values = torch.cat([values, values[-1:].expand(missing, -1, -1, -1)])
        given = {"hook": hook, "entry": entry}
        changes = {name: change for name, change in given.items() if change is not None}
        with arithmetic(self._precision, self.device):
            observed: dict[str, Tensor] = self._graph(values, **changes)
        if missing > 0:
            observed = {name: value[:count] for name, value in observed.items()}
        return observed


_Graph = tuple[Callable[..., dict[str, Tensor]], torch.memory_format]
"""An engine's graph, and the memory format that its input is best in."""


def _torch_graph(model: Model, outputs: Sequence[str], device: torch.device) -> _Graph:
    graph = TorchGraph(model.proto, outputs=outputs).to(device)
    for buffer in graph.buffers():
        if buffer.dim() == 4:
            # Convolutions, and the moments of their outputs, run fastest in this format.
            buffer.data = buffer.contiguous(memory_format=torch.channels_last)
    return graph, torch.channels_last


def _ort_graph(model: Model, outputs: Sequence[str], device: torch.device) -> _Graph:
    # Here, since torch's users need not pay for it.
    from graph_tools.ort_graph import OrtGraph

    graph = OrtGraph(model.proto, outputs=outputs).to(device)
    return graph, torch.contiguous_format


def standard_range(preprocessing: Preprocessing, channels: int) -> tuple[Tensor, Tensor]:
    """Return pixels 0 and 1 in standardized pixel units, [1, C, 1, 1] float32 each."""
    preprocessing.valid_range(channels)  # refuses another number of channels
    low, high = -PIXEL_MEAN / PIXEL_STD, (1 - PIXEL_MEAN) / PIXEL_STD
    return torch.full((1, channels, 1, 1), low), torch.full((1, channels, 1, 1), high)


def pixel_site(preprocessing: Preprocessing, channels: int) -> BatchNormSite | None:
    """Return the images' own target statistics as one more site, in standardized pixel units.

    A normalization that is not a mere change of range tells the statistics of the training
    images: it maps them to mean 0 and variance 1. Otherwise three channels are taken for
    natural images, and nothing is known of other inputs.
    """
    low, high = (value.astype(np.float64) for value in preprocessing.valid_range(channels))
    std, mean = 1 / (high - low), -low / (high - low)
    is_range = np.allclose(mean, mean[0]) and any(
        np.isclose(mean[0], known, atol=0.01) for known in (0.0, 0.5)
    )
    if is_range:
        if channels != 3:
            return None
        mean, std = _NATURAL_MEAN, _NATURAL_STD
        if preprocessing.channels == "bgr":
            mean, std = mean[::-1], std[::-1]
    return BatchNormSite(
        node=PIXELS,
        tensor=PIXELS,
        scale=np.ones(channels, dtype=np.float32),
        bias=np.zeros(channels, dtype=np.float32),
        mean=((mean - PIXEL_MEAN) / PIXEL_STD).astype(np.float32),
        variance=np.square(std / PIXEL_STD).astype(np.float32),
        epsilon=1e-6,
    )


def blank_site(node: str, tensor: str, channels: int) -> BatchNormSite:
    """Return a tensor to watch as if BatchNormalization with mean 0 and variance 1 read it."""
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    return BatchNormSite(
        node=node,
        tensor=tensor,
        scale=ones,
        bias=zeros,
        mean=zeros,
        variance=ones,
        epsilon=1e-6,
    )


def torch_device(name: str) -> torch.device:
    """Return a device that exists.

    Raises:
        SettingsError: no such device here.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingsError(f"{name!r} cannot be used ({reason})", where="--device") from error
    return device
