"""A tokenizer as GGUF's metadata: tokens, types, merges or scores, special tokens, and how text is cut before merging.

llama.cpp has two tokenizers that matter here. "gpt2" merges bytes by rank after a pre-tokenizer that GGUF only names;
"llama" is sentencepiece's: no pre-tokenizer, it merges the two neighbours whose union has the best score. Which one a
tokenizers file is, and which pre-tokenizer, is found from what it does; what neither does is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from litft.errors import UserError
from litft.export.gguf_pretokenizer import APPROXIMATE, parts, pre_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase


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
    if any(part["type"] == "ByteLevel" for part in parts(state["pre_tokenizer"])):
        found = Vocabulary("gpt2", pre_tokenizer(tokenizer), tokens, types)
        found.merges = [" ".join(pair) for pair in _pairs(model)]
        if any(" " in part for pair in _pairs(model) for part in pair):
            raise UserError("GGUF: the tokenizer has merges with blanks in them, which is not supported")
        found.adds = {"space": False}
        if found.pre in APPROXIMATE:
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
    odd = [p["type"] for p in parts(state["normalizer"]) if p["type"] not in ("Prepend", "Replace")]
    odd += [p["type"] for p in parts(state["pre_tokenizer"]) if p["type"] not in ("Metaspace", "Split")]
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


def _pairs(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges; older files write each as one string."""
    halves = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in halves]
