"""Small tokenizers of the kinds that published models have, trained in memory: what differs is how they cut text."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tiny import CHATML, chat_rows

CONTROL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]

# As the tokenizer.json of each family has them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {
    # GGUF's name: (the regex, or how else text is cut; whether words that are tokens are taken whole)
    "gpt-2": (None, False),
    "smollm": ("digits", False),
    "llama-bpe": (LLAMA3, True),
    "dbrx": (LLAMA3, False),
    "qwen2": (QWEN2, False),
    "tekken": (TEKKEN, True),
    "gpt-4o": (GPT4O, False),
}
SPM = ("always", "first", "never")
"""Where a sentencepiece-like tokenizer puts a blank before text: Llama 2, newer Mistrals, Gemma."""

HARD = (
    "Hello, world!",
    " leading, trailing and  double  blanks ",
    "\n\n\ttabs\n \n  and\r\nlines   \n",
    "1 12 123 1234 12345.678 3,141 ½ 2²",
    "I've you're IT'S we'll 'quoted' don't",
    "camelCase HTTPServer snake_case a.b/c\\d",
    "def f(x):\n    return x**2  # !!!\n",
    "naïve café Straße Ελλάδα нещо 你好世界 हिन्दी עברית 🦙🦙 😶\u200d🌫️",
    "<|im_start|>user\nHi <|im_end|>\n<|im_start|>assistant\n",
    "a<|im_end|> b <s>c</s>",
)


def corpus() -> list[str]:
    lines = [message["content"] for row in chat_rows(64, seed=0) for message in row["messages"]]
    return [*lines, *HARD[:8], "system user assistant tool\n", "123 456 7890 it's I'll IT'S THE The"] * 2


@lru_cache
def byte_level(name: str, size: int = 600) -> Any:
    """A byte-level tokenizer that llama.cpp calls so."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    cut, whole = BYTE_LEVEL[name]
    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut in (None, "digits"))]
    if cut == "digits":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    elif cut is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(cut), "isolated"))
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    if name == "dbrx":  # a word that its own merges don't reach tells it from llama-bpe
        state = tokenizer.to_str().replace('"vocab":{', '"vocab":{"Hellofriend":9999,', 1)
        tokenizer = Tokenizer.from_str(state.replace("9999", str(tokenizer.get_vocab_size())))
    if name in ("llama-bpe", "tekken"):
        state = tokenizer.to_str().replace('"vocab":{', '"vocab":{"ĠHellofriend":9999,', 1)
        tokenizer = Tokenizer.from_str(state.replace("9999", str(tokenizer.get_vocab_size())))
    return _wrapped(tokenizer)


@lru_cache
def spm(blank: str = "always", size: int = 300) -> Any:
    """A tokenizer as transformers makes of a sentencepiece model: every way to cut a piece in two is a merge."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=size, show_progress=False))
    found = [text for text, _ in sorted(trained.get_vocab().items(), key=lambda item: item[1])]
    pieces = [text for text in found if len(text) > 1] + [text for text in found if len(text) == 1]
    ids = {text: i for i, text in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces])}
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in ids and piece[i:] in ids
    ]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if blank == "always":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif blank == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    strip = [decoders.Strip(" ", 1, 0)] if blank != "never" else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return _wrapped(tokenizer, unk_token="<unk>")


def _wrapped(tokenizer: Any, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|im_end|>",
        extra_special_tokens=["</s>", "<|im_start|>"],
        clean_up_tokenization_spaces=False,
        chat_template=CHATML,
        **special,
    )
