"""Scripts that run inside the compilers' own environments, and import nothing of this package.

`host` reads a request from a folder, has one of the other scripts compile and run the model, and
writes the result into that folder. A script has four functions::

    def version() -> str
    def compile(model: str, folder: str) -> Any          # the .onnx file; a folder to work in
    def run(compiled: Any, batch: np.ndarray) -> list[np.ndarray]   # in the graph's order
    def integer_kernels(compiled: Any) -> tuple[int, int] | None    # of weighted operators
"""

from __future__ import annotations
