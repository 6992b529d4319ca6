"""Attention over packed documents on a CPU, as one operator that torch.compile doesn't look into.

bf16 goes to our C++ kernels where they run; everything else, and every soft cap and attention sink, to
`litft.models.block_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from litft.models import block_attention, native


@torch.library.custom_op("litft::cpu_attention", mutates_args=())
def cpu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Causal self-attention within each document of a packed row.

    Args:
        q: [1, heads, tokens, head_dim].
        k: [1, kv_heads, tokens, head_dim].
        v: [1, kv_heads, tokens, value_dim].
        cu_seqlens: where documents begin and the last one ends [documents + 1], int32.
        sinks: a score a head [heads] that takes weight and gives nothing (gpt-oss), or None.
        scale: factor on the scores.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2); 0 leaves them.
        window: tokens each query sees, itself included; 0 for all before it.

    Returns:
        The attended values [1, tokens, heads, value_dim], and what the backward pass wants of the scores: the
        log-sum-exp of each query's [heads, tokens], empty where it does without.
    """
    if not _native(q, v, sinks, softcap):
        return block_attention.forward(q, k, v, cu_seqlens, sinks, scale, softcap, window), _no_lse(q)
    out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
    lse = q.new_empty(q.shape[1], q.shape[2], dtype=torch.float32)
    native.attention(q, k, v, out.transpose(1, 2), lse, cu_seqlens, scale, window)
    return out, lse


@torch.library.custom_op("litft::cpu_attention_backward", mutates_args=())
def cpu_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k`, `v` and `sinks` (empty where there are none); the weights are computed anew."""
    if not _native(q, v, sinks, softcap):
        return block_attention.backward(grad, q, k, v, cu_seqlens, sinks, scale, softcap, window)
    dq, dk, dv = _like(q), _like(k), _like(v)
    out, grad = out.transpose(1, 2), grad.transpose(1, 2)
    native.attention_backward(grad, q, k, v, out, lse, dq, dk, dv, cu_seqlens, scale, window)
    return dq, dk, dv, q.new_empty(0)


def _native(q: Tensor, v: Tensor, sinks: Tensor | None, softcap: float) -> bool:
    """Whether the C++ kernels take this: their products go by 32 columns."""
    plain = q.dtype == torch.bfloat16 and sinks is None and not softcap
    return plain and q.shape[3] % 32 == v.shape[3] % 32 == 0 and native.library() is not None


def _like(x: Tensor) -> Tensor:
    """Room for the gradient of `x` [1, heads, tokens, dim], in memory token by token as projections want it."""
    return x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _no_lse(q: Tensor) -> Tensor:
    return q.new_empty(0, dtype=torch.float32)


@cpu_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, sinks: Tensor | None, scale: float, softcap: float, window: int
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
    if not _native(q, v, sinks, softcap):
        return out, _no_lse(q)
    return out, q.new_empty(q.shape[1], q.shape[2], dtype=torch.float32)


@cpu_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, sinks: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(q), _like(k), _like(v), q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.softcap, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: recomputing hands them out once
    dq, dk, dv, dsinks = cpu_attention_backward(grad, *saved, ctx.scale, ctx.softcap, ctx.window)
    return dq, dk, dv, None, dsinks if saved[4] is not None else None, None, None, None


cpu_attention.register_autograd(_backward, setup_context=_keep)
