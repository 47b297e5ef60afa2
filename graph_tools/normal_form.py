"""Turn a model as read into the normal form, and prove that it still computes the same.

The steps: one domain and no local functions; exact rewrites; the image input; control flow
resolved; the opset; shape arithmetic resolved for the most general batch at which a run in
onnxruntime gives what the file gives.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import inliner

from graph_tools.batch import fold_at_batch, generalize_batch, resolve_shapes
from graph_tools.equivalence import Reference, largest_difference
from graph_tools.errors import ModelError
from graph_tools.folding import fold_constants, sort_nodes
from graph_tools.image_input import ImageInput, Layout, find_image_input
from graph_tools.limits import check_cost, check_num_nodes, check_sizes
from graph_tools.opset import (
    IR_VERSION,
    OPSET,
    check_operators,
    check_versions,
    opset_version,
    to_opset,
    to_running_opset,
)
from graph_tools.passes import (
    check_inference_mode,
    constants_to_initializers,
    drop_initializer_inputs,
    drop_unread_masks,
    name_nodes,
    remove_no_ops,
    tell_names_apart,
    to_float32,
)
from graph_tools.quiet import one_line, quiet
from graph_tools.reading import check_weights
from graph_tools.shapes import BATCH, PROBES, annotate, infer, outline, set_shape, with_batch
from graph_tools.walk import all_nodes, subgraphs

__all__ = ["Normalized", "check_graph", "normalize"]

logger = logging.getLogger(__name__)

_DYNAMIC_BATCHES = (2, 1)
_LIKELY_BATCHES = (1, 2, 3, 4, 8, 16, 32)
_MAX_SLOW_PIXELS = 64 * 64
_RE_EXPORT = "export the model again, with opset_version=17 and do_constant_folding=False"


@dataclass(frozen=True, kw_only=True)
class Normalized:
    """A graph in normal form, and what was learned of it; see `graph_tools.model.Model`."""

    proto: onnx.ModelProto
    input: ImageInput
    fixed_batch: int | None
    notes: tuple[str, ...]


def normalize(
    original: onnx.ModelProto,
    *,
    where: str,
    input_shape: tuple[int, ...] | None = None,
    layout: Layout | None = None,
) -> Normalized:
    """Bring a model into normal form.

    Args:
        original: as read, all weights inside; it is not changed.
        where: the file, for messages.
        input_shape: four numbers for dimensions that the file leaves free.
        layout: overrides the layout detected.

    Raises:
        ModelError: see `graph_tools.model.load`; not all of them name the file.
        SettingsError: an `input_shape` that is not four positive numbers.
    """
    check_versions(original, where=where)
    check_num_nodes(original, where=where)
    version = opset_version(original)
    original, repeated = tell_names_apart(original)
    original = to_running_opset(original, where=where)
    check_operators(original, where=where)
    check_weights(original, where=where)
    proto = onnx.ModelProto()
    proto.CopyFrom(original)
    drop_unread_masks(proto)
    check_inference_mode(proto, where=where)
    proto = _standard_proto(proto, where=where)
    notes = [f"names defined twice told apart: {', '.join(repeated)}"] if repeated else []
    notes += _plain_graph(proto)
    image, input_notes = find_image_input(
        proto.graph, input_shape=input_shape, layout=layout, where=where
    )
    notes += input_notes
    if any(True for node in proto.graph.node for _ in subgraphs(node)):
        proto = resolve_shapes(proto, batches=_own_batches(image))
        _refuse_subgraphs(proto)
    _name_last_axes(proto, image)
    proto = to_opset(proto, where=where)
    if version != OPSET:
        notes.append(f"opset {version} converted to {OPSET}")
    proto, fixed_batch, batch_notes = _settle_batch(proto, image, original)
    notes += batch_notes
    return Normalized(proto=proto, input=image, fixed_batch=fixed_batch, notes=tuple(notes))


def _standard_proto(proto: onnx.ModelProto, *, where: str) -> onnx.ModelProto:
    """Return `proto` valid and sorted, with local functions inlined and one domain."""
    proto.ir_version = max(proto.ir_version, 4)  # from IR 4 on, initializers need no input
    proto.graph.name = proto.graph.name or "graph"
    try:
        if proto.functions:
            with quiet():
                proto = inliner.inline_local_functions(proto, convert_version=True)
    except Exception as error:
        raise ModelError(f"local functions cannot be inlined: {one_line(error)}") from error
    # Again, since the bodies of functions may hide what the first check counted as defined.
    check_operators(proto, where=where)
    version = opset_version(proto)
    del proto.functions[:]
    del proto.opset_import[:]
    proto.opset_import.append(onnx.helper.make_opsetid("", version))
    for node in all_nodes(proto):
        node.domain = ""
    drop_initializer_inputs(proto.graph)
    del proto.graph.value_info[:]
    try:
        check_graph(proto)
    except ModelError as error:
        if "sorted" not in error.what:
            raise
        proto = sort_nodes(proto)
        check_graph(proto)
    return proto


def _plain_graph(proto: onnx.ModelProto) -> list[str]:
    """Apply the rewrites that need no shapes, in place; return notes."""
    constants_to_initializers(proto.graph)
    types = to_float32(proto)
    remove_no_ops(proto.graph)
    return [f"{' and '.join(types)} converted to float32"] if types else []


def check_graph(proto: onnx.ModelProto) -> None:
    """Check a model with onnx's checker.

    Raises:
        ModelError: with the first fault.
    """
    bare = outline(proto)
    for value in (*bare.graph.input, *bare.graph.output):
        # The checker wants shapes on the interface, though onnxruntime does not.
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    try:
        with quiet():
            onnx.checker.check_model(bare)
    except Exception as error:
        raise ModelError(f"not a valid graph: {one_line(error)}", hint=_RE_EXPORT) from error


def _refuse_subgraphs(proto: onnx.ModelProto) -> None:
    nodes = [n for n in proto.graph.node if any(True for _ in subgraphs(n))]
    if nodes:
        names = ", ".join(f"{n.op_type} '{n.name or n.output[0]}'" for n in nodes)
        raise ModelError(
            f"control flow that does not fold to constants: {names}",
            hint="export with fixed shapes, or without loops and conditions",
        )


def _own_batches(image: ImageInput) -> tuple[int, ...]:
    """Return the batch sizes at which the file claims to run, as far as they are probed."""
    return PROBES if image.batch is None else (image.batch,)


def _name_last_axes(proto: onnx.ModelProto, image: ImageInput) -> None:
    """Let old Softmax nodes over the last axis say so, whatever the rank.

    Before opset 13 they flatten their input; the converter spells that out with Shape and
    Reshape unless it sees that the axis is the last.
    """
    nodes = [n for n in proto.graph.node if n.op_type in ("Softmax", "LogSoftmax", "Hardmax")]
    if opset_version(proto) >= 13 or not nodes:
        return
    _set_batch(proto, image, image.batch)
    probe = fold_at_batch(proto, image.batch or PROBES[0])
    for node in nodes:
        axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
        shape = probe.shape(node.input[0])
        if shape is not None and axis in (-1, len(shape) - 1):
            del node.attribute[:]
            node.attribute.append(onnx.helper.make_attribute("axis", -1))


def _settle_batch(
    proto: onnx.ModelProto, image: ImageInput, original: onnx.ModelProto
) -> tuple[onnx.ModelProto, int | None, list[str]]:
    """Find the most general batch at which the graph still computes what the file computes."""
    reference = Reference(original, image)
    _set_batch(proto, image, image.batch)
    # First of all, since this refuses tensors that are too large to run anything.
    plain = _finish(resolve_shapes(proto, batches=_own_batches(image)), batch=image.batch)
    if image.batch is None:
        try:
            expected = {count: reference.run(count, count) for count in _DYNAMIC_BATCHES}
        except RuntimeError as error:
            logger.debug("the file does not run at every batch: %s", error)
        else:
            for count, outputs in expected.items():
                _check_equal(plain, outputs, count, reference)
            return plain, None, []
    sizes = (image.batch,) if image.batch else _LIKELY_BATCHES
    batch, outputs, error_text = _first_running(reference, sizes)
    if batch is None:
        return plain, image.batch, [_check_slowly(plain, image, reference, error_text)]
    general = _generalized(proto, image, batch, reference)
    if general is not None:
        return general, None, [f"written for batch size {batch}, generalized to any"]
    if image.batch is None:
        _set_batch(proto, image, batch)
        plain = _finish(resolve_shapes(proto, batches=(batch,)), batch=batch)
    _check_equal(plain, outputs, batch, reference)
    return plain, batch, [f"runs at batch size {batch} only"]


def _set_batch(proto: onnx.ModelProto, image: ImageInput, batch: int | None) -> None:
    shape = (batch or BATCH, *image.shape)
    set_shape(proto.graph.input[0], onnx.TensorProto.FLOAT, shape)


def _first_running(
    reference: Reference, sizes: Sequence[int]
) -> tuple[int | None, list[np.ndarray], str]:
    """Return the first batch size at which the file runs and its outputs, or the error."""
    text = ""
    for size in sizes:
        try:
            return size, reference.run(size, size), ""
        except RuntimeError as error:
            text = text or str(error)
    return None, [], text


def _generalized(
    proto: onnx.ModelProto, image: ImageInput, batch: int, reference: Reference
) -> onnx.ModelProto | None:
    """Return the form for any batch if it proves right on several images, else None."""
    count = 3 if batch == 1 else 2 * batch
    dynamic = onnx.ModelProto()
    dynamic.CopyFrom(proto)
    _set_batch(dynamic, image, None)
    try:
        result = _finish(generalize_batch(dynamic, batch), batch=None)
        actual = reference.run_normal(result, count)
        difference = largest_difference(actual, reference.run(count, batch))
        if batch > 1:
            alone = reference.run_normal(result, 1)
            first = [output[:1] for output in reference.run(batch, batch)]
            difference = max(difference, largest_difference(alone, first))
    except (ModelError, RuntimeError) as error:
        logger.debug("batch %d cannot be generalized: %s", batch, error)
        return None
    return result if difference <= reference.tolerance / 10 else None


def _check_slowly(
    proto: onnx.ModelProto, image: ImageInput, reference: Reference, error: str
) -> str:
    """Check the normal form of a file that onnxruntime cannot run; return a note on it."""
    batch = image.batch or 1
    try:
        reference.run_normal(proto, batch)
    except RuntimeError as fault:
        raise ModelError(
            f"onnxruntime cannot run the model: {fault}", hint=_RE_EXPORT
        ) from fault
    note = f"onnxruntime does not run the file itself ({error[:80]})"
    if image.height * image.width * batch > _MAX_SLOW_PIXELS:
        return f"{note}; the normal form was not compared with it"
    try:
        expected = reference.run_slowly(batch)
    except RuntimeError:
        return f"{note}; the normal form was not compared with it"
    _check_equal(proto, expected, batch, reference)
    return f"{note}; the normal form was compared with onnx.reference"


def _finish(proto: onnx.ModelProto, *, batch: int | None) -> onnx.ModelProto:
    """Name, annotate and check a resolved graph."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    _refuse_subgraphs(result)
    if _cancel_casts(result):
        result = fold_constants(result)
    name_nodes(result.graph)
    result.ir_version = IR_VERSION
    annotate(result, batch=batch)
    types = infer(with_batch(result, result.graph.input[0].name, batch or 1))
    check_sizes(types)
    check_cost(result, types, images=1 if batch else 3)
    check_graph(result)
    return result


def _cancel_casts(proto: onnx.ModelProto) -> bool:
    """Turn casts to the type that a tensor has already into Identity, CastLike into Cast."""
    types = infer(with_batch(proto, proto.graph.input[0].name, 1))
    changed = False
    for node in proto.graph.node:
        if node.op_type not in ("Cast", "CastLike"):
            continue
        if node.op_type == "Cast":
            target = next(a.i for a in node.attribute if a.name == "to")
        else:
            target = types[node.input[1]].elem_type if node.input[1] in types else 0
        own = types[node.input[0]].elem_type if node.input[0] in types else 0
        if not target or (node.op_type == "Cast" and own != target):
            continue
        del node.input[1:], node.attribute[:]
        node.op_type = "Identity" if own == target else "Cast"
        if own != target:
            node.attribute.append(onnx.helper.make_attribute("to", target))
        changed = True
    return changed


def _check_equal(
    proto: onnx.ModelProto, expected: list[np.ndarray], count: int, reference: Reference
) -> None:
    try:
        difference = largest_difference(reference.run_normal(proto, count), expected)
    except RuntimeError as error:
        raise ModelError(f"the normal form does not run: {error}", hint=_RE_EXPORT) from error
    if difference > reference.tolerance:
        raise ModelError(
            f"the normal form differs from the file by {difference:.1e} of the largest output",
            hint=_RE_EXPORT,
        )
