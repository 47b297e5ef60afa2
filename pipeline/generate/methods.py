"""The methods of making images, by name. Each is a module: an objective and its defaults."""

from __future__ import annotations

from pipeline.generate.dgh import make_dgh
from pipeline.generate.diversity import make_prior
from pipeline.generate.job import Make
from pipeline.generate.noise import make_noise

__all__ = ["METHODS", "NEEDS_BATCH_NORM"]

METHODS: dict[str, Make] = {
    "dgh": make_dgh,
    "prior": make_prior,
    "noise": make_noise,
}

NEEDS_BATCH_NORM = frozenset(("dgh",))
"""Methods that match BatchNormalization statistics and nothing else."""
