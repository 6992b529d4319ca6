"""A model for Ollama: a GGUF file and a Modelfile whose Go template writes a chat as the model's Jinja template does.

The Go template is not looked up by a model's name. It is put together from what stands between the messages when the
model's own template is rendered, and then checked on other conversations: so it holds for a changed system prompt or
end-of-turn token as well, and a template that can't be said this way is refused.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litft.data.dated import writes_date
from litft.errors import UserError
from litft.export.final import new_folder, own_settings
from litft.export.gguf import DTYPES, Progress, name_of, stop_ids, write_gguf
from litft.export.gguf_tokenizer import adds_bos, rendered

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

    from litft.models.resolve import ModelSource

Messages = list[dict[str, str]]

FAMILIES = ("chatml", "llama3", "gemma", "mistral", "phi")
"""Whose chat templates a Go template can say; others of their build as well."""
_CONTEXT = 8192  # tokens; Ollama reserves memory for all of them, and cuts chats at 4096 unless told
_USER, _ANSWER, _SYSTEM = "\x02u{}\x03", "\x02a{}\x03", "\x02s\x03"  # no template writes such characters


@dataclass(frozen=True)
class ChatForm:
    """What a chat template writes between the messages; user and assistant take turns, the user first and last.

    Attributes:
        start: before the first user's text, without a system message.
        system_start: before the system message.
        system_end: between the system message and the first user's text.
        answer: between a user's text and an earlier answer.
        reply: after the last user's text, where the answer is to follow.
        again: between an answer and the next user's text.
        last_system: what `again` is before the last user's text when there is a system message, its text in between;
            None where it stands at the beginning.
        takes_system: whether the template writes a system message; if not, it stands in front of the first user's text.
        notes: what is written otherwise, for the user.
    """

    start: str
    system_start: str
    system_end: str
    answer: str
    reply: str
    again: str
    last_system: tuple[str, str] | None = None
    takes_system: bool = True
    notes: tuple[str, ...] = ()

    def write(self, messages: Messages) -> str:
        """The text of a chat, as the Go template writes it."""
        system = next((m["content"] for m in messages if m["role"] == "system"), None)
        turns = [m["content"] for m in messages if m["role"] != "system"]
        ahead = system is not None and (self.last_system is None or len(turns) == 1)
        text = f"{self.system_start}{system}{self.system_end}" if ahead else self.start
        for i, turn in enumerate(turns):
            if i % 2 == 0:
                text += turn + (self.reply if i == len(turns) - 1 else self.answer)
            elif self.last_system is not None and system is not None and i == len(turns) - 2:
                text += turn + self.last_system[0] + system + self.last_system[1]
            else:
                text += turn + self.again
        return text

    def go(self) -> str:
        """The Go template, in the variables that Ollama gives it.

        `.System` holds all system messages, which are among `.Messages` too; messages of one role in a row are one.
        """
        ahead, again = ".System", self.again
        if self.last_system is not None:
            before, after = self.last_system
            ahead = "and .System (eq (len .Messages) 2)"
            again = _if(
                "and $.System (eq (len (slice $.Messages $i)) 2)", f"{before}{{{{ $.System }}}}{after}", self.again
            )
        user = "{{ .Content }}" + _if("$last", self.reply, self.answer)
        assistant = "{{ .Content }}" + _if("not $last", again)
        return (
            _if(ahead, f"{self.system_start}{{{{ .System }}}}{self.system_end}", self.start)
            + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + _if('eq .Role "user"', user, _if('eq .Role "assistant"', assistant))
            + "{{ end }}"
        )


def _if(condition: str, then: str, otherwise: str = "") -> str:
    """An `if` of Go's templates; nothing where there is nothing to choose."""
    if then == otherwise:
        return then
    return f"{{{{ if {condition} }}}}{then}" + (f"{{{{ else }}}}{otherwise}" if otherwise else "") + "{{ end }}"


def chat_form(tokenizer: PreTrainedTokenizerBase, *, adds_bos: bool) -> ChatForm:
    """What a tokenizer's chat template writes between messages.

    Args:
        tokenizer: with a chat template.
        adds_bos: whether the token at the beginning of a text is added by whoever tokenises it; the form then leaves
            it out.

    Raises:
        UserError: the template can't be said by a Go template of the known families.
    """
    if not tokenizer.chat_template:
        raise UserError("Ollama: the model has no chat template, so there is nothing to write its TEMPLATE from")
    one, two, three = (_conversation(turns) for turns in (1, 2, 3))
    try:
        short, longer = _between(rendered(tokenizer, one)), _between(rendered(tokenizer, three))
        form = _learned(tokenizer, short, longer, two)
        probes = [[*prefix, *_spoken(n)] for n in (1, 2, 3, 4) for prefix in ([], _said_by_system())]
        for probe in probes:
            system = not form.takes_system and probe[0]["role"] == "system"
            if not system and form.write(probe) != rendered(tokenizer, probe):
                raise ValueError("it writes other text between other messages")
    except ValueError as error:
        raise UserError(
            f"Ollama: a Modelfile can't say this model's chat template: {error}\n"
            f"templates of these families can be said: {', '.join(FAMILIES)}; others not yet\n"
            "litft export --to gguf writes the Jinja template into the file, which llama.cpp reads"
        ) from error
    bos = (tokenizer.bos_token or "") if adds_bos else ""
    form = replace(
        form,
        start=form.start.removeprefix(bos),
        system_start=form.system_start.removeprefix(bos),
        notes=tuple(_notes(tokenizer, form)),
    )
    if any("{{" in text or '"""' in text for text in vars(form).values() if isinstance(text, str)):
        raise UserError('Ollama: the chat template writes {{ or """, which a Modelfile can\'t')
    return form


def _learned(tokenizer: PreTrainedTokenizerBase, short: list[str], longer: list[str], two: Messages) -> ChatForm:
    start, reply = short
    first, answer, again, *_ = longer
    plain = ChatForm(start, "", "", answer, reply, again)
    if first != start or plain.write(_conversation(3)) != rendered(tokenizer, _conversation(3)):
        raise ValueError("what it writes around a message depends on the ones before it")
    system = {"role": "system", "content": _SYSTEM}
    try:
        alone = rendered(tokenizer, [system, *_conversation(1)])
        among = rendered(tokenizer, [system, *two])
    except ValueError:  # "System role not supported"
        return ChatForm(start, start, "\n\n", answer, reply, again, takes_system=False)
    if alone.count(_SYSTEM) != 1 or among.count(_SYSTEM) != 1:
        raise ValueError("it does not write a system message once")
    system_start, system_end = _between(alone)[:2]
    if among.index(_SYSTEM) < among.index(_USER.format(0)):
        return ChatForm(start, system_start, system_end, answer, reply, again)
    before, after = _between(among)[2:4]
    return ChatForm(start, system_start, system_end, answer, reply, again, last_system=(before, after))


def _notes(tokenizer: PreTrainedTokenizerBase, form: ChatForm) -> Iterator[str]:
    template: Any = tokenizer.chat_template
    if writes_date(template):
        yield "the chat template writes the date: the Modelfile holds today's"
    if not form.takes_system:
        yield "the chat template takes no system message: in Ollama one stands before the first question"
    if "tools" in (template if isinstance(template, str) else str(template.values())):
        yield "tools are left out of the Modelfile's template"
    blanks = [{"role": "user", "content": "  a  "}]
    if form.write(blanks) != rendered(tokenizer, blanks):
        yield "the chat template drops blanks around a message, Ollama keeps them"
    thought = [*_conversation(1), {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}, *_conversation(1)]
    if form.write(thought) != rendered(tokenizer, thought):
        yield "the chat template drops the thinking (<think>) of earlier answers, Ollama keeps it"


def _conversation(turns: int) -> Messages:
    """So many user messages, with answers between them."""
    roles = (("user", _USER), ("assistant", _ANSWER))
    return [{"role": role, "content": mark.format(i)} for i in range(turns) for role, mark in roles][: 2 * turns - 1]


def _spoken(turns: int) -> Messages:
    """A chat with text as people write it."""
    texts = (
        "Why is the sky blue?",
        "Because: scattering.\n\nBlue <b>light</b> {scatters} more.",
        "日本語で？ 1+1=2",
        "Ja - 'so'",
    )
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": f"{i}{texts[i % 4]}"} for i in range(2 * turns - 1)]


def _said_by_system() -> Messages:
    return [{"role": "system", "content": "Answer in one line.\nBe kind."}]


def _between(text: str) -> list[str]:
    """The stretches around the marks."""
    pieces = text.replace("\x03", "\x02").split("\x02")
    return pieces[::2]


def parameters(settings: GenerationConfig, stops: Sequence[str], context: int) -> list[str]:
    """The PARAMETER lines: where to stop, how to choose tokens, how much context to reserve.

    Args:
        settings: the model's own generation settings; without `do_sample` decoding is greedy, as in transformers,
            where Ollama would draw at a temperature of 0.8.
        stops: texts of the tokens that end an answer.
        context: tokens.
    """
    values: dict[str, Any] = {"num_ctx": context, "temperature": 0}
    if settings.do_sample:
        said = {
            "temperature": 1.0 if settings.temperature is None else settings.temperature,
            "top_p": 1.0 if settings.top_p is None else settings.top_p,
            "top_k": 50 if settings.top_k is None else settings.top_k,
            "min_p": settings.min_p,
        }
        values |= {name: value for name, value in said.items() if value is not None}
    penalty = settings.repetition_penalty
    values["repeat_penalty"] = 1.0 if penalty is None else penalty
    return [
        *(f'PARAMETER stop "{text}"' for text in stops),
        *(f"PARAMETER {name} {value:g}" for name, value in values.items()),
    ]


def export_ollama(
    source: ModelSource,
    out: Path,
    *,
    dtype: str | None = None,
    adapter: Literal["merge", "keep"] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write a model, an adapter merged in, as GGUF, and the Modelfile that `ollama create` takes.

    Args:
        source: of `resolve`.
        out: a folder that is not there yet.
        dtype: of the GGUF file, see `litft.export.gguf.DTYPES`; None is q8_0.
        adapter: "merge" or None; an adapter can't stay one here.
        trust_remote_code: run the Python code that the model brings.
        progress: called with how many weights were written since, and their total.

    Returns:
        Lines for the user.

    Raises:
        UserError: llama.cpp does not compute the model, or a Go template can't say its chat template.
        Failed: the weights don't fit the dtype.
    """
    from litft.models.load import load_config, load_tokenizer

    if adapter == "keep":
        raise UserError("--adapter keep: with --to ollama an adapter is merged\nmend: leave --adapter out")
    dtype = dtype or DTYPES[0]
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    form = chat_form(tokenizer, adds_bos=adds_bos(tokenizer))
    config = load_config(source, trust_remote_code=trust_remote_code)
    stops = [str(tokenizer.convert_ids_to_tokens(id)) for id in stop_ids(source, tokenizer, config)]
    name = name_of(source)
    with new_folder(out) as folder:
        file = folder / f"{name}-{dtype}.gguf"
        lines = write_gguf(source, file, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress)
        modelfile = [
            f"FROM ./{file.name}",
            f'TEMPLATE """{form.go()}"""',
            *parameters(own_settings(source, config), stops, context_of(config)),
        ]
        (folder / "Modelfile").write_text("\n".join(modelfile) + "\n", encoding="utf-8")
    return [
        f"{out}: {file.name}, Modelfile",
        *lines,
        *form.notes,
        f"try it: ollama create {ollama_name(name)} -f {shlex.quote(str(out / 'Modelfile'))}",
    ]


def ollama_name(name: str) -> str:
    """What Ollama can call a model: ASCII that begins with a letter or digit."""
    return re.sub(r"[^a-z0-9_.-]+", "-", name.lower()).strip("-._")[:80] or "model"


def context_of(config: Any) -> int:
    """How many tokens Ollama shall reserve memory for.

    At most what the model was trained on before its positions were stretched by two sets of factors (longrope), since
    llama.cpp takes the set for long texts whenever the context is longer.
    """
    rope = config.rope_parameters or {}
    original = config.max_position_embeddings
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    return int(min(original, _CONTEXT))
