"""What tools with a quantizer of their own want: images, scales and the float network.

They do not read QuantizeLinear and DequantizeLinear, but calibrate themselves. The folder holds the
network in float, the images as arrays in the network's own units and as pictures in 0..255, every
scale of the quantized file in one JSON file, and a page on how each tool takes them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from graph_tools.errors import DataError, SettingsError
from graph_tools.saving import data_file
from pipeline.export.fake_quantized import FakeQuantized
from pipeline.export.tool_pages import Pictures, pages
from pipeline.images import ImageSet
from pipeline.preprocessing import Preprocessing

__all__ = ["scales_of", "write_calibration"]

_FORMAT = 1


def write_calibration(
    network: FakeQuantized,
    path: Path,
    images: ImageSet | None,
    float_model: Path | None,
    folder: Path,
) -> tuple[list[str], dict[str, Any]]:
    """Fill ``folder``; returns what there is to say in words and as plain data.

    Args:
        network: the quantized file.
        path: its path: images and the float network are looked for beside it.
        images: the images; None for those beside the file.
        float_model: the network in float; None to look for it.
        folder: an empty folder.

    Raises:
        DataError: there are no images.
        SettingsError: the float network is not there, or is another one.
    """
    properties = {entry.key: entry.value for entry in network.graph.proto.metadata_props}
    source = _float_model(path, float_model, properties)
    if images is None:
        raise DataError(
            "no images beside the quantized file",
            where=str(path),
            hint="give them with --images",
        )
    shutil.copyfile(source, folder / "model.onnx")
    if data_file(source).is_file():
        shutil.copyfile(data_file(source), folder / data_file(source).name)
    layout = _layout(properties, images)
    array = images.load()
    np.save(folder / "images.npy", array)
    by_channel = array if layout == "NHWC" else array.transpose(0, 2, 3, 1)
    np.save(folder / "images_nhwc.npy", np.ascontiguousarray(by_channel))
    name = network.graph.inputs[0].name
    (folder / "scales.json").write_text(
        json.dumps(scales_of(network, float_model=source), indent=1) + "\n"
    )
    lines = [
        f"model.onnx: {source.name}, in float",
        f"images.npy, images_nhwc.npy: {images.count} images in the network's units",
        f"scales.json: {len(network.roundings)} tensors, {len(network.stored)} constants",
    ]
    preprocessing = Preprocessing.from_metadata(properties)
    pictures = None
    if preprocessing is None or by_channel.shape[3] not in (1, 3):
        lines.append(
            "no pictures: the file does not state its normalization in 1 or 3 channels"
        )
    else:
        _write_pictures(folder, preprocessing.invert(array, layout))
        said = json.loads(properties["preprocessing"]).get("source", "")
        pictures = Pictures(
            count=images.count,
            height=by_channel.shape[1],
            width=by_channel.shape[2],
            num_channels=by_channel.shape[3],
            preprocessing=preprocessing,
            source=said,
        )
        lines.append(f"images/: {images.count} pictures in 0..255, rounded; {said}")
    for file, text in pages(name, pictures).items():
        (folder / file).write_text(text)
    return lines, {"images": images.count, "pictures": pictures is not None}


def _float_model(path: Path, given: Path | None, properties: Mapping[str, str]) -> Path:
    """The network that the file was made from, by its digest."""
    digest = properties.get("zsq.source_sha256", "")
    candidates = [given] if given is not None else sorted(path.parent.glob("*.onnx"))
    for candidate in candidates:
        try:
            found = hashlib.sha256(candidate.read_bytes()).hexdigest()
        except OSError as error:
            raise SettingsError(
                f"cannot be read: {error.strerror}", where=str(candidate)
            ) from error
        if found == digest:
            return candidate
    if given is not None:
        raise SettingsError(
            f"is not the network that {path.name} was made from",
            where=str(given),
            hint="give that one: the digest of the file is in its metadata",
        )
    raise SettingsError(
        f"the network that {path.name} was made from is not beside it",
        where=str(path),
        hint="give it with --float-model",
    )


def _layout(properties: Mapping[str, str], images: ImageSet) -> Any:
    """NCHW unless only the last axis can be that of channels."""
    given = json.loads(properties.get("zsq.settings", "{}")).get("layout")
    if given in ("NCHW", "NHWC"):
        return given
    first, _, last = images.shape
    return "NHWC" if last in (1, 3) and first not in (1, 3) else "NCHW"


def _write_pictures(folder: Path, pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    (folder / "images").mkdir()
    names = []
    for index, picture in enumerate(pixels):
        name = f"images/{index:05}.png"
        Image.fromarray(picture[..., 0] if picture.shape[2] == 1 else picture).save(
            folder / name
        )
        names.append(name)
    (folder / "images.txt").write_text("\n".join(names) + "\n")


def scales_of(network: FakeQuantized, *, float_model: Path | None = None) -> dict[str, Any]:
    """Every quantizer of a file in plain data, by the names of the float network's tensors.

    ``value = scale * (integer - zero_point)``; zero points are all 0.
    """
    tensors = {
        entry.source.removesuffix("_float")
        if entry.result in network.graph.outputs
        else entry.source: {
            "scale": entry.scale,
            "zero_point": 0,
            "bits": entry.bits,
            "signed": entry.signed,
        }
        for entry in network.roundings.values()
    }
    constants = {
        entry.name.removesuffix("_q"): {
            "role": entry.role,
            "node": _reader(network, entry.result),
            "scales": [float(scale) for scale in np.atleast_1d(entry.scale)],
            "axis": entry.axis,
            "zero_point": 0,
            "bits": entry.bits,
            "signed": entry.signed,
        }
        for entry in network.stored.values()
    }
    return {
        "format": _FORMAT,
        "model": None if float_model is None else float_model.name,
        "tensors": tensors,
        "constants": constants,
    }


def _reader(network: FakeQuantized, tensor: str) -> str:
    return next((node.name for node in network.graph.consumers.get(tensor, ())), "")
