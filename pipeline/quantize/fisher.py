"""How much the outputs of a network depend on each element of an inner tensor.

The diagonal of the Fisher information: the expected square of the gradient of the log-likelihood of
an output drawn from the network's own distribution (BRECQ, arXiv 2102.05426, section 3.3). What
classifiers give, [N, classes], are logits of a categorical distribution; any other output is taken
for the mean of a normal distribution as wide as the output's own spread.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.quantize.lockstep import Batches, Lockstep

__all__ = ["output_sensitivity"]


def output_sensitivity(
    lockstep: Lockstep, tensors: Sequence[str], generator: torch.Generator
) -> dict[str, Batches]:
    """Squared gradients of the float network's outputs to ``tensors``.

    Args:
        lockstep: the float network, run up to ``tensors`` and no farther.
        tensors: names of tensors that it has just computed.
        generator: draws the outputs.

    Returns:
        For each tensor, batch by batch, with mean 1 over all of them. A tensor on which no output
        depends is left out.
    """
    found: dict[str, Batches] = {name: [] for name in tensors}
    for index in range(len(lockstep.exact[tensors[0]])):
        values = {name: batches[index] for name, batches in lockstep.exact.items()}
        leaves = {name: values[name].detach().requires_grad_() for name in tensors}
        values.update(leaves)
        values = lockstep.graph.run_steps(lockstep.pending, values)
        outputs = [values[n] for n in lockstep.graph.output_names if n in values]
        reached = [_log_likelihood(v, generator) for v in outputs if v.requires_grad]
        if not reached:
            return {}
        gradients = torch.autograd.grad(
            torch.stack(reached).sum(), list(leaves.values()), allow_unused=True
        )
        for name, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                found[name].append(gradient.square())
    sensitivity = {}
    for name, parts in found.items():
        if parts:
            count = sum(part.numel() for part in parts)
            mean = torch.stack([part.sum(dtype=torch.float64) for part in parts]).sum() / count
            scale = 1 / max(float(mean), 1e-30)
            sensitivity[name] = [part * scale for part in parts]
    return sensitivity


def _log_likelihood(output: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of values drawn from the distribution that ``output`` describes."""
    if output.dim() == 2 and output.shape[1] > 1:
        probabilities = output.detach().softmax(dim=1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        return output.log_softmax(dim=1).gather(1, drawn).sum()
    noise = torch.randn(output.shape, generator=generator)
    return (output * noise / output.detach().std(correction=0).clamp_min(1e-12)).sum()
