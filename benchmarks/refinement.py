"""What sadag's refinement does to its own terms, by how far it may go; on a shipped network.

Row by row: the statistics loss (as in GENIE), 1 - cosine with neighbors among the pixels (L_GM) and
the cosine with the most similar other image (L_div), without refinement (reach 0) and with it. The
reach is the sum of the rates of all steps as a multiple of the published one; for form pixels it is
RAdam's rate.

    python benchmarks/refinement.py --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from cells import Cell, add_shard, read_cells, run_cells

from graph_tools.batchnorm import find_batch_norms
from graph_tools.model import load
from pipeline.generate import sadag
from pipeline.generate.genie import LatentRun, observe_all
from pipeline.generate.job import Job
from pipeline.generate.last_linear import find_last_linear
from pipeline.images import ImageWriter, open_images
from pipeline.preprocessing import Preprocessing
from pipeline.run import quantizer_of
from pipeline.settings import GenerateSettings, QuantizeSettings

ROOT = Path(__file__).resolve().parent.parent
COUNT = 32
HALF = Preprocessing(mean=(0.5,), std=(0.5,))


def cell(form: str, reach: float, seed: int, iterations: int) -> Cell:
    """Make images, refine them, and measure the terms; reach 0 refines nothing."""
    model = load(ROOT / "models" / "digits_resnet.onnx")
    quantizer = quantizer_of(model, QuantizeSettings(weights=4, activations=4), seed=seed)
    settings = GenerateSettings(
        method="sadag",
        sadag_form=form,  # type: ignore[arg-type]
        num_images=COUNT,
        batch_size=COUNT,
        iterations=iterations,
        seed=seed,
    )
    seen = []

    def kept(images):  # type: ignore[no-untyped-def]
        seen.append(quantizer(images))
        return seen[-1]

    device = torch.device("cpu")
    job = Job(model, settings, find_batch_norms(model), HALF, device, kept)
    names = ("_CODE_REACH", "_WEIGHT_REACH") if form == "generator" else ("_PIXEL_RATE",)
    published = {"_CODE_REACH": 5e-3, "_WEIGHT_REACH": 2e-3, "_PIXEL_RATE": 1.0}
    for name in names:
        setattr(sadag, name, max(reach, 1e-9) * published[name])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "images.npz"
        with ImageWriter(path, count=COUNT, shape=model.input.shape) as writer:
            sadag.make_sadag(job, writer, None)
        inputs = torch.from_numpy(open_images(path, shape=model.input.shape).load())
    layer = find_last_linear(model)
    assert layer is not None
    run = LatentRun(job, [layer.logits])
    quantized = sadag.QuantizedNetwork(*seen[0], HALF, device)
    found = {}
    with torch.no_grad():
        images = run.network.pixels(inputs)
        values = observe_all(run.network, images)
        found["statistics"] = float(run.loss(values))
    for name, weights in (("matching", (1.0, 0.0)), ("diversity", (0.0, 1.0))):
        terms = sadag.Agreement(
            run.network,
            quantized,
            layer.logits,
            count=COUNT,
            matching=weights[0],
            diversity=weights[1],
            generator=torch.Generator().manual_seed(9),
        )
        with torch.no_grad():
            found[name] = float(terms(images, lambda points: points, values, 0))
    return found


def planned(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Cell]]]:
    for seed in args.seeds:
        for form, reaches in (("generator", args.reaches), ("pixels", args.rates)):
            for reach in (0.0, *reaches):
                key = f"{form}/{reach:g}/{args.iterations}/{seed}"
                yield key, functools.partial(cell, form, reach, seed, args.iterations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--iterations", type=int, default=100, help="before the refinement")
    parser.add_argument("--reaches", nargs="*", type=float, default=[1, 10, 30])
    parser.add_argument("--rates", nargs="*", type=float, default=[0.02, 0.1])
    results = ROOT / "benchmarks" / "results" / "refinement.json"
    parser.add_argument("--output", type=Path, default=results)
    add_shard(parser)
    args = parser.parse_args()
    torch.set_num_threads(1)
    run_cells(
        args.output,
        dict(planned(args)),
        lambda found: ", ".join(f"{name} {value:.4f}" for name, value in found.items()),
        part=args.shard,
    )
    print("| form, reach, steps before, seed | statistics | L_GM | L_div |\n|---|---|---|---|")
    for key, found in read_cells(args.output).items():
        words = [f"{found[name]:.3f}" for name in ("statistics", "matching", "diversity")]
        print("| " + " | ".join([key.replace("/", ", "), *words]) + " |")


if __name__ == "__main__":
    main()
