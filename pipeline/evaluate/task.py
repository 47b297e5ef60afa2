"""What is measured: top-1 of classes, or average precision of boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from graph_tools.errors import SettingsError
from pipeline.evaluate.box_datasets import BoxDataset, holds_boxes, open_box_dataset
from pipeline.evaluate.classification import Accuracy, evaluate_classification
from pipeline.evaluate.datasets import Dataset, open_dataset
from pipeline.evaluate.decoders import Decoder, load_decoder
from pipeline.evaluate.detection import DetectionAccuracy, evaluate_detection
from pipeline.evaluate.placement import Resize
from pipeline.settings import DetectionSettings

if TYPE_CHECKING:
    from graph_tools.model import ImageInput
    from pipeline.preprocessing import Preprocessing

__all__ = ["Evaluation", "Measured", "open_evaluation"]

Measured = Accuracy | DetectionAccuracy


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """Labelled images, and how models are measured on them.

    Args:
        task: what the models do.
        dataset: images with labels, or with boxes.
        resize: how pictures of another size are laid on the input.
        decoder: from a detector's outputs to boxes; None for classifiers.
        settings: of detection.
    """

    task: Literal["classification", "detection"]
    dataset: Dataset | BoxDataset
    resize: Resize
    decoder: Decoder | None = field(default=None, repr=False)
    settings: DetectionSettings = field(default_factory=DetectionSettings)

    def run(
        self,
        models: Sequence[Path],
        preprocessing: Preprocessing,
        *,
        threads: int = 0,
        limit: int | None = None,
        model_input: ImageInput | None = None,
        fixed: Mapping[str, npt.NDArray[Any]] | None = None,
        on_step: Callable[[int, int, Mapping[str, float]], None] | None = None,
    ) -> tuple[Measured, ...]:
        """Measure models in the order given; see `evaluate_classification`.

        Raises:
            ZsqError: a file, a picture or a decoder that cannot be used.
        """
        if isinstance(self.dataset, Dataset):
            return evaluate_classification(
                models,
                self.dataset,
                preprocessing,
                resize=self.resize,
                threads=threads,
                limit=limit,
                model_input=model_input,
                fixed=fixed,
                on_step=on_step,
            )
        assert self.decoder is not None
        return evaluate_detection(
            models,
            self.dataset,
            preprocessing,
            self.decoder,
            resize=self.resize,
            min_score=self.settings.min_score,
            overlap=self.settings.nms_overlap,
            threads=threads,
            limit=limit,
            model_input=model_input,
            fixed=fixed,
            on_step=on_step,
        )


def open_evaluation(
    data: Path,
    task: Literal["auto", "classification", "detection"] = "auto",
    settings: DetectionSettings | None = None,
    resize: Resize | None = None,
) -> Evaluation:
    """Open labelled images without decoding them.

    Args:
        data: folder, zip or npz.
        task: auto takes detection for data with boxes.
        settings: of detection.
        resize: by default crop for classifiers and stretch for detectors.

    Raises:
        DataError: the data cannot be used.
        SettingsError: there is no such decoder, or boxes would be cropped away.
    """
    settings = settings or DetectionSettings()
    if task == "classification" or (task == "auto" and not holds_boxes(data)):
        return Evaluation(
            task="classification", dataset=open_dataset(data), resize=resize or "crop"
        )
    if resize == "crop":
        raise SettingsError(
            "what is cropped away cannot be detected",
            where="--resize crop",
            hint="choose stretch or letterbox",
        )
    return Evaluation(
        task="detection",
        dataset=open_box_dataset(data),
        resize=resize or "stretch",
        decoder=load_decoder(settings.decoder),
        settings=settings,
    )
