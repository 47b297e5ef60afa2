from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluate.average_precision import Detections, Objects, mean_average_precision
from pipeline.evaluate.suppression import overlaps, suppress


def objects(*rows: tuple[float, ...]) -> Objects:
    """Rows: class, x1, y1, x2, y2."""
    values = np.array(rows, dtype=np.float64).reshape(-1, 5)
    return Objects(boxes=values[:, 1:], classes=values[:, 0].astype(np.int64))


def found(*rows: tuple[float, ...]) -> Detections:
    """Rows: score, class, x1, y1, x2, y2."""
    values = np.array(rows, dtype=np.float64).reshape(-1, 6)
    classes = values[:, 1].astype(np.int64)
    return Detections(boxes=values[:, 2:], scores=values[:, 0], classes=classes)


def test_by_hand():
    """Three objects; found: one exactly, nothing, one with an overlap of 62/100.

    Up to an overlap of 0.6 precision is 1 at the 34 recalls 0..0.33, 2/3 at the 33 recalls
    0.34..0.66 and 0 beyond; from 0.65 on the third detection is wrong, too.
    """
    truth = [
        objects((0, 0, 0, 10, 10), (0, 20, 20, 30, 30)),
        objects((0, 0, 0, 10, 10)),
    ]
    detections = [
        found((0.9, 0, 0, 0, 10, 10), (0.7, 0, 20, 20, 30, 26.2)),
        found((0.8, 0, 40, 40, 50, 50)),
    ]
    good, bad = (34 + 33 * 2 / 3) / 101, 34 / 101
    map50, map50_95 = mean_average_precision(truth, detections)
    assert map50 == pytest.approx(good)
    assert map50_95 == pytest.approx((3 * good + 7 * bad) / 10)


def test_classes_count_alike_and_wrong_ones_do_not():
    truth = [objects((0, 0, 0, 10, 10), (0, 20, 0, 30, 10), (7, 0, 20, 10, 30))]
    # Both objects of class 0; that of class 7 is called 3, a class that does not occur.
    detections = [
        found((0.9, 0, 0, 0, 10, 10), (0.8, 0, 20, 0, 30, 10), (0.99, 3, 0, 20, 10, 30))
    ]
    assert mean_average_precision(truth, detections) == pytest.approx((0.5, 0.5))


def test_nothing_found_and_nothing_to_find():
    assert mean_average_precision([objects((0, 0, 0, 1, 1))], [found()]) == (0.0, 0.0)
    assert all(map(np.isnan, mean_average_precision([objects()], [found()])))


def test_pycocotools_says_the_same_of_files_in_its_own_format(tmp_path: Path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    rng = np.random.default_rng(0)
    truth, detections, annotations, results = [], [], [], []
    for image in range(1, 13):
        count = int(rng.integers(1, 9))
        corners = rng.uniform(0, 80, (count, 2))
        boxes = np.concatenate([corners, corners + rng.uniform(5, 40, (count, 2))], axis=1)
        classes = rng.integers(0, 4, count)
        crowd = rng.random(count) < 0.15
        truth.append(
            Objects(boxes=boxes, classes=classes, areas=np.full(count, 50.0), crowd=crowd)
        )
        moved = np.repeat(boxes, 3, axis=0) + rng.normal(0, 2, (3 * count, 4))
        labels = np.where(rng.random(3 * count) < 0.8, np.repeat(classes, 3), 2)
        scores = rng.random(3 * count).round(2)  # ties, too
        detections.append(Detections(boxes=moved, scores=scores, classes=labels))
        for index in range(count):
            x, y, x2, y2 = boxes[index]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(classes[index]) + 10,
                    "bbox": [x, y, x2 - x, y2 - y],
                    "area": 50.0,
                    "iscrowd": int(crowd[index]),
                }
            )
        for score, label, (x, y, x2, y2) in zip(scores, labels, moved, strict=True):
            results.append(
                {
                    "image_id": image,
                    "category_id": int(label) + 10,
                    "bbox": [x, y, x2 - x, y2 - y],
                    "score": score,
                }
            )
    (tmp_path / "truth.json").write_text(
        json.dumps(
            {
                "images": [{"id": image} for image in range(1, 13)],
                "annotations": annotations,
                "categories": [{"id": number} for number in range(10, 14)],
            }
        )
    )
    (tmp_path / "found.json").write_text(json.dumps(results))
    reference = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(reference, reference.loadRes(str(tmp_path / "found.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    ours = mean_average_precision(truth, detections)
    assert capsys.readouterr().out == ""
    assert 0.2 < ours[1] < ours[0] < 0.95
    assert ours == pytest.approx((evaluation.stats[1], evaluation.stats[0]), abs=1e-12)


def test_overlaps():
    box = np.array([0, 0, 4, 4])
    others = np.array([[0, 0, 4, 4], [2, 2, 6, 6], [4, 0, 8, 4], [1, 1, 1, 3], [3, 3, 1, 1]])
    assert overlaps(box, others) == pytest.approx([1, 4 / 28, 0, 0, 0])
    assert overlaps(box[[0, 0, 0, 0]], others[3:4]) == 0


def brute_force(boxes, scores, classes, overlap) -> list[int]:
    """Greedy suppression as it is defined, in plain Python."""

    def area(a):
        return max(0, a[2] - a[0]) * max(0, a[3] - a[1])

    def too_alike(a, b):
        common = area([max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])])
        union = area(a) + area(b) - common
        return union > 0 and common / union > overlap

    kept: list[int] = []
    for i in sorted(range(len(boxes)), key=lambda i: (-scores[i], i)):
        if not any(classes[k] == classes[i] and too_alike(boxes[k], boxes[i]) for k in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_suppression_is_that_of_brute_force(seed: int, overlap: float):
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 20, (120, 2))
    boxes = np.concatenate([corners, corners + rng.integers(-1, 12, (120, 2))], axis=1)
    scores = rng.integers(0, 30, 120) / 30  # many ties
    classes = rng.integers(0, 3, 120)
    expected = brute_force(boxes.tolist(), scores.tolist(), classes.tolist(), overlap)
    kept = suppress(boxes, scores, classes, overlap=overlap, most=1000)
    assert kept.tolist() == expected
    assert suppress(boxes, scores, classes, overlap=overlap, most=7).tolist() == expected[:7]
    none = suppress(boxes[:0], scores[:0], classes[:0], overlap=overlap, most=7)
    assert none.dtype == np.int64
    assert not len(none)
