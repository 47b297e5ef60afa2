"""How precisely the network computes while images are made.

    float32   as the model says
    tf32      float32 with 10 bits of mantissa inside convolutions and products, on GPUs that can
    bfloat16  convolutions and products in bfloat16 (torch's autocast); what they put out has 8 bits
              of mantissa, its moments are summed in float32 and added up in float64

Canvases, optimizer and losses are float32 and float64 throughout. Images need not be exact: what is
written is measured again in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch

__all__ = ["Precision", "arithmetic"]

Precision = Literal["auto", "float32", "tf32", "bfloat16"]


@contextlib.contextmanager
def arithmetic(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute forward passes in a precision.

    The backward pass of a bfloat16 one is in bfloat16; outside of the block a GPU's convolutions
    follow torch's own setting, TF32 by default.

    Args:
        precision: "auto" is float32 on a CPU, tf32 on a GPU.
        device: where.
    """
    if precision == "bfloat16":
        with torch.autocast(device.type, dtype=torch.bfloat16):
            yield
        return
    if device.type != "cuda":
        yield
        return
    fast, convolutions, products = (
        precision != "float32",
        torch.backends.cudnn,
        torch.backends.cuda,
    )
    before = convolutions.allow_tf32, products.matmul.allow_tf32
    convolutions.allow_tf32 = products.matmul.allow_tf32 = fast
    try:
        yield
    finally:
        convolutions.allow_tf32, products.matmul.allow_tf32 = before
