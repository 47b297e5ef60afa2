"""Draw the figures of the documentation: ``python -m docs.make_figures``.

Everything in them is computed on the networks in ``models/``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

import pipeline
from graph_tools.compare import run_tensors
from pipeline.run import preprocessing_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"


def save(name: str) -> None:
    """Write the current figure."""
    plt.savefig(FIGURES / name, dpi=110, metadata={"Software": None})
    plt.close()
    with Image.open(FIGURES / name) as drawn:  # 256 colors are a third of the bytes
        small = drawn.convert("RGB").quantize(256)
    small.save(FIGURES / name, optimize=True)


def images() -> None:
    """Images at the start of optimization and at its end."""
    model = pipeline.load(ROOT / "models" / "cifar10_mobilenetv2.onnx")
    shown = []
    with tempfile.TemporaryDirectory() as folder:
        for iterations in (1, 80):
            settings = pipeline.GenerateSettings(num_images=16, iterations=iterations)
            made = pipeline.generate_images(
                model, Path(folder) / f"{iterations}.npz", settings
            )
            preprocessing = preprocessing_of(model, pipeline.InputSettings())
            shown.append(preprocessing.invert(made.images.load(16), model.input.layout))
    _, axes = plt.subplots(1, 2, figsize=(7, 3.7), layout="constrained")
    for axis, pictures, title in zip(
        axes, shown, ("at the start", "after 80 steps"), strict=True
    ):
        tiles = np.asarray(pictures).reshape(4, 4, *pictures[0].shape)
        axis.imshow(np.concatenate(np.concatenate(tiles, axis=1), axis=1))
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    save("images.png")


def thresholds() -> None:
    """The values of one tensor, and the error that each power-of-two threshold makes."""
    model = pipeline.load(ROOT / "models" / "digits_resnet.onnx")
    normalization = pipeline.InputSettings(mean=("0.5",), std=("0.5",))
    with tempfile.TemporaryDirectory() as folder:
        settings = pipeline.GenerateSettings(num_images=64, iterations=30)
        made = pipeline.generate_images(
            model, Path(folder) / "i.npz", settings, input=normalization
        )
        quantization = pipeline.quantize_model(
            model, made.images, pipeline.QuantizeSettings(activations=4)
        )
        tensors = quantization.plan.tensors
        name = next(n for n in list(tensors)[1:] if not tensors[n].signed)
        values = run_tensors(quantization.model.proto, [name], made.images.load(64))[name]
    chosen = tensors[name].exponent
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    left.hist(values.ravel(), bins=80, color="0.6", log=True)
    exponents = np.arange(int(chosen) - 3, int(chosen) + 3)
    errors = []
    for exponent in exponents:
        scale = 2.0**exponent
        rounded = np.clip(np.rint(values / scale), 0, 15) * scale
        errors.append(float(np.mean(np.square(values - rounded))))
        last = 15.5 * scale
        if last <= values.max() * 1.05:
            color = "C3" if exponent == chosen else "C0"
            left.axvline(last, color=color, linewidth=1.5 if exponent == chosen else 0.8)
    left.set_xlabel("value of the tensor (lines: where 4 bits end)")
    left.set_ylabel("how often")
    colors = ["C3" if exponent == chosen else "C0" for exponent in exponents]
    right.bar(exponents, errors, color=colors)
    right.set_yscale("log")
    right.set_xlabel("exponent of the scale (red: chosen)")
    right.set_ylabel("mean squared error")
    save("thresholds.png")


DRAW = {"images": images, "thresholds": thresholds}

if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    for word in sys.argv[1:] or DRAW:
        DRAW[word]()
