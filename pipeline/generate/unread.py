"""Which of the settings that a user changed no one looked at: a method has no use for them."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, cast

from pipeline.settings import GenerateSettings

__all__ = ["Watched"]

_GENERAL = frozenset(
    (
        "method",
        "num_images",
        "batch_size",
        "seed",
        "device",
        "engine",
        "oversample",
        "parallel_batches",
    )
)
"""What is read or set for every method, before it begins."""


class Watched:
    """Settings that remember what was read.

    Args:
        settings: as given.
    """

    def __init__(self, settings: GenerateSettings) -> None:
        self._settings = settings
        self._read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self._read.add(name)
        return getattr(self._settings, name)

    @property
    def as_settings(self) -> GenerateSettings:
        """These, as what they stand for."""
        return cast(GenerateSettings, self)

    def unread(self) -> tuple[str, ...]:
        """Return the settings that are not the default's and were not read."""
        return tuple(
            field.name
            for field in fields(GenerateSettings)
            if field.name not in self._read | _GENERAL
            and getattr(self._settings, field.name) != field.default
        )
