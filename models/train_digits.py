"""Train the two shipped networks on scikit-learn's digits and write them as ONNX.

::

    python models/train_digits.py                             # rewrites models/digits_*.onnx
    python models/train_digits.py --output-dir DIR            # writes them elsewhere
    python models/train_digits.py --export-held-out FILE.npz  # only the held-out digits
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import sklearn
import torch
from architectures import DigitsMobileNet, DigitsResNet
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

__all__ = [
    "NETWORKS",
    "Digits",
    "export",
    "held_out_digits",
    "load_split",
    "main",
    "spread_batch_norms",
    "top1",
    "train",
    "write_held_out",
]

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "digits_resnet": DigitsResNet,
    "digits_mobilenet": DigitsMobileNet,
}
EPOCHS = 40
BATCH_SIZE = 64
LEARNING_RATE = 0.1
WEIGHT_DECAY = 1e-3
SEED = 0
# Of pixels in 0..1: the networks take values in [-1, 1].
MEAN, STD = 0.5, 0.5


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Pictures of digits and which digit each is.

    Args:
        images: [N, 8, 8, 1] uint8, 0..255.
        labels: [N] int64, 0..9.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def load_split() -> tuple[Digits, Digits]:
    """Return the digits to train on and the held-out ones: two thirds, one third, by class.

    The split is the same on every call. No network sees the held-out digits in training.
    """
    data = load_digits()
    # The 17 gray levels 0..16 are spread over 0..255.
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)[..., None]
    labels = data.target.astype(np.int64)
    train_index, held_out_index = train_test_split(
        np.arange(len(labels)), test_size=1 / 3, random_state=SEED, stratify=labels
    )
    training, held_out = (
        Digits(images=images[index], labels=labels[index])
        for index in (train_index, held_out_index)
    )
    return training, held_out


def held_out_digits() -> Digits:
    """Return the digits that no network was trained on: 599 of the 1797."""
    return load_split()[1]


def write_held_out(path: Path) -> Digits:
    """Write the held-out digits as an ``.npz`` with the arrays "images" and "labels"."""
    digits = held_out_digits()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.savez(file, images=digits.images, labels=digits.labels)
    return digits


def spread_batch_norms(network: nn.Module) -> None:
    """Start each BatchNorm2d with scales and biases that differ from channel to channel.

    In networks trained for days they differ widely, which is what makes quantization hard;
    a training of seconds would leave them near 1 and 0.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.normal_(0, 0.5).exp_()
                module.bias.normal_(0, 0.4)


def train(network: nn.Module, digits: Digits, *, epochs: int, seed: int) -> None:
    """Train in place: SGD, cosine schedule, shifts of at most one pixel.

    Args:
        network: takes [N, 1, 8, 8] float32, returns logits [N, 10].
        digits: what to train on.
        epochs: passes over the digits.
        seed: of the order of the images and their shifts.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = _to_tensors(digits)
    steps = epochs * (len(labels) // BATCH_SIZE)
    # Decay pulls only the convolutions: scales that shrink together would undo their spread.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in network.parameters() if p.ndim > 1]},
        {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        groups, lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=0.2
    )
    loss_function = nn.CrossEntropyLoss(label_smoothing=0.05)
    network.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        # The incomplete last batch is left out; the order differs from epoch to epoch.
        for start in range(0, len(order) // BATCH_SIZE * BATCH_SIZE, BATCH_SIZE):
            batch = order[start : start + BATCH_SIZE]
            optimizer.zero_grad()
            loss = loss_function(network(_shift(images[batch], generator)), labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def top1(network: nn.Module, digits: Digits) -> float:
    """Return how many digits the network names right, in percent."""
    images, labels = _to_tensors(digits)
    with torch.no_grad():
        right = network(images).argmax(dim=1) == labels
    return 100 * float(right.double().mean())


def export(
    network: nn.Module,
    path: Path,
    metadata: dict[str, str],
    shape: tuple[int, int, int] = (1, 8, 8),
) -> None:
    """Write the network with its BatchNormalization nodes, for any batch size.

    Args:
        network: in evaluation mode.
        path: the ONNX file to write (opset 17, input "image", output "logits").
        metadata: stored in the file's ``metadata_props``.
        shape: [C, H, W] of an image.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with warnings.catch_warnings():
        # The TorchScript exporter is deprecated, but is the one that can keep the nodes.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            network,
            (torch.zeros(1, *shape),),
            str(temporary),
            dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            do_constant_folding=False,
            opset_version=17,
            input_names=["image"],
            output_names=["logits"],
            dynamic_axes={"image": {0: "N"}, "logits": {0: "N"}},
        )
    model = onnx.load(str(temporary))
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(temporary))
    temporary.replace(path)


def make(name: str, path: Path, *, epochs: int = EPOCHS, seed: int = SEED) -> float:
    """Train one of `NETWORKS`, write it, and return its top-1 on the held-out digits."""
    torch.manual_seed(seed)
    network = NETWORKS[name]()
    spread_batch_norms(network)
    training, held_out = load_split()
    train(network, training, epochs=epochs, seed=seed)
    accuracy = top1(network, held_out)
    metadata = {
        "data": f"scikit-learn load_digits, {len(training.labels)} training images",
        "license": "Apache-2.0",
        "made_by": "models/train_digits.py",
        "preprocessing": json.dumps({"mean": [MEAN], "std": [STD]}),
        "top1_held_out": f"{accuracy:.2f} % of {len(held_out.labels)} held-out digits",
        "training": f"seed {seed}, {epochs} epochs",
        "versions": f"torch {torch.__version__}, scikit-learn {sklearn.__version__}",
    }
    export(network, path, metadata)
    return accuracy


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line in the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--networks", nargs="+", choices=sorted(NETWORKS), default=[*NETWORKS])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--export-held-out", type=Path, metavar="FILE.npz")
    options = parser.parse_args(arguments)
    if options.export_held_out is not None:
        digits = write_held_out(options.export_held_out)
        print(f"{options.export_held_out}: {len(digits.labels)} held-out digits")
        return
    # One thread, because the order of a sum decides its last bits.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name in options.networks:
        path = options.output_dir / f"{name}.onnx"
        accuracy = make(name, path, epochs=options.epochs, seed=options.seed)
        print(f"{path}: top-1 {accuracy:.2f} % on held-out digits")


def _to_tensors(digits: Digits) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(digits.images).permute(0, 3, 1, 2).float()
    return (images / 255 - MEAN) / STD, torch.from_numpy(digits.labels)


def _shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by -1, 0 or 1 pixel on each axis; black comes in at the border."""
    count, _, height, width = images.shape
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-MEAN / STD)
    offsets = torch.randint(0, 3, (2, count, 1), generator=generator)
    rows = (offsets[0] + torch.arange(height))[:, :, None]
    columns = (offsets[1] + torch.arange(width))[:, None, :]
    return padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


if __name__ == "__main__":
    main()
