"""Two files, float or quantized, on the same images: SQNR tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from graph_tools.compare import TensorComparison, compare_tensors, run_tensors
from graph_tools.errors import DataError, ModelError
from graph_tools.fixed_inputs import fix_inputs
from graph_tools.limits import check_file_cost
from graph_tools.matching import Match, match_tensors
from graph_tools.reading import check_weights, read_proto
from pipeline.images import ImageSet, open_images

__all__ = ["Comparison", "Row", "compare_files"]

OnProgress = Callable[[str, int, int, Mapping[str, float]], None]

_NUM_WORST = 3
_CLEARLY = 3.0  # dB that taking out a gain has to bring before it counts as one
_OFF = 0.02  # of a gain


@dataclass(frozen=True, kw_only=True)
class Row:
    """A tensor in both models.

    Attributes:
        first: its name in the first model, the reference; ``second`` in the second.
        op_type: what makes it; ``matched`` how it was found: by name, structure or position.
        sqnr_db: signal to noise in dB, of the values divided by ``gain``.
        gain: factor that one model holds the tensor at, as where the bound of a ReLU6 was
            moved to a power of two; else 1.
        max_abs_error: largest difference, with the gain in it.
        agreement: share of equal elements, for integers.
        is_output: whether it is an output of the first model.
        rank: 1 for the lowest SQNR, up to 3; 0 for all others.
    """

    first: str
    second: str
    op_type: str
    matched: str
    sqnr_db: float | None
    gain: float
    max_abs_error: float
    agreement: float | None
    is_output: bool
    rank: int = 0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two models, tensor by tensor, in the order of the first one's graph.

    Attributes:
        only_first: tensors without a counterpart; ``only_second`` likewise.
        other_shape: pairs that were found, but whose shapes differ.
        images: how many were run; ``source`` says which.
    """

    rows: tuple[Row, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    other_shape: tuple[str, ...]
    images: int
    source: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def compare_files(
    first: Path,
    second: Path,
    images: Path | None = None,
    *,
    max_images: int = 64,
    fixed: Mapping[str, npt.NDArray[Any]] | None = None,
    threads: int = 0,
    on_progress: OnProgress | None = None,
) -> Comparison:
    """Compare two files in onnxruntime, without optimization.

    Args:
        first: the reference; float or quantized.
        second: the other one.
        images: [N, ...] float32 as `zsq generate` writes them; by default those beside either
            file.
        max_images: use at most so many.
        fixed: arrays for inputs other than the image.
        threads: of onnxruntime.
        on_progress: called as (stage, done, total, terms).

    Raises:
        ModelError: a file cannot be read or run, or the two have nothing in common.
        DataError: there are no images, or they do not fit.
    """
    progress = on_progress or (lambda stage, done, total, terms: None)
    protos = [_read(path, fixed or {}) for path in (first, second)]
    chosen = _images(images, first, second)
    count = min(max_images, chosen.count)
    matching = match_tensors(*protos)
    probe = next(chosen.batches(1))
    ones, others = (
        run_tensors(proto, names, probe, threads=threads)
        for proto, names in (
            (protos[0], [match.first for match in matching.matches]),
            (protos[1], [match.second for match in matching.matches]),
        )
    )
    alike = [m for m in matching.matches if _fit(ones[m.first], others[m.second])]
    if not alike:
        raise ModelError(
            "no tensor of the one is found in the other",
            where=f"{first} and {second}",
            hint="they have to be the same network",
        )
    size = 16

    def batches() -> Any:
        for index, batch in enumerate(chosen.batches(size, limit=count)):
            progress("compare", min(index * size, count), count, {})
            yield batch
        progress("compare", count, count, {})

    compared = compare_tensors(
        protos[0],
        protos[1],
        {match.first: match.second for match in alike},
        batches(),
        threads=threads,
    )
    outputs = {entry.name for entry in protos[0].graph.output}
    rows = [_row(match, compared[match.first], outputs) for match in alike]
    return Comparison(
        rows=tuple(_ranked(rows)),
        only_first=matching.only_first,
        only_second=matching.only_second,
        other_shape=tuple(m.first for m in matching.matches if m not in alike),
        images=count,
        source=str(chosen.path),
    )


def _read(path: Path, fixed: Mapping[str, npt.NDArray[Any]]) -> onnx.ModelProto:
    proto, _ = read_proto(path)
    check_weights(proto, where=str(path))
    check_file_cost(proto, where=str(path))
    constant = {tensor.name for tensor in proto.graph.initializer}
    inputs = [entry.name for entry in proto.graph.input if entry.name not in constant]
    if len(inputs) > 1 and fixed:
        fix_inputs(proto, fixed, where=str(path))
        inputs = [name for name in inputs if name not in fixed]
    if len(inputs) != 1:
        raise ModelError(
            f"has {len(inputs)} inputs, only one can be an image",
            where=str(path),
            hint="fix the others with --input NAME=FILE.npy",
        )
    return proto


def _images(images: Path | None, first: Path, second: Path) -> ImageSet:
    if images is None:
        beside = [path.with_suffix("") / "images.npz" for path in (second, first)]
        images = next((path for path in beside if path.is_file()), None)
    if images is None:
        raise DataError(
            "there are no images beside the two files",
            where=str(second),
            hint="give --images X.npz; zsq generate makes some",
        )
    return open_images(images)


def _fit(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> bool:
    """Whether two tensors can be compared; a fixed batch was filled up."""
    same_kind = np.issubdtype(one.dtype, np.inexact) == np.issubdtype(other.dtype, np.inexact)
    return same_kind and one.shape[1:] == other.shape[1:]


def _row(match: Match, found: TensorComparison, outputs: set[str]) -> Row:
    aligned, sqnr, gain = found.aligned_sqnr_db, found.sqnr_db, 1.0
    moved = aligned is not None and sqnr is not None and aligned - sqnr > _CLEARLY
    if moved and abs(found.gain - 1) > _OFF:
        sqnr, gain = aligned, found.gain
    return Row(
        first=match.first,
        second=match.second,
        op_type=match.op_type,
        matched=match.how,
        sqnr_db=sqnr,
        gain=gain,
        max_abs_error=found.max_abs_error,
        agreement=found.agreement,
        is_output=match.first in outputs,
    )


def _ranked(rows: list[Row]) -> list[Row]:
    """Number the rows of lowest SQNR."""
    measured = [row for row in rows if row.sqnr_db is not None and row.sqnr_db < np.inf]
    lowest = sorted(measured, key=lambda row: row.sqnr_db or 0.0)[:_NUM_WORST]
    ranks = {row.first: rank for rank, row in enumerate(lowest, start=1)}
    return [Row(**{**asdict(row), "rank": ranks.get(row.first, 0)}) for row in rows]
