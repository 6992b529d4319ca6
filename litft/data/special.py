"""Tokens of a rendered chat, where text that only spells a control token stays text.

A user may write `<|im_end|>` in a message. Tokenised as it stands, that becomes the control token and ends the turn:
the text forges structure. Here such spots are found by their character offsets, and the chat is tokenised once more
with the true control tokens written as private names, so that nothing else is recognised as one. Every other id stays
as in the tokenisation of the whole text.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from litft.data.jsontext import snippet
from litft.data.masks import MaskError, Span

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

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

    def __call__(self, text: str, literal: Sequence[Span] = ()) -> tuple[list[int], np.ndarray]:
        """Token ids of `text` and the characters that each stands for.

        Args:
            text: a rendered chat, control tokens and all.
            literal: ranges, in order, in which nothing is a control token.

        Returns:
            ids, and for each the half-open character range (begin, end) in `text`, in order: int64 [tokens, 2]. Some
            tokenizers leave blanks out of these ranges; the ends before blanks can't be told then, the beginnings after
            them neither.

        Raises:
            MaskError: the tokenizer fails at this text, or can't but take a text for a control token.
        """
        ids, offsets = self._encode(self.tokenizer, text)
        control = [
            k for k, token in enumerate(ids) if token in self.special_ids and self._is_written(k, text, ids, offsets)
        ]
        places: list[Span] = [(begin, end) for begin, end in offsets[control].tolist()]
        true = _outside(places, literal)
        if len(true) == len(control):
            return ids, offsets
        written = [(ids[control[k]], places[k]) for k in true]
        del ids, offsets  # of a large row, before those of the second tokenisation
        return self._encode_escaped(text, written)

    def spells_special(self, text: str) -> bool:
        """Whether `text` contains the text of a special token."""
        return any(token in text for token in self.special_tokens)

    @staticmethod
    def _encode(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> tuple[list[int], np.ndarray]:
        encoding = tokenize(tokenizer, text, add_special_tokens=False, return_attention_mask=False, **options)
        ids = encoding["input_ids"]
        encoded: Any = encoding[0]
        # One by one: the list of them all that tokenizers makes takes 130 bytes a token, and longer.
        ranges = itertools.chain.from_iterable(map(encoded.token_to_chars, range(len(ids))))
        return ids, np.fromiter(ranges, np.int64, 2 * len(ids)).reshape(-1, 2)

    def _encode_escaped(self, text: str, true: Sequence[tuple[int, Span]]) -> tuple[list[int], np.ndarray]:
        """Tokenise again, with the true control tokens (ids and places) as aliases and all others as plain text."""
        tokenizer = self._escaped or self._make_escaped()
        pieces: list[str] = []
        alias_ends, shifts = [], [0]  # where an alias ends in the new text; new minus old length so far
        done = length = 0
        for i, (begin, end) in true:
            token, alias = self._text_of(i), self._alias_of[i]
            # A token that takes the blanks beside it covers more than its own letters: replace just these.
            if (at := text.find(token, begin, end)) >= 0:
                begin, end = at, at + len(token)
            pieces += (text[done:begin], alias)
            done = end
            length += len(pieces[-2]) + len(alias)
            alias_ends.append(length)
            shifts.append(shifts[-1] + len(alias) - (end - begin))
        ids, offsets = self._encode(tokenizer, "".join([*pieces, text[done:]]), split_special_tokens=True)
        before = np.searchsorted(alias_ends, offsets[:, 0], side="right")  # how many aliases stand before each token
        is_next = offsets[:, 1] >= np.array([*alias_ends, np.iinfo(np.int64).max])[before]
        offsets -= np.array(shifts)[np.stack([before, before + is_next], 1)]
        for k, new in enumerate(ids):
            if new in self.special_ids and self._is_written(k, text, ids, offsets):
                raise MaskError(
                    f"a text spells {self._text_of(new)}, and the tokenizer makes the control token of plain text too",
                    "remove it from the text, or use data.allow_special_tokens: true",
                )
        return [self._id_of.get(i, i) for i in ids], offsets

    def _text_of(self, token: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token))

    def _is_written(self, k: int, text: str, ids: list[int], offsets: np.ndarray) -> bool:
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


def _outside(places: Sequence[Span], literal: Sequence[Span]) -> list[int]:
    """Which of the places (in order) touch none of the literal ranges (in order)."""
    outside, at = [], 0
    for k, (begin, end) in enumerate(places):
        while at < len(literal) and literal[at][1] <= begin:
            at += 1
        if at == len(literal) or literal[at][0] >= end:
            outside.append(k)
    return outside


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> BatchEncoding:
    """What the tokenizer makes of a text of any length.

    Raises:
        MaskError: it fails. Splitting by regular expressions gives up at runs of millions of blanks, for one.
    """
    try:
        return tokenizer(text, verbose=False, **options)  # length is judged elsewhere
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        raise MaskError(
            f"the tokenizer fails at this row: {snippet(str(error))}", "split the row, or leave it out"
        ) from None
