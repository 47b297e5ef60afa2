"""What torchrun tells a process in its environment; without torch, which takes long to import."""

from __future__ import annotations

import os

__all__ = ["started_count", "started_rank"]


def started_count() -> int:
    """Return how many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def started_rank() -> int:
    """Return the number of this process among those that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", "0")) if started_count() > 1 else 0
