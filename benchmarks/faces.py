"""Faces that UltraFace finds before and after quantization: a figure, and how many stay.

Quantizes the network without data (or takes a file that was), runs both on the pictures of COCO in
../shared, and draws the boxes of three of them, on a mosaic, so that no picture leaves its place:

    python benchmarks/faces.py [--quantized FILE]

writes docs/faces.png and benchmarks/results/faces.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from accuracy import RESULTS, ROOT, SHARED
from cells import write_text
from PIL import Image, ImageDraw

from pipeline.evaluate.average_precision import Detections
from pipeline.evaluate.box_datasets import BoxDataset, open_box_dataset
from pipeline.evaluate.decoders import load_decoder
from pipeline.evaluate.detection import detect
from pipeline.evaluate.pictures import decode
from pipeline.evaluate.placement import place, placement
from pipeline.evaluate.sessions import open_session
from pipeline.evaluate.suppression import overlaps
from pipeline.preprocessing import Preprocessing
from pipeline.run import QuantizeJob, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)

MODEL = SHARED / "models" / "ultraface_rfb320.onnx"
PIXELS = Preprocessing(mean=(127 / 255,), std=(128 / 255,))
SHOWN = ("000000000308", "000000000536", "000000000389")
MIN_SCORE, OVERLAP = 0.6, 0.3  # as in the network's own demonstration
SIZE = (300, 200)  # of a picture in the figure
BLOCK = 5
COLORS = {"float": (0, 200, 255), "W8A8": (255, 220, 0)}


def quantized(folder: Path, num_images: int) -> Path:
    job = QuantizeJob(
        model=MODEL,
        output=folder / "ultraface.w8a8.onnx",
        input=InputSettings(mean=("0.498039",), std=("0.501961",)),
        generation=GenerateSettings(num_images=num_images),
        quantization=QuantizeSettings(),
        verification=VerifySettings(),
    )
    print("proof passed:", quantize_file(job).proof.passed)
    return job.output


def faces(model: Path, dataset: BoxDataset) -> list[Detections]:
    """What a file finds in each picture, in its pixels."""
    session, decoder = open_session(model, threads=1), load_decoder("boxes")
    height, width = session.input.height, session.input.width
    found = []
    with dataset.files.opened() as read:
        for name in dataset.names:
            picture = decode(read(name), 3, name)
            pixels = place(picture, height, width, "stretch", name)
            images = PIXELS.apply(pixels[None], session.input.layout)
            boxes, scores = decoder(session.outputs(images)[0][0], height, width)
            chosen = detect(boxes[0], scores[0], min_score=MIN_SCORE, overlap=OVERLAP)
            lie = placement(picture.size, height, width, "stretch")
            found.append(
                Detections(
                    boxes=lie.to_picture(chosen.boxes),
                    scores=chosen.scores,
                    classes=chosen.classes,
                )
            )
    return found


def comparison(before: list[Detections], after: list[Detections]) -> dict[str, Any]:
    """How many faces of the float network the other one finds, and the other way round."""

    def kept(some: list[Detections], others: list[Detections]) -> list[float]:
        return [
            float(overlaps(box, other.boxes).max(initial=0))
            for one, other in zip(some, others, strict=True)
            for box in one.boxes
        ]

    there, back = np.array(kept(before, after)), np.array(kept(after, before))
    return {
        "faces_float": len(there),
        "faces_quantized": len(back),
        "found_again": int((there > 0.5).sum()),
        "not_in_float": int((back <= 0.5).sum()),
        "mean_overlap": float(there[there > 0.5].mean()),
    }


def draw(dataset: BoxDataset, columns: dict[str, list[Detections]]) -> Image.Image:
    """A row for each file, a column for each picture."""
    figure = Image.new("RGB", (SIZE[0] * len(SHOWN), SIZE[1] * len(columns)))
    stems = [Path(name).stem for name in dataset.names]
    with dataset.files.opened() as read:
        for row, (label, found) in enumerate(columns.items()):
            for column, stem in enumerate(SHOWN):
                index = stems.index(stem)
                picture = decode(read(dataset.names[index]), 3, stem)
                lie = placement(picture.size, SIZE[1], SIZE[0], "crop")
                shown = mosaic(Image.fromarray(place(picture, SIZE[1], SIZE[0], "crop", stem)))
                pen = ImageDraw.Draw(shown)
                for box, score in zip(found[index].boxes, found[index].scores, strict=True):
                    scale = np.array([lie.scale_x, lie.scale_y] * 2)
                    x1, y1, x2, y2 = box * scale + np.array([lie.left, lie.top] * 2)
                    pen.rectangle((x1, y1, x2, y2), outline=COLORS[label], width=2)
                    write(pen, (x1, y1 - 12), f"{score:.2f}", COLORS[label])
                write(pen, (4, 2), label, COLORS[label])
                figure.paste(shown, (column * SIZE[0], row * SIZE[1]))
    return figure


def mosaic(picture: Image.Image) -> Image.Image:
    """Blocks of `BLOCK` pixels: what is where can be seen, but not who."""
    small = picture.resize(
        (picture.width // BLOCK, picture.height // BLOCK), Image.Resampling.BOX
    )
    return small.resize(picture.size, Image.Resampling.NEAREST)


def write(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, color: tuple[int, int, int]
) -> None:
    """Text that can be read on any picture."""
    pen.rectangle(pen.textbbox(at, text), fill=(0, 0, 0))
    pen.text(at, text, fill=color)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quantized", type=Path, help="file to take")
    parser.add_argument("--num-images", type=int, default=32, help="to calibrate with")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "faces.png")
    parser.add_argument("--output", type=Path, default=RESULTS / "faces.json")
    args = parser.parse_args()
    dataset = open_box_dataset(SHARED / "data" / "coco_dev.zip")
    with tempfile.TemporaryDirectory() as folder:
        model = args.quantized or quantized(Path(folder), args.num_images)
        columns = {"float": faces(MODEL, dataset), "W8A8": faces(model, dataset)}
    facts = comparison(*columns.values())
    write_text(args.output, json.dumps(facts, indent=1) + "\n")
    figure = draw(dataset, columns).quantize(128)
    figure.save(args.figure, optimize=True)
    print(facts, f"{args.figure}: {args.figure.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
