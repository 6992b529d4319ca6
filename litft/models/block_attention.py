"""Attention over packed documents on any CPU: dense matrix products over blocks of queries.

torch's flash kernel for CPUs takes eight times as long for the backward pass of a short document as for the forward
pass. Blocks of ordinary products take about a third of that. Lengths are rounded up to a few sizes, because the matrix
library compiles a kernel for every new shape: what lies past a document's end is zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

GRAIN = 32
"""Lengths are rounded up to a multiple of this."""
ROWS = (320, 256, 192, 128, 64)
"""Queries that a block of a document may have; fewer than its last entry where the document ends."""
SCORES_BYTES = 10_000_000
"""What a block's scores may take: beyond it, re-reading them from memory costs more than smaller blocks do."""


class _Document:
    """One document's operands in the type computed in: queries [heads, length, dim], keys and values [kv_heads, ...].

    The length is rounded up; rows past the document's end are zero.
    """

    def __init__(self, start: int, end: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
        self.start, self.real = start, end - start
        self.length = _round_up(self.real)
        self.heads, self.kv_heads = q.shape[1], k.shape[1]
        self.q, self.k, self.v = self.rows_of(q[0]).mul_(scale), self.rows_of(k[0]), self.rows_of(v[0])

    def rows_of(self, x: Tensor) -> Tensor:
        """This document's part of `x` [heads, tokens, dim] as a matrix a head [heads, length, dim]."""
        out = x.new_empty(x.shape[0], self.length, x.shape[2], dtype=_computed_in(x.dtype))
        out[:, : self.real] = x[:, self.start : self.start + self.real]
        out[:, self.real :] = 0
        return out

    def blocks(self, window: int) -> Iterator[tuple[slice, slice]]:
        """Blocks of queries, each with the keys that it may look at; the last of those keys are its own."""
        first = 0
        while first < self.length:
            before = min(first, _round_up(window - 1)) if window else first
            fitting = (rows for rows in ROWS if 4 * self.heads * rows * (before + rows) <= SCORES_BYTES)
            rows = min(next(fitting, ROWS[-1]), self.length - first)
            yield slice(first, first + rows), slice(first - before, first + rows)
            first += rows

    def grouped(self, x: Tensor, rows: slice) -> Tensor:
        """Rows of `x` [heads, length, dim] with the heads that share a key head in one matrix [kv_heads, ..., dim]."""
        return x[:, rows].reshape(self.kv_heads, -1, x.shape[2])

    def by_head(self, x: Tensor, rows: slice) -> Tensor:
        """The way back from `grouped`, without the rows past the document's end [heads, rows, dim]."""
        return x.view(self.heads, rows.stop - rows.start, x.shape[2])[:, : max(0, self.real - rows.start)]

    def within(self, rows: slice) -> slice:
        """Where rows of this document lie in the packed row."""
        return slice(self.start + rows.start, self.start + min(rows.stop, self.real))


def _round_up(length: int) -> int:
    return -(-length // GRAIN) * GRAIN


def _filled(x: Tensor, length: int) -> Tensor:
    """`x` [..., tokens, dim] with zeros up to `length` tokens."""
    return x if x.shape[-2] == length else F.pad(x, (0, 0, 0, length - x.shape[-2]))


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _documents(cu_seqlens: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Iterator[_Document]:
    for start, end in pairwise(cu_seqlens.tolist()):
        yield _Document(start, end, q, k, v, scale)


@lru_cache(maxsize=64)
def _hidden(rows: int, keys: int, window: int, dtype: torch.dtype) -> Tensor:
    """Added to scores, [rows, keys]: minus infinity where a query may not look. The last `rows` keys are its own."""
    distance = torch.arange(keys - rows, keys)[:, None] - torch.arange(keys)
    allowed = (distance >= 0) & (distance < window) if window else distance >= 0
    return torch.zeros(rows, keys, dtype=dtype).masked_fill_(~allowed, -torch.inf)


def _weights(
    doc: _Document, rows: slice, see: slice, sinks: Tensor | None, softcap: float, window: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention weights of a block [kv_heads, group * rows, keys].

    Returns:
        The weights; the derivative of the soft cap; what the sinks take [heads, rows].
    """
    scores = torch.bmm(doc.grouped(doc.q, rows), doc.k[:, see].transpose(1, 2))
    slope = None
    if softcap:
        bent = scores.div_(softcap).tanh_()
        slope = 1 - bent * bent
        scores = bent.mul_(softcap)
    count, keys = rows.stop - rows.start, see.stop - see.start
    own = keys if window else count  # without a window only a block's own keys can be hidden from it
    by_head = scores.view(doc.heads, count, keys)
    by_head[..., keys - own :].add_(_hidden(count, own, window, scores.dtype))
    if sinks is None:
        return torch.softmax(scores, -1), slope, None
    taken = torch.sigmoid(sinks.to(scores.dtype)[:, None] - torch.logsumexp(by_head, -1))
    return torch.softmax(by_head, -1).mul_(1 - taken[..., None]).view(scores.shape), slope, taken


@contextmanager
def _products(dtype: torch.dtype) -> Iterator[None]:
    """Products of fp32 matrices: bf16 factors and fp32 sums where the operands were bf16, else fp32 throughout."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    with torch.autocast("cpu", enabled=False):
        try:
            matmul.fp32_precision = "bf16" if dtype == torch.bfloat16 else "ieee"
            yield
        finally:
            matmul.fp32_precision = before


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """The attended values [1, tokens, heads, value_dim]; the arguments are those of `cpu_attention`."""
    out = q.new_empty(1, q.shape[2], q.shape[1], v.shape[3])
    if sinks is None and not softcap and not window:  # the forward pass of torch's kernel is fast
        for start, end in pairwise(cu_seqlens.tolist()):
            # rounded up as well: queries past the end see the next document, and nobody sees them
            rows = slice(start, start + _round_up(end - start))
            a, b, c = (_filled(x[:, :, rows], rows.stop - start) for x in (q, k, v))
            part = F.scaled_dot_product_attention(
                a,
                b,
                c,
                is_causal=True,
                scale=scale,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            out[:, start:end] = part[:, :, : end - start].transpose(1, 2)
        return out
    by_head = out[0].transpose(0, 1)
    with _products(q.dtype):
        for doc in _documents(cu_seqlens, q, k, v, scale):
            for rows, see in doc.blocks(window):
                weights, _, _ = _weights(doc, rows, see, sinks, softcap, window)
                by_head[:, doc.within(rows)] = doc.by_head(torch.bmm(weights, doc.v[:, see]), rows)
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `q`, `k`, `v` and `sinks` (empty where there are none); the weights are computed anew."""
    dq, dk, dv = (x.new_empty(1, x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))
    dsinks = q.new_zeros(q.shape[1] if sinks is not None else 0, dtype=_computed_in(q.dtype))
    with _products(q.dtype):
        for doc in _documents(cu_seqlens, q, k, v, scale):
            g = doc.rows_of(grad[0].transpose(0, 1))
            to_k, to_v = torch.zeros_like(doc.k), torch.zeros_like(doc.v)
            for rows, see in doc.blocks(window):
                weights, slope, taken = _weights(doc, rows, see, sinks, softcap, window)
                above = doc.grouped(g, rows)
                to_v[:, see] += torch.bmm(weights.transpose(1, 2), above)
                back = torch.bmm(above, doc.v[:, see].transpose(1, 2))  # of the weights, and then of the scores
                if taken is None:
                    back = torch._softmax_backward_data(back, weights, -1, back.dtype)
                else:
                    mean = (weights * back).sum(-1, keepdim=True)
                    dsinks -= (taken * mean.view(taken.shape)).sum(-1)
                    back.sub_(mean).mul_(weights)
                if slope is not None:
                    back.mul_(slope)
                to_q = torch.bmm(back, doc.k[:, see]).mul_(scale)
                dq[0, :, doc.within(rows)] = doc.by_head(to_q, rows)
                to_k[:, see] += torch.bmm(back.transpose(1, 2), doc.grouped(doc.q, rows))
            everything = doc.within(slice(0, doc.length))
            dk[0, :, everything], dv[0, :, everything] = to_k[:, : doc.real], to_v[:, : doc.real]
    return dq, dk, dv, dsinks if sinks is None else dsinks.to(sinks.dtype)
