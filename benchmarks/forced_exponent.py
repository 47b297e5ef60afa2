"""Top-1 with the step of one tensor forced: which quantizer makes a method better or worse.

Each set of images chooses the quantizers of a W8A8 file, as usual; then once more with another
exponent for one tensor. Where two methods differ by that tensor alone, each gets the other's top-1.

Run from the repository root; the real networks and images are expected in ../shared, the images in
a folder as `accuracy.py --keep-images` leaves them there (NETWORK.METHOD.SEED.npz):

    python benchmarks/forced_exponent.py --folder DIR --images dgh genie-100 real --exponents -5 -6

Cells are kept in benchmarks/results/forced_exponent.json and not measured again.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accuracy import CASES, RESULTS, held_out, model_path
from cells import Cell, run_cells

import pipeline.quantize
from pipeline.evaluate.classification import evaluate_classification
from pipeline.run import QuantizeJob, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)


def measured(network: str, images: Path, seed: int, tensor: str, exponent: int | None) -> Cell:
    """Quantize with the exponent of a tensor forced (None: as chosen), and evaluate."""
    case, choose = CASES[network], pipeline.quantize.activation_quantizers
    chosen: dict[str, int] = {}

    def forced(*args: Any, **options: Any) -> Any:
        quantizers = choose(*args, **options)
        chosen[tensor] = quantizers[tensor].exponent
        if exponent is not None:
            quantizers[tensor] = replace(quantizers[tensor], exponent=exponent)
        return quantizers

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(pipeline.quantize, "activation_quantizers", forced),
    ):
        job = QuantizeJob(
            model=model_path(network),
            output=Path(folder) / "q.onnx",
            images=images,
            input=InputSettings(mean=case.mean, std=case.std),
            generation=GenerateSettings(seed=seed),
            quantization=QuantizeSettings(),
            verification=VerifySettings(max_images=16, interpreter_images=0),
        )
        quantize_file(job)
        accuracy = evaluate_classification(
            [job.output], held_out(case, seed), case.preprocessing
        )[0]
    return {"top1": accuracy.top1, "chosen": chosen[tensor]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="cifar10_resnet20", choices=list(CASES))
    parser.add_argument("--tensor", default="input", help="name in the prepared network")
    parser.add_argument("--exponents", nargs="+", type=int, default=[-5, -6])
    parser.add_argument("--images", nargs="+", default=["dgh", "genie-100", "real"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "forced_exponent.json")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    runs = {
        f"{args.network}/{args.tensor}/{images}/{seed}/{exponent}": functools.partial(
            measured,
            args.network,
            args.folder / f"{args.network}.{images}.{seed}.npz",
            seed,
            args.tensor,
            exponent,
        )
        for images, seed, exponent in product(args.images, args.seeds, (None, *args.exponents))
    }
    cells = run_cells(
        args.output, runs, lambda cell: f"{cell['top1']:.2f} (chosen: {cell['chosen']})"
    )
    columns = ["as chosen", *map(str, args.exponents)]
    print(f"\n| {args.network}, {args.tensor} | seed | {' | '.join(columns)} |")
    print("|---" * (len(columns) + 2) + "|")
    for images, seed in product(args.images, args.seeds):
        found = [
            cells[f"{args.network}/{args.tensor}/{images}/{seed}/{exponent}"]
            for exponent in (None, *args.exponents)
        ]
        shown = [f"{cell['top1']:.2f}" for cell in found]
        shown[0] += f" ({found[0]['chosen']})"
        print(f"| {images} | {seed} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()
