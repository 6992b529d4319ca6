"""Attention in which packed documents never see each other, registered with transformers.

`litft_packed` is the fast one: kernels of our own on a CPU, torch's variable-length flash attention on a GPU.
`litft_plain` is one call of `scaled_dot_product_attention` a document, or the formula written out; the fast one falls
back to it for what its kernels can't do. Sliding windows, soft caps and attention sinks are honoured by both, so every
model that routes its attention through transformers' `AttentionInterface` may use them.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn

from litft.models.context_parallel import exchanged
from litft.models.cpu_attention import cpu_attention

NAME, PLAIN = "litft_packed", "litft_plain"
FLASH_HEAD_DIM = 256  # the widest head of flash attention
GROUPED: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""torch 2.11 doesn't want to be told that key heads may be fewer."""


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
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal self-attention within each document, by the fastest kernel there is for it.

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
        max_length_q: tokens of the longest document, or a bound on it.
        kwargs: what other attention implementations want; `document_bounds` goes to `plain_attention`.

    Returns:
        The attended values [rows, tokens, heads, value_dim], and None in place of attention weights.

    Raises:
        ValueError: for attention that cannot be packed.
    """
    _refuse_position_bias(kwargs)
    if group := kwargs.pop("context_group", None):
        options: Any = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
        options |= {"s_aux": s_aux, "cu_seq_lens_q": cu_seq_lens_q, "max_length_q": max_length_q}
        return exchanged(packed_attention, group, module, query, key, value, **options, **kwargs)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    window = sliding_window or 0
    if cu_seq_lens_q is not None and not dropout and query.shape[0] == 1:
        q, k, v = (_as_autocast(x) for x in (query, key, value))
        if q.device.type == "cpu":
            return cpu_attention(q, k, v, cu_seq_lens_q, s_aux, scale, softcap or 0.0, window)[0], None
        if softcap is None and s_aux is None and _flash_takes(q, k, v):
            longest = max_length_q or q.shape[2]
            q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
            see = (window - 1 if window else -1, 0)
            bounds = cu_seq_lens_q, cu_seq_lens_q, longest, longest
            out: Any = varlen_attn(q, k, v, *bounds, scale=scale, window_size=see, **GROUPED)
            return out[None], None
    return plain_attention(
        module,
        query,
        key,
        value,
        scaling=scale,
        dropout=dropout,
        sliding_window=sliding_window,
        softcap=softcap,
        s_aux=s_aux,
        cu_seq_lens_q=cu_seq_lens_q,
        **kwargs,
    )


def _as_autocast(x: Tensor) -> Tensor:
    """What autocast would make of an operand: rotary embeddings leave queries and keys in fp32."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def _flash_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    halves = q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and halves and q.shape[3] == v.shape[3] <= FLASH_HEAD_DIM and q.shape[3] % 8 == 0


def plain_attention(
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
    """Causal self-attention within each document, one call a document.

    As `packed_attention`; `document_bounds` is `cu_seq_lens_q` as numbers on the host, because to read it from a GPU
    would cost a wait in every layer.
    """
    _refuse_position_bias(kwargs)
    if group := kwargs.pop("context_group", None):
        options: Any = {"scaling": scaling, "dropout": dropout, "sliding_window": sliding_window, "softcap": softcap}
        options |= {"s_aux": s_aux, "cu_seq_lens_q": cu_seq_lens_q, "document_bounds": document_bounds}
        return exchanged(plain_attention, group, module, query, key, value, **options, **kwargs)
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


def _refuse_position_bias(kwargs: dict[str, Any]) -> None:
    if kwargs.get("position_bias") is not None:
        raise ValueError("packed attention takes no position bias")


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


def register(fast: bool = True) -> str:
    """Make both implementations known to transformers; returns the name for `attn_implementation`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionInterface.register(PLAIN, plain_attention)
    return NAME if fast else PLAIN


def best(config: Any, device: torch.device, half: bool, fast: bool = True, shared: bool = False) -> str:
    """The implementation to train a model with.

    Args:
        config: the model's.
        device: where it runs.
        half: computed in 16 bits.
        fast: False for `litft_plain`.
        shared: whether processes share the tokens of a row, which only ours know of.

    Returns:
        transformers' name: ours, or an installed FlashAttention for soft caps on a GPU, which torch's doesn't know.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if fast and capped and not shared and device.type == "cuda" and half and importlib.util.find_spec("flash_attn"):
        return "flash_attention_2"
    return register(fast)


def opaque_to_compiler(model: Any, device: torch.device, half: bool) -> str | None:
    """Why a model's attention can't be part of a compiled layer; None where one of our operators takes all of it.

    Args:
        model: with its attention chosen.
        device: where it runs.
        half: computed in 16 bits.
    """
    config = model.config.get_text_config()
    if model.config._attn_implementation != NAME:
        return f"its attention is {model.config._attn_implementation}"
    if any(getattr(config, name, None) for name in ("attention_dropout", "attn_pdrop")):
        return "its attention has dropout"
    if device.type == "cpu":
        return None
    if device.type != "cuda" or not half:
        return f"there is no packed attention in {'16' if half else '32'} bits on {device.type}"
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "model_type", "") == "gpt_oss":
        return "torch's flash attention has no soft caps and no sinks"
    return None
