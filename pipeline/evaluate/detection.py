"""Mean average precision of ONNX files that detect objects."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graph_tools.errors import DataError
from graph_tools.model import ImageInput
from pipeline.evaluate.average_precision import (
    MAX_DETECTIONS,
    Detections,
    Objects,
    mean_average_precision,
)
from pipeline.evaluate.box_datasets import BoxDataset
from pipeline.evaluate.decoders import Decoder
from pipeline.evaluate.pictures import decode
from pipeline.evaluate.placement import Placement, Resize, place, placement
from pipeline.evaluate.sessions import Session, open_session
from pipeline.evaluate.suppression import suppress
from pipeline.preprocessing import Preprocessing

__all__ = ["DetectionAccuracy", "detect", "evaluate_detection"]

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, Mapping[str, float]], None]

_MAX_CANDIDATES = 5000  # of a picture, the best ones, that suppression looks at


@dataclass(frozen=True, kw_only=True)
class DetectionAccuracy:
    """How well a model detects.

    Args:
        model: its file.
        map50: mean average precision at an overlap of 0.5, in percent; NaN without objects.
        map50_95: mean over the overlaps 0.5, 0.55, ..., 0.95, in percent.
        count: number of pictures.
        seconds: time in onnxruntime, without reading and decoding.
    """

    model: str
    map50: float
    map50_95: float
    count: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, under the names by which the numbers are known."""
        return {
            "model": self.model,
            "mAP@0.5": self.map50,
            "mAP@0.5:0.95": self.map50_95,
            "count": self.count,
            "seconds": self.seconds,
        }


def evaluate_detection(
    models: Sequence[Path],
    dataset: BoxDataset,
    preprocessing: Preprocessing,
    decoder: Decoder,
    *,
    resize: Resize = "stretch",
    min_score: float = 0.001,
    overlap: float = 0.5,
    threads: int = 0,
    limit: int | None = None,
    model_input: ImageInput | None = None,
    fixed: Mapping[str, npt.NDArray[Any]] | None = None,
    on_step: OnStep | None = None,
) -> tuple[DetectionAccuracy, ...]:
    """Run models on the same pictures and compare what they find with what is there.

    Every class of a box whose score is above ``min_score`` is a detection of its own; of those
    of a class that overlap, the best stays; the best 100 of a picture count.

    Args:
        models: ONNX files, float or quantized.
        dataset: pictures with boxes.
        preprocessing: what the models expect.
        decoder: from outputs to boxes and scores.
        resize: how pictures are laid on the input.
        min_score: detections below do not count.
        overlap: intersection over union above which the lesser of two is dropped.
        threads: threads of onnxruntime; 0 lets it choose.
        limit: take only this many pictures, drawn at random with a fixed seed.
        model_input: layout and size, for files that leave them open.
        fixed: arrays for inputs other than the image, for files that still have them.
        on_step: called with pictures done, pictures in all, and no numbers.

    Returns:
        One accuracy a model, in the order given.

    Raises:
        DataError: a picture cannot be read, or the data set has more classes than the scores.
        ModelError: onnxruntime cannot load or run a file, or the decoder is for other outputs.
        SettingsError: a decoder of the user's fails.
    """
    sessions = [
        open_session(path, threads=threads, model_input=model_input, fixed=fixed)
        for path in models
    ]
    if limit is not None and limit < dataset.count:
        order = np.random.default_rng(0).permutation(dataset.count)[: max(1, limit)]
        dataset = dataset.only(sorted(map(int, order)))
    total, rows = dataset.count * len(models), []
    for index, session in enumerate(sessions):
        done = index * dataset.count

        def tell(count: int, before: int = done) -> None:
            if on_step is not None:
                on_step(before + count, total, {})

        objects, found, seconds = _run(
            session, dataset, preprocessing, decoder, resize, min_score, overlap, tell
        )
        map50, map50_95 = mean_average_precision(objects, found)
        row = DetectionAccuracy(
            model=str(session.path),
            map50=100 * map50,
            map50_95=100 * map50_95,
            count=dataset.count,
            seconds=seconds,
        )
        logger.info("%s", row)
        rows.append(row)
    if rows and math.isnan(rows[0].map50):
        raise DataError("the pictures hold no objects", where=str(dataset.path))
    return tuple(rows)


def detect(
    boxes: npt.NDArray[Any],
    scores: npt.NDArray[Any],
    *,
    min_score: float,
    overlap: float,
    most: int = MAX_DETECTIONS,
) -> Detections:
    """Choose the detections of one picture.

    Args:
        boxes: [K, 4], x1 y1 x2 y2.
        scores: [K, C]; NaN counts as nothing found, as does a box that is not finite.
        min_score: detections have a larger score.
        overlap: see `suppress`.
        most: detections to keep.

    Returns:
        Best first, in the units of ``boxes``.
    """
    finite = np.isfinite(boxes).all(axis=1)
    scores = np.where(finite[:, None] & ~np.isnan(scores), scores, -np.inf)
    rows, classes = np.nonzero(scores > min_score)
    values = scores[rows, classes].astype(np.float64)
    best = np.argsort(-values, kind="stable")[:_MAX_CANDIDATES]
    rows, classes, values = rows[best], classes[best], values[best]
    kept = suppress(boxes[rows], values, classes, overlap=overlap, most=most)
    return Detections(
        boxes=boxes[rows[kept]].astype(np.float64),
        scores=values[kept],
        classes=classes[kept].astype(np.int64),
    )


def _run(
    session: Session,
    dataset: BoxDataset,
    preprocessing: Preprocessing,
    decoder: Decoder,
    resize: Resize,
    min_score: float,
    overlap: float,
    tell: Callable[[int], None],
) -> tuple[list[Objects], list[Detections], float]:
    """Return what is in the pictures, what was found, in their pixels, and the seconds."""
    entry, seconds = session.input, 0.0
    objects: list[Objects] = []
    found: list[Detections] = []
    size = entry.batch or min(session.batch_size, 8)  # decoded grids of many classes are large
    with dataset.files.opened() as read:
        for start in range(0, dataset.count, size):
            pixels, placements, sizes = [], [], []
            for index in range(start, min(start + size, dataset.count)):
                name = dataset.names[index]
                where = f"{dataset.path}:{name}"
                picture = decode(read(name), entry.channels, where)
                _check_size(picture.size, dataset.sizes[index], where)
                pixels.append(place(picture, entry.height, entry.width, resize, where))
                placements.append(placement(picture.size, entry.height, entry.width, resize))
                sizes.append(picture.size)
                objects.append(_in_pixels(dataset, index, picture.size))
            images = preprocessing.apply(np.stack(pixels), entry.layout)
            begin = time.perf_counter()
            runs = session.outputs(images)
            seconds += time.perf_counter() - begin
            for outputs, rows in runs:
                boxes, scores = decoder(outputs, entry.height, entry.width)
                _check_classes(scores.shape[2], dataset, session)
                for row in range(rows):
                    chosen = detect(
                        boxes[row], scores[row], min_score=min_score, overlap=overlap
                    )
                    at = len(found) - start
                    found.append(_on_picture(chosen, placements[at], sizes[at]))
            tell(len(found))
    return objects, found, seconds


def _on_picture(found: Detections, placement: Placement, size: tuple[int, int]) -> Detections:
    """Bring boxes from the input to the picture, and cut off what leaves it."""
    boxes = placement.to_picture(found.boxes)
    boxes = np.clip(boxes, 0, np.array([*size, *size], dtype=np.float64))
    return Detections(boxes=boxes, scores=found.scores, classes=found.classes)


def _in_pixels(dataset: BoxDataset, index: int, size: tuple[int, int]) -> Objects:
    objects = dataset.objects[index]
    if not dataset.shares:
        return objects
    boxes = objects.boxes * np.array([*size, *size], dtype=np.float64)
    return Objects(boxes=boxes, classes=objects.classes)


def _check_size(size: tuple[int, int], labelled: tuple[int, int] | None, where: str) -> None:
    if labelled is not None and labelled != size:
        raise DataError(
            f"is {size[0]}x{size[1]}, but its annotations are for {labelled[0]}x{labelled[1]}",
            where=where,
        )


def _check_classes(num_scores: int, dataset: BoxDataset, session: Session) -> None:
    if dataset.num_classes > num_scores:
        raise DataError(
            f"has {dataset.num_classes} classes, but {session.path.name} has {num_scores}",
            where=str(dataset.path),
            hint="give pictures with the classes that the model was trained on",
        )
