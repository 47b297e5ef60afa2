"""What a tensor can be on its way through the interpreter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graph_tools.integer.arithmetic import Fixed, Integers
from graph_tools.integer.tables import Lookup

__all__ = ["Float", "Stored", "Value"]


@dataclass(frozen=True)
class Stored:
    """Integers as the file stores them, zero point included."""

    integers: Integers


@dataclass(frozen=True)
class Float:
    """A tensor that is in float."""

    values: npt.NDArray[Any]

    def to_float(self) -> npt.NDArray[np.float32]:
        """The tensor."""
        return self.values


Value = Stored | Fixed | Lookup | Float
