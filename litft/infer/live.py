"""A model in the middle of its training, answering."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from litft.infer.load import ChatModel
from litft.models.compiled import eager
from litft.models.shard import root_gathered

if TYPE_CHECKING:
    from litft.methods.base import Method


@contextmanager
def answering(method: Method) -> Iterator[ChatModel]:
    """Inside the context a method's live model answers; it is as before after it.

    Processes that each have a part of it answer the same prompts together.

    Args:
        method: with its model built.
    """
    from litft.data.template import ChatEncoder
    from litft.export.final import generation_settings, template_stops

    model = method.net.model
    encoder = ChatEncoder(method.tokenizer) if method.tokenizer.chat_template else None
    settings = generation_settings(model.generation_config, method.tokenizer, template_stops(method.tokenizer))
    device = method.run_device if getattr(method, "parallel", None) else next(model.parameters()).device
    half = getattr(method, "compute_dtype", None)
    torch.clear_autocast_cache()  # of a step that is under way
    try:
        with (
            eager(),
            _as_for_answers(model),
            root_gathered(method.net),
            torch.autocast(device.type, half or torch.bfloat16, enabled=half is not None),
        ):
            yield ChatModel(model, method.tokenizer, settings, set(settings.eos_token_id or ()), encoder)
    finally:
        torch.clear_autocast_cache()  # casts of weights that were made here have no gradient


@contextmanager
def _as_for_answers(model: Any) -> Iterator[None]:
    """Evaluation mode, a cache and an attention that takes one; restored on exit."""
    implementation, modes = model.config._attn_implementation, {m: m.training for m in model.modules()}
    model.eval()
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    model.config.use_cache = True
    try:
        yield
    finally:
        model.config.use_cache = False
        model.set_attn_implementation(implementation)
        for module, training in modes.items():
            module.training = training
