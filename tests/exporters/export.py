"""Export networks of the zoo with torch's two exporters, silently."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tests.exporters.networks import SIZE, ZOO, build

__all__ = ["DYNAMO_OPSETS", "SCRIPT_OPSETS", "Export", "export"]

SCRIPT_OPSETS = tuple(range(9, 21))
DYNAMO_OPSETS = tuple(range(18, 24))
_OLDEST_BATCH_NORM = 14  # before it TorchScript exports in mode PRESERVE need no care


@dataclass(frozen=True, kw_only=True)
class Export:
    """How a network is exported.

    Attributes:
        network: name in the zoo.
        exporter: ``script`` is TorchScript, ``dynamo`` torch.export.
        opset: version asked for.
        keep: BatchNormalization kept; by default exporters fold it away.
        free: axes that stay free.
    """

    network: str
    exporter: Literal["script", "dynamo"]
    opset: int
    keep: bool = True
    free: Literal["none", "batch", "all"] = "batch"

    def __str__(self) -> str:
        kept = "kept" if self.keep else "folded"
        return f"{self.network}-{self.exporter}{self.opset}-{kept}-{self.free}"


def export(what: Export, folder: Path) -> Path:
    """Write the file and return its path.

    Raises:
        Exception: whatever torch raises if it cannot export the network so.
    """
    net, entry = build(what.network), ZOO[what.network]
    image = torch.randn(2 if what.free != "none" else 1, entry.channels, SIZE, SIZE)
    path = folder / f"{what}.onnx"
    axes = {"none": {}, "batch": {0: "batch"}, "all": {0: "batch", 2: "height", 3: "width"}}
    names = axes[what.free]
    common = {"input_names": ["image"], "opset_version": what.opset}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _quiet():
        warnings.simplefilter("ignore")
        if what.exporter == "script":
            training = torch.onnx.TrainingMode
            torch.onnx.export(
                net,
                (image,),
                path,
                dynamo=False,
                dynamic_axes={"image": names} if names else None,
                training=training.PRESERVE if what.keep else training.EVAL,
                do_constant_folding=not what.keep,
                **common,
            )
        else:
            shapes = {axis: torch.export.Dim(name) for axis, name in names.items()}
            torch.onnx.export(
                net,
                (image,),
                path,
                dynamo=True,
                dynamic_shapes=(shapes,) if shapes else None,
                optimize=not what.keep,
                external_data=False,
                verbose=False,
                **common,
            )
    return path


@contextlib.contextmanager
def _quiet():
    """Silence the loggers of torch.onnx and onnxscript."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
