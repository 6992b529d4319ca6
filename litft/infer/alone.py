"""Answers by transformers' own `generate`, one at a time: for models and settings that the engine can't batch."""

from __future__ import annotations

import contextlib
import copy
import logging
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from litft.infer.load import ChatModel

if TYPE_CHECKING:
    from litft.infer.engine import Request

_said: set[tuple[str, str]] = set()


def say_once(name: str, why: str) -> None:
    """Log that a model's prompts are not batched, and why, once a process."""
    if (name, why) not in _said:
        _said.add((name, why))
        logging.getLogger(__name__).warning("%s is answered one prompt at a time: %s", name or "the model", why)


def why_alone(model: Any) -> str | None:
    """Why rows can't be continued together in slots, as half a sentence; None where they can."""
    from transformers import PreTrainedModel

    from litft.models.load import can_pack

    if not isinstance(model, PreTrainedModel):
        return "its forward pass is not transformers'"
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type"), *(part.get("rope_type") for part in rope.values() if isinstance(part, dict))}
    if kinds & {"dynamic", "longrope"}:
        return "its rotary angles depend on the longest row of a batch"
    return can_pack(model)


def alone(bundle: ChatModel, request: Request) -> None:
    """Answer one request by transformers' `generate`, whatever its settings and the model's cache are."""
    from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

    class Over(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            if request.cancelled:
                request.end("cancelled")
            return torch.full(input_ids.shape[:1], request.finish is not None, device=input_ids.device)

    class Tokens:
        """transformers' streamer, which gets the prompt first."""

        prompt = True

        def put(self, value: torch.Tensor) -> None:
            for id in [] if self.prompt else value.flatten().tolist():
                if request.finish is None:
                    request.accept(id, bundle)
            self.prompt = False

        def end(self) -> None:
            pass

    model: Any = bundle.model
    seed = request.seed if isinstance(request.seed, int | None) else zlib.crc32(request.seed.encode())
    own = model.generation_config
    model.generation_config = GenerationConfig()  # blank, or `generate` would fill what `settings` leaves out from it
    settings = copy.copy(request.settings)
    settings.max_new_tokens = request.max_new_tokens
    ids = torch.tensor([request.ids], device=model.device)
    growing = settings.num_beams in (None, 1)  # several beams have no one text that grows
    try:
        with seeded(seed, model.device):
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                streamer=Tokens() if growing else None,
                stopping_criteria=StoppingCriteriaList([Over()]),
            )
    finally:
        model.generation_config = own
    for id in out[0, len(request.ids) + len(request.new) :].tolist():
        if request.finish is None:
            request.accept(id, bundle)
    request.end("length")


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside the block torch's random numbers follow `seed`; afterwards they go on as if nothing had happened."""
    if seed is None:
        yield
        return
    forked: dict[str, Any] = {"devices": []}
    if device.type != "cpu":
        forked = {"devices": [device], "device_type": device.type}
    with torch.random.fork_rng(**forked):
        torch.manual_seed(seed)
        yield
