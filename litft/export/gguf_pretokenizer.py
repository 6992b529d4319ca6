"""GGUF's name for the way in which a byte-level tokenizer cuts text before it merges bytes."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any

from litft.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_SPLITS = {
    "llama-bpe": _CASED + "|" + _WORD + r"\p{L}+|\p{N}{1,3}" + _REST,
    "qwen2": _CASED + "|" + _WORD + r"\p{L}+|\p{N}" + _REST,
    "tekken": f"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\\p{{N}}" + _REST.replace(r"[\r\n]*", r"[\r\n/]*"),
    "gpt-4o": f"{_WORD}{_UPPER}*{_LOWER}+{_CASED}?|{_WORD}{_UPPER}+{_LOWER}*{_CASED}?|\\p{{N}}{{1,3}}"
    + _REST.replace(r"[\r\n]*", r"[\r\n/]*"),
}
_WHOLE_WORDS = {"llama-bpe", "tekken"}  # llama.cpp takes a word that is a token without looking at the merges
APPROXIMATE = {"tekken", "gpt-4o"}
"""Whose regex llama.cpp has with combining marks (\\p{M}) taken for no letters."""
_TWIN = {"llama-bpe": "dbrx"}  # the same cuts, but merges alone decide

# What tells pre-tokenizers apart: digits, contractions, cases, blanks and line ends, marks, scripts, emoji.
_PROBES = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n",
    "3 33 333 3333 33333 333333 3333333 3.3 3..3 3...3 1,234,567 ½ ² ٣٤٥ 1st 2nd a1b22c333",
    "I've been 'told he's there, 'RE you sure? 'M not I'LL 'D it's IT'S we'd WE'D x'y",
    "camelCase PascalCase HTTPServer iPhone McDonald ALLCAPS nOtHiNg aB Ab",
    "''''''```````\"\"\"\"......!!!!!!?????? ------======= //path/to\\file /\n/ #!/bin/sh\n",
    "a  b   c    d\te\r\nf \n g\u00a0h\u3000i  \n  j  ",
    "e\u0301te\u0301 нещо на Български កាន់តែពិសេស ?我想在apple工作1314151天～ हिन्दी ไทย עברית",
    "🚀 (normal) 😶\u200d🌫️ (multiple) ✅ 🦙🦙 €5 $5 £ ©",
    "def f(x):\n    return x**2  # two\n\n\nif __name__ == '__main__':\n\tf(10)\n",
    "_private __dunder__ snake_case kebab-case a.b.c a,b;c:d <tag> [x] {y}",
)


def pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """GGUF's name for the way in which a byte-level tokenizer cuts text before it merges.

    Found by cutting hard strings with it and with every way that is known here, not from a hash of token ids: so it
    holds for a vocabulary that has grown, too.

    Raises:
        UserError: it cuts as none of them does. A wrong name would degrade every answer without a word.
    """
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    other = [part["type"] for part in parts(state["normalizer"]) if part["type"] != "NFC"]
    if other:
        raise UserError(f"GGUF: the tokenizer rewrites text first ({other[0]}), which llama.cpp does not do")
    ours = _cuts(backend.pre_tokenizer)
    name = next((name for name, theirs in _known_cuts().items() if theirs == ours), None)
    if name is None:
        cuts = list(zip(_PROBES, ours, strict=True))
        text, cut = next((pair for pair in cuts if _odd(pair[1])), cuts[0])
        raise UserError(
            "GGUF: the pre-tokenizer is none of those known here "
            f"({', '.join(_known_cuts())}):\n    {json.dumps(state['pre_tokenizer'], ensure_ascii=False)[:200]}\n"
            f"    it cuts {text[:40]!r} into {cut[:6]}\nllama.cpp would cut text otherwise than in training"
        )
    whole = bool(state["model"].get("ignore_merges"))
    if whole != (name in _WHOLE_WORDS) and not _merges_reach_all(backend):
        if name not in _TWIN:
            raise UserError(f"GGUF: the tokenizer cuts as {name!r} but treats words that are tokens otherwise")
        return _TWIN[name]
    return name


def _cuts(pre: Any) -> list[list[str]]:
    return [[piece for piece, _ in pre.pre_tokenize_str(probe)] for probe in _PROBES]


def _odd(pieces: list[str]) -> bool:
    return not any(pieces in theirs for theirs in _known_cuts().values())


@functools.cache
def _known_cuts() -> dict[str, list[list[str]]]:
    from tokenizers import Regex, pre_tokenizers

    after = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    known = {
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
    }
    for name, regex in _SPLITS.items():
        known[name] = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), after])
    return {name: _cuts(pre) for name, pre in known.items()}


def _merges_reach_all(backend: Tokenizer) -> bool:
    """Whether the merges make every token from its bytes, so that taking it whole is no difference."""
    from tokenizers import Tokenizer as Plain

    state = json.loads(backend.to_str())
    state["model"]["ignore_merges"] = False
    merged = Plain.from_str(json.dumps(state)).model
    return all(len(merged.tokenize(text)) == 1 for text in state["model"]["vocab"])


def parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    steps = component["normalizers"] if "normalizers" in component else component["pretokenizers"]
    return [part for step in steps for part in parts(step)]
