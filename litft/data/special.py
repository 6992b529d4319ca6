"""Tokens of a rendered chat, where text that only spells a control token stays text.

A user may write `<|im_end|>` in a message. Tokenised as it stands, that becomes the control token and ends the turn:
the text forges structure. Here such spots are found by their character offsets, and the chat is tokenised once more
with the true control tokens written as private names, so that nothing else is recognised as one. Every other id stays
as in the tokenisation of the whole text.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from litft.data.masks import MaskError, Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ALIAS = "\U0010fde0{}\U0010fde1"  # how a true control token is written for the second tokenisation


class ChatTokenizer:
    """Tokenises rendered chats with the character range of every token.

    Args:
        tokenizer: a fast tokenizer of transformers (one that knows offsets).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        special_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids: frozenset[int] = frozenset(special_ids | set(tokenizer.all_special_ids))
        self.special_tokens: tuple[str, ...] = tuple(
            sorted({str(tokenizer.convert_ids_to_tokens(i)) for i in self.special_ids}, key=len, reverse=True)
        )
        self._escaped: PreTrainedTokenizerBase | None = None
        self._alias_of: dict[int, str] = {}
        self._id_of: dict[int, int] = {}

    def __call__(self, text: str, literal: Sequence[Span] = ()) -> tuple[list[int], list[Span]]:
        """Token ids of `text` and the characters that each stands for.

        Args:
            text: a rendered chat, control tokens and all.
            literal: ranges, in order, in which nothing is a control token.

        Returns:
            ids, and for each the half-open character range (begin, end) in `text`, in order. Some tokenizers leave
            blanks out of these ranges; the ends before blanks can't be told then, the beginnings after them neither.
        """
        ids, offsets = self._encode(self.tokenizer, text)
        control = [
            k for k, token in enumerate(ids) if token in self.special_ids and self._is_written(k, text, ids, offsets)
        ]
        true = _outside(control, offsets, literal)
        if len(true) < len(control):
            ids, offsets = self._encode_escaped(text, ids, offsets, true)
        return ids, offsets

    def spells_special(self, text: str) -> bool:
        """Whether `text` contains the text of a special token."""
        return any(token in text for token in self.special_tokens)

    @staticmethod
    def _encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> tuple[list[int], list[Span]]:
        encoding = tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,  # length is judged elsewhere
            **options,
        )
        return encoding["input_ids"], encoding["offset_mapping"]

    def _encode_escaped(
        self, text: str, ids: list[int], offsets: list[Span], true: Sequence[int]
    ) -> tuple[list[int], list[Span]]:
        """Tokenise again, with the true control tokens (indices into ids) as aliases and all others as plain text."""
        tokenizer = self._escaped or self._make_escaped()
        pieces: list[str] = []
        shifts: list[tuple[int, int]] = []  # (where an alias ends in the new text, new minus old length so far)
        done = shift = length = 0
        for k in true:
            token, alias = self._text_of(ids[k]), self._alias_of[ids[k]]
            # A token that takes the blanks beside it covers more than its own letters: replace just these.
            begin, end = offsets[k]
            if (at := text.find(token, begin, end)) >= 0:
                begin, end = at, at + len(token)
            pieces += (text[done:begin], alias)
            done = end
            length += len(pieces[-2]) + len(alias)
            shift += len(alias) - (end - begin)
            shifts.append((length, shift))
        new_ids, new_offsets = self._encode(tokenizer, "".join([*pieces, text[done:]]), split_special_tokens=True)
        at, before, result = 0, 0, []
        for begin, end in new_offsets:
            while at < len(shifts) and shifts[at][0] <= begin:
                before = shifts[at][1]
                at += 1
            after = shifts[at][1] if at < len(shifts) and shifts[at][0] <= end else before
            result.append((begin - before, end - after))
        for k, new in enumerate(new_ids):
            if new in self.special_ids and self._is_written(k, text, new_ids, result):
                raise MaskError(
                    f"a text spells {self._text_of(new)}, and the tokenizer makes the control token of plain text too",
                    "remove it from the text, or use data.allow_special_tokens: true",
                )
        return [self._id_of.get(i, i) for i in new_ids], result

    def _text_of(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def _is_written(self, k: int, text: str, ids: list[int], offsets: list[Span]) -> bool:
        """Whether a special token stands for its own name, not (as the unknown token does) for other text."""
        return ids[k] != self.tokenizer.unk_token_id or self._text_of(ids[k]) in text[slice(*offsets[k])]

    def _make_escaped(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer that knows an alias for every control token."""
        from tokenizers import AddedToken

        escaped = copy.deepcopy(self.tokenizer)
        added = self.tokenizer.added_tokens_decoder
        for token in sorted(self.special_ids):
            alias = _ALIAS.format(token)
            flags = added.get(token)
            escaped.add_tokens(
                [
                    AddedToken(
                        alias,
                        normalized=False,
                        special=False,  # so that it is recognised where special tokens are not
                        lstrip=bool(flags and flags.lstrip),
                        rstrip=bool(flags and flags.rstrip),
                    )
                ]
            )
            self._alias_of[token] = alias
            self._id_of[int(escaped.convert_tokens_to_ids(alias))] = token  # type: ignore[arg-type]
        self._escaped = escaped
        return escaped


def _outside(tokens: Sequence[int], offsets: Sequence[Span], literal: Sequence[Span]) -> list[int]:
    """Those of the tokens (indices, in order) that touch none of the literal ranges (in order)."""
    outside, at = [], 0
    for k in tokens:
        begin, end = offsets[k]
        while at < len(literal) and literal[at][1] <= begin:
            at += 1
        if at == len(literal) or literal[at][0] >= end:
            outside.append(k)
    return outside
