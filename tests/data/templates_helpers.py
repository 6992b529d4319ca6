"""A tiny tokenizer that knows the control tokens of every stock template, chats in several shapes, and expectations."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litft.data.conversation import Conversation

CONTROL = """
<|im_start|> <|im_end|> <|endoftext|> <bos> <eos> <s> </s> <|begin_of_text|> <|eot_id|> <|start_header_id|>
<|end_header_id|> <start_of_turn> <end_of_turn> <|user|> <|assistant|> <|system|> <|observation|> [gMASK] <sop>
<|end|> <|start|> <|channel|> <|message|> <|call|> <|return|> <|constrain|> <｜User｜> <｜Assistant｜>
<｜end▁of▁sentence｜> <｜tool▁calls▁begin｜> <｜tool▁calls▁end｜> <｜tool▁call▁begin｜> <｜tool▁call▁end｜>
<｜tool▁sep｜> <｜tool▁outputs▁begin｜> <｜tool▁outputs▁end｜> <｜tool▁output▁begin｜> <｜tool▁output▁end｜>
<end_of_utterance> <|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|CHATBOT_TOKEN|> <|USER_TOKEN|> <|SYSTEM_TOKEN|>
<|START_RESPONSE|> <|END_RESPONSE|> <|turn> <turn|> <|tool_call> <tool_call|> <|tool_response> <tool_response|>
<|tool> <tool|> <|channel> <channel|> <|"|> <|tool_call_start|> <|tool_call_end|> <|tool_list_start|>
<|tool_list_end|> <|tool_response_start|> <|tool_response_end|> <|eot|> <|eom|>
"""
SPECIAL = CONTROL.split()
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]  # not special


@functools.lru_cache
def tokenizer(**options: Any) -> Any:
    """A byte-level BPE trained on a few lines; every call gives the same object, so tests set what they need."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    lines = ["the user asks the assistant for the weather in Paris", "the answer is 42 and it is sunny", "\n\n"]
    backend.train_from_iterator(lines * 3, trainer)
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "additional_special_tokens": SPECIAL, **options}
    result = PreTrainedTokenizerFast(tokenizer_object=backend, **settings)
    result.add_tokens(PLAIN)
    return result


def stock_folder() -> Path:
    import importlib.util

    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "chat_templates"


def stock_names() -> list[str]:
    """The stock templates, without TRL's training variants."""
    return sorted(f.stem for f in stock_folder().glob("*.jinja") if not f.stem.endswith("_training"))


def stock(name: str) -> str:
    return (stock_folder() / f"{name}.jinja").read_text(encoding="utf-8")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "id": "call00001", "function": {"name": name, "arguments": arguments}}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "name": "get_weather", "tool_call_id": "call00001"}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "its name"}},
                "required": ["city"],
            },
        },
    }
]


def chat(*messages: dict[str, Any], tools: list | None = None, train: list | None = None) -> Conversation:
    return Conversation(list(messages), train or [None] * len(messages), tools, file="chats.jsonl", line=7)


_CALL = assistant("", tool_calls=[call("get_weather", {"city": "Paris"})])
SHAPES: dict[str, Conversation] = {
    "single": chat(user("Hi?"), assistant("One.")),
    "two": chat(user("Hi?"), assistant("One."), user("More?"), assistant("Two.")),
    "system": chat(system("Be brief."), user("Hi?"), assistant("One.")),
    "reasoning": chat(
        user("Hi?"),
        assistant("One.", reasoning_content="Why one."),
        user("More?"),
        assistant("Two.", reasoning_content="Why two."),
    ),
    "in a row": chat(user("Hi?"), assistant("One."), assistant("Two.")),
    "assistant first": chat(assistant("One."), user("Hi?"), assistant("Two.")),
    "tools": chat(user("Weather?"), _CALL, result("21 degrees"), assistant("Two."), tools=TOOLS),
    "open call": chat(user("Weather?"), _CALL, tools=TOOLS),
    "blanks": chat(user("  Hi?\n"), assistant("One. "), user(" More?\n\n"), assistant("Two.\n")),
}


@dataclass
class Family:
    """What a template makes the model write, by hand from reading the template.

    Attributes:
        end: the end of a turn; `last` that of the row's last turn, `called` that of a tool call.
        lead: what the model writes before an answer; `lead_last` in the turns after the last question.
        think: the last answer's reasoning with all that leads to the answer; None where it is left out.
        think_early: the same in earlier turns.
        call: the tool call with all that leads to it; None where the template knows none.
        strips: whether blanks around an answer are removed.
        cannot: by shape, words of the reason for which the case is refused.
        other: by shape, what the rules above don't say.
    """

    end: str
    last: str | None = None
    called: str | None = None
    lead: str = ""
    lead_last: str | None = None
    think: str | None = None
    think_early: str | None = None
    call: str | None = None
    strips: bool = False
    cannot: dict[str, str] = field(default_factory=dict)
    other: dict[str, list[str]] = field(default_factory=dict)

    def expected(self, shape: str) -> list[str]:
        """The trained stretches of a case, in order."""
        last = self.end if self.last is None else self.last
        lead_last = self.lead if self.lead_last is None else self.lead_last
        think = lead_last if self.think is None else self.think
        think_early = self.lead if self.think_early is None else self.think_early
        called = str(self.call) + (self.end if self.called is None else self.called)
        space, newline = ("", "") if self.strips else (" ", "\n")
        one, two = self.lead + "One." + self.end, lead_last + "Two." + last
        cases = {
            "single": [lead_last + "One." + last],
            "system": [lead_last + "One." + last],
            "two": [one, two],
            "assistant first": [one, two],
            "in a row": [lead_last + "One." + self.end, two],
            "reasoning": [think_early + "One." + self.end, think + "Two." + last],
            "tools": [called, two],
            "open call": [called],
            "blanks": [self.lead + "One." + space + self.end, lead_last + "Two." + newline + last],
        }
        return self.other.get(shape) or cases[shape]


_NO_TOOLS = {"tools": "does not render tools", "open call": "does not render tools"}
_STRICT = dict.fromkeys(("in a row", "assistant first", "tools"), "must alternate") | {
    "open call": "does not render tools"
}
_JSON = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
_QWEN = f"<tool_call>\n{_JSON}\n</tool_call>"
_XML = "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
_LFM = "<|tool_call_start|>[get_weather(city='Paris')]<|tool_call_end|>"
_LLAMA = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
_GEMMA = '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>'
_MUSE = (
    ' to=get_weather<|message|><atem:function_calls>\n<atem:invoke name="get_weather">\n'
    '<atem:parameter name="city">Paris</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
)
_GLM = "\n<think></think>\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"
_HARMONY = ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Paris"}'
_FINAL, _ANALYSIS = "<|channel|>final<|message|>", "<|channel|>analysis<|message|>"
_IM, _DS = "<|im_end|>", "<｜end▁of▁sentence｜>"
_LOST_ROW = {"in a row": "generation prompt does not stand before assistant message 3"}


def _gemma4(**more: Any) -> Family:
    """Tool calls stop on the mark of the result, which the template writes into the same turn."""
    return Family("<turn|>", called="<|tool_response>", call=_GEMMA, strips=True, **more)


def _nemotron(space: str) -> Family:
    """Without reasoning the template writes the no-thinking prompt; with it, the default one."""
    return Family(
        _IM,
        think=f"Why two.{space}</think>{space}",
        think_early=space,
        call=f"\n{_XML}\n",
        strips=True,
    )


# The prompt ends in `<think>` and one line break; the token of two breaks straddles its end and so is the answer's.
_EMPTY = "\n\n</think>\n\n"


def _qwen3_5(lead_last: str, **more: Any) -> Family:
    return Family(_IM, lead_last=lead_last, call=lead_last + _XML, strips=True, **more)


FAMILIES: dict[str, Family] = {
    "cohere": Family("<|END_OF_TURN_TOKEN|>", strips=True, cannot=_STRICT),
    "cohere2": Family("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>", cannot=_STRICT),
    "deepseek_r1_distill": Family(_DS, cannot=_NO_TOOLS),
    "deepseekv3": Family(_DS, cannot=_NO_TOOLS),
    "diffusion_gemma": _gemma4(
        think="<|channel>thought\nWhy two.\n<channel|>", other={"in a row": ["One.Two.<turn|>"]}
    ),
    "gemma": Family("<end_of_turn>", strips=True, cannot=_STRICT | {"system": "System role not supported"}),
    "gemma3": Family("<end_of_turn>", strips=True, cannot=_STRICT),
    "gemma4": _gemma4(cannot=_LOST_ROW),
    "gemma4_v2": Family("<turn|>", call=_GEMMA, strips=True),
    "gemma4_v3": _gemma4(cannot=_LOST_ROW),
    "gemma4_v4": _gemma4(cannot=_LOST_ROW),
    "gemma4_v5": _gemma4(think="<|channel>thought\nWhy two.\n<channel|>", other={"in a row": ["One.Two.<turn|>"]}),
    "glm4moe": Family(
        "<|user|>",
        last="",
        called="<|observation|>",
        lead="\n<think></think>\n",
        think="\n<think>Why two.</think>\n",
        call=_GLM,
        strips=True,
        other={"open call": [_GLM], "in a row": ["\n<think></think>\nOne.", "\n<think></think>\nTwo."]},
    ),
    "gptoss": Family(
        "<|end|>",
        last="<|return|>",
        called="<|call|>",
        lead=_FINAL,
        think=f"{_ANALYSIS}Why two.<|end|><|start|>assistant{_FINAL}",
        call=_HARMONY,
    ),
    "idefics3": Family("<end_of_utterance>", lead=" ", cannot=_NO_TOOLS),
    "lfm2": Family(_IM, cannot=dict.fromkeys(("tools", "open call"), "does not render tool_calls")),
    "lfm2_2_5": Family(_IM, think="<think>Why two.</think>", call=_LFM),
    "lfm2_2_5_v2": Family(_IM, think="<think>Why two.</think>", call=_LFM),
    "lfm2_2_5_vl": Family(_IM, think="<think>Why two.</think>", call=_LFM),
    "lfm2_v2": Family(_IM, call=_LFM),
    "llama3": Family("<|eot_id|>", strips=True, cannot=_NO_TOOLS),
    "llama3_1": Family("<|eot_id|>", call=_LLAMA, strips=True),
    "llama3_2": Family("<|eot_id|>", call=_LLAMA, strips=True),
    "llava_next": Family(
        "</s>",
        lead=" ",
        cannot={
            "tools": "Only user and assistant roles are supported",
            "open call": "does not render tools",
            "assistant first": "generation prompt does not stand before assistant message 1",
        },
    ),
    "muse_glimmer": Family(
        "<|eot|>",
        lead=" to=user<|message|>",
        think=" to=self<|message|>Why two.<|eom|><|start|>assistant to=user<|message|>",
        think_early=" to=self<|message|>Why one.<|eom|><|start|>assistant to=user<|message|>",
        call=_MUSE,
    ),
    "nemotron_3_5_lightning": _nemotron(""),
    "nemotron_3_nano": _nemotron("\n"),
    "nemotron_3_super": _nemotron("\n"),
    "nemotron_3_ultra": _nemotron(""),
    "phi3": Family("<|end|>", cannot=_NO_TOOLS),
    "phi3_5": Family("<|end|>", cannot=_NO_TOOLS),
    "qwen2_5": Family(_IM, call=_QWEN),
    "qwen2_5_vl": Family(_IM, cannot=_NO_TOOLS),
    "qwen3": Family(
        _IM,
        lead_last="<think>\n\n</think>\n\n",
        think="<think>\nWhy two.\n</think>\n\n",
        call=_QWEN,
        # Only the very last message gets an empty reasoning.
        other={
            "in a row": ["One." + _IM, "<think>\n\n</think>\n\nTwo." + _IM],
            "open call": ["<think>\n\n</think>\n\n" + _QWEN + _IM],
        },
    ),
    "qwen3_5_nothink": _qwen3_5("", think="<think>\nWhy two.\n</think>\n\n"),
    "qwen3_5_think": _qwen3_5(_EMPTY, think="Why two.\n</think>\n\n"),
    "qwen3_6": _qwen3_5(_EMPTY, think="Why two.\n</think>\n\n"),
    "qwen3_8": _qwen3_5(
        _EMPTY,
        lead=_EMPTY,
        think="Why two.\n</think>\n\n",
        think_early="Why one.\n</think>\n\n",
    ),
    "qwen3_instruct_2507": Family(_IM, call=_QWEN),
    "qwen3_vl": Family(_IM, call=_QWEN),
    "smolvlm": Family("<end_of_utterance>", lead=" ", cannot=_NO_TOOLS),
}
