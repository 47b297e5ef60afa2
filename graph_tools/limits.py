"""What a file may ask of the machine, found before anything of it is run.

A file of a hundred bytes can ask for terabytes, for years of arithmetic, or for functions that
call each other twice, thirty levels deep. Sizes come from shape inference; what inference does
not reach (results whose size depends on values) is not bounded here.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx

from graph_tools.errors import ModelError, ZsqError
from graph_tools.shapes import TensorType, infer
from graph_tools.walk import nested_nodes, subgraphs

__all__ = [
    "MAX_NODES",
    "MAX_TENSOR",
    "MAX_WORK",
    "available_bytes",
    "check_cost",
    "check_file_cost",
    "check_num_nodes",
    "check_sizes",
    "within_memory",
]

MAX_NODES = 2**18
"""The most nodes that a graph may have once its local functions are written out."""

MAX_TENSOR = 2**31
"""The most elements that any tensor may have at the batch sizes used here."""

MAX_WORK = 2**44
"""The most multiplications of one run at the smallest batch: minutes to hours of a CPU."""

_WIDTHS: dict[int, int] = {
    onnx.TensorProto.DOUBLE: 8,
    onnx.TensorProto.INT64: 8,
    onnx.TensorProto.FLOAT: 4,
    onnx.TensorProto.INT32: 4,
    onnx.TensorProto.FLOAT16: 2,
    onnx.TensorProto.BFLOAT16: 2,
}
_POOLS = frozenset("AveragePool LpPool MaxPool".split())


def check_num_nodes(proto: onnx.ModelProto, *, where: str) -> None:
    """Refuse graphs of more than `MAX_NODES` nodes, local functions written out.

    Raises:
        ModelError: too many nodes, or functions that call themselves.
    """
    functions = {(f.domain, f.name): f for f in proto.functions}
    sizes: dict[tuple[str, str], int] = {}
    open_calls: set[tuple[str, str]] = set()
    pending = list(functions)
    while pending:  # callees first, without recursion: chains may be long
        key = pending[-1]
        nodes = [] if key in sizes else list(nested_nodes(functions[key].node))
        waiting = {(n.domain, n.op_type) for n in nodes} & functions.keys() - sizes.keys()
        if key in sizes:
            pending.pop()
        elif waiting & (open_calls | {key}):
            raise ModelError(f"local function '{key[1]}' calls itself", where=where)
        elif waiting:
            open_calls.add(key)
            pending += waiting
        else:
            open_calls.discard(key)
            sizes[key] = sum(sizes.get((n.domain, n.op_type), 1) for n in nodes)
    total = sum(sizes.get((n.domain, n.op_type), 1) for n in nested_nodes(proto.graph.node))
    if total > MAX_NODES:
        raise ModelError(
            f"has {total} nodes when its functions are written out; at most {MAX_NODES} are "
            "supported",
            where=where,
        )


def check_sizes(types: Mapping[str, TensorType]) -> None:
    """Refuse graphs with a tensor of more than `MAX_TENSOR` elements, or than memory holds.

    Raises:
        ModelError: naming the tensor.
    """
    available = available_bytes()
    for name, type_ in types.items():
        shape = type_.static
        if shape is None:
            continue
        elements = math.prod(shape)
        if elements > MAX_TENSOR:
            raise ModelError(f"tensor '{name}' would have {elements} elements", hint=_SMALLER)
        if elements * _width(type_) > available:
            raise _too_much(f"tensor '{name}' would take", elements * _width(type_), available)


def check_cost(
    proto: onnx.ModelProto, types: Mapping[str, TensorType], *, images: int = 1
) -> None:
    """Refuse graphs whose tensors do not fit into memory, or that would run for days.

    Args:
        proto: nodes in an order in which they can run.
        types: of its tensors at the smallest batch.
        images: how many times that batch is run at once.

    Raises:
        ModelError: naming the node at which it is too much.
    """
    available = available_bytes()
    last = {name: i for i, node in enumerate(proto.graph.node) for name in _read(node)}
    kept = {value.name for value in proto.graph.output}
    alive = work = 0
    for index, node in enumerate(proto.graph.node):
        name = node.name or next(iter(node.output), "")
        alive += sum(_num_bytes(types.get(output)) for output in node.output)
        if alive * images > available:
            raise _too_much(
                f"the tensors at node '{name}' would take", alive * images, available
            )
        work += max(0, _work(node, types))
        if work > MAX_WORK:
            raise ModelError(
                f"one run takes more than {MAX_WORK:.1e} multiplications (at node '{name}')",
                hint=_SMALLER,
            )
        gone = {tensor for tensor in _read(node) if last[tensor] == index} - kept
        gone |= {output for output in node.output if output not in last} - kept
        alive = max(0, alive - sum(_num_bytes(types.get(tensor)) for tensor in gone))


def check_file_cost(proto: onnx.ModelProto, *, where: str) -> None:
    """Refuse a file, as it is to be run, that asks for too much.

    Args:
        proto: as read; it may be quantized.
        where: the file, for messages.

    Raises:
        ModelError: see `check_num_nodes`, `check_sizes` and `check_cost`.
    """
    check_num_nodes(proto, where=where)
    try:
        types = infer(proto)
        check_sizes(types)
        check_cost(proto, types, images=1)
    except ModelError as error:
        raise ModelError(error.what, where=where, hint=error.hint) from error


def available_bytes() -> int:
    """Return the bytes that tensors may take: half the memory, or what a limit leaves."""
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):  # not everywhere
        return 4 * MAX_TENSOR
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if limit != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            total = min(total, limit - pages * resource.getpagesize())
    return max(0, total)


@contextlib.contextmanager
def within_memory(where: str) -> Iterator[None]:
    """Turn the errors of allocators, of Python, numpy and torch, into one of ours.

    Raises:
        ZsqError: memory ran out in the block.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise ZsqError(
            "needs more memory than there is", where=where, hint=_SMALLER
        ) from error


_SMALLER = "give a smaller --input-shape, or another model"


def _too_much(what: str, asked: int, available: int) -> ModelError:
    return ModelError(
        f"{what} {asked / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB can be used",
        hint=_SMALLER,
    )


def _width(type_: TensorType) -> int:
    return _WIDTHS.get(type_.elem_type, 1)


def _num_bytes(type_: TensorType | None) -> int:
    shape = None if type_ is None else type_.static
    return 0 if type_ is None or shape is None else math.prod(shape) * _width(type_)


def _read(node: onnx.NodeProto) -> set[str]:
    names = set(node.input)
    for graph in subgraphs(node):
        names.update(name for inner in nested_nodes(graph.node) for name in inner.input)
    return names


def _work(node: onnx.NodeProto, types: Mapping[str, TensorType]) -> int:
    """Return the multiplications of a node at the sizes known; 0 for what is elementwise."""

    def shape(names: Iterable[str], index: int) -> tuple[int, ...]:
        name = list(names)[index : index + 1]
        known = types.get(name[0]) if name else None
        return (known.static if known is not None else None) or ()

    made = math.prod(shape(node.output, 0) or (0,))
    if node.op_type in ("Conv", "QLinearConv", "ConvInteger"):
        weight = shape(node.input, 3 if node.op_type == "QLinearConv" else 1)
        return made * math.prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return math.prod(shape(node.input, 0) or (0,)) * math.prod(shape(node.input, 1)[1:])
    if node.op_type in ("MatMul", "Gemm", "MatMulInteger"):
        turned = any(a.name == "transA" and a.i for a in node.attribute)
        rows = shape(node.input, 0)[::-1]  # of a matrix product: summed over the last axis
        return made * (rows or (0,))[-1 if turned else 0]
    if node.op_type in _POOLS:
        kernel = next((a.ints for a in node.attribute if a.name == "kernel_shape"), ())
        return made * math.prod(kernel)
    return 0
