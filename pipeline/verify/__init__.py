"""Proof that a quantized file computes in integers what it says, bit by bit."""

from __future__ import annotations

from pipeline.verify.exactness import verify
from pipeline.verify.proof import Proof, Saturation, TensorProof

__all__ = ["Proof", "Saturation", "TensorProof", "verify"]
