"""Top-1 and top-5 accuracy of ONNX files."""

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
from pipeline.evaluate.datasets import Dataset
from pipeline.evaluate.placement import Resize
from pipeline.evaluate.sessions import Session, open_session
from pipeline.preprocessing import Preprocessing

__all__ = ["Accuracy", "OnStep", "evaluate_classification", "ranks"]

logger = logging.getLogger(__name__)

OnStep = Callable[[int, int, Mapping[str, float]], None]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How often a model is right.

    Args:
        model: its file.
        top1: images whose label has the largest score, in percent.
        top5: images whose label is among the five largest scores, in percent; NaN for a network
            that names a class instead of giving scores.
        count: number of images.
        seconds: time in onnxruntime, without reading and decoding.
    """

    model: str
    top1: float
    top5: float
    count: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {
            "model": self.model,
            "top1": self.top1,
            "top5": self.top5,
            "count": self.count,
            "seconds": self.seconds,
        }


def evaluate_classification(
    models: Sequence[Path],
    dataset: Dataset,
    preprocessing: Preprocessing,
    *,
    resize: Resize = "crop",
    threads: int = 0,
    limit: int | None = None,
    model_input: ImageInput | None = None,
    fixed: Mapping[str, npt.NDArray[Any]] | None = None,
    on_step: OnStep | None = None,
) -> tuple[Accuracy, ...]:
    """Run models on the same labelled images and count what they name right.

    The scores are the model's first output, flattened for each image; of equal scores, the
    one with the lowest index wins. A single integer for each image is the class itself.
    Images are decoded once for all models with the same input.

    Args:
        models: ONNX files, float or quantized.
        dataset: images with labels.
        preprocessing: what the models expect.
        resize: how pictures of another size are laid on the input.
        threads: threads of onnxruntime; 0 lets it choose.
        limit: take only this many images, drawn at random with a fixed seed.
        model_input: layout and size, for files that leave them open.
        fixed: arrays for inputs other than the image, for files that still have them.
        on_step: called with images done, images in all, and the top-1 so far by model name.

    Returns:
        One `Accuracy` a model, in the order given.

    Raises:
        DataError: no labels, or more classes than the model has outputs.
        ModelError: onnxruntime cannot load or run a file.
    """
    if dataset.labels is None:
        raise DataError(
            f"has no labels: {dataset.unlabelled}",
            where=str(dataset.path),
            hint="give class folders, or a labels.csv with the header file,label",
        )
    tallies = [
        _Tally(open_session(path, threads=threads, model_input=model_input, fixed=fixed))
        for path in models
    ]
    count = dataset.count if limit is None else max(1, min(limit, dataset.count))
    total, done = count * len(tallies), 0
    for group in _by_input(tallies):
        batches = dataset.batches(
            group[0].session.input,
            preprocessing,
            max(tally.session.batch_size for tally in group),
            limit=count,
            seed=0 if count < dataset.count else None,
            resize=resize,
        )
        for images, labels in batches:
            assert labels is not None
            for tally in group:
                tally.add(images, labels, dataset)
                done += len(images)
                if on_step is not None:
                    so_far = {each.session.path.name: each.top(1) for each in tallies}
                    on_step(done, total, so_far)
    return tuple(tally.result() for tally in tallies)


def ranks(scores: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return how many classes come before the label: 0 is right, below 5 is in the top five.

    Args:
        scores: [N, K]; of equal scores the lowest index comes first, NaN comes last.
        labels: [N], each less than K.

    Returns:
        [N] int64.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    earlier = np.arange(scores.shape[1])[None] < labels[:, None]
    before = (scores > own) | ((scores == own) & earlier)
    return np.asarray(before.sum(axis=1), dtype=np.int64)


class _Tally:
    """Counts of one model."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.right = {1: 0, 5: 0}
        self.names_class = False  # the network ends in ArgMax
        self.count = 0
        self.seconds = 0.0

    def add(
        self, images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], dataset: Dataset
    ) -> None:
        start = time.perf_counter()
        scores = self.session.scores(images)
        self.seconds += time.perf_counter() - start
        if self.count == 0:
            self.names_class = scores.shape[1] == 1 and scores.dtype.kind in "iu"
            if not self.names_class:
                self._check(scores.shape[1], dataset)
        if np.isnan(scores).any():
            logger.warning("%s: some scores are NaN", self.session.path)
        if self.names_class:
            self.right[1] += int((scores[:, 0] == labels).sum())
        else:
            rank = ranks(scores, labels)
            for top in self.right:
                self.right[top] += int((rank < top).sum())
        self.count += len(labels)

    def top(self, top: int) -> float:
        if self.names_class and top > 1:
            return math.nan
        return 100 * self.right[top] / self.count if self.count else 0.0

    def result(self) -> Accuracy:
        accuracy = Accuracy(
            model=str(self.session.path),
            top1=self.top(1),
            top5=self.top(5),
            count=self.count,
            seconds=self.seconds,
        )
        logger.info(
            "%s: top-1 %.2f %%, top-5 %.2f %% of %d images, %.1f s",
            accuracy.model,
            accuracy.top1,
            accuracy.top5,
            accuracy.count,
            accuracy.seconds,
        )
        return accuracy

    def _check(self, num_outputs: int, dataset: Dataset) -> None:
        num_classes = dataset.num_classes or 0
        if num_classes > num_outputs:
            raise DataError(
                f"has {num_classes} classes, but {self.session.path.name} has "
                f"{num_outputs} output(s)",
                where=str(dataset.path),
                hint="give images of the classes that the model was trained on",
            )
        if dataset.class_names is not None and num_classes < num_outputs:
            logger.warning(
                "%s has %d classes, numbered in sorted order, but %s has %d outputs",
                dataset.path,
                num_classes,
                self.session.path.name,
                num_outputs,
            )


def _by_input(tallies: Sequence[_Tally]) -> list[list[_Tally]]:
    """Group models that take the same images, in the order of their first member."""
    groups: dict[tuple[object, ...], list[_Tally]] = {}
    for tally in tallies:
        key = (tally.session.input.shape, tally.session.input.layout)
        groups.setdefault(key, []).append(tally)
    return list(groups.values())
