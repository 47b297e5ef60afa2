"""Read the weights and BatchNormalization statistics that a file beside the network holds.

A state_dict or checkpoint of torch (read with ``weights_only``, so that nothing in it runs),
safetensors, or an ONNX file of the same network in which BatchNormalization was kept. Only
values matter: names serve to find the four vectors of one BatchNormalization, which every
framework stores side by side, and to report.
"""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from graph_tools.batchnorm import find_batch_norms
from graph_tools.errors import DataError
from graph_tools.model import initializers, load

__all__ = ["NormStatistics", "SideFile", "read_side_file"]

_MEAN = ("running_mean", "moving_mean", "mean")
_VARIANCE = ("running_var", "moving_variance", "moving_var", "variance", "var")
_SCALE = ("weight", "gamma", "scale")
_BIAS = ("bias", "beta", "offset")
_ANY_BYTES = 2**20  # that small files may expand to
_WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "_orig_mod")


@dataclass(frozen=True, kw_only=True)
class NormStatistics:
    """One BatchNormalization of a side file.

    Attributes:
        name: the node's, or the common prefix of the four vectors.
        scale: gamma, ``[C] float64``.
        bias: beta, ``[C] float64``.
        mean: running mean, ``[C] float64``.
        variance: running variance, ``[C] float64``.
        epsilon: None if the file does not say.
    """

    name: str
    scale: np.ndarray
    bias: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    epsilon: float | None

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return int(self.mean.size)


@dataclass(frozen=True, kw_only=True)
class SideFile:
    """What a file knows.

    Attributes:
        path: the file.
        weights: tensors of rank 2 and more by name, floating point, as stored.
        vectors: tensors of rank 1 that belong to no BatchNormalization, ``float64``.
        norms: in the order of the file.
    """

    path: Path
    weights: Mapping[str, np.ndarray]
    vectors: Mapping[str, np.ndarray]
    norms: tuple[NormStatistics, ...]


def read_side_file(
    path: str | os.PathLike[str], *, input_shape: tuple[int, ...] | None = None
) -> SideFile:
    """Read a .pt, .pth, .bin, .safetensors or .onnx file.

    Args:
        path: the file.
        input_shape: as for `graph_tools.model.load`, for an ONNX file that needs it.

    Raises:
        DataError: the file cannot be read, is refused, or holds no BatchNormalization.
        ModelError: an ONNX file that cannot be loaded.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        side = _from_onnx(path, input_shape)
    else:
        side = _from_tensors(path, _read_tensors(path))
    if not side.norms:
        raise DataError(
            "holds no BatchNormalization statistics",
            where=str(path),
            hint="give the state_dict of the trained network, or an export that kept them",
        )
    return side


def _from_onnx(path: Path, input_shape: tuple[int, ...] | None) -> SideFile:
    model = load(path, input_shape=input_shape)
    sites = find_batch_norms(model)
    owned = {
        name
        for node in model.proto.graph.node
        if node.op_type == "BatchNormalization"
        for name in node.input[1:]
    }
    constants = {
        name: value
        for name, value in initializers(model.proto).items()
        if np.issubdtype(value.dtype, np.floating)
    }
    return SideFile(
        path=path,
        weights={name: value for name, value in constants.items() if value.ndim > 1},
        vectors={
            name: value.astype(np.float64)
            for name, value in constants.items()
            if value.ndim == 1 and name not in owned
        },
        norms=tuple(
            NormStatistics(
                name=site.node,
                scale=site.scale.astype(np.float64),
                bias=site.bias.astype(np.float64),
                mean=site.mean.astype(np.float64),
                variance=site.variance.astype(np.float64),
                epsilon=site.epsilon,
            )
            for site in sites
        ),
    )


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return all floating-point tensors of a file by name."""
    where, hint = str(path), "give a .pt, .pth, .bin, .safetensors or .onnx file"
    if not path.is_file():
        raise DataError("no such file", where=where, hint=hint)
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(str(path))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of old formats
                _check_stored(path)
                content = torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # readers of broken files raise anything
        reason = " ".join(str(error).split()).split(". ")[0][:160]
        if "weights_only" in reason.lower() or "weights only" in reason.lower():
            raise DataError(
                "holds more than tensors, and running a pickle of unknown origin is unsafe",
                where=where,
                hint="save the tensors alone: torch.save(model.state_dict(), FILE)",
            ) from error
        raise DataError(f"cannot be read ({reason})", where=where, hint=hint) from error
    found = {
        name: value
        for name, value in _flatten(content).items()
        if value.is_floating_point() and value.layout is torch.strided
    }
    if path.suffix != ".safetensors":  # there the reader checks that nothing overlaps
        _check_bytes(found, path)
    return _short_names(
        {
            name: value.detach().to(torch.float64).numpy()
            if value.dim() < 2
            else value.detach().to(torch.float32).numpy()
            for name, value in found.items()
        }
    )


def _check_stored(path: Path) -> None:
    """Refuse a checkpoint whose parts are compressed, as those of torch never are.

    Raises:
        DataError: a decompression bomb.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > path.stat().st_size:
        raise DataError(
            f"its parts grow to {size:,} bytes, more than the file has",
            where=str(path),
            hint="write it with torch.save",
        )


def _check_bytes(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuse views that make terabytes of one stored number.

    Raises:
        DataError: the tensors are much larger than their file.
    """
    asked = sum(value.numel() * value.element_size() for value in tensors.values())
    if asked > 4 * path.stat().st_size + _ANY_BYTES:
        raise DataError(
            f"its tensors would take {asked:,} bytes, many times the file's",
            where=str(path),
            hint="save contiguous tensors",
        )


def _flatten(content: object) -> dict[str, torch.Tensor]:
    """Return the tensors in nested mappings, names joined by dots.

    A checkpoint may hold several sets, say of weights and of their moving averages; which of them
    was exported shows in the values.
    """
    found: dict[str, torch.Tensor] = {}
    seen: set[int] = set()  # a pickle may hold itself, or one mapping many times over
    pending: list[tuple[str, object]] = [("", content)]
    while pending:
        prefix, value = pending.pop()
        if isinstance(value, torch.Tensor) and prefix:
            found[prefix] = value
        elif isinstance(value, Mapping) and id(value) not in seen:
            seen.add(id(value))
            inner = [
                (f"{prefix}.{key}" if prefix else str(key), v) for key, v in value.items()
            ]
            pending += reversed(inner)
    return found


def _short_names(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Strip what wraps a network ("state_dict.module."), where names stay unique."""
    short = {}
    for name, value in tensors.items():
        parts = name.split(".")
        while len(parts) > 2 and parts[0] in _WRAPPERS:
            parts = parts[1:]
        short[".".join(parts)] = value
    return short if len(short) == len(tensors) else tensors


def _from_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> SideFile:
    groups: dict[str, dict[str, str]] = {}
    for name, value in tensors.items():
        if value.ndim == 1:
            prefix, separator, last = name.replace("/", ".").rpartition(".")
            groups.setdefault(prefix + separator, {})[last.removesuffix(":0")] = name
    norms: list[NormStatistics] = []
    owned: set[str] = set()
    for prefix, members in groups.items():
        names = [
            next((members[word] for word in words if word in members), None)
            for words in (_MEAN, _VARIANCE, _SCALE, _BIAS)
        ]
        mean, variance, scale, bias = (
            None if name is None else tensors[name] for name in names
        )
        if mean is None or variance is None or mean.shape != variance.shape:
            continue
        scale = np.ones_like(mean) if scale is None else scale
        bias = np.zeros_like(mean) if bias is None else bias
        if scale.shape != mean.shape or bias.shape != mean.shape or (variance < 0).any():
            continue
        owned.update(filter(None, names))
        norms.append(
            NormStatistics(
                name=prefix.rstrip(".") or "(unnamed)",
                scale=scale,
                bias=bias,
                mean=mean,
                variance=variance,
                epsilon=None,
            )
        )
    return SideFile(
        path=path,
        weights={name: value for name, value in tensors.items() if value.ndim > 1},
        vectors={
            name: value
            for name, value in tensors.items()
            if value.ndim == 1 and name not in owned
        },
        norms=tuple(norms),
    )
