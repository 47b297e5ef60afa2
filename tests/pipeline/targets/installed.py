"""Compilers that are installed, for tests that skip without them."""

from __future__ import annotations

import pytest

from pipeline.environments import find_environment, how_to_get
from pipeline.target_profiles import load_profile
from pipeline.verify.compilers.process import RUNNERS, ProcessEngine


def installed(name: str, *, timeout: float = 300) -> ProcessEngine:
    """A compiler on one thread; skips the test if it is not installed."""
    profile = load_profile(name)
    environment = find_environment(profile)
    if environment is None:
        pytest.skip(f"{name} is not installed: {how_to_get(profile)}")
    return ProcessEngine(
        name=name,
        version=environment.version,
        python=environment.python,
        script=RUNNERS / f"{name}.py",
        timeout=timeout,
        threads=1,
        opset=profile.verify.opset,
    )
