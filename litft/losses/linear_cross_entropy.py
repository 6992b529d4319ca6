"""The log-probabilities of given tokens from hidden states and the vocabulary matrix, without keeping any logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BLOCK = 2**28
"""Logits that are held at a time: 1,766 rows of a vocabulary of 152k. Each block reads the whole matrix anew, so few
and large ones are best."""
ROWS = 128
"""Rows are filled up to a multiple of this: the matrix libraries make a kernel for every new number of them."""
CHUNK = {"cpu": 2**20, "cuda": 2**26}
"""Logits that are made fp32 at a time: what fits a CPU's cache, and little beside a block on a GPU."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    ahead: bool = True,
) -> Tensor:
    """`-log softmax(f(hidden @ weight.T + bias))[target]` of each row, where f scales and caps.

    The matrix products run in the type that autocast asks for, or in the weight's, everything else in fp32. The
    gradient of a block of logits is made in the place of the logits (softmax minus one-hot), in the forward pass
    already, so that no logits are computed twice.

    Args:
        hidden: [rows, width].
        weight: [vocabulary, width]; where it is frozen, no gradient of it is formed.
        targets: ids [rows].
        bias: [vocabulary], or None.
        scale: factor on the logits (Cohere, Granite).
        softcap: logits become `softcap * tanh(logits / softcap)` after scaling (Gemma 2); 0 leaves them.
        ahead: form the gradient of a trained weight in the forward pass, for a loss that weighs all rows alike. For
            another loss it is formed in the backward pass, from logits computed anew; with a wrong `ahead` too, only
            later.

    Returns:
        fp32 [rows].
    """
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, scale, softcap, ahead)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        scale: float,
        softcap: float,
        ahead: bool,
    ) -> Tensor:
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        ctx.scale, ctx.softcap = scale, softcap
        to_hidden, to_weight, to_bias, _ = ctx.needs_input_grad[:4]
        to_matrix = to_weight or to_bias
        ctx.ahead = ahead or not to_matrix
        nll = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        with torch.autocast(device, enabled=False):
            gradients = Gradients(ctx, hidden, weight, bias)
            wanted = ctx.ahead and (to_hidden or to_matrix)
            for rows, logits in gradients.blocks():
                nll[rows] = _nll(logits, targets[rows], scale, softcap, gradient=wanted)
                if wanted:
                    gradients.add(rows, logits)
        # what a wrong `ahead` would call for; the inputs are alive anyway
        again = (hidden, weight, bias, targets) if to_matrix else (None,) * 4
        ctx.save_for_backward(*(gradients.found if wanted else (None,) * 3), *again)
        return nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (above,) = grads
        d_hidden, d_weight, d_bias, hidden, weight, bias, targets = ctx.saved_tensors
        # one number for all rows: the gradient of a sum comes as an expanded scalar, which shows without a look at it
        alike = above.numel() < 2 or above.stride() == (0,)
        factor = above[:1].sum().reshape(1)  # fp32 in one dimension: products with it are made fp32 without a copy
        if hidden is None or (ctx.ahead and alike):
            d_hidden = None if d_hidden is None else d_hidden * above[:, None]
            d_weight, d_bias = (None if d is None else d * factor for d in (d_weight, d_bias))
        else:
            with torch.autocast(hidden.device.type, enabled=False):
                gradients = Gradients(ctx, hidden, weight, bias)
                for rows, logits in gradients.blocks():
                    _nll(logits, targets[rows], ctx.scale, ctx.softcap, gradient=True)
                    real = above[rows, None]
                    logits[: len(real)].mul_(real)
                    gradients.add(rows, logits)
                d_hidden, d_weight, d_bias = gradients.found
        return d_hidden, d_weight, d_bias, None, None, None, None


class Gradients:
    """The gradients of hidden states, matrix and bias, each where it is needed, gathered from blocks of rows."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, block: int | None = None) -> None:
        self.real, self.block = len(hidden), block or BLOCK
        self.count = -(-self.real // ROWS) * ROWS
        self.hidden = F.pad(hidden.to(ctx.dtype), (0, 0, 0, self.count - self.real))
        self.weight = weight.to(ctx.dtype)
        self.bias = None if bias is None else bias.to(ctx.dtype)
        to_hidden, self.to_weight, self.to_bias = ctx.needs_input_grad[:3]
        self.d_hidden = torch.empty_like(self.hidden) if to_hidden else None
        self.d_weight: Tensor | None = None
        self.d_bias: Tensor | None = None

    @property
    def found(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three gradients; zero where there were no rows."""
        if self.to_weight and self.d_weight is None:
            self.d_weight = torch.zeros_like(self.weight)
        if self.to_bias and self.d_bias is None:
            self.d_bias = self.weight.new_zeros(len(self.weight))
        return None if self.d_hidden is None else self.d_hidden[: self.real], self.d_weight, self.d_bias

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The logits [rows, vocabulary] of one block after another, in the same memory; the last rows may be empty."""
        most = max(ROWS, self.block // len(self.weight) // ROWS * ROWS)
        blocks = -(-self.count // most)
        rows = -(-self.count // max(1, blocks) // ROWS) * ROWS  # of even size
        buffer = self.hidden.new_empty(rows, len(self.weight))
        for start in range(0, self.count, max(1, rows)):
            part = slice(start, min(start + rows, self.count))
            logits = torch.mm(self.hidden[part], self.weight.t(), out=buffer[: part.stop - start])
            if self.bias is not None:
                logits.add_(self.bias)
            yield part, logits

    def add(self, rows: slice, d_logits: Tensor) -> None:
        """Take the gradient of a block of logits in."""
        if self.d_hidden is not None:
            torch.mm(d_logits, self.weight, out=self.d_hidden[rows])
        if self.to_weight:
            part = d_logits.t() @ self.hidden[rows]  # filling rows are zero
            self.d_weight = part if self.d_weight is None else self.d_weight.float().add_(part)
        if self.to_bias:
            real = d_logits[: max(0, self.real - rows.start)]
            part = real.sum(0, dtype=torch.float32)
            self.d_bias = part if self.d_bias is None else self.d_bias.add_(part)


def _nll(logits: Tensor, targets: Tensor, scale: float, softcap: float, gradient: bool) -> Tensor:
    """fp32 losses [targets]; with `gradient` the first logits [rows, vocabulary] are replaced by their gradient."""
    found = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    count = max(1, CHUNK.get(logits.device.type, CHUNK["cuda"]) // logits.shape[1])
    for start in range(0, len(targets), count):
        chunk, ids = logits[start : start + count], targets[start : start + count, None]
        bent = None
        if softcap:
            bent = (chunk.float() * (scale / softcap)).tanh_()
            log_p = torch.log_softmax(bent * softcap, -1)
        elif scale != 1:
            log_p = torch.log_softmax(chunk.float() * scale, -1)
        else:
            log_p = torch.log_softmax(chunk, -1, dtype=torch.float32)
        found[start : start + count] = -log_p.gather(1, ids)[:, 0]
        if gradient:
            d = log_p.exp_()
            d.scatter_add_(1, ids, d.new_full((1, 1), -1.0).expand_as(ids))
            if bent is not None:
                d.mul_(bent.square_().neg_().add_(1))
            if scale != 1:
                d.mul_(scale)
            chunk.copy_(d)
    return found
