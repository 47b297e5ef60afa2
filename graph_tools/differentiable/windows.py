"""Convolution and pooling in terms of operators that have gradients."""

from __future__ import annotations

import numpy as np
from onnx import helper

from graph_tools.differentiable.registry import NoGradientError, Site, Writer, rewrite

__all__: list[str] = []


@rewrite("GlobalMaxPool")
def _global_max_pool(site: Site, write: Writer) -> str:
    return write("MaxPool", site.name(0), kernel_shape=list(site.shape(site.name(0))[2:]))


@rewrite("AveragePool")
def _average_pool(site: Site, write: Writer) -> str | None:
    """The gradient ignores dilations, and is wrong for three spatial axes."""
    shape = site.shape(site.name(0))
    spatial = len(shape) - 2
    dilations = site.attribute("dilations", [1] * spatial)
    if spatial < 3 and set(dilations) == {1}:
        return None
    kernel, pads = site.attribute("kernel_shape", []), site.attribute("pads", [0])
    plain = site.attribute("auto_pad", "NOTSET") == "NOTSET"
    counted = not any(pads) or site.attribute("count_include_pad", 0)
    if not plain or not counted or site.attribute("ceil_mode", 0):
        raise NoGradientError("AveragePool with dilations or three axes, padded")
    weight = np.full((shape[1], 1, *kernel), 1 / np.prod(kernel), np.float32)
    return write(
        "Conv",
        site.name(0),
        weight,
        group=shape[1],
        pads=pads if any(pads) else [0] * (2 * spatial),
        strides=site.attribute("strides", [1] * spatial),
        dilations=dilations,
    )


@rewrite("Conv")
def _conv(site: Site, write: Writer) -> str | None:
    """The gradient ignores ``auto_pad``: pads are written out."""
    auto_pad = site.attribute("auto_pad", "NOTSET")
    if auto_pad == "NOTSET":
        return None
    sizes, kernel = site.shape(site.name(0))[2:], site.shape(site.name(1))[2:]
    strides = site.attribute("strides", [1] * len(sizes))
    dilations = site.attribute("dilations", [1] * len(sizes))
    outputs = site.shape(site.node.output[0])[2:]
    totals = [
        max((out - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        for out, stride, k, dilation, size in zip(
            outputs, strides, kernel, dilations, sizes, strict=True
        )
    ]
    less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
    if auto_pad == "VALID":
        less = more = [0] * len(sizes)
    pads = less + more if auto_pad != "SAME_LOWER" else more + less
    kept = {a.name: helper.get_attribute_value(a) for a in site.node.attribute}
    del kept["auto_pad"]
    return write("Conv", *site.node.input, **{**kept, "pads": pads})


@rewrite("ConvTranspose")
def _conv_transpose(site: Site, write: Writer) -> str:
    """Zeros between the pixels, then a Conv with the kernel turned around."""
    weight = site.value(1)
    assert weight is not None  # required by the operator
    shape, kernel = site.shape(site.name(0)), weight.shape[2:]
    spatial = len(kernel)
    strides = site.attribute("strides", [1] * spatial)
    dilations = site.attribute("dilations", [1] * spatial)
    reach = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    begin, end = _transposed_pads(site, shape[2:], strides, reach)

    value = site.name(0)
    if set(strides) != {1}:
        apart = [entry for size in shape[2:] for entry in (size, 1)]
        zeros = [entry for stride in strides for entry in (0, stride - 1)]
        pads = np.array([0] * (len(zeros) + 4) + zeros, np.int64)
        value = write("Pad", write.reshape(value, (*shape[:2], *apart)), pads)
        grown = [size * stride for size, stride in zip(shape[2:], strides, strict=True)]
        value = write.reshape(value, (*shape[:2], *grown))
        end = [pad - (stride - 1) for pad, stride in zip(end, strides, strict=True)]
    cropped = [min(pad, 0) for pad in (*begin, *end)]
    if any(cropped):  # negative pads crop
        crop = np.array([0, 0, *cropped[:spatial], 0, 0, *cropped[spatial:]], np.int64)
        value = write("Pad", value, crop)

    groups = site.attribute("group", 1)
    turned = np.flip(weight, axis=tuple(range(2, weight.ndim)))
    parts = turned.reshape(groups, shape[1] // groups, -1, *kernel)  # [g, in/g, out/g, ...]
    swapped = np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(
        -1, shape[1] // groups, *kernel
    )
    bias = [site.name(2)] if site.name(2) else []
    return write(
        "Conv",
        value,
        swapped,
        *bias,
        group=groups,
        dilations=dilations,
        pads=[max(pad, 0) for pad in (*begin, *end)],
    )


def _transposed_pads(
    site: Site, sizes: tuple[int, ...], strides: list[int], reach: list[int]
) -> tuple[list[int], list[int]]:
    """Return what the Conv adds before and after each spatial axis of the spread input."""
    outputs = site.shape(site.node.output[0])[2:]
    spatial = len(sizes)
    auto_pad = site.attribute("auto_pad", "NOTSET")
    given = site.attribute("pads", [0] * (2 * spatial))[:spatial]
    begin, end = [], []
    for axis in range(spatial):
        spread = (sizes[axis] - 1) * strides[axis] + 1
        extra = site.attribute("output_padding", [0] * spatial)[axis]
        total = spread + reach[axis] + extra - outputs[axis]  # removed at both ends
        front = 0 if auto_pad == "VALID" else given[axis]
        if auto_pad in ("SAME_UPPER", "SAME_LOWER") or site.attribute("output_shape", ()):
            front = total // 2 if auto_pad == "SAME_UPPER" else total - total // 2
        begin.append(reach[axis] - front)
        end.append(outputs[axis] - spread - begin[-1] + reach[axis])
    return begin, end
