"""Top-1 of power-of-two files: networks x schemes x rounding x calibration images x seeds.

The images: ``real`` training images, ``dgh`` and ``prior`` made by the tool, ``dgh-noise`` likewise
but started from noise, as published; ``zeroq`` to ``sadag`` by the methods of those names. Noise is
of two kinds: ``noise`` is the tool's own (pixels around middle gray, in the model's input range),
``normal`` is N(0, 1) in the model's input units, which flatters noise where the input is normalized
to about that. ``float`` is the network itself. Of ImageNet there is one file: a seed's real images
are drawn from it, and no cell of that seed, whatever its images, is tested on them.

Run from the repository root; the real networks and images are expected in ../shared:

    python benchmarks/accuracy.py --networks cifar10_resnet20 --seeds 0 1 2
    python benchmarks/accuracy.py --schemes W4A8 W4A4 --rounding nearest brecq --keep-images DIR
    python benchmarks/accuracy.py --schemes W4A8 --set qdrop=0 --set bias_correction=none

Each cell is kept in benchmarks/results/accuracy.json under a key such as
``cifar10_resnet20/W4A8/full/adaround/dgh/0``, with settings other than the default behind the
third part; cells that are there are not run again (--fresh runs them). Several runs may write at
the same time. The tables are written to benchmarks/results/accuracy.md (--tables-only: no run).
With --keep-images DIR images are made once for all schemes.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import Cell, add_shard, read_cells, run_cells, write_text

from graph_tools.model import load
from pipeline.evaluate.classification import evaluate_classification
from pipeline.evaluate.datasets import Dataset, open_dataset
from pipeline.images import ImageWriter
from pipeline.preprocessing import Preprocessing
from pipeline.run import QuantizeJob, quantize_file
from pipeline.settings import (
    GenerateSettings,
    InputSettings,
    QuantizeSettings,
    VerifySettings,
)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
RESULTS = ROOT / "benchmarks" / "results"
IMAGENET = ("0.485", "0.456", "0.406"), ("0.229", "0.224", "0.225")
METHODS = ("zeroq", "dsg", "intraq", "genie", "sadag")
IMAGES = ("real", "dgh", "dgh-noise", "noise", "normal", "prior", *METHODS)
DGH = {"dgh": "natural", "dgh-noise": "noise"}  # what they start from


@dataclass(frozen=True, kw_only=True)
class Case:
    mean: tuple[str, ...]
    std: tuple[str, ...]
    test: str
    calibration: str
    num_images: int

    @property
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(
            mean=tuple(map(float, self.mean)), std=tuple(map(float, self.std))
        )


CIFAR = {"test": "cifar10_test_dev.zip", "calibration": "cifar10_train.zip", "num_images": 256}
CASES = {
    "cifar10_resnet20": Case(mean=IMAGENET[0], std=IMAGENET[1], **CIFAR),
    "cifar10_resnet56": Case(mean=IMAGENET[0], std=IMAGENET[1], **CIFAR),
    "cifar10_mobilenetv2": Case(mean=IMAGENET[0], std=IMAGENET[1], **CIFAR),
    "mcunet_cifar10_32": Case(mean=IMAGENET[0], std=IMAGENET[1], **CIFAR),
    "mlperftiny_resnet8_cifar10_tf2onnx_bn": Case(
        mean=("0",), std=("0.00392156862745098",), **CIFAR
    ),
    "mobilenet_v1_025_224_imagenet": Case(
        mean=("0.5",),
        std=("0.5",),
        test="imagenet_dev.zip",
        calibration="imagenet_dev.zip",
        num_images=64,
    ),
}


def held_out(case: Case, seed: int, num_images: int = 0) -> Dataset:
    """The test images, without those of them that are this seed's real calibration images."""
    test = open_dataset(SHARED / "data" / case.test)
    if case.test != case.calibration:
        return test
    return test.without(test.drawn(num_images or case.num_images, seed))


def model_path(name: str) -> Path:
    """The network's file: shipped in models/, or one of the real networks."""
    shipped = ROOT / "models" / f"{name}.onnx"
    return shipped if shipped.exists() else SHARED / "models" / f"{name}.onnx"


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a cell is of.

    Args:
        scheme: such as "W4A8"; "float" for the network itself, whose other parts are empty.
        variant: "full", or with settings other than the default "full,qdrop=0".
    """

    network: str
    scheme: str
    variant: str = ""
    rounding: str = ""
    images: str = ""
    seed: int = 0

    def __str__(self) -> str:
        if self.scheme == "float":
            return f"{self.network}/float"
        parts = (
            self.network,
            self.scheme,
            self.variant,
            self.rounding,
            self.images,
            self.seed,
        )
        return "/".join(map(str, parts))

    @classmethod
    def parse(cls, text: str) -> Key:
        """The inverse of str(); the variant may hold slashes, those of node names."""
        network, scheme, *rest = text.split("/", 2)
        if not rest:
            return cls(network=network, scheme=scheme)
        variant, rounding, images, seed = rest[0].rsplit("/", 3)
        return cls(
            network=network,
            scheme=scheme,
            variant=variant,
            rounding=rounding,
            images=images,
            seed=int(seed),
        )


def variant_name(settings: dict[str, Any], others: dict[str, Any]) -> str:
    """``full,qdrop=0``: the scheme, then what differs from the default, in order of names."""
    found = {**settings, **others}
    words = [str(found.pop("scheme", "full"))]
    for name, value in sorted(found.items()):
        text = " ".join(value) if isinstance(value, (tuple, list)) else value
        words.append(f"{name}={text}")
    return ",".join(words)


def bits_of(scheme: str) -> tuple[int, int]:
    match = re.fullmatch(r"W(\d+)A(\d+)", scheme)
    if match is None:
        raise argparse.ArgumentTypeError(f"{scheme!r} is not like W4A8")
    return int(match[1]), int(match[2])


def normal_noise(model: Path, folder: Path, count: int, seed: int) -> Path:
    shape = load(model).input.shape
    with ImageWriter(folder / "normal.npz", count=count, shape=shape) as writer:
        rng = np.random.default_rng(seed)
        writer.append(rng.standard_normal((count, *shape)).astype(np.float32))
    return folder / "normal.npz"


def float_cell(name: str) -> Cell:
    case = CASES[name]
    start = time.perf_counter()
    test = open_dataset(SHARED / "data" / case.test)
    accuracy = evaluate_classification([model_path(name)], test, case.preprocessing)[0]
    return {"top1": accuracy.top1, "seconds": time.perf_counter() - start}


def quantized_cell(key: Key, settings: dict[str, Any], args: argparse.Namespace) -> Cell:
    case, model = CASES[key.network], model_path(key.network)
    test = held_out(case, key.seed)
    settings = {**settings, "rounding": key.rounding}
    settings["weights"], settings["activations"] = bits_of(key.scheme)
    generation: dict[str, Any] = {"num_images": case.num_images, "seed": key.seed}
    if key.images in ("noise", "prior", *METHODS):
        generation["method"] = key.images
    if key.images in DGH:
        generation |= {"method": "dgh", "start": DGH[key.images]}
    adapted = key.images in (*DGH, *METHODS, "prior")
    steps = f"-{args.iterations}" if args.iterations and adapted else ""
    if steps:
        generation["iterations"] = args.iterations
    kept = None
    if args.keep_images is not None and key.images != "normal":
        args.keep_images.mkdir(parents=True, exist_ok=True)
        kept = args.keep_images / f"{key.network}.{key.images}{steps}.{key.seed}.npz"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        images = kept if kept is not None and kept.exists() else None
        if key.images == "normal":
            images = normal_noise(model, Path(folder), case.num_images, key.seed)
        takes_data = key.images == "real" and images is None
        job = QuantizeJob(
            model=model,
            output=Path(folder) / "q.onnx",
            data=SHARED / "data" / case.calibration if takes_data else None,
            images=images,
            input=InputSettings()
            if args.guess
            else InputSettings(mean=case.mean, std=case.std),
            generation=GenerateSettings(**generation),
            quantization=QuantizeSettings(**settings),
            verification=VerifySettings(max_images=args.verify_images),
        )
        result = quantize_file(job)
        seconds = time.perf_counter() - start
        if kept is not None and not kept.exists():
            temporary = kept.with_name(f".{kept.name}")
            shutil.copyfile(result.folder / "images.npz", temporary)
            temporary.replace(kept)
        accuracy = evaluate_classification([job.output], test, case.preprocessing)[0]
    mixed = result.report["quantization"].get("mixed_precision")
    return {
        "top1": accuracy.top1,
        "quantize": result.report["times"]["quantize"],
        "seconds": seconds,
        "times": result.report["times"],
        "passed": result.proof.passed,
        "sqnr_db": [output["sqnr_db"] for output in result.report["quantization"]["outputs"]],
        "settings": settings | generation,
        **({} if mixed is None else {"mixed_precision": mixed}),
    }


def markdown(cells: dict[str, Cell]) -> str:
    """One table a network and scheme: a row for each variant and rounding."""
    tops: dict[tuple[str, str], dict[tuple[str, str], dict[str, list[Cell]]]] = {}
    floats: dict[str, float] = {}
    for text, cell in cells.items():
        key = Key.parse(text)
        if key.scheme == "float":
            floats[key.network] = cell["top1"]
            continue
        rows = tops.setdefault((key.network, key.scheme), {})
        rows.setdefault((key.variant, key.rounding), {}).setdefault(key.images, []).append(
            cell
        )
    lines = [
        "# Top-1 of power-of-two files, by calibration images",
        "",
        "Percent; mean ± standard deviation over (n) seeds. Seconds: quantization alone, mean over",
        "images and seeds. Written by `python benchmarks/accuracy.py`.",
    ]
    for network, scheme in sorted(tops, key=lambda table: (table[0], *_fewest_last(table[1]))):
        rows = tops[network, scheme]
        used = {images for row in rows.values() for images in row}
        columns = [
            "real",
            "dgh",
            "noise",
            *(i for i in ("dgh-noise", "normal", "prior", *METHODS) if i in used),
        ]
        gaps = ["dgh - real", "dgh - noise", "dgh - float"]
        head = ["scheme, rounding", "float", *columns, *gaps, "seconds"]
        lines += ["", f"## {network}, {scheme}", "", _row(head), "|---" * len(head) + "|"]
        for (variant, rounding), row in sorted(rows.items()):
            means = {i: statistics.mean(c["top1"] for c in found) for i, found in row.items()}
            if network in floats:
                means["float"] = floats[network]
            differences = [
                f"{means[a] - means[b]:+.2f}" if {a, b} <= set(means) else "-"
                for a, b in (gap.split(" - ") for gap in gaps)
            ]
            took = statistics.mean(c["quantize"] for found in row.values() for c in found)
            shown = [_spread(row.get(images, [])) for images in columns]
            float_top1 = f"{means['float']:.2f}" if "float" in means else "-"
            name = f"{variant}, {rounding}"
            lines.append(_row([name, float_top1, *shown, *differences, f"{took:.0f}"]))
    return "\n".join(lines) + "\n"


def _fewest_last(scheme: str) -> tuple[int, int]:
    weights, activations = bits_of(scheme)
    return -weights, -activations


def _row(words: list[str]) -> str:
    return "| " + " | ".join(words) + " |"


def _spread(found: list[Cell]) -> str:
    tops = [cell["top1"] for cell in found]
    if not tops:
        return "-"
    spread = f" ± {statistics.stdev(tops):.2f} ({len(tops)})" if len(tops) > 1 else ""
    return f"{statistics.mean(tops):.2f}{spread}"


def planned(
    args: argparse.Namespace, settings: dict[str, Any]
) -> Iterator[tuple[Key, Callable[[], Cell]]]:
    """The cells that the flags name."""
    others = {
        name: value
        for name, value in (("iterations", args.iterations), ("guess", args.guess))
        if value
    }
    variant = variant_name(settings, others)
    for name in args.networks:
        yield Key(network=name, scheme="float"), functools.partial(float_cell, name)
    for key in grid(args, args.networks, variant):
        yield key, functools.partial(quantized_cell, key, settings, args)


def grid(args: argparse.Namespace, networks: Iterable[str], variant: str) -> Iterator[Key]:
    """The keys that the flags name, those of all networks for a seed before the next seed."""
    for seed, network, scheme, rounding, images in itertools.product(
        args.seeds, networks, args.schemes, args.rounding, args.images
    ):
        yield Key(
            network=network,
            scheme=scheme,
            variant=variant,
            rounding=rounding,
            images=images,
            seed=seed,
        )


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of QuantizeSettings that the flags give, other than what the table goes over."""
    settings: dict[str, Any] = {}
    for name in ("scheme", "weight_scale", "rounding_iterations"):
        if getattr(args, name) is not None:
            settings[name] = getattr(args, name)
    if args.bits:
        settings["bits"] = tuple(args.bits)
    for entry in args.set:
        name, _, value = entry.partition("=")
        try:
            settings[name] = json.loads(value)
        except json.JSONDecodeError:
            settings[name] = value
    return settings


def add_grid(parser: argparse.ArgumentParser, images: Iterable[str], output: str) -> None:
    """Add the flags that `grid` and `settings_of` read, and those about running cells."""
    parser.add_argument("--schemes", nargs="+", default=["W8A8"], metavar="W4A8")
    parser.add_argument("--scheme", choices=["full", "academic"], help="which tensors")
    parser.add_argument("--weight-scale")
    parser.add_argument("--bits", action="append", metavar="PATTERN=W4A8")
    parser.add_argument("--rounding", nargs="+", default=["nearest"])
    parser.add_argument("--rounding-iterations", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE")
    parser.add_argument("--images", nargs="+", default=[*images][:4], choices=[*images])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--keep-images", type=Path, help="folder")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--tables-only", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS / output)
    add_shard(parser)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(CASES), choices=list(CASES))
    add_grid(parser, IMAGES, "accuracy.json")
    parser.add_argument("--iterations", type=int, default=0, help="of generation")
    parser.add_argument("--guess", action="store_true", help="do not give mean and std")
    parser.add_argument("--verify-images", type=int, default=64)
    args = parser.parse_args()
    for scheme in args.schemes:
        bits_of(scheme)
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.tables_only:
        runs = {str(key): run for key, run in planned(args, settings_of(args))}
        run_cells(
            args.output,
            runs,
            lambda cell: f"{cell['top1']:.2f} ({cell['seconds']:.0f} s)",
            fresh=args.fresh,
            part=args.shard,
        )
    tables = markdown(read_cells(args.output))
    write_text(args.output.with_suffix(".md"), tables)
    print(tables)


if __name__ == "__main__":
    main()
