"""Chats to tokens, with the mask of the tokens that are trained.

ids are those of `tokenizer.apply_chat_template(whole conversation)`, so training equals serving; one exception: text of
a system, user or tool message that spells a control token stays text (see `litft.data.special`), and the schema of a
tool that spells one is refused. A token is trained
where it holds a character that the model would have to produce (see `litft.data.masks`): so a token that straddles the
end of the prompt belongs to the answer, which could not be written without it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litft.data import bounds, complete, masks
from litft.data.conversation import Conversation, Message
from litft.data.dated import on_day
from litft.data.generation import marked_spans, marking
from litft.data.jsontext import snippet
from litft.data.masks import Layout, MaskError, Scaffold, Span
from litft.data.scaffold import Form, find_form, learn
from litft.data.special import ChatTokenizer, tokenize
from litft.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["assistant", "last", "all"]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TAG = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,60}\]")
_CONTROL = re.compile(r"<[|｜][^<>|｜\s]{1,60}[|｜]>")
_MANY = 100  # messages; where each needs a render of all before it, the cost is quadratic
_WAYS_OUT = (
    "name one with data.chat_template (a Jinja file, or chatml), or take an instruct model, which brings its own"
)
_ASSISTANT: Message = {"role": "assistant"}


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


@dataclass(slots=True, frozen=True)
class _Learned:
    """What an encoder knows of a template; `marking`: one that shows what it says itself the model produces, or ""."""

    form: Form
    scaffold: Scaffold
    marking: str


class ChatEncoder:
    """Turns conversations into tokens and the mask of the trained ones. Picklable.

    Args:
        tokenizer: a fast tokenizer with a chat template (raw text rows need none).
        train_on: `assistant`: all assistant messages except those with `train: false`; `last`: the last assistant
            message, and those with `train: true`; `all`: every token except the texts with `train: false`.
        allow_special_tokens: let text of system, user and tool messages that spells a special token become that token.
        today: the day that a template which writes today's date takes for it; the present one by default.

    Raises:
        UserError: the tokenizer has no fast version.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        train_on: TrainOn = "assistant",
        allow_special_tokens: bool = False,
        today: date | None = None,
    ) -> None:
        if not tokenizer.is_fast:
            raise UserError(
                f"{type(tokenizer).__name__} is a slow tokenizer, which can't say which characters a token stands for\n"
                "mend: use the model's fast tokenizer (a tokenizer.json in its folder)"
            )
        self.tokenizer = tokenizer
        self.train_on = train_on
        self.allow_special_tokens = allow_special_tokens
        self.today = today
        self._tokens = ChatTokenizer(tokenizer)
        self._learned: dict[bool, _Learned] = {}

    def __call__(self, conversation: Conversation) -> Encoded:
        """Encode a training row.

        Raises:
            DataError: the template refuses the row or loses a part of it, its mask can't be established, or no token
                would be trained.
        """
        with _said_of(conversation):
            if conversation.text is not None:
                return self._encode_text(conversation.text)
            return self._encode_chat(conversation)

    def prompt(self, conversation: Conversation) -> list[int]:
        """Token ids of the messages and the generation prompt, as the model gets them at inference.

        Raises:
            DataError: the template refuses the conversation.
        """
        messages, tools = conversation.messages, conversation.tools
        with _said_of(conversation):
            self._check_names(messages, tools)
            text = self._render(messages, tools, prompt=True)
            literal: list[Span] = []
            if self._spells_special(messages):
                layout = masks.lay_out(self._render, messages, tools, text, prompt=True)
                literal = self._literal(layout, messages)
            return self._tokens(text, literal)[0]

    @property
    def scaffold(self) -> Scaffold:
        """What the template writes around the texts.

        Raises:
            UserError: no mask can be established with this template.
        """
        return self._learn(None).scaffold

    @property
    def stop_ids(self) -> set[int]:
        """The ids of the trained end-of-turn tokens on which generation stops.

        Raises:
            UserError: no mask can be established with this template.
        """
        encoded = [self.tokenizer(stop, add_special_tokens=False)["input_ids"] for stop in self.scaffold.stops]
        added = self.tokenizer.added_tokens_decoder
        return {ids[-1] for ids in encoded if len(ids) == 1 or ids[-1] in added}  # not the end of a text in pieces

    @property
    def fingerprint(self) -> str:
        """Hash of everything in here that decides ids and masks."""
        import transformers

        from litft.models.load import tokenizer_fingerprint

        tokenizer = tokenizer_fingerprint(self.tokenizer)
        parts = (transformers.__version__, tokenizer, self.train_on, self.allow_special_tokens)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _encode_text(self, text: str) -> Encoded:
        ids = list(tokenize(self.tokenizer, text)["input_ids"])
        if not ids:
            raise MaskError("the text is empty")
        eos = self.tokenizer.eos_token_id
        if eos is not None and ids[-1] != eos:
            ids.append(eos)
        return Encoded(ids, [True] * len(ids), text)

    def _encode_chat(self, conversation: Conversation) -> Encoded:
        messages, tools = conversation.messages, conversation.tools
        wanted = self._wanted(conversation)
        self._check_names(messages, tools)
        scaffold = self._learn(tools).scaffold
        if len(messages) > 10 * _MANY:
            self._check_time(messages, tools)
        text = self._render(messages, tools)
        layout = masks.lay_out(self._render, messages, tools, text)
        complete.check_texts(layout, messages, tools, scaffold)
        ids, offsets = self._tokens(text, self._literal(layout, messages))
        if self.train_on == "all" and all(wanted):
            return Encoded(ids, [True] * len(ids), text)
        answers = list(
            masks.answers(layout, messages, scaffold, functools.partial(self._prompt_before, messages, tools))
        )
        for answer in answers:
            complete.check_calls(text, answer, messages[answer.message])
        if self.train_on == "all":
            unwanted = [(a.begin, a.end) for a in answers if not wanted[a.message]]
            unwanted += layout.texts([m if not w else _ASSISTANT for m, w in zip(messages, wanted, strict=True)])
            trained = [not covered for covered in masks.covered(offsets, sorted(unwanted))]
        else:
            kept = [answer for answer in answers if wanted[answer.message]]
            for answer in kept:
                complete.check_said(layout, answer, messages[answer.message])
            spans = [(answer.begin, answer.end) for answer in kept]
            if template := self._learn(tools).marking:
                marked = self._render(messages, tools, chat_template=template)
                spans = masks.within(kept, marked_spans(marked, text))
            trained = masks.covered(offsets, spans)
        if not any(trained):
            raise MaskError("no token of this row would be trained", "see data.train_on and the messages' train flags")
        return Encoded(ids, trained, text, complete.notes(layout, answers, wanted, messages, scaffold))

    def _wanted(self, conversation: Conversation) -> list[bool]:
        """Which messages are trained."""
        messages = conversation.messages
        flags = conversation.train or [None] * len(messages)
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
        wanted = []
        for i, (message, flag) in enumerate(zip(messages, flags, strict=True)):
            answer = message["role"] == "assistant"
            if self.train_on == "all":
                wanted.append(flag is not False)
                continue
            if flag and not answer:
                raise MaskError(
                    f"train: true stands on message {i + 1}, of role {message['role']}",
                    "only assistant messages can be trained, or every token with data.train_on: all",
                )
            wanted.append((answer and (self.train_on == "assistant" or i == last)) if flag is None else flag)
            said = (message.get("content") or "") + (message.get("reasoning_content") or "")
            if wanted[-1] and not said.strip() and not message.get("tool_calls"):
                raise MaskError(f"assistant message {i + 1} is empty", "remove it, or give it train: false")
        return wanted

    def _spells_special(self, messages: Sequence[Message]) -> bool:
        return not self.allow_special_tokens and any(
            m["role"] != "assistant" and self._tokens.spells_special(m.get("content") or "") for m in messages
        )

    def _literal(self, layout: Layout, messages: Sequence[Message]) -> list[Span]:
        """Where nothing is a control token, because somebody else than the template wrote it."""
        if self.allow_special_tokens:
            return []
        marks = {(i, kind) for _, i, kind in layout.marks}
        for i, message in enumerate(messages):
            if ((i, "c") not in marks or (i, "d") not in marks) and self._spells_special([message]):
                raise MaskError(
                    f"message {i + 1} spells a special token, and the chat template rewrites its text",
                    "remove the token's text, or use data.allow_special_tokens: true",
                )
        return layout.texts(messages)

    def _check_names(self, messages: Sequence[Message], tools: list | None) -> None:
        """Refuse control tokens in schemas and names, which templates write in forms too various to be followed."""
        if self.allow_special_tokens:
            return
        named = [m.get(key) for m in messages if m["role"] != "assistant" for key in ("name", "tool_call_id")]
        for where, value in (("the schema of a tool", tools), ("the name or id of a tool message", named)):
            keys, strings = complete.leaves(value)
            if spelled := next((text for text in (*keys, *strings) if self._tokens.spells_special(text)), None):
                raise MaskError(
                    f"{where} spells a special token: {snippet(spelled)}",
                    "remove the token's text, or use data.allow_special_tokens: true",
                )

    def _learn(self, tools: list | None) -> _Learned:
        """What there is to know of the template; tokenizers may have another template for conversations with tools."""
        if not self.tokenizer.chat_template:
            raise MaskError("the tokenizer has no chat template", _WAYS_OUT)
        own = isinstance(self.tokenizer.chat_template, dict) and bool(tools)
        if own not in self._learned:

            def render(messages: Sequence[Message], offered: list | None, **options: Any) -> str:
                offered = offered or (tools if own else None)
                try:
                    return self._apply(messages, offered, patience=bounds.PATIENCE_LEARNING, **options)
                except bounds.TooMuch as error:  # for good: what is tried next would take as long
                    raise UserError(str(error)) from None

            form = find_form(render)
            learned = learn(functools.partial(render, form=form), self._tokens.special_tokens)
            template = marking(self.tokenizer.get_chat_template(tools=tools))
            self._learned[own] = _Learned(form, learned, template)
        return self._learned[own]

    def _render(self, messages: Sequence[Message], tools: list | None, **options: Any) -> str:
        return self._apply(messages, tools, form=self._learn(tools).form, **options)

    def _check_time(self, messages: Sequence[Message], tools: list | None) -> None:
        """Refuse a very long conversation where the template's time grows with the square of its length."""
        count, before = len(messages), 0.0
        part = 2 * _MANY
        while part < count:
            begin = time.perf_counter()
            try:
                self._render(messages[:part], tools)
            except bounds.TooMuch:
                raise
            except MaskError:  # a part may end where the template refuses it
                pass
            seconds = time.perf_counter() - begin
            if seconds > 1 and seconds > 3 * before > 0 and seconds * (count / part) ** 2 > bounds.PATIENCE:
                raise MaskError(
                    f"{count} messages are too many for the chat template: its time grows with their number squared",
                    "split the row",
                )
            part, before = 2 * part, seconds

    def _prompt_before(self, messages: Sequence[Message], tools: list | None, i: int) -> str:
        """The render of the messages before i with the generation prompt; of a long conversation, nothing."""
        return self._render(messages[:i], tools, prompt=True) if 0 < i < _MANY else ""

    def _apply(
        self,
        messages: Sequence[Message],
        tools: list | None,
        *,
        form: Form,
        prompt: bool = False,
        patience: float | None = None,
        **variables: Any,
    ) -> str:
        if self.today:
            template = variables.get("chat_template") or self.tokenizer.get_chat_template(tools=tools)
            variables["chat_template"] = on_day(template, self.today)
        try:
            with bounds.Bounded(patience or bounds.PATIENCE):
                text = self.tokenizer.apply_chat_template(
                    form(messages), tools=tools, add_generation_prompt=prompt, tokenize=False, **variables
                )
        except bounds.TooMuch:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            said = snippet(str(error), size=200)
            raise MaskError(f"the chat template refuses this conversation: {said}") from error
        bounds.check_length(str(text), messages, tools)
        return str(text)


@contextlib.contextmanager
def _said_of(conversation: Conversation) -> Iterator[None]:
    """What goes wrong inside is an error of this row."""
    file, line = conversation.file or None, conversation.line or None
    try:
        yield
    except MaskError as error:
        raise DataError(error.what, file=file, line=line, mend=error.mend) from error
    except RecursionError:
        raise DataError("nested too deeply", file=file, line=line, mend="flatten the row") from None


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
        begins = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]  # as the model was pretrained
        tokenizer.chat_template = "{{ bos_token }}" * begins + CHATML
    elif chat_template is not None:
        file = Path(chat_template)
        if not file.is_file():
            raise UserError(f"data.chat_template: no file {chat_template}; name a Jinja file, or chatml")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
    elif not tokenizer.chat_template:
        raise UserError(f"the tokenizer has no chat template\nmend: {_WAYS_OUT}")
    if not add_tokens and (missing := missing_tokens(tokenizer)):
        raise UserError(
            f"the tokenizer lacks tokens of the chat template: {', '.join(missing)}; with model.add_tokens: true they"
            " become new rows of the embedding, or choose another data.chat_template"
        )


def missing_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The control tokens of the chat template that the tokenizer lacks, so that it would split them into pieces.

    A template whose end-of-turn token the tokenizer knows was made for it: other marks of such a template are plain
    text by design (`<|user|>` in Zephyr's, OLMo's) and not missing.
    """
    scaffold = ChatEncoder(tokenizer).scaffold

    def lacking(texts: Iterable[str], tags: re.Pattern[str]) -> list[str]:
        found = dict.fromkeys(tag for text in texts for tag in tags.findall(text))
        return [tag for tag in found if len(tokenizer(tag, add_special_tokens=False)["input_ids"]) != 1]

    if not (missing := lacking(scaffold.ends, _TAG)):
        return []
    return list(dict.fromkeys((*missing, *lacking(scaffold.prompts["user"], _CONTROL))))
