"""From an encoded picture to pixels of the size that a model takes."""

from __future__ import annotations

import io
import warnings

import numpy as np
import numpy.typing as npt
from PIL import Image

from graph_tools.errors import DataError

__all__ = ["MAX_PIXELS", "SUFFIXES", "decode", "fit"]

SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)
# Larger than any camera's pictures in use as test data; 150 MB of RGB.
MAX_PIXELS = 50_000_000
# Pillow would open any format it knows, whatever the name: PostScript runs Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
_MODES = {1: "L", 3: "RGB"}


def decode(data: bytes, channels: int, where: str) -> Image.Image:
    """Decode a picture.

    As in torchvision's folders, transparency is dropped, animations give their first frame
    and a camera's orientation mark is not applied.

    Args:
        data: the encoded file.
        channels: 1 for gray or 3 for RGB.
        where: the file's name, for messages.

    Raises:
        DataError: damaged, not a picture, more than 8 bits a channel, more than `MAX_PIXELS`,
            or ``channels`` is neither 1 nor 3.
    """
    if channels not in _MODES:
        raise DataError(
            f"pictures have 1 or 3 channels, but the model takes {channels}",
            where=where,
            hint="give the images as an .npz in the model's own layout and normalization",
        )
    try:
        with warnings.catch_warnings():
            # Pillow warns about huge pictures, which are refused below, and about metadata.
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            _check_size(image.width, image.height, where)
            if image.mode[0] in "IF":
                raise DataError(
                    "has more than 8 bits a channel", where=where, hint="convert it to 8 bits"
                )
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            return image.convert(_MODES[channels])
    except DataError:
        raise
    # On damaged files Pillow's decoders raise almost any class of exception.
    except Exception as error:
        raise DataError(f"cannot be decoded ({error})", where=where) from error


def fit(image: Image.Image, height: int, width: int, where: str) -> npt.NDArray[np.uint8]:
    """Resize and crop a picture to the size that a model takes.

    The picture is scaled (bilinear, antialiased) until it just covers the size, then cropped
    at the center. A picture of the right size is left as it is.

    Args:
        image: mode "L" or "RGB".
        height: of the result, in pixels.
        width: of the result, in pixels.
        where: the file's name, for messages.

    Returns:
        [height, width, 1 or 3] uint8.

    Raises:
        DataError: the picture is so narrow that it would grow beyond `MAX_PIXELS`.
    """
    if image.size != (width, height):
        scale = max(width / image.width, height / image.height)
        scaled_width = max(width, round(image.width * scale))
        scaled_height = max(height, round(image.height * scale))
        _check_size(scaled_width, scaled_height, where)
        image = image.resize((scaled_width, scaled_height), Image.Resampling.BILINEAR)
        left, top = round((scaled_width - width) / 2), round((scaled_height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    pixels = np.asarray(image, dtype=np.uint8)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _check_size(width: int, height: int, where: str) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"has {width}x{height} pixels, more than {MAX_PIXELS:,}",
            where=where,
            hint="make it smaller",
        )
