"""Operators on boxes: pooling inside regions of interest, and suppression of overlaps."""

from __future__ import annotations

from math import ceil, floor

import torch

from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = ["max_roi_pool", "non_max_suppression", "roi_align"]


@operator("RoiAlign")
def roi_align(node: Node) -> Compute:
    """Average (or maximum) of points interpolated inside each bin of each region.

    He et al., "Mask R-CNN", 2017. The default coordinates are those of the opset: without the
    shift by half a pixel before opset 16.
    """
    transform = "output_half_pixel" if node.opset < 16 else "half_pixel"
    half_pixel = node.text("coordinate_transformation_mode", transform) == "half_pixel"
    largest = node.text("mode", "avg").lower() == "max"
    outputs = node.integer("output_height", 1), node.integer("output_width", 1)
    ratio, scale = node.integer("sampling_ratio", 0), node.number("spatial_scale", 1.0)

    def compute(x: torch.Tensor, rois: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        regions = rois * scale - (0.5 if half_pixel else 0.0)
        results = [x.new_zeros(0, x.shape[1], *outputs)]
        for (left, top, right, bottom), image in zip(regions, images.tolist(), strict=True):
            rows = _bin_weights(top, bottom, outputs[0], x.shape[2], half_pixel, ratio)
            columns = _bin_weights(left, right, outputs[1], x.shape[3], half_pixel, ratio)
            pool = _largest_share if largest else _mean_share
            results.append(pool(x[image], rows, columns)[None])
        return torch.cat(results)

    return compute


def _bin_weights(
    start: torch.Tensor,
    end: torch.Tensor,
    num_bins: int,
    size: int,
    half_pixel: bool,
    ratio: int,
) -> torch.Tensor:
    """Return the weights of both neighbors of each point, ``[2, bins, points, size]``.

    Points further than one element outside count nothing.
    """
    extent = end - start if half_pixel else (end - start).clamp(min=1.0)
    count = ratio or max(ceil(float(extent) / num_bins), 0)
    bins = torch.arange(num_bins, dtype=start.dtype, device=start.device)[:, None]
    points = torch.arange(count, dtype=start.dtype, device=start.device)[None]
    position = start + (bins + (points + 0.5) / max(count, 1)) * (extent / num_bins)
    inside = (position >= -1) & (position <= size)
    position = position.clamp(0, size - 1)
    low = position.detach().floor()
    rest = position - low
    elements = torch.arange(size, device=start.device)
    lower = (1 - rest)[..., None] * (elements == low[..., None])
    upper = rest[..., None] * (elements == (low + 1)[..., None])
    return torch.stack([lower, upper]) * inside[..., None]


def _mean_share(
    image: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Mean of the interpolated points: interpolation is separable."""
    rows = rows.sum(0).sum(1) / max(rows.shape[2], 1)  # [bins, height]
    columns = columns.sum(0).sum(1) / max(columns.shape[2], 1)
    return rows @ image @ columns.t()


def _largest_share(
    image: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Largest weighted neighbor of any point: ONNX takes the maximum before adding up."""
    bins, width = rows.shape[1], columns.shape[1]
    shares = rows.flatten(0, 2) @ image @ columns.flatten(0, 2).t()
    if not shares.numel():
        return image.new_zeros(len(image), bins, width)
    shares = shares.reshape(-1, 2, bins, rows.shape[2], 2, width, columns.shape[2])
    return shares.amax((1, 3, 4, 6))


@operator("MaxRoiPool")
def max_roi_pool(node: Node) -> Compute:
    """Maximum over the elements in each bin of each region, whose corners are rounded.

    Girshick, "Fast R-CNN", 2015. Rows of ``rois``: image, left, top, right, bottom.
    """
    scale = node.number("spatial_scale", 1.0)
    height, width = node.attributes["pooled_shape"]

    def compute(x: torch.Tensor, rois: torch.Tensor) -> torch.Tensor:
        results = [x.new_zeros(0, x.shape[1], height, width)]
        for image, *corners in rois.tolist():
            left, top, right, bottom = (floor(corner * scale + 0.5) for corner in corners)
            rows = _bin_ranges(top, bottom, height, x.shape[2])
            columns = _bin_ranges(left, right, width, x.shape[3])
            plane = x[int(image)]
            bins = [
                plane[:, r0:r1, c0:c1].amax((1, 2))
                if r0 < r1 and c0 < c1
                else plane.new_zeros(len(plane))
                for r0, r1 in rows
                for c0, c1 in columns
            ]
            results.append(torch.stack(bins, 1).reshape(1, -1, height, width))
        return torch.cat(results)

    return compute


def _bin_ranges(first: int, last: int, num_bins: int, size: int) -> list[tuple[int, int]]:
    step = max(last - first + 1, 1) / num_bins
    return [
        (
            min(max(floor(index * step) + first, 0), size),
            min(max(ceil((index + 1) * step) + first, 0), size),
        )
        for index in range(num_bins)
    ]


@operator("NonMaxSuppression", host=(0, 1, 2, 3, 4))
def non_max_suppression(node: Node) -> Compute:
    """Indices ``[selected, 3]`` (image, class, box) of boxes that no better box overlaps.

    Boxes ``[N, B, 4]``, scores ``[N, classes, B]``; of equal scores the first box wins. Indices
    carry no gradient.
    """
    centers = node.flag("center_point_box")

    def compute(
        boxes: torch.Tensor,
        scores: torch.Tensor,
        most: torch.Tensor | None = None,
        overlap: torch.Tensor | None = None,
        least: torch.Tensor | None = None,
    ) -> torch.Tensor:
        count = 0 if most is None else int(most)
        limit = 0.0 if overlap is None else float(overlap)
        corners = _corners(boxes.detach(), centers)
        chosen: list[list[int]] = []
        for image, classes in enumerate(scores.detach()):
            for label, values in enumerate(classes):
                order = values.argsort(descending=True, stable=True)
                if least is not None:
                    order = order[values[order] > least.reshape(())]
                kept = _greedy(corners[image], order, count, limit)
                chosen.extend([image, label, box] for box in kept)
        return torch.tensor(chosen, dtype=torch.int64).reshape(-1, 3)

    return compute


def _corners(boxes: torch.Tensor, centers: bool) -> torch.Tensor:
    """Return lower and upper corner of each box, ``[N, B, 2, 2]``."""
    first, second = boxes[..., :2], boxes[..., 2:]
    if centers:
        return torch.stack([first - second / 2, first + second / 2], -2)
    return torch.stack([torch.minimum(first, second), torch.maximum(first, second)], -2)


def _greedy(corners: torch.Tensor, order: torch.Tensor, count: int, limit: float) -> list[int]:
    """Take the best box and drop what overlaps it, until nothing is left."""
    kept: list[int] = []
    areas = (corners[:, 1] - corners[:, 0]).prod(-1)
    while len(order) and len(kept) < count:
        best, order = order[0], order[1:]
        kept.append(int(best))
        low = torch.maximum(corners[best, 0], corners[order, 0])
        high = torch.minimum(corners[best, 1], corners[order, 1])
        shared = (high - low).clamp(min=0).prod(-1)
        union = areas[best] + areas[order] - shared
        empty = (areas[best] <= 0) | (areas[order] <= 0) | (union <= 0)
        order = order[empty | (shared / union <= limit)]
    return kept
