"""Method prior: what images should fulfil where a network stores no statistics.

Every feature gets something to do. Synthetic images (`pipeline.generate.synthetic`) drive the
first layers of a network much as photographs do. With depth they fall behind: features that answer
to objects stay quiet, and the outputs span a fraction of their range. The loss wakes them up and
keeps everything else:

    (1/C) sum_c [ ((m_c - mean_c) / sigma_c)^2 - weight log((v_c + e) / (variance_c + e)) ]

averaged over the outputs of the convolutions and matrix products, with the moments ``m, v`` over
all images together, those of the synthetic images ``mean, variance``, and ``e`` a thousandth of the
tensor's mean variance. The logarithm gives a quiet channel as much to gain as a loud one, so the
least active change most. The pixels' own mean and variance are held.

Outputs are stretched as in DGH, but not without end: an image whose output spans ``_SPAN`` times
what the synthetic images span on average is let be. In trained networks photographs span 1.0 to
1.4 times as much on average, single ones twice.

Only every fourth image is optimized, and for a few steps. Power-of-two thresholds follow the
extremes, which some images suffice to reach; the mean error of a rounded weight follows the mean of
all images, and there gradients do harm: they add fine patterns that no photograph has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from graph_tools.batchnorm import BatchNormSite
from graph_tools.model import Model
from pipeline.generate.heads import find_heads
from pipeline.generate.job import Job, Made
from pipeline.generate.loop import OnStep, OptimizeSettings
from pipeline.generate.network import PIXELS, Network, blank_site
from pipeline.generate.objective import Objective
from pipeline.generate.statistics import SiteTargets, Sums
from pipeline.generate.stretch import ranges
from pipeline.generate.synthetic import synthetic_source
from pipeline.images import ImageWriter

__all__ = ["DiversityObjective", "find_features", "make_prior", "measure_start"]

ITERATIONS = 20
LEARNING_RATE = 0.1
"""Of RAdam, in standardized pixel units."""
MOVING = 0.25
"""Share of the images that are optimized."""

_SPAN = 2.0
_QUIET = 1e-3  # of a tensor's mean variance: a channel below counts as dead


@dataclass(frozen=True, kw_only=True)
class DiversityObjective(Objective):
    """The loss of method prior.

    Args:
        targets: moments of the synthetic images.
        spans: of the outputs to stretch, by name: what the synthetic images span on average.
        weight: of the logarithm, against the distance from the synthetic images' means.
        heads: names of ``spans``: the outputs to stretch.
    """

    targets: SiteTargets
    spans: Mapping[str, float]
    weight: float = 0.1
    heads: Sequence[str] = ()

    def statistics(self, sums: Sums) -> Tensor:
        """Return the loss of all images together: a float64 scalar."""
        targets = self.targets
        offset, variance = sums.moments()
        floor = (_QUIET * targets.mean_over_channels(targets.variance) + 1e-12)[
            targets.site_index
        ]
        scale = targets.variance + floor
        gain = torch.log((variance + floor) / scale)
        pixels = torch.tensor(
            [site.node == PIXELS for site in targets.sites], device=gain.device
        )[targets.site_index]
        reward = torch.where(pixels, -gain.square(), self.weight * gain)
        return targets.mean_over_channels(offset.square() / scale - reward).mean()

    def output(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the output loss of a batch, -1 when every image has reached its span."""
        shares = [ranges(values[name]) / (_SPAN * span) for name, span in self.spans.items()]
        return -torch.stack(shares).clamp_max(1.0).mean()


def measure_start(
    batches: Iterable[Tensor],
    network: Network,
    features: Sequence[BatchNormSite],
    heads: Sequence[str],
) -> tuple[SiteTargets, dict[str, float]]:
    """Run the synthetic images.

    Args:
        batches: [N, C, H, W] in standardized pixel units.
        network: observes the features and the heads.
        features: as `find_features` returns them.
        heads: names of outputs.

    Returns:
        The moments of the features as targets, and the mean span of each head that has any.
    """
    targets = SiteTargets(features, network.device)
    sums, spans, count = targets.zero(), dict.fromkeys(heads, 0.0), 0
    with torch.no_grad():
        for images in batches:
            for chunk in torch.split(images, network.chunk or len(images)):
                values = network.observe(chunk)
                sums = sums + targets.measure(values)
                for name in heads:
                    spans[name] += float(ranges(values[name]).double().sum())
            count += len(images)
    moments = zip(
        *(torch.split(m.cpu(), _sizes(features)) for m in sums.moments()), strict=True
    )
    filled = [
        replace(
            site,
            mean=mean.numpy().astype(np.float32),
            variance=variance.numpy().astype(np.float32),
        )
        for site, (mean, variance) in zip(features, moments, strict=True)
    ]
    found = {name: span / count for name, span in spans.items() if 0 < span < math.inf}
    return SiteTargets(filled, network.device), found


def find_features(model: Model) -> tuple[BatchNormSite, ...]:
    """Return the outputs of convolutions and matrix products, [N, C, ...], and the pixels.

    Their statistics are blank: mean 0, variance 1; `measure_start` fills them in. Products whose
    channels lie in the last of three axes, as in transformers, are left out.
    """
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.proto.graph.value_info, *model.proto.graph.output)
    }
    features = [blank_site(PIXELS, PIXELS, model.input.channels)]
    for node in model.proto.graph.node:
        shape = shapes.get(node.output[0], [])
        is_convolution = node.op_type in ("Conv", "ConvTranspose") and len(shape) > 2
        is_product = node.op_type in ("Gemm", "MatMul") and len(shape) == 2
        if (is_convolution or is_product) and shape[1] > 0:
            features.append(blank_site(node.name, node.output[0], shape[1]))
    return tuple(features)


def _sizes(features: Sequence[BatchNormSite]) -> list[int]:
    return [site.channels for site in features]


def make_prior(job: Job, writer: ImageWriter, on_step: OnStep | None) -> Made:
    """Adapt synthetic images to the network and write them."""
    settings = job.settings
    heads = find_heads(job.model) if settings.output_weight != 0 else ()
    features = find_features(job.model)
    network = job.network(heads, features)
    source = synthetic_source(job.preprocessing, job.shape[0])
    prior = job.image_prior(source=source, blur=0.0, moving=MOVING)
    state = job.generator.get_state()
    starts = (prior.start(size, job.generator).to(job.device) for size in job.sizes)
    images = (prior.render(canvas, prior.center()) for canvas in starts)
    targets, spans = measure_start(images, network, features, heads)
    job.generator.set_state(state)  # the loop makes the same images again
    objective = DiversityObjective(targets=targets, spans=spans, heads=tuple(spans))
    how = OptimizeSettings(
        iterations=settings.iterations or ITERATIONS,
        learning_rate=settings.learning_rate or LEARNING_RATE,
        output_weight=1.0 if settings.output_weight is None else settings.output_weight,
        output_ratio=settings.output_ratio,
        parallel=settings.parallel_batches or 1,
    )
    _, history = job.optimize(writer, network, prior, objective, how, on_step)
    return (), history
