"""The balance loss of a mixture of experts, by document."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balance(router_logits: Sequence[Tensor], cu_seqlens: Tensor, document_of_token: Tensor, top_k: int) -> Tensor:
    """How unevenly each document's tokens are spread over the experts.

    The loss of Switch Transformers (Fedus et al., 2021, eq. 4-6) over one document at a time, as in DeepSeek-V3 (2024,
    eq. 17-20): over a whole batch it is a product of means and would change with how the batch is cut.

    Args:
        router_logits: of each layer, [tokens, experts], without padding.
        cu_seqlens: document boundaries [documents + 1].
        document_of_token: which document each token belongs to [tokens].
        top_k: experts a token is sent to.

    Returns:
        The loss of each document, fp32 [documents]; `top_k` where the spread is even.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    documents, experts = len(lengths), router_logits[0].shape[-1]
    share = router_logits[0].new_zeros(documents, experts, dtype=torch.float32)
    chosen = torch.zeros_like(share)
    for logits in router_logits:
        probabilities = logits.reshape(-1, experts).float().softmax(-1)
        picked = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
        share = share.index_add(0, document_of_token, probabilities)
        chosen = chosen.index_add(0, document_of_token, picked)
    rows = (lengths * len(router_logits))[:, None]
    return (share / rows * (chosen / rows)).sum(-1) * experts
