"""Attention, with softmax and without, and rotary position embedding."""

from __future__ import annotations

from math import sqrt

import torch
from torch.nn import functional

from graph_tools.torch_ops.dtypes import torch_type
from graph_tools.torch_ops.registry import Compute, Node, operator

__all__ = ["attention", "linear_attention", "rotary_embedding"]


@operator("Attention")
def attention(node: Node) -> Compute:
    """softmax(Q K^T scale + bias) V, by heads.

    Q, K and V are ``[N, heads, length, size]`` or ``[N, length, heads * size]``; a key head
    serves several query heads where there are more of these. The bias holds the mask, the
    causal frontier, the window, and the keys that count. Further outputs, if wanted: keys and
    values with the past before them, and the scores at the stage ``qk_matmul_output_mode``.
    Vaswani et al., 2017; ONNX Attention 23 to 25.
    """
    query_heads, key_heads = node.integer("q_num_heads", 0), node.integer("kv_num_heads", 0)
    scale, softcap = node.attributes.get("scale"), node.number("softcap", 0.0)
    stage = node.integer("qk_matmul_output_mode", 0)
    precision = node.attributes.get("softmax_precision")

    def compute(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None = None,
        past_key: torch.Tensor | None = None,
        past_value: torch.Tensor | None = None,
        counts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        packed = query.dim() == 3
        if packed:
            query = _by_heads(query, query_heads)
            key, value = _by_heads(key, key_heads), _by_heads(value, key_heads)
        past = 0
        if past_key is not None and past_value is not None:
            past = past_key.shape[2]
            key, value = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
        present = key, value
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, 1) for part in present)
        # Both sides by the root, so that 16-bit products do not overflow.
        root = sqrt(1 / sqrt(query.shape[3]) if scale is None else scale)
        scores = torch.matmul(query * root, key.transpose(2, 3) * root)
        stages = [scores]
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        stages.append(scores)
        bias = _bias(node, scores, mask, past, counts)
        scores = scores + bias
        stages.append(scores)
        dtype = scores.dtype if precision is None else torch_type(precision)
        blind = (bias == -torch.inf).all(-1, keepdim=True)  # rows that may see no key
        weights = torch.softmax(scores.masked_fill(blind, 0.0).to(dtype), -1)
        weights = weights.masked_fill(blind, 0.0).to(query.dtype)
        stages.append(weights)
        result = torch.matmul(weights, value)
        result = result.transpose(1, 2).flatten(2) if packed else result
        return result, *present, stages[stage]

    return compute


def _by_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[N, length, heads * size]`` to ``[N, heads, length, size]``."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def _bias(
    node: Node,
    scores: torch.Tensor,
    mask: torch.Tensor | None,
    past: int,
    counts: torch.Tensor | None,
) -> torch.Tensor:
    """Return what is added to the scores, -inf where a query may not see a key."""
    queries, keys = scores.shape[-2:]
    left, right = node.integer("left_window_size", -1), node.integer("right_window_size", -1)
    if node.flag("is_causal"):
        right = 0
    positions = torch.arange(keys, device=scores.device)
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=scores.device)
    offset = torch.tensor(past, device=scores.device)
    if counts is not None:
        counts = counts.to(scores.device).reshape(-1, 1, 1, 1)
        allowed = allowed & (positions < counts)
        offset = counts - queries
    own = torch.arange(queries, device=scores.device)[:, None] + offset
    if left >= 0:
        allowed = allowed & (positions >= own - left)
    if right >= 0:
        allowed = allowed & (positions <= own + right)
    bias = torch.zeros_like(allowed, dtype=scores.dtype).masked_fill(~allowed, -torch.inf)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -torch.inf)
    return bias + functional.pad(mask, (0, keys - mask.shape[-1]), value=-torch.inf)


@operator("LinearAttention")
def linear_attention(node: Node) -> Compute:
    """Attention through a state ``[N, heads, key size, value size]`` that each step updates.

    All inputs are ``[N, length, heads * size]``. The state may fade by exp(decay), and by the
    delta rule takes up beta times what it does not hold yet. The second output is the last
    state. Yang et al., "Gated Delta Networks", 2024; ONNX LinearAttention 27.
    """
    query_heads, key_heads = node.attributes["q_num_heads"], node.attributes["kv_num_heads"]
    given_scale = node.number("scale", 0.0)
    is_delta = node.text("update_rule", "gated_delta").endswith("delta")

    def compute(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        past: torch.Tensor | None = None,
        decay: torch.Tensor | None = None,
        beta: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        dtype = torch.promote_types(query.dtype, torch.float32)
        queries = _by_heads(query, query_heads).to(dtype)
        keys, values = (_by_heads(part, key_heads).to(dtype) for part in (key, value))
        sizes = keys.shape[-1], values.shape[-1]
        scale = given_scale or 1 / sqrt(sizes[0])
        fades = None if decay is None else _by_heads(decay, key_heads).to(dtype).exp()
        rates = None if beta is None else _by_heads(beta, beta.shape[-1]).to(dtype)
        state = keys.new_zeros(*keys.shape[:2], *sizes) if past is None else past.to(dtype)
        results = []
        for step in range(query.shape[1]):
            k, v = keys[:, :, step, :, None], values[:, :, step, None]
            state = state if fades is None else state * fades[:, :, step, :, None]
            if is_delta and rates is not None:
                v = rates[:, :, step, None] * (v - (state * k).sum(2, keepdim=True))
            state = state + k * v
            shared = state.repeat_interleave(query_heads // key_heads, 1)
            results.append(torch.matmul(queries[:, :, step, None] * scale, shared))
        result = torch.cat(results, 2).transpose(1, 2).flatten(2).to(query.dtype)
        return result, state.to(query.dtype if past is None else past.dtype)

    return compute


@operator("RotaryEmbedding")
def rotary_embedding(node: Node) -> Compute:
    """Turn pairs of elements by angles that follow the position.

    Su et al., "RoFormer", 2021. Input ``[N, heads, length, size]`` or
    ``[N, length, heads * size]``; the caches hold cosine and sine of each position's angles.
    """
    heads, turned = node.integer("num_heads", 0), node.integer("rotary_embedding_dim", 0)
    interleaved = node.flag("interleaved")

    def compute(
        x: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        packed = x.dim() == 3
        values = _by_heads(x, heads) if packed else x
        if positions is not None:
            cosine, sine = cosine[positions.long()], sine[positions.long()]
        cosine, sine = cosine.unsqueeze(1), sine.unsqueeze(1)  # one for all heads
        size = turned or values.shape[-1]
        pairs, rest = values[..., :size], values[..., size:]
        if interleaved:
            first, second = pairs[..., 0::2], pairs[..., 1::2]
        else:
            first, second = pairs.chunk(2, -1)
        real = cosine * first - sine * second
        imaginary = sine * first + cosine * second
        if interleaved:
            pairs = torch.stack([real, imaginary], -1).flatten(-2)
        else:
            pairs = torch.cat([real, imaginary], -1)
        result = torch.cat([pairs, rest], -1)
        return result.transpose(1, 2).flatten(2) if packed else result

    return compute
