"""A folder or model id in, a model that can answer out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from litft.data.conversation import Conversation, Message
from litft.errors import UserError
from litft.export.final import as_ids, generation_settings, own_settings, template_stops

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from litft.data.template import ChatEncoder

Prompt = str | list[Message] | Conversation
"""What can be answered: the text of one user turn, the messages so far, or a conversation."""


@dataclass
class ChatModel:
    """A model ready to answer, with all that answering needs.

    Attributes:
        model: in eval mode on its device, adapters merged.
        tokenizer: of the fine-tuned model; not changed by generation.
        settings: the model's own generation settings (sampling, stop and pad tokens).
        stop_ids: every token that ends an answer.
        encoder: writes a chat as training did; None where the tokenizer has no chat template.
        name: as the user named the model.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: GenerationConfig
    stop_ids: set[int]
    encoder: ChatEncoder | None
    name: str = ""

    @property
    def context_length(self) -> int | None:
        """How many tokens prompt and answer may have together; None where the model names no limit."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids that the model continues: the whole chat so far and the header of the answer.

        Without a chat template a string is continued as it stands.

        Raises:
            UserError: messages, and no chat template to write them with.
            DataError: the template refuses the conversation.
        """
        if isinstance(prompt, Conversation) and prompt.text is not None:
            prompt = prompt.text
        elif self.encoder is not None:
            return self.encoder.prompt(as_conversation(prompt))
        if not isinstance(prompt, str):
            raise UserError(
                f"{self.name}: its tokenizer has no chat template, so it cannot take messages\n"
                "give plain text to continue, or a model that was fine-tuned on chats"
            )
        ids = list(self.tokenizer(prompt)["input_ids"])
        while ids and ids[-1] in self.stop_ids:  # a tokenizer that closes every text, which would be the end
            ids.pop()
        return ids

    @cached_property
    def hidden_ids(self) -> set[int]:
        """Special tokens that are no part of an answer's text.

        These are the named ones (bos, eos, pad, ...), the stop tokens and those with which the template frames a
        turn. Others, flagged special by some tokenizers, are mark-up that the answer needs (`[TOOL_CALLS]`).
        """
        tokens = self.tokenizer.special_tokens_map.values()
        named = {id for token in tokens for id in as_ids(self.tokenizer.convert_tokens_to_ids(token))}
        frame = set(self.encode("a")) if self.encoder is not None else set()
        special = {id for id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return self.stop_ids | named | (frame & special)

    def decode(self, ids: list[int]) -> str:
        """The answer in `ids`: up to the first stop token, without the tokens that only frame it."""
        end = next((i for i, id in enumerate(ids) if id in self.stop_ids), len(ids))
        shown = [id for id in ids[:end] if id not in self.hidden_ids]
        text = self.tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return str(text)


def as_conversation(prompt: Prompt) -> Conversation:
    """A prompt as a conversation; a string is one user turn."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, list):
        prompt = Conversation(messages=prompt, train=[None] * len(prompt))
    return prompt


def load_for_inference(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ChatModel:
    """Load a model to answer with; an adapter is merged, in memory, into its 16-bit base.

    Args:
        name: a run folder (its `final/`), an adapter folder, a model folder, a hub id or an alias.
        device: "auto" (the first GPU, else the CPU), "cpu", "cuda", "cuda:1", "mps".
        dtype: of the weights; None is the dtype they are stored in, or fp32 on a CPU without fast 16-bit arithmetic.
        revision: branch, tag or commit of a model on the hub.
        trust_remote_code: allow Python code that comes with the model.

    Returns:
        The model with tokenizer, generation settings and stop tokens.

    Raises:
        UserError: no such model, no such device, or an adapter that cannot be merged.
    """
    import torch

    from litft.data.template import ChatEncoder
    from litft.export.weights import stored_dtype
    from litft.infer.products import by_onednn
    from litft.models.load import grow, is_quantised, load_model, load_tokenizer
    from litft.models.resolve import resolve
    from litft.tuners.lora import merge_adapter

    where = find_device(device)
    source = resolve(name, revision=revision, trust_remote_code=trust_remote_code, quantised=True)
    if is_quantised(source):  # what isn't packed goes with the scales
        dtype = stored_dtype(source.folder) or torch.bfloat16
    elif dtype is None:
        dtype = stored_dtype(source.folder) or torch.bfloat16
        if dtype != torch.float32 and where.type == "cpu" and not _fast_16_bit_cpu():
            dtype = torch.float32
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    model = load_model(source, dtype=dtype, trust_remote_code=trust_remote_code)
    if source.adapter is not None:
        grow(model, tokenizer)
        merge_adapter(model, source.adapter)
    model.config.use_cache = True
    model = model.requires_grad_(False).eval().to(where)
    by_onednn(model)

    settings = generation_settings(own_settings(source, model.config), tokenizer, template_stops(tokenizer))
    encoder = ChatEncoder(tokenizer) if tokenizer.chat_template else None
    return ChatModel(model, tokenizer, settings, set(as_ids(settings.eos_token_id)), encoder, str(name))


def find_device(device: str = "auto") -> torch.device:
    """The device of that name; "auto" is the first GPU, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without CUDA
        raise UserError(f"--device {device}: not available here; use --device auto or cpu") from error
    return where


def _fast_16_bit_cpu() -> bool:
    """Whether the CPU multiplies bf16 in hardware."""
    import torch

    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
