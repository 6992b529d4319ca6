"""Tiny random models, a tiny tokenizer and chat rows: what tests run on instead of the model hub.

Everything is built in memory and seeded, so two processes get bitwise the same weights and the same token ids.
"""

from __future__ import annotations

import random
from functools import lru_cache
from pathlib import Path
from typing import Any

VOCAB = 384
"""Vocabulary of `tiny_tokenizer`, and of every tiny model unless overridden."""
ENDOFTEXT, IM_START, IM_END = 0, 1, 2
"""Ids of the three special tokens."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Wide enough initial weights that attention, positions and windows show in the logits; at transformers' 0.02 a model
# this small is nearly linear and a contaminated document would hardly move anything.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": IM_END,
    "pad_token_id": ENDOFTEXT,
}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, **_SLIDING},
    "gemma3": {"head_dim": 16, "query_pre_attn_scalar": 16, **_SLIDING},
    "mistral": {"sliding_window": 8},
    "phi3": {},
    "gpt2": {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
    "olmo2": {},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 131072,  # 32 x 4096, as its YaRN scaling says
        **_SLIDING,
    },
    # Granite's four multipliers, none of them 1, so that code which forgets one is caught.
    "granite": {
        "embedding_multiplier": 6.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.4,
        "logits_scaling": 4.0,
        "tie_word_embeddings": True,
    },
}
FAMILIES = tuple(_FAMILY)
"""The twelve families: llama, mistral, phi3, gpt_oss, olmo2 and qwen3_moe untied, the others tied."""
_MODEL_TYPE = {"gemma3": "gemma3_text"}


def tiny_config(family: str, **config_overrides: Any) -> Any:
    """The configuration of a family's tiny model."""
    from transformers import AutoConfig

    options = {**_COMMON, **_FAMILY[family], **config_overrides}
    return AutoConfig.for_model(_MODEL_TYPE.get(family, family), **options)


def tiny_model(family: str, *, seed: int = 0, **config_overrides: Any) -> Any:
    """A random fp32 model of about 40k to 100k parameters: 2 layers, hidden size 32, dropout 0.

    Args:
        family: one of `FAMILIES`.
        seed: of the weights; the global random state is left as it was.
        config_overrides: keys of the family's configuration (`tie_word_embeddings=True`, `num_hidden_layers=4`).

    Returns:
        The model in train mode, with `config.use_cache` as the family has it (True).
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(family, **config_overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


@lru_cache(maxsize=1)
def _trained_tokenizer() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = [message["content"] for row in chat_rows(64, seed=0) for message in row["messages"]]
    tokenizer.train_from_iterator(lines + ["system user assistant tool\n"] * 4, trainer)
    assert tokenizer.get_vocab_size() == VOCAB, tokenizer.get_vocab_size()
    return tokenizer.to_str()


def tiny_tokenizer(template: str | None = "chatml", **kw: Any) -> Any:
    """A fresh byte-level BPE tokenizer of `VOCAB` tokens, the same in every process; any text round-trips.

    Args:
        template: "chatml", the text of a Jinja chat template, or None for a tokenizer without one.
        kw: to PreTrainedTokenizerFast (`pad_token="<|im_end|>"`, `bos_token="<|endoftext|>"`).
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    options = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": False}
    extra = kw.pop("extra_special_tokens", ["<|im_start|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_tokenizer()),
        model_max_length=512,
        extra_special_tokens=extra,
        **{**options, **kw},
    )
    tokenizer.chat_template = CHATML if template == "chatml" else template
    return tokenizer


def save_tiny(
    folder: str | Path,
    family: str = "llama",
    *,
    template: str | None = "chatml",
    dtype: Any = None,
    seed: int = 0,
    **config_overrides: Any,
) -> Path:
    """Save a tiny model, tokenizer and generation config as a folder that AutoModel and AutoTokenizer load.

    Args:
        folder: made if absent.
        family: one of `FAMILIES`.
        template: as in `tiny_tokenizer`.
        dtype: of the stored weights; None is fp32.
        seed: of the weights.
        config_overrides: as in `tiny_model`.

    Returns:
        The folder.
    """
    folder = Path(folder)
    model = tiny_model(family, seed=seed, **config_overrides)
    if dtype is not None:
        model = model.to(dtype)
        model.config.dtype = dtype
    model.generation_config.eos_token_id = [IM_END]
    model.generation_config.pad_token_id = ENDOFTEXT
    model.save_pretrained(folder)
    tiny_tokenizer(template).save_pretrained(folder)
    return folder


_LINES = """
the a sun moon river stone bird tree old new red blue quick slow runs sings sleeps falls under over
with without seven nine because when why how many what who where light water fire wind word line song answer question
"""
_WORDS = _LINES.split()


def chat_rows(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """`n` chat rows of uneven length: 1 to 3 turns, some with a system message, answers of 1 to 40 words, all distinct.

    Returns:
        Rows `{"messages": [{"role", "content"}, ...]}`, a function of (n, seed); the first rows of a longer list are
        those of a shorter one.
    """
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(_WORDS) for _ in range(rng.randint(low, high)))

    rows = []
    for i in range(n):
        messages = [{"role": "system", "content": f"Be {text(1, 3)}."}] if rng.random() < 0.25 else []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            longest = rng.choice((2, 8, 40))
            messages.append({"role": "user", "content": f"{text(2, 12)}?"})
            messages.append({"role": "assistant", "content": f"{i}: {text(1, longest)}."})
        rows.append({"messages": messages})
    return rows


def write_jsonl(path: str | Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows one JSON object a line; returns the path."""
    import json

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
