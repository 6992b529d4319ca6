"""A tokenizer as GGUF's metadata: tokens, types, merges or scores, special tokens, and how text is cut before merging.

llama.cpp has two tokenizers that matter here. "gpt2" merges bytes by rank after a pre-tokenizer that GGUF only names;
"llama" is sentencepiece's: no pre-tokenizer, it merges the two neighbours whose union has the best score. Which one a
tokenizers file is, and which pre-tokenizer, is found from what it does; what neither does is refused.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from litft.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
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
_APPROXIMATE = {"tekken", "gpt-4o"}  # llama.cpp's regex takes marks (\p{M}) for no letters
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


@dataclass
class Vocabulary:
    """A tokenizer as GGUF says it.

    Attributes:
        model: "gpt2" or "llama", the kind of llama.cpp's tokenizer.
        pre: name of the pre-tokenizer.
        tokens: text of each token, one for every row of the embedding.
        types: `gguf.TokenType` of each.
        scores: of each ("llama"), the higher the earlier it is merged.
        merges: pairs in their order ("gpt2").
        special: ids by their name in GGUF (bos, eos, eot, eom, unk, pad).
        adds: whether bos, eos, or a blank before the text are added.
        chat_template: the template, or several by name.
        strips: whether special tokens take the blanks after them away, as Phi-3's do.
        notes: what is not the same in llama.cpp.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    adds: dict[str, bool] = field(default_factory=dict)
    chat_template: str | dict[str, str] | None = None
    strips: bool = False
    notes: list[str] = field(default_factory=list)

    def describe(self, writer: GGUFWriter) -> None:
        """Write the tokenizer's metadata."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        if self.scores:
            writer.add_token_scores(self.scores)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        for name, id in self.special.items():
            getattr(writer, f"add_{name}_token_id")(id)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        writer.add_add_space_prefix(self.adds["space"])
        if isinstance(self.chat_template, dict):
            writer.add_chat_template([{"name": n, "template": t} for n, t in self.chat_template.items()])
        elif self.chat_template:
            writer.add_chat_template(self.chat_template)


def vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, stop_ids: Iterable[int] = ()) -> Vocabulary:
    """A tokenizer as GGUF says it.

    Args:
        tokenizer: of the model.
        rows: of the embedding; those without a token get an unused one.
        stop_ids: every token that ends an answer, the trained one first.

    Raises:
        UserError: llama.cpp has no tokenizer that does the same, or the embedding is too small.
    """
    if not tokenizer.is_fast:
        raise UserError("GGUF: the tokenizer has no tokenizer.json, from which its merges are read")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    if model["type"] != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        raise UserError(f"GGUF: a tokenizer of the type {model['type']} is not supported, only BPE")
    tokens, types = _tokens(tokenizer, model, rows)
    if any(part["type"] == "ByteLevel" for part in _parts(state["pre_tokenizer"])):
        found = Vocabulary("gpt2", pre_tokenizer(tokenizer), tokens, types)
        found.merges = [" ".join(pair) for pair in _pairs(model)]
        if any(" " in part for pair in _pairs(model) for part in pair):
            raise UserError("GGUF: the tokenizer has merges with blanks in them, which is not supported")
        found.adds = {"space": False}
        if found.pre in _APPROXIMATE:
            found.notes.append("llama.cpp cuts words with combining marks (Hindi, Thai) otherwise than this tokenizer")
    elif model.get("byte_fallback"):
        found = Vocabulary("llama", "default", tokens, types, scores=_scores(tokenizer, model, tokens))
        found.adds = {"space": _adds_blank(tokenizer, state, found.notes)}
    else:
        raise UserError("GGUF: the tokenizer neither works on bytes nor falls back to them, as llama.cpp's do")
    found.chat_template = tokenizer.chat_template
    _special(found, tokenizer, list(stop_ids))
    _strips(found, tokenizer)
    return found


def _tokens(tokenizer: PreTrainedTokenizerBase, model: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    from gguf import TokenType

    added = tokenizer.added_tokens_decoder
    texts: dict[int, str] = {id: text for text, id in model["vocab"].items()}
    if max([*texts, *added]) >= rows:
        raise UserError(f"GGUF: the tokenizer has {max([*texts, *added]) + 1} tokens, the embedding only {rows} rows")
    tokens, types = [], []
    for id in range(rows):
        text, kind = texts.get(id), TokenType.NORMAL
        if id in added:
            text = added[id].content
            kind = TokenType.CONTROL if added[id].special or _looks_special(text) else TokenType.USER_DEFINED
            if kind == TokenType.USER_DEFINED and model.get("byte_fallback"):
                text = text.replace("▁", " ")
        elif text is None:
            text, kind = f"[PAD{id}]", TokenType.UNUSED
        elif model.get("byte_fallback") and len(text) == 6 and text.startswith("<0x"):
            kind = TokenType.BYTE
        if text == model.get("unk_token"):
            kind = TokenType.UNKNOWN
        tokens.append(text)
        types.append(int(kind))
    if len(set(tokens)) < len(tokens):
        twice = next(text for text in tokens if tokens.count(text) > 1)
        raise UserError(f"GGUF: the tokenizer has two tokens {twice!r}, which llama.cpp can't hold")
    return tokens, types


def _looks_special(text: str) -> bool:
    """Control tokens that published tokenizers fail to flag: llama.cpp's converter goes by their look as well."""
    framed = (text.startswith("<|") and text.endswith("|>")) or (text.startswith("<｜") and text.endswith("｜>"))
    return (
        framed
        or (text.startswith("<unused") and text.endswith(">"))
        or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
    )


# ---- byte-level BPE


def pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """GGUF's name for the way in which a byte-level tokenizer cuts text before it merges.

    Found by cutting hard strings with it and with every way that is known here, not from a hash of token ids: so it
    holds for a vocabulary that has grown, too.

    Raises:
        UserError: it cuts as none of them does. A wrong name would degrade every answer without a word.
    """
    backend = tokenizer.backend_tokenizer
    state = json.loads(backend.to_str())
    other = [part["type"] for part in _parts(state["normalizer"]) if part["type"] != "NFC"]
    if other:
        raise UserError(f"GGUF: the tokenizer rewrites text first ({other[0]}), which llama.cpp does not do")
    ours = _cuts(backend.pre_tokenizer)
    name = next((name for name, theirs in _known_cuts().items() if theirs == ours), None)
    if name is None:
        text, cut = next((probe, piece) for probe, piece in zip(_PROBES, ours, strict=True) if _odd(piece))
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


# ---- sentencepiece-like BPE


def _scores(tokenizer: PreTrainedTokenizerBase, model: dict[str, Any], tokens: list[str]) -> list[float]:
    """Scores whose order is that of the merges, so that llama.cpp merges as the tokenizer does.

    llama.cpp joins any two neighbours whose union is a token. That is the same where the merges hold every way to cut
    every token in two, the ways of one token next to each other: as they do when made from a sentencepiece model.

    Raises:
        UserError: the merges are not like that.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    ways: dict[str, int] = {}
    for rank, (left, right) in enumerate(_pairs(model)):
        first.setdefault(left + right, rank)
        last[left + right] = rank
        ways[left + right] = ways.get(left + right, 0) + 1
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    vocab = model["vocab"].keys() - added
    for piece in vocab:
        if len(piece) < 2 or (len(piece) == 6 and piece.startswith("<0x")):
            continue
        cuts = sum(piece[:i] in vocab and piece[i:] in vocab for i in range(1, len(piece)))
        if cuts > ways.get(piece, 0) or (piece in first and last[piece] - first[piece] >= max(ways[piece], 1)):
            raise UserError(
                f"GGUF: llama.cpp's sentencepiece tokenizer would merge {piece!r} otherwise than this one does\n"
                "only merges that were made from a sentencepiece model can be written"
            )
    return [-float(first.get(text, 0)) if text in vocab else -1000.0 for text in tokens]


def _adds_blank(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], notes: list[str]) -> bool:
    """Whether llama.cpp shall put a blank before text, at its start and after each special token: both or neither.

    Tokenizers have finer rules. What keeps chats as they are goes first, then what keeps text without special tokens.
    """
    odd = [p["type"] for p in _parts(state["normalizer"]) if p["type"] not in ("Prepend", "Replace")]
    odd += [p["type"] for p in _parts(state["pre_tokenizer"]) if p["type"] not in ("Metaspace", "Split")]
    if odd or "".join(_pieces(tokenizer, "a  b")).lstrip("▁") != "a▁▁b":
        raise UserError(f"GGUF: llama.cpp does not rewrite text as this tokenizer does ({', '.join(odd) or 'blanks'})")
    start = _pieces(tokenizer, "ab")[0].startswith("▁")
    if not tokenizer.chat_template:
        return start
    try:
        turns = [
            {"role": role, "content": text} for role, text in (("user", "ab"), ("assistant", "cd"), ("user", "e f"))
        ]
        chat = rendered(tokenizer, turns)
    except ValueError:
        return start
    wanted = _pieces(tokenizer, chat)
    found = next((blank for blank in (start, not start) if _as_llama_cpp(tokenizer, chat, blank) == wanted), None)
    if found is None:
        notes.append("llama.cpp puts blanks into chats otherwise than this tokenizer: compare answers")
    elif found != start:
        notes.append("text that does not follow a special token has no blank before it in llama.cpp, as it has here")
    return start if found is None else found


def _as_llama_cpp(tokenizer: PreTrainedTokenizerBase, text: str, blank: bool) -> list[str]:
    """The pieces that llama.cpp makes of a text: between special tokens, each stretch by itself."""
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    longest = sorted(map(re.escape, added), key=len, reverse=True)
    pieces: list[str] = []
    for part in re.split(f"({'|'.join(longest)})", text):
        if part in added:
            pieces.append(part)
            continue
        if pieces and pieces[-1] in added and added[pieces[-1]].rstrip:
            part = part.lstrip()
        if part:
            written = " " * blank + part
            pieces += [token.value for token in tokenizer.backend_tokenizer.model.tokenize(written.replace(" ", "▁"))]
    return pieces


def _pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).tokens


# ---- both


def _special(found: Vocabulary, tokenizer: PreTrainedTokenizerBase, stops: list[int]) -> None:
    """Ids of special tokens, and whether text gets them by itself.

    llama.cpp stops on eos, eot and eom and on a few tokens that it knows by their text.
    """
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(stops), None),
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    more = [id for id in dict.fromkeys(stops) if id != ids["eos"]]
    ids |= dict(zip(("eot", "eom"), more, strict=False))
    if len(more) > 2:
        found.notes.append(f"llama.cpp stops on {found.tokens[more[0]]} but may not on {found.tokens[more[2]]}")
    found.special = {name: id for name, id in ids.items() if id is not None}
    text = tokenizer("ab")["input_ids"]
    found.adds["bos"] = adds_bos(tokenizer)
    found.adds["eos"] = bool(text) and text[-1] == ids["eos"]
    if not found.adds["bos"] and text and text[0] == ids["bos"]:
        found.notes.append(f"text without the chat template gets no {tokenizer.bos_token}, since chats have none")


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether llama.cpp shall put the bos token before a text.

    It does so before a chat, too, unless that begins with one: so not where the chat template writes none.
    """
    bos = tokenizer.bos_token
    if bos is None or tokenizer("ab")["input_ids"][:1] != [tokenizer.bos_token_id]:
        return False
    if not tokenizer.chat_template:
        return True
    try:
        return rendered(tokenizer, [{"role": "user", "content": "ab"}]).startswith(bos)
    except ValueError:
        return True


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """A chat and the header of the answer as the chat template writes them, within bounds.

    Raises:
        ValueError: the template refuses it.
    """
    from litft.data.bounds import PATIENCE_LEARNING, Bounded

    try:
        with Bounded(PATIENCE_LEARNING):
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template is a program: it may fail in any way
        raise ValueError(f"it says {str(error)[:120]!r}") from error


def _strips(found: Vocabulary, tokenizer: PreTrainedTokenizerBase) -> None:
    """Special tokens that swallow the blanks beside them, which GGUF can't say."""
    tokens = tokenizer.added_tokens_decoder.values()
    swallow = [token.content for token in tokens if token.rstrip and token.content != "</s>"]
    found.strips = bool(swallow) and {"</s>", "<unk>", "<s>", "<|endoftext|>"} <= set(found.tokens)
    if not found.strips and (odd := [token.content for token in tokens if token.lstrip or token.rstrip]):
        found.notes.append(f"blanks beside {odd[0]} are text in llama.cpp, and dropped here")


def _parts(component: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    steps = component["normalizers"] if "normalizers" in component else component["pretokenizers"]
    return [part for step in steps for part in _parts(step)]


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges; older files write each as one string."""
    halves = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in halves]
