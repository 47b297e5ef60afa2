"""The methods of making images, by name. Each is a module: an objective and its defaults."""

from __future__ import annotations

from pipeline.generate.dgh import make_dgh
from pipeline.generate.diversity import make_prior
from pipeline.generate.dsg import make_dsg
from pipeline.generate.genie import make_genie
from pipeline.generate.intraq import make_intraq
from pipeline.generate.job import Make
from pipeline.generate.noise import make_noise
from pipeline.generate.sadag import make_sadag
from pipeline.generate.zeroq import make_zeroq

__all__ = ["METHODS", "NEEDS_BATCH_NORM"]

METHODS: dict[str, Make] = {
    "dgh": make_dgh,
    "zeroq": make_zeroq,
    "dsg": make_dsg,
    "intraq": make_intraq,
    "genie": make_genie,
    "prior": make_prior,
    "sadag": make_sadag,
    "noise": make_noise,
}

NEEDS_BATCH_NORM = frozenset(("dgh", "zeroq", "dsg", "intraq", "genie", "sadag"))
"""Methods that match BatchNormalization statistics and nothing else."""
