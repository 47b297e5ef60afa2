"""What a wrong or missing normalization costs: W8A8 files, by images and by what was said.

``right`` gives the network's mean and std, ``none`` lets the tool find them, the others are
ranges that are wrong on purpose. Images are made by DGH, in the model's own input space; taken
from real pictures, which the normalization turns into input; or Gaussian noise in the range that
it says. Accuracy is measured with the right normalization, as the network would be fed.

Run from the repository root; the real networks and images are expected in ../shared:

    python benchmarks/normalization.py

Each cell is kept in benchmarks/results/normalization.json and not run again; the table is
written beside it.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accuracy import CASES, RESULTS, SHARED, float_cell, model_path
from cells import Cell, read_cells, run_cells, write_text

from pipeline.evaluate.classification import evaluate_classification
from pipeline.evaluate.datasets import open_dataset
from pipeline.run import QuantizeJob, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)

WRONG: dict[str, dict[str, Any]] = {
    "[-1,1]": {"range": "-1,1"},
    "[0,255]": {"range": "0,255"},
    "[0,1]-BGR": {"range": "0,1", "channels": "bgr"},
}
IMAGES = ("dgh", "real", "noise")


def input_settings(network: str, said: str) -> InputSettings:
    if said == "right":
        return InputSettings(mean=CASES[network].mean, std=CASES[network].std)
    return InputSettings(**WRONG.get(said, {}))


def cell(network: str, said: str, images: str, args: argparse.Namespace) -> Cell:
    case = CASES[network]
    test = open_dataset(SHARED / "data" / case.test)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        generation: dict[str, Any] = {"num_images": args.num_images, "seed": args.seed}
        if images != "real":
            generation["method"] = images
        job = QuantizeJob(
            model=model_path(network),
            output=Path(folder) / "q.onnx",
            data=SHARED / "data" / case.calibration if images == "real" else None,
            input=input_settings(network, said),
            generation=GenerateSettings(**generation),
            quantization=QuantizeSettings(),
            verification=VerifySettings(max_images=16, interpreter_images=0),
        )
        report = quantize_file(job).report
        accuracy = evaluate_classification([job.output], test, case.preprocessing)[0]
    quality = (report["generation"] or {}).get("quality")
    return {
        "top1": accuracy.top1,
        "preprocessing": report["preprocessing"],
        "quality": quality and quality["line"],
        "warnings": report["warnings"],
        "seconds": time.perf_counter() - start,
    }


def markdown(cells: dict[str, Cell]) -> str:
    lines = [
        "# Top-1 of W8A8 files by normalization",
        "",
        "Percent, 64 calibration images, measured with the right normalization.",
        "Written by `python benchmarks/normalization.py`.",
    ]
    networks = dict.fromkeys(key.split("/")[0] for key in cells)
    for network in networks:
        head = ["said", *IMAGES, "warned"]
        lines += ["", f"## {network}, float {cells[f'{network}/float']['top1']:.2f}", ""]
        lines += [_row(head), "|---" * len(head) + "|"]
        for said in ("right", "none", *WRONG):
            found = [cells.get(f"{network}/{said}/{images}") for images in IMAGES]
            if not any(found):
                continue
            warned = any(
                "contradicts" in text for one in found if one for text in one["warnings"]
            )
            shown = [f"{one['top1']:.2f}" if one else "-" for one in found]
            lines.append(_row([said, *shown, "yes" if warned else "no"]))
    return "\n".join(lines) + "\n"


def _row(words: list[str]) -> str:
    return "| " + " | ".join(words) + " |"


def planned(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Cell]]]:
    for network in args.networks:
        yield f"{network}/float", functools.partial(float_cell, network)
        for images in args.images:
            for said in args.said:
                yield (
                    f"{network}/{said}/{images}",
                    functools.partial(cell, network, said, images, args),
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    networks = ["cifar10_resnet20", "mlperftiny_resnet8_cifar10_tf2onnx_bn"]
    parser.add_argument("--networks", nargs="+", default=networks, choices=list(CASES))
    parser.add_argument("--images", nargs="+", default=[*IMAGES], choices=IMAGES)
    said = ["right", "none", *WRONG]
    parser.add_argument("--said", nargs="+", default=said, choices=said)
    parser.add_argument("--num-images", type=int, default=64, help="to calibrate with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--tables-only", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / "normalization.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.tables_only:
        runs = dict(planned(args))
        run_cells(args.output, runs, lambda found: f"{found['top1']:.2f}", fresh=args.fresh)
    table = markdown(read_cells(args.output))
    write_text(args.output.with_suffix(".md"), table)
    print(table)


if __name__ == "__main__":
    main()
