"""Modelfiles: their Go templates rendered by Go's own text/template, against the chat template's rendering."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from templates_helpers import stock, tokenizer
from tiny import CHATML, save_tiny, tiny_tokenizer
from transformers import AutoTokenizer, GenerationConfig

from litft.cli.main import main
from litft.errors import UserError
from litft.export.ollama import FAMILIES, chat_form, ollama_name, parameters

MISTRAL = (  # Mistral 7B Instruct v0.2: no system message
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_V3 = (  # v0.3: the system message before the last question
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set messages = messages[1:] %}"
    "{% endif %}{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% if loop.last and system is defined %}{{ '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
    "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
DEFAULT_SYSTEM = (  # as SmolLM2's: a system message of its own where there is none
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Bot.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "chatml with a default": DEFAULT_SYSTEM,
    "mistral": MISTRAL,
    "mistral v3": MISTRAL_V3,
    **{
        name: stock(name)
        for name in ("qwen2_5", "qwen3", "llama3", "llama3_1", "llama3_2", "gemma", "gemma3", "phi3", "phi3_5")
    },
}
NO_SYSTEM = {"gemma", "mistral"}

SYSTEM = {"role": "system", "content": "Be short.\nBe kind."}
TEXTS = ("Hello {there}", 'Hi!\n\nWhat\'s "up"? <b>', "日本語 1+1", "2 & 3", "And 'now'?", "Now: {{ nothing }}", "End")
TURNS = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(TEXTS)]
CHATS = [[*system, *TURNS[:count]] for count in (1, 3, 5, 7) for system in ([], [SYSTEM])]

# How Ollama runs a template that names .Messages (template/template.go): system messages joined in .System, and
# messages of one role in a row made one.
GO = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }
type Case struct { Template string; Chats [][]Message }

func main() {
	var cases []Case
	if err := json.NewDecoder(os.Stdin).Decode(&cases); err != nil { panic(err) }
	out := [][]string{}
	for _, c := range cases {
		t := template.Must(template.New("").Option("missingkey=zero").Parse(c.Template))
		texts := []string{}
		for _, chat := range c.Chats {
			var system []string
			var collated []*Message
			for i := range chat {
				m := &chat[i]
				if m.Role == "system" { system = append(system, m.Content) }
				if n := len(collated); n > 0 && collated[n-1].Role == m.Role {
					collated[n-1].Content += "\\n\\n" + m.Content
				} else { collated = append(collated, m) }
			}
			var b strings.Builder
			data := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": collated, "Response": ""}
			if err := t.Execute(&b, data); err != nil { panic(err) }
			texts = append(texts, b.String())
		}
		out = append(out, texts)
	}
	json.NewEncoder(os.Stdout).Encode(out)
}
"""


def speaking(template: str, **options: Any) -> Any:
    made = tokenizer(**options)
    made.chat_template = template
    return made


def go(tmp_path: Path, cases: list[tuple[str, list[Any]]]) -> list[list[str]]:
    """Rendered by Debian's Go."""
    if shutil.which("go") is None:
        pytest.skip("no Go here")
    (tmp_path / "main.go").write_text(GO)
    asked = json.dumps([{"Template": template, "Chats": chats} for template, chats in cases])
    command = ["go", "run", "main.go"]
    done = subprocess.run(command, cwd=tmp_path, input=asked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_go_writes_every_chat_as_the_chat_template_does(tmp_path: Path) -> None:
    cases, expected = [], []
    for name, template in TEMPLATES.items():
        chats = [chat for chat in CHATS if not (name in NO_SYSTEM and chat[0]["role"] == "system")]
        tok = speaking(template)
        cases.append((chat_form(tok, adds_bos=False).go(), chats))
        expected.append([tok.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats])
    for name, ours, theirs in zip(TEMPLATES, go(tmp_path, cases), expected, strict=True):
        assert ours == theirs, name


@pytest.mark.slow
def test_go_without_the_bos_that_the_tokenizer_adds_and_with_a_system_message_that_the_template_refuses(
    tmp_path: Path,
) -> None:
    tok = speaking(stock("gemma"))
    form = chat_form(tok, adds_bos=True)
    ((plain, said, open_answer),) = go(tmp_path, [(form.go(), [TURNS[:1], [SYSTEM, *TURNS[:1]], TURNS[:2]])])
    assert tok.bos_token + plain == tok.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=True)
    assert said == plain.replace(TEXTS[0], f"{SYSTEM['content']}\n\n{TEXTS[0]}")
    assert open_answer == plain + TEXTS[1]  # an answer that was begun goes on
    assert not form.takes_system and any("no system message" in note for note in form.notes)


@pytest.mark.parametrize("name", TEMPLATES)
def test_form_of_every_family(name: str) -> None:
    tok = speaking(TEMPLATES[name])
    form = chat_form(tok, adds_bos=False)
    for chat in CHATS:
        if name in NO_SYSTEM and chat[0]["role"] == "system":
            continue
        assert form.write(chat) == tok.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize(("name", "drops"), [("qwen3", True), ("qwen2_5", False)])
def test_thinking_that_only_the_chat_template_drops_is_said(name: str, drops: bool) -> None:
    notes = chat_form(speaking(TEMPLATES[name]), adds_bos=False).notes
    assert any("the thinking (<think>) of earlier answers" in note for note in notes) is drops


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}",  # counts
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | upper }}\n{% endfor %}",  # changes the text
        "{{ messages[-1]['content'] }}",  # forgets
        "{{ raise_exception('no') }}",
        "{% for m in messages %}{{ '{{x}}' + m['content'] }}{% endfor %}",
        None,
    ],
)
def test_a_template_that_cannot_be_said_is_refused(template: str | None) -> None:
    with pytest.raises(UserError) as error:
        chat_form(speaking(template), adds_bos=False)  # type: ignore[arg-type]
    said = str(error.value)
    assert len(said.splitlines()) <= 5 and (template is None or "{{" in said or all(f in said for f in FAMILIES))


def test_parameters_are_the_models_own() -> None:
    plain = parameters(GenerationConfig(), ["<|im_end|>"], 2048)
    assert plain == [
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER num_ctx 2048",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
    ]
    drawn = parameters(GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, repetition_penalty=1.1), [], 4096)
    assert {"PARAMETER temperature 0.6", "PARAMETER top_p 0.9", "PARAMETER repeat_penalty 1.1"} <= set(drawn)
    assert "PARAMETER top_k 50" in drawn  # transformers' own default


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "model", template=DEFAULT_SYSTEM)
    assert main(["export", str(tmp_path / "model"), "--to", "ollama", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "ollama create model -f" in said
    assert [ollama_name(name) for name in ("My Rün.2", "_é", "日本", "_x.")] == ["my-r-n.2", "model", "model", "x"]
    (file,) = (tmp_path / "out").glob("*.gguf")
    modelfile = (tmp_path / "out" / "Modelfile").read_text()
    assert modelfile.startswith(f"FROM ./{file.name}\n") and 'PARAMETER stop "<|im_end|>"' in modelfile
    assert "PARAMETER num_ctx 512" in modelfile and str(tmp_path) not in modelfile
    (template,) = re.findall(r'TEMPLATE """(.*?)"""\n', modelfile, re.S)
    tok = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert template == chat_form(tok, adds_bos=False).go() and "You are Bot." in template
    assert GGUFReader(file).fields["tokenizer.chat_template"].contents() == tok.chat_template


def test_refused_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path / "model", template="{% for m in messages %}{{ loop.index ~ m['content'] }}{% endfor %}")
    assert main(["export", str(tmp_path / "model"), "--to", "ollama", "--out", str(tmp_path / "out")]) == 2
    assert "chatml, llama3, gemma, mistral, phi" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    tiny_tokenizer(None).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    assert main(["export", str(tmp_path / "model"), "--to", "ollama", "--out", str(tmp_path / "out")]) == 2
    assert "no chat template" in capsys.readouterr().err
