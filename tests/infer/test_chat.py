"""The conversation in the terminal, on given input and output."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from tiny import save_tiny

from litft.errors import UserError
from litft.infer import stream as streaming
from litft.infer.chat import chat
from litft.infer.generate import generate
from litft.infer.load import ChatModel, load_for_inference


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return load_for_inference(save_tiny(tmp_path_factory.mktemp("llama"), "llama"), device="cpu")


def talk(bundle: ChatModel, *lines: str, **options: Any) -> tuple[list[dict[str, Any]], str]:
    """What is remembered at the end, and what was written."""
    output = io.StringIO()
    options = {"temperature": 0, "max_new_tokens": 6, **options}
    history = chat(bundle, input=io.StringIO("".join(f"{line}\n" for line in lines)), output=output, **options)
    return history, output.getvalue()


def test_the_terminal_itself_is_read_and_written(
    llama: ChatModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("why?\n"))
    history = chat(llama, temperature=0, max_new_tokens=6)
    assert [message["role"] for message in history] == ["user", "assistant"]
    assert f"you> model> {history[1]['content']}" in capsys.readouterr().out


def test_each_turn_answers_the_whole_conversation_so_far(llama: ChatModel) -> None:
    history, written = talk(llama, "why?", "", "and then?")
    assert [message["role"] for message in history] == ["user", "assistant"] * 2
    for end in (1, 3):
        expected = generate(llama, [history[:end]], temperature=0, max_new_tokens=6)[0]
        assert history[end]["content"] == expected
        assert f"model> {expected}" in written


def test_reset_forgets_all_but_the_system_message(llama: ChatModel) -> None:
    history, written = talk(llama, "why?", "/reset", "/exit", "never read", system="Be brief.")
    assert history == [{"role": "system", "content": "Be brief."}]
    assert "(forgotten)" in written
    history, _ = talk(llama, "why?", "/reset", "what?")
    expected = generate(llama, ["what?"], temperature=0, max_new_tokens=6)[0]
    assert history == [{"role": "user", "content": "what?"}, {"role": "assistant", "content": expected}]


def test_commands_are_explained_and_a_wrong_one_is_not_sent_to_the_model(llama: ChatModel) -> None:
    history, written = talk(llama, "/help", "/rest")
    assert history == []
    assert all(word in written for word in ("/reset", "/exit", "Ctrl-C", "Ctrl-D", "no command /rest"))


def test_ctrl_c_stops_the_answer_and_keeps_what_was_given(llama: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interrupt comes in the middle of generation, as the second piece of text is written."""

    class Interrupting(io.StringIO):
        writes_left: int | None = None

        def write(self, text: str) -> int:
            if text == "model> ":
                self.writes_left = 2
            elif self.writes_left is not None:
                self.writes_left -= 1
                if self.writes_left == 0:
                    self.writes_left = None
                    raise KeyboardInterrupt
            return super().write(text)

    output = Interrupting()
    history = chat(llama, input=io.StringIO("why?\n/exit\n"), output=output, temperature=0, max_new_tokens=60)
    assert "(stopped)" in output.getvalue()
    whole = generate(llama, ["why?"], temperature=0, max_new_tokens=60)[0]
    assert history[0] == {"role": "user", "content": "why?"}
    assert 0 < len(history[1]["content"]) < len(whole)
    assert whole.startswith(history[1]["content"])

    def before_the_first_word(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, "stream", before_the_first_word)
    history, written = talk(llama, "why?")
    assert history == []
    assert "(stopped)" in written


def test_ctrl_c_at_the_prompt_does_not_leave(llama: ChatModel) -> None:
    class Keys(io.StringIO):
        pressed = False

        def readline(self, *_: Any) -> str:  # type: ignore[override]
            if not self.pressed:
                self.pressed = True
                raise KeyboardInterrupt
            return super().readline()

    output = io.StringIO()
    history = chat(llama, input=Keys("why?\n"), output=output, temperature=0, max_new_tokens=2)
    assert len(history) == 2
    assert "Ctrl-D or /exit to leave" in output.getvalue()


def test_a_conversation_too_long_for_the_model_is_said_and_goes_on(tmp_path: Path) -> None:
    bundle = load_for_inference(save_tiny(tmp_path / "short", "llama", max_position_embeddings=64))
    history, written = talk(bundle, "why?", "sun moon " * 30, "what?")
    assert [m["content"] for m in history if m["role"] == "user"] == ["why?", "what?"]
    assert "the conversation has" in written
    assert "the model takes 64 together with the answer; /reset starts again)" in written


def test_an_answer_that_was_cut_is_marked(llama: ChatModel) -> None:
    assert "(cut at the longest answer allowed)" in talk(llama, "why?", max_new_tokens=2)[1]


def test_what_cannot_work_is_said_at_once(llama: ChatModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--temperature -1"):
        talk(llama, temperature=-1)
    bundle = load_for_inference(save_tiny(tmp_path / "base", "llama", template=None))
    with pytest.raises(UserError, match="no chat template"):
        talk(bundle)
