"""A decoder out of a Python file of the user's."""

from __future__ import annotations

import importlib.util
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from graph_tools.errors import SettingsError

__all__ = ["Hook"]

Array = npt.NDArray[Any]

_SIGNATURE = (
    "decode(outputs, height, width) returns boxes [N, K, 4] in pixels of the input and scores "
    "[N, K, C]"
)


@dataclass(frozen=True, kw_only=True)
class Hook:
    """A function from a file, as a decoder; what goes wrong in it becomes one line.

    Args:
        name: ``path/to/file.py:function``, for messages.
        function: see `pipeline.evaluate.decoders`.
    """

    name: str
    function: Callable[..., Any]

    @classmethod
    def load(cls, path: str, function: str) -> Hook:
        """Run a file and take a function from it.

        Raises:
            SettingsError: no such file or function, or the file fails.
        """
        name = f"{path}:{function}"
        if not Path(path).is_file():
            raise SettingsError("there is no such file", where=f"--decoder {name}")
        spec = importlib.util.spec_from_file_location("zsq_decoder", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise SettingsError(
                f"the file fails: {_line(error, path)}", where=f"--decoder {name}"
            ) from error
        found = getattr(module, function, None)
        if not callable(found):
            raise SettingsError(
                f"the file has no function {function}", where=f"--decoder {name}"
            )
        return cls(name=name, function=found)

    def __call__(
        self, outputs: Mapping[str, Array], height: int, width: int
    ) -> tuple[Array, Array]:
        """Call the function and check what it returns.

        Raises:
            SettingsError: it fails, or returns something else than boxes and scores.
        """
        where, path = f"--decoder {self.name}", self.name.rpartition(":")[0]
        try:
            boxes, scores = map(np.asarray, self.function(dict(outputs), height, width))
        except (Exception, SystemExit) as error:
            raise SettingsError(_line(error, path), where=where, hint=_SIGNATURE) from error
        count = len(next(iter(outputs.values())))
        numeric = boxes.dtype.kind in "fiu" and scores.dtype.kind in "fiu"
        shaped = boxes.ndim == scores.ndim == 3 and boxes.shape[2] == 4
        if not numeric or not shaped or boxes.shape[:2] != scores.shape[:2]:
            shapes = (
                f"{boxes.dtype} {list(boxes.shape)} and {scores.dtype} {list(scores.shape)}"
            )
            raise SettingsError(f"it returned {shapes}", where=where, hint=_SIGNATURE)
        if len(boxes) != count:
            raise SettingsError(
                f"it returned {len(boxes)} rows for {count} image(s)",
                where=where,
                hint=_SIGNATURE,
            )
        return boxes, scores


def _line(error: BaseException, path: str) -> str:
    """Say what was raised, and in which line of the file."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"SyntaxError: {error.msg} (line {error.lineno})"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    place = f" (line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"
