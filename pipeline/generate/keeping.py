"""Make images so that signals and too little memory do no harm, and errors say what is kept."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib import metadata as packages
from pathlib import Path
from typing import Any, TypeVar

from graph_tools.errors import ZsqError
from graph_tools.image_input import ImageInput
from graph_tools.model import Model, initializers
from pipeline.generate.checkpoints import Checkpoints, Identity, open_checkpoints
from pipeline.generate.defaults import default_batch_size
from pipeline.generate.faults import OutOfMemoryError, memory_guard
from pipeline.preprocessing import Preprocessing
from pipeline.ranks import PeerLostError, Ranks
from pipeline.settings import CheckpointSettings, GenerateSettings
from pipeline.stopping import deferred_stop

__all__ = ["identity_of", "keeping", "with_smaller_batches"]

logger = logging.getLogger(__name__)

_PACKAGES = ("onnx-zsq", "torch", "numpy", "onnxruntime")
_Result = TypeVar("_Result")


def identity_of(
    model: Model,
    settings: GenerateSettings,
    preprocessing: Preprocessing,
    purpose: Mapping[str, Any] | None = None,
) -> Identity:
    """Return all that images depend on but the number of threads, which changes their last bits.

    Args:
        model: the network.
        settings: as the user gave them.
        preprocessing: how pixels become the model's input.
        purpose: settings of the quantizer.
    """
    digest = hashlib.sha256()
    for name, values in initializers(model.proto).items():
        digest.update(name.encode())
        digest.update(values.tobytes())
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(packages.PackageNotFoundError):
            versions[name] = packages.version(name)
    identity = {
        "model": {
            "sha256": model.sha256,
            "weights": digest.hexdigest(),
            "input": list(model.input.shape),
            "batch": model.fixed_batch,
        },
        "setting": asdict(settings),
        "normalization": preprocessing.to_dict(),
        "quantization": dict(purpose or {}),
        "version of": versions,
    }
    plain: Identity = json.loads(json.dumps(identity))
    return plain


@contextlib.contextmanager
def keeping(
    output: Path, settings: CheckpointSettings, identity: Identity, ranks: Ranks
) -> Iterator[Checkpoints]:
    """Keep checkpoints beside ``output`` while the block runs; errors say which one is kept."""
    with open_checkpoints(output, identity, settings, ranks) as checkpoints:
        try:
            yield checkpoints
        except ZsqError as error:
            if newest := checkpoints.newest():
                kept = f"the last good checkpoint is kept: {newest}"
                error.hint = f"{error.hint}; {kept}" if error.hint else kept
            if ranks.count > 1 and not isinstance(error, PeerLostError):
                ranks.fail()
            raise


def with_smaller_batches(
    make: Callable[[int], _Result],
    settings: GenerateSettings,
    entry: ImageInput,
    checkpoints: Checkpoints,
) -> _Result:
    """Make images; start anew with half the batch where memory runs out.

    Args:
        make: takes the size of a batch.
        settings: of which number of images, batch size and device matter.
        entry: the model's input.
        checkpoints: of the run; learns of the smaller batch.

    Returns:
        What ``make`` returns.

    Raises:
        ZsqError: not even one image fits.
        Interrupted: see `generate`.
    """
    size = settings.batch_size or default_batch_size(
        entry.height, entry.width, settings.device
    )
    size = checkpoints.lowered_to or size
    # Optimizers import this when they are first used, and where memory has run out that fails.
    import torch._dynamo

    while True:
        try:
            with deferred_stop() as stop, memory_guard():
                checkpoints.stop = stop
                return make(size)
        except OutOfMemoryError as error:
            reason = str(error).strip().partition("\n")[0] or "no more is known"
        fits = min(size, settings.num_images)
        if checkpoints.ranks.count > 1:
            raise ZsqError(
                f"a batch does not fit into memory ({reason})",
                where=f"process {checkpoints.ranks.rank}",
                hint=f"give a smaller --batch-size, such as {max(1, fits // 2)}",
            )
        if fits == 1:
            raise ZsqError(
                f"not even a single image fits into memory ({reason})",
                where=f"--device {settings.device}",
                hint="give a smaller --input-shape, or another device",
            )
        size = fits // 2
        warning = f"memory ran out: all was started anew with --batch-size {size}"
        logger.warning("%s (%s)", warning, reason)
        checkpoints.warnings.append(warning)
        checkpoints.lowered_to = size
        checkpoints.clear()
        gc.collect()
        if settings.device.startswith("cuda"):
            torch.cuda.empty_cache()
