"""A grid of settings on one network: bits, rounding, method, seed; what each costs and gives.

Images are made once for each method and seed. Every cell is a run of `quantize_file` on these,
and is written down as soon as it is done, so that a sweep goes on where it was stopped. Fidelity
is measured on images that no cell calibrates on: made by the first method with a seed of their
own.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graph_tools.compare import compare_tensors, run_tensors
from graph_tools.errors import DataError, SettingsError, ZsqError
from graph_tools.model import Model
from graph_tools.quantizer import Plan
from graph_tools.reading import read_proto
from graph_tools.saving import data_file
from pipeline.evaluate.sessions import open_session
from pipeline.generate import generate
from pipeline.images import ImageSet, open_images
from pipeline.pareto import front, plot_front
from pipeline.record import flat_settings, versions
from pipeline.run import (
    QuantizeJob,
    load_network,
    preprocessing_of,
    quantize_file,
    quantizer_of,
)
from pipeline.settings import GenerateSettings, Method, SweepGrid

__all__ = ["Cell", "Sweep", "sweep_file"]

OnProgress = Callable[[str, int, int, Mapping[str, float]], None]

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination, and what came of it.

    Attributes:
        weight_bytes: of the weights, packed; ``file_bytes`` of the file.
        agreement: share of held-out images with the same highest score as in float; None where
            the first output is not one row of scores.
        sqnr_db: lowest SQNR of an output on them; None where none is in float.
        top1: accuracy in percent on the labelled images; None without any.
        proved: whether the proof passed.
        error: why there is no result; "" where there is one.
        digest: of all that decides the result.
    """

    name: str
    method: str
    seed: int
    weights: int
    activations: int
    rounding: str
    digest: str
    weight_bytes: int = 0
    file_bytes: int = 0
    agreement: float | None = None
    sqnr_db: float | None = None
    top1: float | None = None
    proved: bool = False
    seconds: float = 0.0
    error: str = ""
    optimal: bool = False


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All cells in grid order.

    Attributes:
        measure: the field of a cell that fidelity is judged by.
        float_top1: accuracy of the float network in percent, where there are labels.
        resumed: how many cells were there before.
    """

    folder: Path
    cells: tuple[Cell, ...]
    measure: str
    float_top1: float | None
    resumed: int
    plot: Path | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            **asdict(self),
            "folder": str(self.folder),
            "plot": None if self.plot is None else str(self.plot),
        }


@dataclass(kw_only=True)
class _Log:
    """What is done, in ``sweep.json``."""

    path: Path
    entries: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> _Log:
        empty: dict[str, dict[str, dict[str, Any]]] = {"images": {}, "cells": {}}
        if not path.is_file():
            return cls(path=path, entries=empty)
        try:
            found = json.loads(path.read_text())
            entries = {kind: dict(found[kind]) for kind in empty}
            if found["format"] != _FORMAT:
                raise ValueError(f"format {found['format']}, expected {_FORMAT}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            hint = "choose another folder with -o, or remove it"
            raise DataError("is not what a sweep wrote", where=str(path), hint=hint) from error
        return cls(path=path, entries=entries)

    def get(self, kind: str, name: str, digest: str) -> dict[str, Any] | None:
        entry = self.entries[kind].get(name)
        return entry if entry is not None and entry["digest"] == digest else None

    def put(self, kind: str, name: str, entry: Mapping[str, Any]) -> None:
        self.entries[kind][name] = dict(entry)
        temporary = self.path.with_name(f".{self.path.name}")
        try:
            temporary.write_text(json.dumps({"format": _FORMAT, **self.entries}, indent=1))
            temporary.replace(self.path)
        except OSError as error:
            what = f"cannot write: {error.strerror or error}"
            raise ZsqError(what, where=str(self.path)) from error


def sweep_file(
    base: QuantizeJob,
    grid: SweepGrid,
    folder: Path,
    *,
    on_progress: OnProgress | None = None,
) -> Sweep:
    """Quantize one network in every way of a grid.

    Args:
        base: the network and all settings that the grid does not vary; its output is not used.
        grid: what is varied.
        folder: for images, files, ``sweep.json`` and ``pareto.png``; made if it is not there.
        on_progress: called as (stage, done, total, terms).

    Returns:
        The cells; one whose settings contradict each other says so in ``error``.

    Raises:
        ZsqError: the network, the folder or the labelled images cannot be used.
    """
    if base.images is not None or base.data is not None:
        raise SettingsError("a sweep makes its own images", where="images and data")
    if base.task == "detection":
        raise SettingsError(
            "a sweep measures the accuracy of classifiers",
            where="task detection",
            hint="leave the labels out: files are then compared with the float network",
        )
    base = replace(base, task="classification")
    progress = on_progress or (lambda stage, done, total, terms: None)
    model, _ = load_network(base)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ZsqError(f"cannot be made: {error.strerror}", where=str(folder)) from error
    log = _Log.open(folder / "sweep.json")
    needed = dict.fromkeys([*grid.images(), grid.held_out()])
    paths = {key: _images(base, model, folder, log, *key, progress) for key in needed}
    yardstick = open_images(paths[grid.held_out()], shape=model.input.shape)
    jobs = dict(_jobs(base, grid, folder, paths))
    cells: list[Cell] = []
    float_top1, resumed = None, 0
    for index, (cell, job) in enumerate(jobs.items()):
        progress("sweep", index, len(jobs), {})
        if job is None:
            cells.append(cell)
            continue
        cell = replace(
            cell, digest=_digest(model, job, cell.name, paths[grid.held_out()].name)
        )
        known = log.get("cells", cell.name, cell.digest)
        if known is not None and not known["cell"]["error"]:
            done = Cell(**known["cell"])
            resumed += 1
        else:
            done, found_top1 = _run(cell, job, yardstick, progress)
            known = {"digest": cell.digest, "cell": asdict(done), "float_top1": found_top1}
            log.put("cells", cell.name, known)
        float_top1 = known["float_top1"] if known["float_top1"] is not None else float_top1
        cells.append(done)
    progress("sweep", len(jobs), len(jobs), {})
    return _finished(folder, cells, float_top1, resumed)


def _finished(
    folder: Path, cells: list[Cell], float_top1: float | None, resumed: int
) -> Sweep:
    good = [cell for cell in cells if not cell.error]
    measure = next(
        (
            name
            for name in ("top1", "agreement", "sqnr_db")
            if good and all(getattr(cell, name) is not None for cell in good)
        ),
        "sqnr_db",
    )
    points = [
        (float(cell.weight_bytes), float(getattr(cell, measure)))
        for cell in good
        if getattr(cell, measure) is not None
    ]
    optimal = front(points)
    cells = [
        replace(
            cell,
            optimal=not cell.error
            and getattr(cell, measure) is not None
            and (float(cell.weight_bytes), float(getattr(cell, measure))) in optimal,
        )
        for cell in cells
    ]
    plot = folder / "pareto.png" if points else None
    if plot is not None:
        plot_front(plot, cells, measure, float_top1)
    return Sweep(
        folder=folder,
        cells=tuple(cells),
        measure=measure,
        float_top1=float_top1,
        resumed=resumed,
        plot=plot,
    )


def _jobs(
    base: QuantizeJob, grid: SweepGrid, folder: Path, paths: Mapping[tuple[Method, int], Path]
) -> Iterator[tuple[Cell, QuantizeJob | None]]:
    for method, seed in grid.images():
        for weights, activations, rounding in itertools.product(
            grid.weights, grid.activations, grid.rounding
        ):
            name = f"{method}-{seed}.w{weights}a{activations}-{rounding}"
            cell = Cell(
                name=name,
                method=method,
                seed=seed,
                weights=weights,
                activations=activations,
                rounding=rounding,
                digest="",
            )
            try:
                quantization = replace(
                    base.quantization,
                    weights=weights,
                    activations=activations,
                    rounding=rounding,
                )
            except SettingsError as error:  # settings that exclude each other
                yield replace(cell, error=str(error)), None
                continue
            yield (
                cell,
                replace(
                    base,
                    output=folder / f"{name}.onnx",
                    images=paths[method, seed],
                    quantization=quantization,
                    generation=replace(base.generation, method=method, seed=seed),
                ),
            )


def _digest(model: Model, job: QuantizeJob, *words: str) -> str:
    """Of all that decides a result."""
    parts = [
        model.sha256,
        flat_settings(job),
        str(job.evaluate_data),
        str(job.bn_from),
        job.target,
        versions(),
        words,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _images(
    base: QuantizeJob,
    model: Model,
    folder: Path,
    log: _Log,
    method: Method,
    seed: int,
    progress: OnProgress,
) -> Path:
    """The images of one method and seed, made if they are not there."""
    settings: GenerateSettings = replace(base.generation, method=method, seed=seed)
    name = f"images-{method}-{seed}"
    path = folder / f"{name}.npz"
    digest = _digest(model, replace(base, generation=settings), "images")
    if log.get("images", name, digest) is None or not path.is_file():
        made = generate(
            model,
            settings,
            path,
            preprocessing=preprocessing_of(model, base.input, seed=seed),
            quantizer=quantizer_of(model, seed=seed),
            on_step=lambda done, total, terms: progress(name, done, total, terms),
        )
        entry = {"digest": digest, "seconds": made.seconds, "quality": made.quality.line}
        log.put("images", name, entry)
    return path


def _run(
    cell: Cell, job: QuantizeJob, yardstick: ImageSet, progress: OnProgress
) -> tuple[Cell, float | None]:
    """The cell with its result, and the accuracy of the float network if it was measured."""
    try:
        result = quantize_file(job, on_progress=progress)
        agreement, sqnr = _fidelity(job.model, result.output, yardstick)
    except ZsqError as error:
        return replace(cell, error=str(error)), None
    assert job.images is not None
    _share_images(job.images, result.folder / job.images.name)
    accuracies = result.report["evaluation"] or [{"top1": None}] * 2
    done = replace(
        cell,
        weight_bytes=_packed_bytes(Plan.load(result.folder / "plan.json")),
        file_bytes=sum(
            path.stat().st_size
            for path in (result.output, data_file(result.output))
            if path.is_file()
        ),
        agreement=agreement,
        sqnr_db=sqnr,
        top1=accuracies[1]["top1"],
        proved=result.proof.passed,
        seconds=round(sum(result.report["times"].values()), 1),
    )
    return done, accuracies[0]["top1"]


def _share_images(images: Path, copy: Path) -> None:
    """Let the copy of the images beside a file be the same file, where there are hard links."""
    copy = copy.with_name(f"images{images.suffix}")
    link = copy.with_name(f".{copy.name}")
    with contextlib.suppress(OSError):
        os.link(images, link)
        link.replace(copy)


def _packed_bytes(plan: Plan) -> int:
    bits = sum(
        constant.values.size * constant.quantizer.bits
        for constant in plan.constants.values()
        if constant.role != "bias"
    )
    return -(-bits // 8)


def _fidelity(
    source: Path, written: Path, images: ImageSet
) -> tuple[float | None, float | None]:
    """Share of equal decisions on the first output, and the lowest SQNR of an output."""
    protos: list[onnx.ModelProto] = [read_proto(path)[0] for path in (source, written)]
    shared = {entry.name for entry in protos[0].graph.output}
    names = [entry.name for entry in protos[1].graph.output if entry.name in shared]
    compared = compare_tensors(
        protos[0], protos[1], {name: name for name in names}, images.batches(16)
    )
    ratios = [found.sqnr_db for found in compared.values() if found.sqnr_db is not None]
    sqnr = min(ratios, default=None)
    first = run_tensors(protos[0], names[:1], next(images.batches(1)))[names[0]]
    if first.ndim != 2 or first.shape[1] < 2 or not np.issubdtype(first.dtype, np.floating):
        return None, _finite(sqnr)
    sessions = [open_session(path) for path in (source, written)]
    equal = 0
    for batch in images.batches(64):
        decided = [session.scores(batch).argmax(axis=1) for session in sessions]
        equal += int((decided[0] == decided[1]).sum())
    return equal / images.count, _finite(sqnr)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity; equal outputs count as 200 dB."""
    return None if value is None else max(-200.0, min(value, 200.0))
