"""A key-value cache in which every row has a place and a length of its own, and the attention that reads it.

transformers pads a batch on the left to one length and keeps it together to the end. Here each row fills its slot from
the start, so that rows of any length are continued by one forward pass, leave when they are done, and others enter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

NAME = "litft_slots"
_GROW = 64  # positions by which slots grow, at least


@dataclass
class Step:
    """What one forward pass reads and writes.

    Either rows that begin (every `starts` is 0, padded on the right to one length), or any number of rows by one token
    each, or one row by several tokens.

    Attributes:
        slots: the rows' slots, neighbours.
        starts: tokens that each row has in the cache [rows].
        fresh: whether the rows begin.
        device: where the model is.
    """

    slots: slice
    starts: list[int]
    fresh: bool
    device: torch.device
    _masks: dict[Any, Tensor | None] = field(default_factory=dict)

    @cached_property
    def begin(self) -> Tensor:
        """`starts` on the device [rows]."""
        return torch.tensor(self.starts, device=self.device)

    @cached_property
    def rows(self) -> Tensor:
        """0, 1, ... [rows]."""
        return torch.arange(len(self.starts), device=self.device)

    def positions(self, tokens: int) -> Tensor:
        """Of the tokens that go in [rows, tokens]."""
        return self.begin[:, None] + torch.arange(tokens, device=self.device)

    def mask(self, tokens: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores [rows or 1, 1, tokens, keys]; None where all earlier keys are seen, or all.

        A token sees itself and what came before it, with a sliding window its last `window` positions.
        """
        key = tokens, keys, window, dtype
        if key not in self._masks:
            self._masks[key] = self._mask(*key)
        return self._masks[key]

    def _mask(self, tokens: int, keys: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        banded = window is not None and max(self.starts) + tokens > window
        if not banded and (self.fresh or (tokens == 1 and min(self.starts) + 1 == keys)):
            return None
        rows = self.positions(tokens)[:1] if self.fresh else self.positions(tokens)
        distance = rows[:, None, :, None] - torch.arange(keys, device=self.device)
        hidden = distance < 0
        if window is not None:
            hidden |= distance >= window
        return torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill_(hidden, torch.finfo(dtype).min)


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    slots: Step,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over what a `SlotCache` holds, by transformers' interface.

    Args:
        module: the attention module, unused.
        query: [rows, heads, tokens, head_dim].
        key: [rows, kv_heads, keys, head_dim], as the cache returns them.
        value: [rows, kv_heads, keys, value_dim].
        attention_mask: None, because transformers makes no mask for an implementation it doesn't know.
        slots: of this forward pass.
        scaling: factor on the scores; 1/sqrt(head_dim) where None.
        sliding_window: positions a token sees, its own included; None for all before it.
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        s_aux: one learned sink score a head [heads] (gpt-oss), or None.
        kwargs: what other implementations want.

    Returns:
        The attended values [rows, tokens, heads, value_dim], and None in place of attention weights.
    """
    rows, heads, tokens, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    mask = slots.mask(tokens, keys, sliding_window, query.dtype)
    if softcap is None and s_aux is None:
        causal = mask is None and tokens > 1
        if tokens == 1:  # heads that share keys are queries of one head: nothing is repeated
            query = query.reshape(rows, kv_heads, heads // kv_heads, -1)
        out = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=scaling, enable_gqa=query.shape[1] != kv_heads
        )
        return out.reshape(rows, heads, tokens, -1).transpose(1, 2), None
    grouped = query.reshape(rows, kv_heads, heads // kv_heads, tokens, -1)
    scores = grouped @ key.transpose(2, 3)[:, :, None] * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask[:, :, None]
    elif tokens > 1:
        ahead = torch.ones(tokens, keys, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, torch.finfo(scores.dtype).min)
    if s_aux is not None:  # a column that takes weight and gives nothing
        sinks = s_aux.to(scores.dtype).view(1, kv_heads, -1, 1, 1).expand(*scores.shape[:4], 1)
        scores = torch.cat([scores, sinks], dim=4)
    weights = scores.float().softmax(4)[..., :keys].to(value.dtype)
    return (weights @ value[:, :, None]).reshape(rows, heads, tokens, -1).transpose(1, 2), None


AttentionInterface.register(NAME, slot_attention)


@contextmanager
def routed(model: Any) -> Iterator[None]:
    """Inside the block the model's attention is `slot_attention`."""
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


class SlotCache(Cache):
    """The cache of all layers.

    Attributes:
        step: what the forward pass that comes next reads and writes.
    """

    step: Step
    layers: list[Any]

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=partial(_SlotLayer, self))  # type: ignore[arg-type]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first `length` positions to another slot."""
        for layer in self.layers:
            for held in (layer.keys, layer.values):
                if held is not None:
                    held[target, :, :length] = held[source, :, :length]

    def clear(self) -> None:
        """Give all memory back."""
        self.layers.clear()

    def bytes_per_token(self) -> int:
        """Of one position of one row, over all layers; 0 before anything was stored."""
        held = [part for layer in self.layers for part in (layer.keys, layer.values) if part is not None]
        return sum(part.shape[1] * part.shape[3] * part.element_size() for part in held)


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer [slots, kv_heads, positions, dim]."""

    is_sliding = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store what is new [rows, kv_heads, tokens, dim]; returns all that the rows' queries may look at."""
        step, tokens = self._cache.step, key_states.shape[2]
        length = max(step.starts) + tokens
        self.keys = _room(self.keys, key_states, step.slots.stop, length)
        self.values = _room(self.values, value_states, step.slots.stop, length)
        keys, values = self.keys[step.slots, :, :length], self.values[step.slots, :, :length]
        if step.fresh:
            keys.copy_(key_states)
            values.copy_(value_states)
            return key_states, value_states
        if tokens == 1:
            keys[step.rows, :, step.begin] = key_states[:, :, 0]
            values[step.rows, :, step.begin] = value_states[:, :, 0]
        else:
            (start,) = step.starts
            keys[:, :, start:] = key_states
            values[:, :, start:] = value_states
        return keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `update` makes the room."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys a mask would have to cover, and where they begin; no mask is made."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Positions in use, of the longest row of the present step."""
        return max(self._cache.step.starts)

    def get_max_length(self) -> int:
        """No bound."""
        return -1


def _room(held: Tensor | None, new: Tensor, slots: int, length: int) -> Tensor:
    """The same contents in a tensor that has room for so many slots and positions, the same one if it has already."""
    have = (0, 0) if held is None else (held.shape[0], held.shape[2])
    if held is not None and slots <= have[0] and length <= have[1]:
        return held
    slots = max(slots, have[0] * 3 // 2) if slots > have[0] else have[0]
    if length > have[1]:
        length = -(-max(length, have[1] * 5 // 4) // _GROW) * _GROW
    grown = new.new_zeros(slots, new.shape[1], max(length, have[1]), new.shape[3])
    if held is not None:
        grown[: have[0], :, : have[1]] = held
    return grown
