"""Where a data set's images come from: encoded pictures, or one array."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from graph_tools.errors import DataError
from pipeline.evaluate.files import Files
from pipeline.evaluate.pictures import decode
from pipeline.evaluate.placement import Resize, place

if TYPE_CHECKING:
    from graph_tools.model import ImageInput
    from pipeline.preprocessing import Preprocessing

__all__ = ["ArraySource", "ImageSource", "PartSource", "PictureSource"]

Indices = npt.NDArray[np.int64]


class ImageSource(Protocol):
    """Images by index, as a model takes them."""

    def batches(
        self,
        indices: Indices,
        size: int,
        model_input: ImageInput,
        preprocessing: Preprocessing,
        resize: Resize = "crop",
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the images of ``indices``, ``size`` at a time: [<= size, *shape] float32."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PartSource:
    """Some images of another source.

    Args:
        whole: the other source.
        chosen: [N] indices there.
    """

    whole: ImageSource
    chosen: Indices = field(repr=False)

    def batches(
        self,
        indices: Indices,
        size: int,
        model_input: ImageInput,
        preprocessing: Preprocessing,
        resize: Resize = "crop",
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the images of ``indices``, ``size`` at a time: [<= size, *shape] float32."""
        return self.whole.batches(
            self.chosen[indices], size, model_input, preprocessing, resize
        )


@dataclass(frozen=True, kw_only=True)
class PictureSource:
    """Encoded pictures, decoded when a batch needs them.

    Args:
        files: where they are.
        names: their paths, in the order of the data set.
    """

    files: Files
    names: tuple[str, ...] = field(repr=False)

    def batches(
        self,
        indices: Indices,
        size: int,
        model_input: ImageInput,
        preprocessing: Preprocessing,
        resize: Resize = "crop",
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the images of ``indices``, ``size`` at a time: [<= size, *shape] float32."""
        height, width, channels = model_input.height, model_input.width, model_input.channels
        with self.files.opened() as read:
            for start in range(0, len(indices), size):
                names = [self.names[index] for index in indices[start : start + size]]
                pixels = np.empty((len(names), height, width, channels), dtype=np.uint8)
                for position, name in enumerate(names):
                    where = f"{self.files.path}:{name}"
                    picture = decode(read(name), channels, where)
                    pixels[position] = place(picture, height, width, resize, where)
                yield preprocessing.apply(pixels, model_input.layout)


@dataclass(frozen=True, kw_only=True, eq=False)
class ArraySource:
    """One array in memory.

    Args:
        path: the file that it came from.
        images: [N, H, W, C] uint8 pictures, C = 1 or 3 unless their shape is the model's; or
            floating point in the model's own layout and normalization.
    """

    path: Path
    images: npt.NDArray[Any] = field(repr=False)

    def batches(
        self,
        indices: Indices,
        size: int,
        model_input: ImageInput,
        preprocessing: Preprocessing,
        resize: Resize = "crop",
    ) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the images of ``indices``, ``size`` at a time: [<= size, *shape] float32."""
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            if self.images.dtype == np.uint8:
                pixels = self._pixels(chosen, model_input, resize)
                yield preprocessing.apply(pixels, model_input.layout)
            else:
                yield self._values(chosen, model_input)

    def _pixels(
        self, chosen: Indices, model_input: ImageInput, resize: Resize
    ) -> npt.NDArray[np.uint8]:
        height, width, channels = model_input.height, model_input.width, model_input.channels
        pixels: npt.NDArray[np.uint8] = self.images[chosen]
        found = pixels.shape[3]
        if pixels.shape[1:] == (height, width, channels):
            return pixels
        if found not in (1, 3) or channels not in (1, 3):
            raise DataError(
                f"holds pictures of {found} channel(s), but the model takes {channels}",
                where=str(self.path),
            )
        mode = "L" if channels == 1 else "RGB"
        fitted = [
            place(
                Image.fromarray(one[..., 0] if found == 1 else one).convert(mode),
                height,
                width,
                resize,
                str(self.path),
            )
            for one in pixels
        ]
        return np.stack(fitted)

    def _values(self, chosen: Indices, model_input: ImageInput) -> npt.NDArray[np.float32]:
        if self.images.shape[1:] != model_input.shape:
            raise DataError(
                f"holds images of shape {list(self.images.shape[1:])}, but the model takes "
                f"{list(model_input.shape)}",
                where=str(self.path),
                hint="store pixels as uint8 [N, H, W, C], or the model's own layout and size",
            )
        values = self.images[chosen].astype(np.float32)
        finite = np.isfinite(values).all(axis=(1, 2, 3))
        if not finite.all():
            index = int(chosen[int(np.argmin(finite))])
            raise DataError(
                f"image {index} (from 0) holds NaN or infinity", where=str(self.path)
            )
        return values
