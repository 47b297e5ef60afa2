"""How good is a quantized file, as far as that can be told without labels?

The float and the quantized network run on the same images, of up to three kinds: those that the
quantizer was calibrated with, others that were generated with another seed, and synthetic natural
ones, which no network had a say in. Measured are the share of images that both name the same
(class scores only) and the outputs' signal to noise ratio. `pipeline.drop` makes of the shares an
estimate of the accuracy that quantization costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
import torch

from graph_tools.compare import compare_tensors
from graph_tools.model import Model
from graph_tools.reading import read_proto
from pipeline.generate import default_num_images
from pipeline.generate.network import standard_range
from pipeline.generate.prior import PIXEL_MEAN, PIXEL_STD
from pipeline.generate.synthetic import synthetic_source
from pipeline.images import ImageSet
from pipeline.preprocessing import Preprocessing

__all__ = ["Fidelity", "Kind", "measure_all", "measure_fidelity", "prior_batches"]

Kind = Literal["calibration", "held-out", "prior"]

_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How near a quantized network is to the float one on some images.

    Attributes:
        kind: what the images are.
        images: how many.
        agreement: share of them to which both networks give the same class; None for networks
            that do not have one output of class scores.
        sqnr_db: of the worst output; ``inf`` when equal, None where outputs are no floats.
    """

    kind: Kind
    images: int
    agreement: float | None
    sqnr_db: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        return asdict(self)


def measure_fidelity(
    network: onnx.ModelProto,
    quantized: onnx.ModelProto,
    outputs: Sequence[str],
    batches: Iterable[npt.NDArray[np.float32]],
    kind: Kind,
    *,
    threads: int = 0,
) -> Fidelity:
    """Run both networks on images and compare their outputs.

    Args:
        network: in float.
        quantized: the same in integers, with outputs of the same names.
        outputs: names of the outputs.
        batches: [N, ...] float32 each, in the networks' own layout and normalization.
        kind: what the images are.
        threads: onnxruntime threads; 0 lets it choose.

    Raises:
        ModelError, DataError: as `compare_tensors`.
    """
    count = 0

    def counted() -> Iterator[npt.NDArray[np.float32]]:
        nonlocal count
        for batch in batches:
            count += len(batch)
            yield batch

    pairs = {name: name for name in outputs}
    found = compare_tensors(network, quantized, pairs, counted(), threads=threads).values()
    ratios = [each.sqnr_db for each in found if each.sqnr_db is not None]
    shares = [each.same_top1 for each in found]
    if len(shares) == 1 and shares[0] is None:  # a network that names a class
        shares = [each.agreement for each in found]
    return Fidelity(
        kind=kind,
        images=count,
        agreement=shares[0] if len(shares) == 1 else None,
        sqnr_db=min(ratios, default=None),
    )


def measure_all(
    network: Model,
    written: Path,
    images: ImageSet,
    preprocessing: Preprocessing,
    *,
    held_out: ImageSet | None = None,
    seed: int = 0,
    threads: int = 0,
) -> tuple[Fidelity, ...]:
    """Measure a written file on its calibration images, and on as many synthetic ones.

    Args:
        network: in float, as it was quantized.
        written: the quantized file.
        images: that it was calibrated with.
        preprocessing: how pixels become its input.
        held_out: images generated with another seed, if there are any.
        seed: of the synthetic images.
        threads: onnxruntime threads; 0 lets it choose.
    """
    count = default_num_images(network.input.height, network.input.width)
    quantized = read_proto(written)[0]
    sources: dict[Kind, Iterator[npt.NDArray[np.float32]]] = {
        "calibration": images.batches(_BATCH, limit=count),
        **({} if held_out is None else {"held-out": held_out.batches(_BATCH)}),
        "prior": prior_batches(network, preprocessing, count, seed),
    }
    return tuple(
        measure_fidelity(
            network.proto, quantized, network.outputs, batches, kind, threads=threads
        )
        for kind, batches in sources.items()
    )


def prior_batches(
    model: Model, preprocessing: Preprocessing, count: int, seed: int
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield synthetic natural images, those that ``--method prior`` starts from.

    Args:
        model: the network, of which the input's shape and layout matter.
        preprocessing: how pixels become its input.
        count: how many images.
        seed: of everything random.

    Yields:
        [<= 16, *shape] float32 in the model's own layout and normalization.
    """
    entry = model.input
    generator = torch.Generator().manual_seed(seed)
    source = synthetic_source(preprocessing, entry.channels)
    low, high = standard_range(preprocessing, entry.channels)
    shape = (entry.channels, entry.height, entry.width)
    for start in range(0, count, _BATCH):
        images = torch.clamp(source(min(_BATCH, count - start), shape, generator), low, high)
        pixels = (PIXEL_MEAN + PIXEL_STD * images).numpy().astype(np.float64)
        least, greatest = (
            value.astype(np.float64).reshape(1, -1, 1, 1)
            for value in preprocessing.valid_range(entry.channels)
        )
        values = least + (greatest - least) * pixels
        if entry.layout == "NHWC":
            values = values.transpose(0, 2, 3, 1)
        yield np.ascontiguousarray(values, np.float32)
