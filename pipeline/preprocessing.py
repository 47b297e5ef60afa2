"""How pixels become a model's input, and back.

A model input value is ``(pixel / 255 - mean) / std``, channel by channel, in the model's
channel order. A model that takes 0..255 has mean 0 and std 1/255; one that takes [-1, 1] has
mean 0.5 and std 0.5.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from graph_tools.errors import DataError, SettingsError

if TYPE_CHECKING:
    from graph_tools.model import Layout

__all__ = ["ChannelOrder", "Preprocessing"]

ChannelOrder = Literal["rgb", "bgr"]


def _numbers(values: object, field: str) -> tuple[float, ...]:
    if isinstance(values, (str, bytes)) or not isinstance(values, (tuple, list)):
        raise SettingsError(f"{values!r} is not a list of numbers", where=f"--{field}")
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError) as error:
        raise SettingsError(
            f"{values!r} is not a list of numbers", where=f"--{field}"
        ) from error
    if not numbers or not all(math.isfinite(number) for number in numbers):
        raise SettingsError(
            f"{values!r} is not one finite number for each channel", where=f"--{field}"
        )
    return numbers


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The normalization and channel order that a model expects.

    Args:
        mean: mean of pixels in 0..1, one per input channel in the model's own channel order,
            or a single value for all channels.
        std: standard deviation of pixels in 0..1, likewise; positive.
        channels: channel order of a 3-channel input; ignored for other channel counts.
        source: where the values come from: "given", "model metadata", "read from the graph:
            ...", "guessed: ..." or "assumed: ...".

    Raises:
        SettingsError: a value is not finite, a std is not positive, lengths disagree.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: ChannelOrder = "rgb"
    source: str = "given"

    def __post_init__(self) -> None:
        mean, std = _numbers(self.mean, "mean"), _numbers(self.std, "std")
        if min(std) <= 0:
            raise SettingsError(f"{list(std)} has a value that is not positive", where="--std")
        if len(mean) != len(std) and 1 not in (len(mean), len(std)):
            raise SettingsError(
                f"{len(mean)} values, but --std has {len(std)}",
                where="--mean",
                hint="give one value, or one for each channel",
            )
        if self.channels not in ("rgb", "bgr"):
            raise SettingsError(f"{self.channels!r} is not rgb or bgr", where="--channels")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "std", std)

    @classmethod
    def of_range(
        cls, low: float, high: float, *, channels: ChannelOrder = "rgb", source: str = "given"
    ) -> Preprocessing:
        """Return the normalization that takes pixels from ``low`` (black) to ``high`` (white).

        Raises:
            SettingsError: not two finite numbers, the first one less.
        """
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise SettingsError(
                f"{low:g},{high:g} are not two numbers, the first one less", where="--range"
            )
        span = high - low
        return cls(mean=(-low / span,), std=(1 / span,), channels=channels, source=source)

    def valid_range(
        self, num_channels: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Return the smallest and largest input value of each channel.

        Args:
            num_channels: channels C of the model's input.

        Returns:
            ``low, high``: [C] float32 in model input units, what pixels 0 and 255 become.

        Raises:
            SettingsError: mean and std are for another number of channels.
        """
        mean, std = self._for_channels(num_channels)
        return ((0 - mean) / std).astype(np.float32), ((1 - mean) / std).astype(np.float32)

    def apply(self, pixels: npt.NDArray[Any], layout: Layout) -> npt.NDArray[np.float32]:
        """Turn pixels into model input.

        Args:
            pixels: [N, H, W, C] uint8, or floating point in 0..255; RGB if C is 3.
            layout: layout of the model's input.

        Returns:
            [N, C, H, W] or [N, H, W, C] float32, contiguous, in the model's channel order.

        Raises:
            DataError: the array has not four axes.
            SettingsError: mean and std are for another number of channels.
        """
        if pixels.ndim != 4:
            raise DataError(f"pixels have shape {list(pixels.shape)}, not [N, H, W, C]")
        mean, std = self._for_channels(pixels.shape[3])
        # float64, so that a model that takes 0..255 gets whole numbers.
        values = (self._reorder(pixels) / np.float64(255) - mean) / std
        if layout == "NCHW":
            values = values.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(values, dtype=np.float32)

    def invert(self, images: npt.NDArray[np.float32], layout: Layout) -> npt.NDArray[np.uint8]:
        """Turn model input into pictures.

        Args:
            images: [N, C, H, W] or [N, H, W, C] in model input units.
            layout: which of the two.

        Returns:
            [N, H, W, 3] uint8 RGB if C is 3, else [N, H, W, 1] gray: the only channel, or the
            mean of the first three (or two). Values outside the valid range saturate.

        Raises:
            DataError: the array has not four axes.
            SettingsError: mean and std are for another number of channels.
        """
        if images.ndim != 4:
            raise DataError(f"images have shape {list(images.shape)}, not four axes")
        values = images.transpose(0, 2, 3, 1) if layout == "NCHW" else images
        mean, std = self._for_channels(values.shape[3])
        pixels = self._reorder(values.astype(np.float64) * std + mean) * 255
        if pixels.shape[3] != 3:
            pixels = pixels[..., :3].mean(axis=3, keepdims=True)
        pixels = np.nan_to_num(pixels, nan=0.0, posinf=255.0, neginf=0.0)
        rounded = np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)
        return np.ascontiguousarray(rounded)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: mean, std, channels, source."""
        return {
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": self.channels,
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Rebuild from `to_dict`; ``channels`` and ``source`` may be absent.

        Raises:
            SettingsError: mean or std is absent, or a value cannot be used.
        """
        if "mean" not in data or "std" not in data:
            raise SettingsError("mean or std is missing", where="preprocessing")
        return cls(
            mean=_numbers(data["mean"], "mean"),
            std=_numbers(data["std"], "std"),
            channels=data.get("channels", "rgb"),
            source=str(data.get("source", "given")),
        )

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Preprocessing | None:
        """Read what a model file says about itself.

        Args:
            metadata: the file's ``metadata_props``; "preprocessing" is the JSON of `to_dict`.

        Returns:
            None if the file says nothing, or nothing that can be understood; the key is no
            standard, so that another tool's use of it is no fault of the user.
        """
        try:
            found = cls.from_dict(json.loads(metadata["preprocessing"]))
        except (KeyError, TypeError, ValueError, RecursionError, SettingsError):
            return None
        return replace(found, source="model metadata")

    def _for_channels(
        self, num_channels: int
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        for field, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, num_channels):
                raise SettingsError(
                    f"{len(values)} values for an input of {num_channels} channel(s)",
                    where=f"--{field}",
                    hint="give one value, or one for each channel",
                )
        mean = np.broadcast_to(np.array(self.mean, dtype=np.float64), (num_channels,))
        return mean, np.broadcast_to(np.array(self.std, dtype=np.float64), (num_channels,))

    def _reorder(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return (
            values[..., ::-1] if self.channels == "bgr" and values.shape[-1] == 3 else values
        )
