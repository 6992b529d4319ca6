"""Context parallelism: the tokens of a packed row shared by several processes (Ulysses, arXiv:2309.14509).

Everything but attention goes token by token, so each process runs it over its share of the row. Around attention the
processes exchange: each gives its tokens' other heads away and gets all tokens for its own heads, so that attention
sees whole documents, wherever the row was cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import gcd
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litft.errors import UserError
from litft.models.collectives import all_to_all

if TYPE_CHECKING:
    from litft.models.mesh import Parallel


def check(config: Any, sizes: Any, cannot_pack: str | None) -> None:
    """Refuse a model whose attention can't be shared; before it is loaded.

    Args:
        config: the model's.
        sizes: of the groups.
        cannot_pack: why rows have to be padded, or None.

    Raises:
        UserError: naming what doesn't fit.
    """
    flag = f"--trainer.strategy.context_parallel_size {sizes.context}"
    if cannot_pack:
        raise UserError(f"{flag}: rows of this model can't be packed: {cannot_pack}\nmend: leave it out")
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    if any("longrope" in str(value) for value in (rope, *rope.values())):
        raise UserError(
            f"{flag}: the model's positions (longrope) follow the longest row, of which each process has a part\n"
            "mend: leave it out"
        )
    heads = config.get_text_config().num_attention_heads // sizes.tensor
    if heads % sizes.context:
        shared = f" (of which tensor parallelism leaves {heads} to a process)" if sizes.tensor > 1 else ""
        raise UserError(
            f"{flag}: does not divide the model's {heads * sizes.tensor} attention heads{shared}\n"
            "mend: a divisor of them, or leave it out"
        )


def share_of(batch: dict[str, Any], parallel: Parallel) -> dict[str, Any]:
    """This process's tokens of a packed row, and its targets.

    Args:
        batch: what `litft.data.batch.pack_documents` makes, the same in every process of the group.
        parallel: with the group.

    Returns:
        A batch whose `input_ids` and `position_ids` are [1, slots / processes] and whose targets are those of them;
        `cu_seqlens` are still the whole row's. `counts` are the targets of each process.
    """
    size, rank = parallel.sizes.context, parallel.rank_in("context")
    ids, positions, targets = batch["input_ids"], batch["position_ids"], batch["target_positions"]
    slots = -(-ids.shape[1] // size)
    fill = slots * size - ids.shape[1]
    if fill:  # one more document without targets
        ids = torch.nn.functional.pad(ids, (0, fill))
        positions = torch.cat([positions, torch.arange(fill, device=positions.device)[None]], 1)
    bounds = batch["document_bounds"]
    edges = torch.arange(1, size, device=targets.device) * slots
    ends = [0, *torch.searchsorted(targets, edges).tolist(), len(targets)]
    mine = slice(ends[rank], ends[rank + 1])
    part = slice(rank * slots, (rank + 1) * slots)
    lengths = batch["cu_seqlens"]
    return batch | {
        "input_ids": ids[:, part],
        "position_ids": positions[:, part],
        "cu_seqlens": torch.cat([lengths, lengths[-1:] + fill]) if fill else lengths,
        "document_bounds": (*bounds, bounds[-1] + fill) if fill else bounds,
        "max_seqlen": max(batch["max_seqlen"], fill),
        "target_positions": targets[mine] - rank * slots,
        "target_ids": batch["target_ids"][mine],
        "counts": [b - a for a, b in itertools.pairwise(ends)],
        "context_group": parallel.context_group,
    }


def exchanged(
    attend: Callable[..., tuple[Tensor, None]],
    group: Any,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention over all tokens of a row for this process's heads, and back to all heads of its tokens.

    Args:
        attend: an attention function of transformers' interface.
        group: of processes that share the row.
        module: of the interface.
        query: [1, heads, tokens of this process, head_dim].
        key: [1, kv_heads, tokens of this process, head_dim]; repeated where they are fewer than processes.
        value: [1, kv_heads, tokens of this process, value_dim].
        s_aux: a sink a head.
        options: of the interface.
    """
    size, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    times = size // gcd(size, key.shape[1])
    if times > 1:
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    if s_aux is not None:
        s_aux = s_aux.chunk(size)[rank]
    query, key, value = (_heads_out(x, size, group) for x in (query, key, value))
    found, _ = attend(module, query, key, value, None, s_aux=s_aux, **options)
    return _heads_back(found, size, group), None


def _heads_out(x: Tensor, size: int, group: Any) -> Tensor:
    """[1, heads, own tokens, dim] to [1, own heads, tokens, dim]."""
    _, heads, tokens, dim = x.shape
    found = all_to_all(x.view(size, heads // size, tokens, dim), group)
    return found.transpose(0, 1).reshape(1, heads // size, size * tokens, dim)


def _heads_back(x: Tensor, size: int, group: Any) -> Tensor:
    """[1, tokens, own heads, dim] to [1, own tokens, heads, dim]."""
    _, tokens, heads, dim = x.shape
    found = all_to_all(x.reshape(size, tokens // size, heads, dim), group)
    return found.permute(1, 0, 2, 3).reshape(1, tokens // size, size * heads, dim)
