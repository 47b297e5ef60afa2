"""Train the shipped MobileNetV2 on CIFAR-10 pictures and write it as ONNX.

::

    python models/train_cifar.py TRAIN.zip TEST.zip [-o FILE.onnx]

writes models/cifar10_mobilenetv2.onnx, or the file given. The zips hold ``CLASS/NAME.jpg``,
32x32. The test pictures are read once, after the training: nothing is chosen by them. A run
that was stopped goes on from its last epoch (``--checkpoint``).
"""

from __future__ import annotations

import argparse
import io
import json
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from architectures import CifarMobileNet
from PIL import Image
from torch import nn
from train_digits import export

__all__ = ["Pictures", "main", "read_pictures", "top1", "train"]

EPOCHS = 18
BATCH_SIZE = 128
LEARNING_RATE = 0.2
WEIGHT_DECAY = 3e-4
LABEL_SMOOTHING = 0.05
MARGIN = 4
SEED = 0
# Of pixels in 0..1: the usual normalization of RGB pictures.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """Pictures and the number of each one's class.

    Args:
        images: [N, 32, 32, 3] uint8, RGB.
        labels: [N] int64, classes in sorted order of their names.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]


def read_pictures(path: Path) -> Pictures:
    """Decode a zip of class folders."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        folders = [name.split("/")[-2] for name in names]
        classes = sorted(set(folders))
        images = [
            np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
            for name in names
        ]
    labels = np.array([classes.index(folder) for folder in folders], dtype=np.int64)
    return Pictures(images=np.stack(images), labels=labels)


def train(
    network: nn.Module, pictures: Pictures, *, epochs: int, seed: int, checkpoint: Path
) -> float:
    """Train in place: SGD, one-cycle schedule, mirrored and shifted by up to 4 pixels.

    Args:
        network: takes [N, 3, 32, 32] float32, returns logits [N, 10].
        pictures: what to train on.
        epochs: passes over the pictures.
        seed: of their order, mirroring and shifts.
        checkpoint: file that is written after each epoch and gone on from if it is there.

    Returns:
        Seconds of training, those before a checkpoint included.
    """
    generator = torch.Generator().manual_seed(seed)
    margins = ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0))
    padded = torch.from_numpy(np.pad(pictures.images, margins, mode="reflect"))
    labels = torch.from_numpy(pictures.labels)
    steps = len(labels) // BATCH_SIZE
    groups: list[dict[str, Any]] = [
        {"params": [p for p in network.parameters() if p.ndim > 1]},
        {"params": [p for p in network.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(
        groups, lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=epochs * steps, pct_start=0.25
    )
    loss_function = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    parts = {"network": network, "optimizer": optimizer, "schedule": schedule}
    first, seconds = _resume(parts, generator, checkpoint)
    for epoch in range(first, epochs):
        start, losses = time.perf_counter(), 0.0
        network.train()
        order = torch.randperm(len(labels), generator=generator)
        for batch in order[: steps * BATCH_SIZE].view(steps, BATCH_SIZE):
            optimizer.zero_grad()
            loss = loss_function(network(_augment(padded, batch, generator)), labels[batch])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses += loss.item()
        seconds += time.perf_counter() - start
        _save(parts, generator, checkpoint, epoch + 1, seconds)
        print(f"epoch {epoch + 1}: loss {losses / steps:.3f} ({seconds:.0f} s)", flush=True)
    network.eval()
    return seconds


def top1(network: nn.Module, pictures: Pictures) -> float:
    """Return how many pictures the network names right, in percent."""
    right = 0
    with torch.no_grad():
        for start in range(0, len(pictures.labels), 500):
            images = torch.from_numpy(pictures.images[start : start + 500])
            found = network(_normalize(images)).argmax(dim=1).numpy()
            right += int((found == pictures.labels[start : start + 500]).sum())
    return 100 * right / len(pictures.labels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line in the module docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("train", type=Path, metavar="TRAIN.zip")
    parser.add_argument("test", type=Path, metavar="TEST.zip")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="default: FILE.pt beside the output")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args(arguments)
    output = options.output or Path(__file__).resolve().parent / "cifar10_mobilenetv2.onnx"
    checkpoint = options.checkpoint or output.with_suffix(".pt")
    # One thread, because the order of a sum decides its last bits.
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    network = CifarMobileNet().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    training = read_pictures(options.train)
    seconds = train(
        network, training, epochs=options.epochs, seed=options.seed, checkpoint=checkpoint
    )
    test = read_pictures(options.test)
    accuracy = top1(network, test)
    metadata = {
        "data": f"CIFAR-10, {len(training.labels)} training images, re-encoded as JPEG",
        "license": "Apache-2.0",
        "made_by": "models/train_cifar.py",
        "preprocessing": json.dumps({"mean": MEAN, "std": STD}),
        "top1_test": f"{accuracy:.2f} % of {len(test.labels)} test images",
        "training": f"seed {options.seed}, {options.epochs} epochs, {seconds:.0f} s, one thread",
        "versions": f"torch {torch.__version__}",
    }
    network = network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    export(network, output, metadata, shape=(3, 32, 32))
    print(f"{output}: top-1 {accuracy:.2f} %, trained for {seconds:.0f} s")


def _augment(
    padded: torch.Tensor, batch: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Cut 32x32 pixels out of each padded picture and mirror half of them.

    Args:
        padded: [N, 40, 40, 3] uint8.
        batch: [B] int64, which pictures.
        generator: of the offsets and what is mirrored.

    Returns:
        [B, 3, 32, 32] float32, normalized, channels last in memory.
    """
    count, size = len(batch), padded.shape[1] - 2 * MARGIN
    offsets = torch.randint(0, 2 * MARGIN + 1, (2, count, 1), generator=generator)
    mirrored = torch.randint(0, 2, (count, 1), generator=generator, dtype=torch.bool)
    span = torch.arange(size)
    rows = offsets[0] + span
    columns = offsets[1] + torch.where(mirrored, span.flip(0), span)
    return _normalize(padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]])


def _normalize(images: torch.Tensor) -> torch.Tensor:
    values = (images.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    return values.permute(0, 3, 1, 2)


def _resume(
    parts: dict[str, Any], generator: torch.Generator, checkpoint: Path
) -> tuple[int, float]:
    if not checkpoint.exists():
        return 0, 0.0
    state = torch.load(checkpoint, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    generator.set_state(state["generator"])
    return int(state["epoch"]), float(state["seconds"])


def _save(
    parts: dict[str, Any],
    generator: torch.Generator,
    checkpoint: Path,
    epoch: int,
    seconds: float,
) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"generator": generator.get_state(), "epoch": epoch, "seconds": seconds}
    temporary = checkpoint.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(checkpoint)


if __name__ == "__main__":
    main()
