"""What the comparison of targets needs of a compiler or runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx

__all__ = ["Engine", "Ran", "Refusal"]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What a model gave.

    Attributes:
        outputs: [runs, ...] each, in the graph's order.
        integer_kernels: weighted operators that compute in integers, of how many; None: unknown.
        compile_seconds: once.
        run_seconds: of each run.
    """

    outputs: tuple[npt.NDArray[Any], ...]
    integer_kernels: tuple[int, int] | None
    compile_seconds: float
    run_seconds: tuple[float, ...]


class Refusal(Exception):
    """A compiler did not do it: ``what`` in one line; ``compiled`` says whether it got that far."""

    def __init__(self, what: str, *, compiled: bool) -> None:
        self.what, self.compiled = " ".join(what.split()), compiled
        super().__init__(self.what)


class Engine(Protocol):
    """A compiler or runtime; ``name`` and ``version`` are for the table."""

    @property
    def name(self) -> str:
        """As in the table."""
        ...

    @property
    def version(self) -> str:
        """As installed."""
        ...

    def run(self, proto: onnx.ModelProto, images: npt.NDArray[np.float32]) -> Ran:
        """Compile and run a model of static shape on [runs, batch, ...] images.

        Raises:
            Refusal: it does not compile, run or answer.
        """
        ...
