"""Every error that a user can cause, in one hierarchy.

::

    ZsqError                          .where, .hint; str() says what, where, what to do
    |- ModelError                     the input model
    |  |- UnsupportedOperatorError    lists all missing operators at once
    |  |- NoBatchNormError            nothing to match images to
    |  '- DynamicShapeError           free dimensions that need --input-shape
    |- SettingsError                  an option's value
    |- DataError                      images, folders, archives
    |- GenerationError                diverged or non-finite
    |- TargetError                    what a runtime or chip cannot take
    |- IntegerOverflowError           a sum that 32 bits do not hold
    '- VerificationError              the file could not be checked at all

The command line prints ``str(error)`` as one line and exits with 2.
"""

from __future__ import annotations

__all__ = [
    "DataError",
    "DynamicShapeError",
    "GenerationError",
    "IntegerOverflowError",
    "ModelError",
    "NoBatchNormError",
    "SettingsError",
    "TargetError",
    "UnsupportedOperatorError",
    "VerificationError",
    "ZsqError",
]


_LONGEST = 400  # characters of a word


class ZsqError(Exception):
    """What went wrong, where, and what to do about it.

    Args:
        what: the fault, without a full stop.
        where: file, node or tensor concerned; empty if the fault has no place.
        hint: what to do; empty if nothing helps.
    """

    def __init__(self, what: str, *, where: str = "", hint: str = "") -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(what, where, hint)

    def __str__(self) -> str:
        line = f"{self.where}: {self.what}" if self.where else self.what
        line = f"{line}; {self.hint}" if self.hint else line
        return " ".join(map(_shortened, line.split()))


def _shortened(word: str) -> str:
    """A name as people can read it; damaged files have names of any length."""
    return (
        word
        if len(word) <= _LONGEST
        else f"{word[: _LONGEST // 2]}...{word[-_LONGEST // 4 :]}"
    )


class ModelError(ZsqError):
    """The input model cannot be used."""


class UnsupportedOperatorError(ModelError):
    """The graph holds operators that the engine lacks; ``missing`` lists them all.

    Args:
        missing: names like ``"Einsum"`` or ``"com.acme:Magic"``.
        where: the file or graph.
        hint: what to do.
    """

    def __init__(
        self,
        missing: tuple[str, ...],
        *,
        where: str = "",
        hint: str = "export without them, or cut the model before them",
    ) -> None:
        self.missing = tuple(sorted(set(missing)))
        if any(name.startswith("com.microsoft") for name in self.missing):
            hint = f"if onnxruntime optimized this file, give the one before that; else {hint}"
        super().__init__(
            f"unsupported operator(s): {', '.join(self.missing)}",
            where=where,
            hint=hint,
        )


class NoBatchNormError(ModelError):
    """The graph has no BatchNormalization whose statistics images could match."""


class DynamicShapeError(ModelError):
    """The input has free dimensions other than the batch."""


class SettingsError(ZsqError):
    """An option has a value that cannot be used."""


class DataError(ZsqError):
    """Images, labels or archives that cannot be used."""


class GenerationError(ZsqError):
    """Image generation diverged."""


class TargetError(ZsqError):
    """A runtime or chip cannot take the model."""


class IntegerOverflowError(ZsqError):
    """An integer computation does not fit into its accumulator; it was not wrapped."""


class VerificationError(ZsqError):
    """The model could not be verified at all (a mismatch is a result, not this error)."""
