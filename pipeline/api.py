"""The five calls of the product on objects, for programs; `import pipeline` offers them.

`pipeline.quantize_file` is all of them in order, with report and record.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from graph_tools.errors import SettingsError
from graph_tools.model import Model
from graph_tools.model import load as load_file
from pipeline.generate import Generated, OnStep, generate
from pipeline.images import ImageSet
from pipeline.quantize import Quantization
from pipeline.run import preprocessing_of, quantize_prepared, quantizer_of, write_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)
from pipeline.target_profiles import load_profile
from pipeline.target_rules import settings_for
from pipeline.verify import Proof, verify

__all__ = ["generate_images", "load", "quantize_model", "verify_model", "write_qdq"]

AnyPath = str | os.PathLike[str]


def load(path: AnyPath, settings: InputSettings | None = None) -> Model:
    """Read an exported ONNX file into the normal form.

    Args:
        path: the file, opset 6 or newer.
        settings: shape and layout of the input, arrays for further inputs.

    Raises:
        ZsqError: the file cannot be used; see `graph_tools.model.load`.
    """
    settings = settings or InputSettings()
    return load_file(
        path,
        input_shape=settings.shape(),
        layout=settings.known_layout(),
        inputs=settings.arrays(),
    )


def generate_images(
    model: Model,
    path: AnyPath,
    settings: GenerateSettings | None = None,
    *,
    input: InputSettings | None = None,
    on_step: OnStep | None = None,
) -> Generated:
    """Make calibration images from a network alone.

    Args:
        model: as `load` gives it.
        path: the .npz file to write: array "images", [N, *model.input.shape] float32.
        settings: method, number of images, seed.
        input: the normalization; what it does not say is guessed.
        on_step: called as (done, total, loss terms).

    Returns:
        ``images`` to quantize with, and the record: quality, history, warnings.

    Raises:
        ZsqError: the method does not fit the network, or the file cannot be written.
    """
    settings, input = settings or GenerateSettings(), input or InputSettings()
    if Path(path).suffix != ".npz":
        raise SettingsError("the output is not named *.npz", where=str(path))
    return generate(
        model,
        settings,
        Path(path),
        preprocessing=preprocessing_of(model, input, seed=settings.seed),
        quantizer=quantizer_of(model, seed=settings.seed),
        on_step=on_step,
    )


def quantize_model(
    model: Model,
    images: ImageSet,
    settings: QuantizeSettings | None = None,
    *,
    target: str = "onnxruntime",
    seed: int = 0,
    on_step: OnStep | None = None,
) -> Quantization:
    """Choose every quantizer of a network; nothing is written.

    Args:
        model: as `load` gives it.
        images: ``generate_images(...).images``, or `open_images`.
        settings: bits, scheme, rounding.
        target: the compiler or chip whose rules are to be kept.
        seed: of what is drawn while roundings are learned.
        on_step: called as (done, total, terms).

    Returns:
        The plan, and the prepared network that it is for.

    Raises:
        ZsqError: nothing to quantize, or settings that the target does not allow.
    """
    chosen = settings_for(load_profile(target), settings or QuantizeSettings())
    return quantize_prepared(model, images, chosen, seed=seed, on_step=on_step)


def write_qdq(
    quantization: Quantization,
    path: AnyPath,
    *,
    target: str = "onnxruntime",
    container: Literal["int8", "int4"] = "int8",
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a quantized network as QuantizeLinear and DequantizeLinear nodes.

    Args:
        quantization: as `quantize_model` gives it.
        path: the .onnx file to write; whole or absent.
        target: as `quantize_model` was told.
        container: type that holds integers of 4 bits and fewer.
        metadata: of the file, by key.

    Returns:
        The path.

    Raises:
        ZsqError: a sum that 32 bits do not hold, or a folder that cannot be written.
    """
    write_file(
        quantization,
        Path(path),
        load_profile(target),
        container=container,
        metadata=metadata or {},
    )
    return Path(path)


def verify_model(
    path: AnyPath, images: ImageSet, settings: VerifySettings | None = None
) -> Proof:
    """Prove a quantized file: runtimes and integers agree bit by bit.

    Args:
        path: the file.
        images: to run it on.
        settings: how many images, threads.

    Returns:
        The proof; ``passed`` says whether everything held, ``summary_lines()`` why.

    Raises:
        ZsqError: the file or the images cannot be used.
    """
    return verify(Path(path), images, settings or VerifySettings())
