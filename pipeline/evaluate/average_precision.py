"""Mean average precision as COCO defines it, computed by pycocotools.

Average precision of a class: the precision at 101 recalls, interpolated, averaged; the mean goes
over the classes that occur (https://cocodataset.org/#detection-eval).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_DETECTIONS", "Detections", "Objects", "mean_average_precision"]

MAX_DETECTIONS = 100
"""Detections that count in a picture, the best ones of all classes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Objects:
    """What is to be found in one picture.

    Args:
        boxes: [n, 4] float64, x1 y1 x2 y2.
        classes: [n] int64, from 0.
        areas: [n] float64; None takes those of the boxes.
        crowd: [n] bool: groups, in which any number of detections may lie; None: no groups.
    """

    boxes: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]
    areas: npt.NDArray[np.float64] | None = None
    crowd: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Detections:
    """What a network found in one picture.

    Args:
        boxes: [n, 4] float64, x1 y1 x2 y2, in the units of the objects' boxes.
        scores: [n] float64.
        classes: [n] int64, from 0.
    """

    boxes: npt.NDArray[np.float64]
    scores: npt.NDArray[np.float64]
    classes: npt.NDArray[np.int64]


def mean_average_precision(
    objects: Sequence[Objects], detections: Sequence[Detections]
) -> tuple[float, float]:
    """Return mAP at an overlap of 0.5, and the mean of mAP at 0.5, 0.55, ..., 0.95.

    Args:
        objects: of each picture.
        detections: of each picture, in the same order.

    Returns:
        Two numbers in 0..1; NaN if the pictures hold no objects.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools tells what it does
        truth, found = COCO(), COCO()
        truth.dataset = _dataset(objects)
        truth.createIndex()
        found.dataset = _dataset(detections)
        found.createIndex()
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, np.inf]], ["all"]
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.params.catIds = sorted({int(c) for o in objects for c in o.classes})
        evaluation.params.imgIds = list(range(1, len(objects) + 1))
        if not evaluation.params.catIds:
            return float("nan"), float("nan")
        evaluation.evaluate()
        evaluation.accumulate()
    # [overlaps, recalls, classes, areas, numbers of detections], -1 where there are no objects
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    return _mean(precision[0]), _mean(precision)


def _dataset(pictures: Sequence[Objects | Detections]) -> dict[str, Any]:
    """Pictures in COCO's form; identifiers count from 1, since 0 means none in places."""
    annotations: list[dict[str, Any]] = []
    for image, picture in enumerate(pictures, start=1):
        boxes = picture.boxes
        sides = boxes[:, 2:] - boxes[:, :2]
        areas = sides.prod(axis=1)
        crowd = np.zeros(len(boxes), dtype=bool)
        scores = None
        if isinstance(picture, Detections):
            scores = picture.scores
        else:
            areas = areas if picture.areas is None else picture.areas
            crowd = crowd if picture.crowd is None else picture.crowd
        for index in range(len(boxes)):
            annotation = {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": int(picture.classes[index]),
                "bbox": [*map(float, boxes[index, :2]), *map(float, sides[index])],
                "area": float(areas[index]),
                "iscrowd": int(crowd[index]),
            }
            if scores is not None:
                annotation["score"] = float(scores[index])
            annotations.append(annotation)
    classes = sorted({int(c) for picture in pictures for c in picture.classes})
    return {
        "images": [{"id": image} for image in range(1, len(pictures) + 1)],
        "annotations": annotations,
        "categories": [{"id": number} for number in classes],
    }


def _mean(precision: npt.NDArray[Any]) -> float:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else float("nan")
