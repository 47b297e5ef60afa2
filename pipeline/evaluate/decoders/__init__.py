"""From a detector's outputs to boxes and scores: one small function a file, chosen by name.

A decoder is any function

    decode(outputs, height, width) -> boxes, scores

    outputs: the network's outputs by name, in the order of the file, each [N, ...] float
    height, width: of the network's input, in pixels
    boxes: [N, K, 4], x1 y1 x2 y2 in pixels of the input
    scores: [N, K, C], one for each class that the data set counts, the larger the better

for N images. Low scores, overlapping boxes and the way back to the picture are not its business.
`load_decoder` takes one from a file of the user's: ``path/to/file.py:function``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt

from graph_tools.errors import SettingsError
from pipeline.evaluate.decoders.boxes import decode_boxes
from pipeline.evaluate.decoders.hook import Hook
from pipeline.evaluate.decoders.ssd import decode_ssd
from pipeline.evaluate.decoders.yolo_fastest_v2 import decode_yolo_fastest_v2

__all__ = ["DECODERS", "Decoder", "load_decoder"]

Array = npt.NDArray[Any]
Decoder = Callable[[Mapping[str, Array], int, int], tuple[Array, Array]]

DECODERS: dict[str, Decoder] = {
    "yolo-fastest-v2": decode_yolo_fastest_v2,
    "ssd": decode_ssd,
    "boxes": decode_boxes,
}


def load_decoder(name: str) -> Decoder:
    """Return the decoder of a name, or the function of ``path/to/file.py:function``.

    Raises:
        SettingsError: no such name, file or function, or the file fails.
    """
    if name in DECODERS:
        return DECODERS[name]
    path, _, function = name.rpartition(":")
    if path.endswith(".py") and function:
        return Hook.load(path, function)
    known = ", ".join(DECODERS)
    raise SettingsError(
        f"{name!r} is not a decoder" if name else "detection needs a decoder",
        where="--decoder",
        hint=f"there are {known}; one of your own is path/to/file.py:function",
    )
