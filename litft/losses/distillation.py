"""What a student's distribution over the next token lacks of a teacher's, in blocks of rows, without keeping logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from litft.losses.linear_cross_entropy import Gradients

BLOCK = 2**24
"""Logits that a loss of any kind is given at a time: it may make some ten fp32 numbers of each."""
Divergence = Literal["forward_kl", "reverse_kl", "symmetric_kl", "js_divergence"]
RowLoss = Callable[[slice, Tensor], Tensor]
"""A slice of rows and their logits, fp32 [rows, vocabulary], to a loss of each."""


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: RowLoss,
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> Tensor:
    """A loss of each row's logits `f(hidden @ weight.T + bias)`, where f scales and caps.

    As `litft.losses.linear_cross_entropy`, for any loss: its gradient is found block by block in the forward pass, so
    that no more logits than a block's are ever held. For a sum in which all rows weigh alike.

    Args:
        hidden: [rows, width].
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
        loss: of a block of rows.
        scale: factor on the logits.
        softcap: logits become `softcap * tanh(logits / softcap)` after scaling; 0 leaves them.

    Returns:
        fp32 [rows].
    """
    return _LinearLoss.apply(hidden, weight, bias, loss, scale, softcap)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, loss: RowLoss, scale: float, softcap: float
    ) -> Tensor:
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wanted = any(ctx.needs_input_grad[:3])
        found = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        with torch.autocast(device, enabled=False):
            gradients = Gradients(ctx, hidden, weight, bias, BLOCK)
            for rows, logits in gradients.blocks():
                real = slice(rows.start, min(rows.stop, len(hidden)))
                raw = logits[: real.stop - real.start].detach().requires_grad_(wanted)
                with torch.set_grad_enabled(wanted):
                    losses = loss(real, bend(raw.float(), scale, softcap))
                    if wanted:
                        logits[: len(raw)].copy_(torch.autograd.grad(losses.sum(), raw)[0])
                found[real] = losses.detach()
                if wanted:
                    logits[len(raw) :].zero_()
                    gradients.add(rows, logits)
        ctx.save_for_backward(*(gradients.found if wanted else (None,) * 3))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        above = grads[0]
        if above.stride() != (0,) and len(above) > 1 and (above != above[0]).any():
            raise RuntimeError("linear_loss: rows have to weigh alike")
        factor = above[:1].sum().reshape(1)
        d_hidden = None if d_hidden is None else d_hidden * above[:, None]
        d_weight, d_bias = (None if d is None else d * factor for d in (d_weight, d_bias))
        return d_hidden, d_weight, d_bias, None, None, None


def bend(logits: Tensor, scale: float, softcap: float) -> Tensor:
    """Logits as the model hands them out."""
    logits = logits * scale if scale != 1 else logits
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def divergence(student: Tensor, teacher: Tensor, kind: Divergence, share: float = 0.5) -> Tensor:
    """How far apart two distributions over the same tokens are.

    Args:
        student: log-probabilities, [rows, tokens].
        teacher: log-probabilities, [rows, tokens].
        kind: `forward_kl` KL(teacher || student); `reverse_kl` KL(student || teacher); `symmetric_kl` a mix of the two;
            `js_divergence` the generalised Jensen-Shannon divergence (Agarwal et al. 2023, eq. 1).
        share: of KL(teacher || student) in the mix; of the teacher in the mixture that Jensen-Shannon measures from.

    Returns:
        [rows].
    """
    if kind == "forward_kl":
        return _kl(teacher, student)
    if kind == "reverse_kl":
        return _kl(student, teacher)
    if kind == "symmetric_kl":
        return share * _kl(teacher, student) + (1 - share) * _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(share), student + math.log1p(-share))
    return share * _kl(teacher, mixture) + (1 - share) * _kl(student, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def with_rest(log_p: Tensor) -> Tensor:
    """Log-probabilities of some tokens, [rows, k], and that of all others together, [rows, k + 1]."""
    rest = (-torch.expm1(torch.logsumexp(log_p, -1).clamp(max=-torch.finfo(log_p.dtype).eps))).log()
    return torch.cat([log_p, rest[:, None]], -1)
