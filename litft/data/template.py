"""Chats to tokens, with the mask of the tokens that are trained.

ids are those of `tokenizer.apply_chat_template(whole conversation)`, so training equals serving; one exception: text of
a system, user or tool message that spells a control token stays text (see `litft.data.special`). A token is trained
where it holds a character that the model would have to produce (see `litft.data.masks`): so a token that straddles the
end of the prompt belongs to the answer, which could not be written without it.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litft.data import masks, scaffold
from litft.data.conversation import Conversation, Message
from litft.data.masks import Layout, MaskError, Scaffold
from litft.data.special import ChatTokenizer, Span
from litft.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last", "all"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_CONTROL = re.compile(r"<[|｜][^<>|｜\s]{1,60}[|｜]>")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(slots=True)
class Encoded:
    """One row as tokens.

    Attributes:
        ids: token ids.
        trained: for each token, whether its loss counts.
        text: the text that was tokenised.
        notes: what was lost on the way by the template's own rules, to be counted and said once.
    """

    ids: list[int]
    trained: list[bool]
    text: str
    notes: tuple[str, ...] = field(default=())


class ChatEncoder:
    """Turns conversations into tokens and the mask of the trained ones.

    Args:
        tokenizer: a fast tokenizer with a chat template (raw text rows need none).
        train_on: `assistant`: all assistant messages except those with `train: false`; `last`: the last assistant
            message, and those with `train: true`; `all`: every token except those of messages with `train: false`.
        allow_special_tokens: let text of system, user and tool messages that spells a special token become that token.

    Raises:
        UserError: the tokenizer has no fast version.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_on: TrainOn = "assistant",
        allow_special_tokens: bool = False,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which can't say which characters a token stands for;"
                " load its fast version (a tokenizer.json beside the model)"
            )
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.allow_special_tokens = allow_special_tokens
        self._tokens = ChatTokenizer(tokenizer)
        self._form: scaffold.Form | None = None
        self._scaffold: Scaffold | None = None
        self._said: set[str] = set()

    # -- public ------------------------------------------------------------------------------------------------------

    def __call__(self, conversation: Conversation) -> Encoded:
        """Encode a training row.

        Raises:
            DataError: the template refuses the row, its mask can't be established, or no token would be trained.
        """
        try:
            encoded = (
                self._encode_text(conversation.text) if conversation.text is not None else self._encode(conversation)
            )
        except MaskError as error:
            raise DataError(
                error.what, file=conversation.file or None, line=conversation.line or None, mend=error.mend
            ) from error
        for note in encoded.notes:
            if note not in self._said:
                self._said.add(note)
                warnings.warn(note, stacklevel=2)
        return encoded

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids of the messages and the generation prompt, as the model gets them at inference."""
        try:
            text = self._render(conversation.messages, conversation.tools, prompt=True)
            literal: Sequence[Span] = ()
            if self._spells_special(conversation.messages):
                layout = masks.lay_out(self._render, conversation.messages, conversation.tools, text, prompt=True)
                literal = layout.texts(conversation.messages)
            return self._tokens(text, literal)[0]
        except MaskError as error:
            raise DataError(
                error.what, file=conversation.file or None, line=conversation.line or None, mend=error.mend
            ) from error

    @property
    def scaffold(self) -> Scaffold:
        """What the template writes around the texts (learned at first use)."""
        if self._scaffold is None:
            self._scaffold = scaffold.learn(self._render, self._tokens.special_tokens)
        return self._scaffold

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids of the end-of-turn tokens, on which generation stops."""
        ids = [self.tokenizer(stop, add_special_tokens=False)["input_ids"][-1] for stop in self.scaffold.stops]
        return tuple(dict.fromkeys(ids))

    # -- chats -------------------------------------------------------------------------------------------------------

    def _encode(self, conversation: Conversation) -> Encoded:
        messages, tools = conversation.messages, conversation.tools
        wanted = self._wanted(conversation)
        masks.check_marks(*(m.get("content") or "" for m in messages))
        text = self._render(messages, tools)
        scaffold = self.scaffold
        layout = masks.lay_out(self._render, messages, tools, text)
        self._check_complete(layout, conversation)
        spans = [(begin, end) for i, begin, end in masks.answers(layout, messages, scaffold) if wanted[i]]
        literal = [] if self.allow_special_tokens else layout.texts(messages)
        ids, offsets = self._tokens(text, literal)
        trained = [True] * len(ids) if self.train_on == "all" else _covered(offsets, spans)
        if not any(trained):
            raise MaskError("no token of this row would be trained", "see data.train_on and the messages' train flags")
        return Encoded(ids, trained, text)

    def _wanted(self, conversation: Conversation) -> list[bool]:
        roles = [message["role"] for message in conversation.messages]
        flags = conversation.train or [None] * len(roles)
        last = max((i for i, role in enumerate(roles) if role == "assistant"), default=-1)
        wanted = []
        for i, (role, flag) in enumerate(zip(roles, flags, strict=True)):
            default = role == "assistant" and (self.train_on != "last" or i == last)
            wanted.append(default if flag is None else flag)
        return wanted

    def _check_complete(self, layout: Layout, conversation: Conversation) -> None:
        pass

    def _encode_text(self, text: str) -> Encoded:
        ids = list(self.tokenizer(text)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if eos is not None and (not ids or ids[-1] != eos):
            ids.append(eos)
        return Encoded(ids, [True] * len(ids), text)

    def _spells_special(self, messages: Sequence[Message]) -> bool:
        return not self.allow_special_tokens and any(
            message["role"] != "assistant" and self._tokens.spells_special(message.get("content") or "")
            for message in messages
        )

    def _render(
        self,
        messages: Sequence[Message],
        tools: list | None,
        *,
        prompt: bool = False,
        form: scaffold.Form | None = None,
        **variables: Any,
    ) -> str:
        if form is None:
            if self._form is None:
                self._form = scaffold.find_form(self._render)
            form = self._form
        try:
            text = self.tokenizer.apply_chat_template(
                form(messages), tools=tools, add_generation_prompt=prompt, tokenize=False, **variables
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise MaskError(f"the chat template refuses this conversation: {error}") from error
        return str(text)


def _covered(offsets: Sequence[Span], spans: Sequence[Span]) -> list[bool]:
    """Which tokens hold a character of one of the spans (both in order)."""
    trained, at = [False] * len(offsets), 0
    for k, (begin, end) in enumerate(offsets):
        while at < len(spans) and spans[at][1] <= begin:
            at += 1
        if at == len(spans):
            break
        trained[k] = end > spans[at][0] and begin < spans[at][1]
    return trained


def truncate(encoded: Encoded, max_length: int) -> Encoded:
    """Keep the first `max_length` tokens with their mask; nothing is appended at the cut."""
    if len(encoded.ids) <= max_length:
        return encoded
    return Encoded(encoded.ids[:max_length], encoded.trained[:max_length], encoded.text, encoded.notes)


def find_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None, *, add_tokens: bool = False
) -> None:
    """Give the tokenizer the chat template that a run uses.

    Args:
        tokenizer: gets the template, in place.
        chat_template: a Jinja file, or `chatml`; None keeps the tokenizer's own.
        add_tokens: leave it to the caller to add the tokens that the template needs and the tokenizer lacks.

    Raises:
        UserError: there is no template, no such file, or the tokenizer lacks tokens of the template.
    """
    if chat_template == "chatml":
        tokenizer.chat_template = CHATML
    elif chat_template is not None:
        file = Path(chat_template)
        if not file.is_file():
            raise UserError(f"data.chat_template: no file {chat_template}; name a Jinja file, or chatml")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        raise UserError(
            "the tokenizer has no chat template; name one with data.chat_template: chatml, or a Jinja file,\n"
            "or train an instruct model, which brings its own"
        )
    if not add_tokens and (missing := missing_tokens(tokenizer)):
        raise UserError(
            f"the tokenizer lacks tokens of the chat template: {', '.join(missing)}; with model.add_tokens: true they"
            " become new rows of the embedding, or choose another data.chat_template"
        )


def missing_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The control tokens that the chat template writes around a question and an answer and the tokenizer lacks."""
    scaffold = ChatEncoder(tokenizer).scaffold
    written = [*scaffold.prompts["user"], *scaffold.ends]
    found = dict.fromkeys(token for text in written for token in _CONTROL.findall(text))
    return [token for token in found if len(tokenizer(token, add_special_tokens=False)["input_ids"]) != 1]
