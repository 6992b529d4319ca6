"""Attention in which packed documents never see each other, registered with transformers under the name `litft_packed`.

One causal attention call a document: a dense block-diagonal mask over the whole pack costs about 7 times more on a CPU.
Sliding windows, soft caps and attention sinks are honoured, so every model that routes its attention through
transformers' `AttentionInterface` may use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "litft_packed"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    document_bounds: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal self-attention within each document.

    Args:
        module: the attention module, part of the interface's signature; unused.
        query: [rows, heads, tokens, head_dim]; one row where documents are packed.
        key: [rows, kv_heads, tokens, head_dim].
        value: [rows, kv_heads, tokens, value_dim].
        attention_mask: ignored: causal attention never looks at the padding to the right of a row.
        scaling: factor on the scores; 1/sqrt(head_dim) where None.
        dropout: probability of dropping an attention weight.
        sliding_window: tokens each query sees, itself included; None sees all before it.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        s_aux: one learned sink score a head [heads] (gpt-oss), or None.
        cu_seq_lens_q: where documents begin and the last one ends [documents + 1], transformers' name; None where each
            row is one document.
        document_bounds: the same as numbers on the host: read from a GPU they would cost a wait in every layer.
        kwargs: what other attention implementations want; ignored, but a position bias is refused.

    Returns:
        The attended values [rows, tokens, heads, value_dim], and None in place of attention weights.

    Raises:
        ValueError: for attention that cannot be packed.
    """
    if kwargs.get("position_bias") is not None:
        raise ValueError("packed attention takes no position bias")
    bounds = document_bounds
    if bounds is None:
        bounds = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    parts = []
    for start, end in pairwise(bounds):
        q, k, v = query[:, :, start:end], key[:, :, start:end], value[:, :, start:end]
        if softcap is not None or s_aux is not None:
            part = _explicit(q, k, v, scaling, dropout, sliding_window, softcap, s_aux)
        else:
            banded = sliding_window is not None and end - start > sliding_window
            mask = _band(end - start, sliding_window, q.device) if banded else None
            part = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        parts.append(part.transpose(1, 2))
    return torch.cat(parts, dim=1), None


def _band(length: int, window: int | None, device: torch.device) -> Tensor:
    """True where a query may look: itself and what came before it, within the window. [length, length]."""
    allowed = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return allowed if window is None else allowed.triu(1 - window)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The formula written out, for what `scaled_dot_product_attention` has no argument for."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_band(q.shape[2], window, q.device), torch.finfo(scores.dtype).min)
    if sinks is not None:  # a column that takes weight and gives nothing
        scores = torch.cat(
            [scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], 1)], dim=3
        )
    weights = scores.float().softmax(3)[..., : k.shape[2]].to(v.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ v


def register() -> str:
    """Make the implementation known to transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    return NAME
