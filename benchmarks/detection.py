"""mAP of YOLO-FastestV2 as power-of-two integers: schemes x rounding x calibration images x seeds.

The images: ``dgh`` made by the tool, ``flat`` likewise without stretching the outputs, ``noise``
its Gaussian noise, ``real`` pictures of COCO. There are only 128 labelled ones: every fourth (32)
is for calibration, and all cells are measured on the other 96; those without real pictures on
all 128, too. ``float`` is the network itself.

Run from the repository root; network and pictures are expected in ../shared:

    python benchmarks/detection.py --keep-images DIR
    python benchmarks/detection.py --schemes W4A8 --rounding adaround --keep-images DIR
    python benchmarks/detection.py --bits @output=A16 --keep-images DIR

Each cell is kept in benchmarks/results/detection.json under a key such as
``yolo_fastestv2_coco/W4A8/full/adaround/dgh/0`` (settings other than the default behind the third
part) and not run again; the table is written beside it (--tables-only: no run).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accuracy import SHARED, Key, add_grid, bits_of, grid, settings_of, variant_name
from cells import Cell, read_cells, run_cells, write_text

from graph_tools.model import load
from pipeline.evaluate.box_datasets import BoxDataset, open_box_dataset
from pipeline.evaluate.decoders import load_decoder
from pipeline.evaluate.detection import evaluate_detection
from pipeline.evaluate.sources import PictureSource
from pipeline.generate import generate
from pipeline.images import ImageWriter
from pipeline.preprocessing import Preprocessing
from pipeline.run import QuantizeJob, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)

NETWORK = "yolo_fastestv2_coco"
MODEL = SHARED / "models" / f"{NETWORK}.onnx"
INPUT = InputSettings(mean=("0",), std=("1",), channels="bgr")
PIXELS = Preprocessing(mean=(0.0,), std=(1.0,), channels="bgr")
IMAGES: dict[str, dict[str, Any]] = {
    "dgh": {"method": "dgh"},
    "flat": {"method": "dgh", "output_weight": 0.0},
    "noise": {"method": "noise"},
    "real": {},
}
EVERY = 4  # one picture in so many is for calibration


def split() -> tuple[BoxDataset, BoxDataset, BoxDataset]:
    """All pictures, those for calibration, those that are left to test."""
    dataset = open_box_dataset(SHARED / "data" / "coco_dev.zip")
    everything = range(dataset.count)
    return (
        dataset,
        dataset.only(everything[::EVERY]),
        dataset.only([index for index in everything if index % EVERY]),
    )


def measured(model: Path, dataset: BoxDataset, suffix: str = "") -> Cell:
    accuracy = evaluate_detection(
        [model], dataset, PIXELS, load_decoder("yolo-fastest-v2"), threads=1
    )[0]
    return {f"map50{suffix}": accuracy.map50, f"map50_95{suffix}": accuracy.map50_95}


def calibration_images(kind: str, count: int, seed: int, folder: Path) -> Path:
    """A file of images, made unless the folder has it."""
    path = folder / f"{NETWORK}.{kind}{count}.{seed}.npz"
    if path.exists():
        return path
    model = load(MODEL)
    if kind != "real":
        settings = GenerateSettings(num_images=count, seed=seed, **IMAGES[kind])
        generate(model, settings, path, preprocessing=PIXELS)
        return path
    pictures = split()[1]
    source = PictureSource(files=pictures.files, names=pictures.names)
    order = torch.randperm(pictures.count, generator=torch.Generator().manual_seed(seed))
    with ImageWriter(
        path, count=min(count, pictures.count), shape=model.input.shape
    ) as writer:
        batches = source.batches(order[:count].numpy(), 8, model.input, PIXELS, "stretch")
        for batch in batches:
            writer.append(batch)
    return path


def float_cell() -> Cell:
    everything, _, test = split()
    return {**measured(MODEL, test), **measured(MODEL, everything, "_all")}


def quantized_cell(key: Key, settings: dict[str, Any], args: argparse.Namespace) -> Cell:
    everything, _, test = split()
    settings = {**settings, "rounding": key.rounding}
    settings["weights"], settings["activations"] = bits_of(key.scheme)
    with tempfile.TemporaryDirectory() as folder:
        kept = args.keep_images or Path(folder)
        kept.mkdir(parents=True, exist_ok=True)
        images = calibration_images(key.images, args.count, key.seed, kept)
        start = time.perf_counter()
        job = QuantizeJob(
            model=MODEL,
            output=Path(folder) / "q.onnx",
            images=images,
            input=INPUT,
            generation=GenerateSettings(seed=key.seed),
            quantization=QuantizeSettings(**settings),
            verification=VerifySettings(max_images=4, interpreter_images=0),
        )
        result = quantize_file(job)
        cell = measured(job.output, test)
        if key.images != "real":
            cell |= measured(job.output, everything, "_all")
    return {
        **cell,
        "seconds": time.perf_counter() - start,
        "passed": result.proof.passed,
        "sqnr_db": {
            output["name"]: output["sqnr_db"]
            for output in result.report["quantization"]["outputs"]
        },
        "images": args.count,
    }


def markdown(cells: dict[str, Cell]) -> str:
    tops: dict[tuple[str, str, str], dict[str, list[Cell]]] = {}
    floats: Cell = {}
    for text, cell in cells.items():
        key = Key.parse(text)
        if key.scheme == "float":
            floats = cell
            continue
        row = tops.setdefault((key.scheme, key.variant, key.rounding), {})
        row.setdefault(key.images, []).append(cell)
    lines = [
        "# mAP of YOLO-FastestV2 as power-of-two integers, by calibration images",
        "",
        "Percent on 96 pictures of COCO; 32 others are the real calibration images. In brackets on",
        "all 128 where no real pictures were used. Mean ± standard deviation over (n) seeds.",
        "Written by `python benchmarks/detection.py`.",
        "",
        f"Float: mAP@0.5 {floats['map50']:.2f} ({floats['map50_all']:.2f}), "
        f"mAP@0.5:0.95 {floats['map50_95']:.2f} ({floats['map50_95_all']:.2f}).",
    ]
    for name, title in (("map50", "mAP@0.5"), ("map50_95", "mAP@0.5:0.95")):
        head = ["scheme", "settings", "rounding", *IMAGES, "dgh - float", "dgh - real"]
        lines += ["", f"## {title}", "", _row(head), "|---" * len(head) + "|"]
        for (scheme, variant, rounding), found in sorted(tops.items()):
            means = {
                images: statistics.mean(cell[name] for cell in row)
                for images, row in found.items()
            }
            means["float"] = floats[name]
            gaps = [
                f"{means[a] - means[b]:+.2f}" if {a, b} <= set(means) else "-"
                for a, b in (("dgh", "float"), ("dgh", "real"))
            ]
            shown = [_shown(found.get(images, []), name) for images in IMAGES]
            lines.append(_row([scheme, variant, rounding, *shown, *gaps]))
    return "\n".join(lines) + "\n"


def _row(words: list[str]) -> str:
    return "| " + " | ".join(words) + " |"


def _shown(cells: list[Cell], name: str) -> str:
    if not cells:
        return "-"
    values = [cell[name] for cell in cells]
    spread = ""
    if len(values) > 1:
        spread = f" ± {statistics.stdev(values):.2f} ({len(values)})"
    whole = [cell[f"{name}_all"] for cell in cells if f"{name}_all" in cell]
    brackets = f" [{statistics.mean(whole):.2f}]" if whole else ""
    return f"{statistics.mean(values):.2f}{spread}{brackets}"


def planned(args: argparse.Namespace) -> Iterator[tuple[Key, Callable[[], Cell]]]:
    settings = settings_of(args)
    others = {"images": args.count} if args.count != 32 else {}
    variant = variant_name(settings, others)
    yield Key(network=NETWORK, scheme="float"), float_cell
    for key in grid(args, [NETWORK], variant):
        yield key, functools.partial(quantized_cell, key, settings, args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_grid(parser, IMAGES, "detection.json")
    parser.add_argument("--count", type=int, default=32, help="calibration images")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.tables_only:
        run_cells(
            args.output,
            {str(key): run for key, run in planned(args)},
            lambda cell: f"mAP@0.5 {cell['map50']:.2f}, mAP@0.5:0.95 {cell['map50_95']:.2f}",
            fresh=args.fresh,
            part=args.shard,
        )
    table = markdown(read_cells(args.output))
    write_text(args.output.with_suffix(".md"), table)
    print(table)


if __name__ == "__main__":
    main()
