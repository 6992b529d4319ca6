"""The server, asked by OpenAI's own client; transformers' `generate` and the engine alone are the oracles."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from openai import AsyncOpenAI, OpenAI
from served import heed_interrupts, served, slow_down
from tiny import chat_rows, save_tiny

from litft.cli.main import main
from litft.infer.load import ChatModel, load_for_inference
from litft.serve.server import Server, is_local

ROOT = Path(__file__).parent.parent.parent
ASK: list[Any] = [{"role": "user", "content": "why?"}]
TOOL_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}[{{ tool['function']['name'] }}]{% endfor %}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message.tool_calls %}{% for call in message.tool_calls %}"
    "{{ call.function.name }}({{ call.function.arguments.x }}){% endfor %}{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return load_for_inference(save_tiny(tmp_path_factory.mktemp("serve") / "tiny", "llama"), device="cpu")


@pytest.fixture(scope="module")
def running(bundle: ChatModel) -> Iterator[tuple[Server, str]]:
    with served(bundle, slots=4, max_tokens=200) as both:
        yield both


@pytest.fixture(scope="module")
def client(running: tuple[Server, str]) -> OpenAI:
    return OpenAI(base_url=f"{running[1]}/v1", api_key="none", max_retries=0, timeout=60)


def oracle(bundle: ChatModel, ids: list[int], longest: int) -> list[int]:
    """Greedy tokens of transformers, up to the stop token and with it."""
    row = torch.tensor([ids])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": longest, "eos_token_id": sorted(bundle.stop_ids)}
    return bundle.model.generate(row, attention_mask=torch.ones_like(row), pad_token_id=0, **options)[
        0, len(ids) :
    ].tolist()


def ask(client: OpenAI, messages: list[Any] = ASK, **more: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **({"temperature": 0} | more))


# -- answers ---------------------------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_transformers_does(client: OpenAI, bundle: ChatModel) -> None:
    for row in chat_rows(6):
        messages = row["messages"][:-1]
        ids = bundle.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        new = oracle(bundle, ids, 24)
        answer = ask(client, messages, max_tokens=24)
        choice = answer.choices[0]
        assert choice.message.content == bundle.decode(new) and choice.message.role == "assistant"
        assert choice.finish_reason == ("stop" if new[-1] in bundle.stop_ids else "length")
        usage = answer.usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(new))
        assert usage.total_tokens == len(ids) + len(new)


def test_a_stream_adds_up_to_the_answer(client: OpenAI) -> None:
    whole = ask(client, max_completion_tokens=20, n=2, temperature=1, seed=3)
    options = {"include_usage": True}
    chunks = list(ask(client, max_tokens=20, n=2, temperature=1, seed=3, stream=True, stream_options=options))
    *chunks, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in chunks)
    assert {chunk.id for chunk in chunks} == {last.id}
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert mine[0].delta.role == "assistant"
        assert "".join(part.delta.content or "" for part in mine) == choice.message.content
        assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
    plain = list(ask(client, max_tokens=3, stream=True))
    assert all(chunk.choices for chunk in plain)  # no usage where nobody asked


def test_completions_continue_text_and_tokens(client: OpenAI, bundle: ChatModel) -> None:
    texts = ["the river", "sun moon"]
    ids = [bundle.tokenizer(text)["input_ids"] for text in texts]
    wanted = [bundle.decode(oracle(bundle, row, 12)) for row in ids]
    for prompt in (texts, ids):
        got = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, temperature=0, n=2)
        assert [choice.text for choice in got.choices] == [wanted[0]] * 2 + [wanted[1]] * 2
        assert [choice.index for choice in got.choices] == [0, 1, 2, 3]
        assert got.usage is not None and got.usage.prompt_tokens == sum(map(len, ids))
    one = client.completions.create(model="tiny", prompt=ids[0], max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in one) == wanted[0]


def test_seeds_draw_the_same_and_choices_differ(client: OpenAI) -> None:
    def texts(**more: Any) -> list[str]:
        answer = ask(client, temperature=1, max_tokens=12, n=4, **more)
        return [choice.message.content for choice in answer.choices]

    first = texts(seed=1)
    assert texts(seed=1) == first and len(set(first)) > 1
    assert texts(seed=2) != first and texts() != texts()
    greedy = ask(client, max_tokens=12).choices[0].message.content
    assert set(texts(extra_body={"top_k": 1})) == {greedy} == set(texts(top_p=1e-6))


def test_stop_texts_end_an_answer(client: OpenAI) -> None:
    whole = ask(client, max_tokens=30).choices[0].message.content
    word = whole[4:7]
    for stop in (word, ["never", word]):
        cut = ask(client, max_tokens=30, stop=stop).choices[0]
        assert (cut.message.content, cut.finish_reason) == (whole[: whole.index(word)], "stop")
    pieces = [chunk.choices[0].delta.content or "" for chunk in ask(client, max_tokens=30, stop=word, stream=True)]
    assert "".join(pieces) == whole[: whole.index(word)]


def test_log_probabilities_are_the_models(client: OpenAI, bundle: ChatModel) -> None:
    prompt = bundle.tokenizer("the river")["input_ids"]
    new = [id for id in oracle(bundle, prompt, 8) if id not in bundle.stop_ids]
    with torch.no_grad():
        logs = bundle.model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 :].log_softmax(1)
    own = [float(logs[i, id]) for i, id in enumerate(new)]
    text = client.completions.create(model="tiny", prompt=prompt, max_tokens=8, temperature=0, logprobs=2).choices[0]
    assert text.logprobs is not None and text.logprobs.token_logprobs == pytest.approx(own, abs=1e-4)
    tops = text.logprobs.top_logprobs or []  # by text, which two tokens may share
    assert [max(top.values()) for top in tops] == text.logprobs.token_logprobs and max(map(len, tops)) == 2
    chat = ask(client, max_tokens=8, logprobs=True, top_logprobs=3).choices[0]
    assert "".join(tell.token for tell in chat.logprobs.content) == chat.message.content
    for tell in chat.logprobs.content:
        assert tell.top_logprobs[0].logprob == tell.logprob and len(tell.top_logprobs) == 3  # greedy
    told = [c.choices[0].logprobs for c in ask(client, max_tokens=8, logprobs=True, stream=True)]
    parts = [tell.logprob for part in told if part for tell in part.content]
    assert parts == pytest.approx([tell.logprob for tell in chat.logprobs.content], abs=1e-5)


def test_tools_and_calls_reach_the_template(tmp_path: Path) -> None:
    bundle = load_for_inference(save_tiny(tmp_path / "tools", "llama", template=TOOL_TEMPLATE), device="cpu")
    assert bundle.hidden_ids  # asks the template, once
    seen: list[list[int]] = []
    encode = bundle.encode
    bundle.encode = lambda prompt: (seen.append(encode(prompt)), seen[-1])[1]  # type: ignore[method-assign]
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    tools: Any = [{"type": "function", "function": {"name": "look", "description": "looks", "parameters": schema}}]
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"x": 7}'}}
    messages: list[Any] = [
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "42"},
    ]
    with served(bundle) as (_, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        ask(client, messages, tools=tools, max_tokens=2)
        ask(client, messages, tools=tools, tool_choice="none", max_tokens=2)
    with_tools, without = (bundle.tokenizer.decode(ids) for ids in (seen[0], seen[-1]))
    assert with_tools.startswith("[look]<|im_start|>system\nBe brief.") and "assistant\nlook(7)" in with_tools
    assert "tool\n42" in with_tools and "[look]" not in without


def test_concurrent_answers_are_those_given_one_by_one(bundle: ChatModel) -> None:
    many_at_once(bundle, 40)


@pytest.mark.slow
def test_200_concurrent_answers_are_those_given_one_by_one(bundle: ChatModel) -> None:
    many_at_once(bundle, 200)


def many_at_once(bundle: ChatModel, count: int) -> None:
    rows = [row["messages"][:-1] for row in chat_rows(count)]
    ids = [bundle.encode(row) for row in rows]
    wanted = [bundle.decode(oracle(bundle, row, 5 + i % 20)) for i, row in enumerate(ids)]

    async def answers(url: str) -> list[str]:
        limits = httpx.Limits(max_connections=count)
        async with httpx.AsyncClient(limits=limits, timeout=120) as http:
            client = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)

            async def one(i: int) -> str:
                options: Any = {"model": "tiny", "messages": rows[i], "max_tokens": 5 + i % 20, "temperature": 0}
                if i % 2:
                    stream = await client.chat.completions.create(**options, stream=True)
                    return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
                return (await client.chat.completions.create(**options)).choices[0].message.content

            return list(await asyncio.gather(*map(one, range(count))))

    with served(bundle, max_queue=count) as (server, url):
        assert asyncio.run(answers(url)) == wanted
        assert server.worker.finished.total() == count


# -- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "error", "code", "param"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found", "model"),
        ({"messages": []}, openai.BadRequestError, "invalid_value", "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, openai.BadRequestError, None, "messages"),
        ({"max_tokens": 0}, openai.BadRequestError, "invalid_value", "max_tokens"),
        ({"max_tokens": 201}, openai.BadRequestError, None, "max_tokens"),
        ({"temperature": -1}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"temperature": "hot"}, openai.BadRequestError, "invalid_value", "temperature"),
        ({"top_p": 2}, openai.BadRequestError, "invalid_value", "top_p"),
        ({"stop": ""}, openai.BadRequestError, "invalid_value", None),
        ({"frequency_penalty": 1.0}, openai.BadRequestError, "invalid_value", "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "invalid_value", "response_format.type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, None, "tools"),
        ({"extra_body": {"best": 1}}, openai.BadRequestError, "unknown_parameter", "best"),
        ({"top_logprobs": 21, "logprobs": True}, openai.BadRequestError, "invalid_value", "top_logprobs"),
    ],
)
def test_mistakes_are_the_clients_own_exceptions(
    client: OpenAI, more: dict[str, Any], error: type[openai.APIStatusError], code: str | None, param: str | None
) -> None:
    with pytest.raises(error) as caught:
        client.chat.completions.create(**({"model": "tiny", "messages": ASK} | more))
    assert (caught.value.code, caught.value.param, caught.value.type) == (code, param, "invalid_request_error")
    assert set(caught.value.response.json()["error"]) == {"message", "type", "param", "code"}


def test_what_exceeds_the_context_is_named_as_openai_does(client: OpenAI, bundle: ChatModel) -> None:
    long = "sun moon " * 300
    for call in (
        lambda: ask(client, [{"role": "user", "content": long}]),
        lambda: ask(client, [{"role": "user", "content": "sun moon " * 180}], max_tokens=200),
        lambda: client.completions.create(model="tiny", prompt=long),
    ):
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as caught:
            call()
        assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="beyond the vocabulary"):
        client.completions.create(model="tiny", prompt=[10**6])


def test_bodies_that_are_no_requests(running: tuple[Server, str]) -> None:
    url = f"{running[1]}/v1/chat/completions"
    json_type = {"Content-Type": "application/json"}
    for content, headers in ((b"{", json_type), (b"[]", json_type), (b"", {}), (b'{"messages": 3}', json_type)):
        answer = httpx.post(url, content=content, headers=headers)
        assert (answer.status_code, set(answer.json()["error"])) == (400, {"message", "type", "param", "code"}), content
        assert answer.json()["error"]["param"] in (None, "messages")
    plain = httpx.post(url, content=json.dumps({"messages": ASK}), headers={"Content-Type": "text/plain"})
    assert plain.status_code == 400  # what a page of another site could send unasked
    assert httpx.get(url).status_code == 405 and "error" in httpx.get(url).json()
    assert httpx.get(f"{running[1]}/v1/nothing").json()["error"]["type"] == "invalid_request_error"


def test_a_request_too_large_is_refused_however_it_is_sent(bundle: ChatModel) -> None:
    with served(bundle, max_body=2000) as (_, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.APIStatusError) as caught:
            ask(client, [{"role": "user", "content": "x" * 3000}])
        assert caught.value.status_code == 413
        pieces = (b"x" * 500 for _ in range(8))  # no Content-Length
        headers = {"Content-Type": "application/json"}
        assert httpx.post(f"{url}/v1/chat/completions", content=pieces, headers=headers).status_code == 413
        assert ask(client, max_tokens=2).choices


def test_a_full_queue_is_a_rate_limit(bundle: ChatModel) -> None:
    with served(bundle, slots=1, max_queue=2) as (server, url):
        slow_down(server)
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.RateLimitError, match="too many requests") as caught:
            ask(client, n=3)
        assert caught.value.code == "queue_full" and caught.value.response.headers["retry-after"] == "1"
        assert len(ask(client, n=2, max_tokens=2).choices) == 2


def test_what_fails_in_the_model_fails_those_requests_only(bundle: ChatModel, capfd: Any) -> None:
    with served(bundle) as (server, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        forward = server.worker.engine._forward

        def bad(*args: Any) -> Any:
            server.worker.engine._forward = forward  # type: ignore[method-assign]
            raise RuntimeError("out of luck")

        server.worker.engine._forward = bad  # type: ignore[method-assign]
        with pytest.raises(openai.InternalServerError, match="RuntimeError") as caught:
            ask(client)
        assert caught.value.code == "internal_error" and "out of luck" in capfd.readouterr().err
        assert ask(client, max_tokens=2).choices


def test_what_a_model_cannot_do_is_said(tmp_path: Path, bundle: ChatModel) -> None:
    plain = load_for_inference(save_tiny(tmp_path / "base", template=None), device="cpu")
    with served(plain) as (_, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="no chat template; it takes /v1/completions"):
            ask(client)
        assert client.completions.create(model="tiny", prompt="the river", max_tokens=3).choices
    own = type(bundle.settings)(no_repeat_ngram_size=3)
    odd = ChatModel(bundle.model, bundle.tokenizer, own, bundle.stop_ids, bundle.encoder)
    with served(odd) as (_, url):
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        with pytest.raises(openai.BadRequestError, match=r"no log-probabilities .* no_repeat_ngram_size"):
            ask(client, logprobs=True)
        whole = ask(client, max_tokens=9).choices[0].message.content
        stream = ask(client, max_tokens=9, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == whole


# -- who may call ------------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_and_never_shown(bundle: ChatModel) -> None:
    with served(bundle, api_key="s3cret-key") as (_, url):
        with pytest.raises(openai.AuthenticationError) as caught:
            ask(OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0))
        assert caught.value.code == "invalid_api_key" and "s3cret" not in caught.value.response.text
        assert caught.value.response.headers["www-authenticate"] == "Bearer"
        assert ask(OpenAI(base_url=f"{url}/v1", api_key="s3cret-key", max_retries=0), max_tokens=2).choices
        assert httpx.get(f"{url}/metrics").status_code == httpx.get(f"{url}/v1/models").status_code == 401
        assert httpx.get(f"{url}/health").status_code == httpx.get(url).status_code == 200


def test_other_sites_pages_are_kept_out(running: tuple[Server, str]) -> None:
    url, port = f"{running[1]}/v1/models", running[1].rpartition(":")[2]
    assert httpx.get(url, headers={"Host": f"evil.example:{port}"}).status_code == 403
    assert httpx.get(url, headers={"Origin": "https://evil.example"}).status_code == 403
    for odd in ("null", "http://[", ""):
        assert httpx.get(url, headers={"Origin": odd}).status_code == 403
    assert httpx.get(url, headers={"Host": "["}).status_code == 403
    assert httpx.get(url, headers={"Origin": running[1]}).status_code == 200
    assert httpx.get(url, headers={"Host": f"localhost:{port}"}).status_code == 200
    assert "access-control-allow-origin" not in httpx.get(url, headers={"Origin": running[1]}).headers


def test_the_page_asks_nothing_of_others(running: tuple[Server, str]) -> None:
    page = httpx.get(running[1])
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|https?://|innerHTML|insertAdjacentHTML|eval\(""", page.text)


# -- coming and going -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_is_answered_no_further(bundle: ChatModel, stream: bool) -> None:
    endless = ChatModel(bundle.model, bundle.tokenizer, bundle.settings, set(), bundle.encoder)
    with served(endless) as (server, url):
        slow_down(server)
        body = {"messages": ASK, "stream": stream, "temperature": 0}
        if stream:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
                next(iter(answer.iter_lines()))
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.3)
        until = time.monotonic() + 5
        while server.worker.finished.total() == 0 and time.monotonic() < until:
            time.sleep(0.02)
        assert server.worker.finished == {"cancelled": 1} and server.worker.new_tokens < 200


def test_health_metrics_and_models(running: tuple[Server, str], client: OpenAI) -> None:
    ask(client, max_tokens=2)
    assert httpx.get(f"{running[1]}/health").json() == {"status": "ok"}
    metrics = httpx.get(f"{running[1]}/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = dict(line.rsplit(" ", 1) for line in metrics.text.splitlines() if not line.startswith("#"))
    answers = sum(float(n) for name, n in values.items() if name.startswith("litft_answers_total"))
    assert (
        answers
        == float(values["litft_answer_seconds_count"])
        == float(values['litft_answer_seconds_bucket{le="+Inf"}'])
    )
    assert float(values["litft_generated_tokens_total"]) > 0 and values["litft_requests_running"] == "0"
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "litft"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "times"), [(signal.SIGTERM, -15, 1), (signal.SIGINT, 130, 1), (signal.SIGINT, 130, 2)]
)
def test_a_signal_ends_it_and_cuts_what_is_being_answered(tmp_path: Path, number: int, code: int, times: int) -> None:
    """The command itself, with an answer under way that would take long."""
    folder = save_tiny(
        tmp_path / "long", "llama", max_position_embeddings=30_000, eos_token_id=None, num_hidden_layers=8
    )
    words = [sys.executable, "-m", "litft", "serve", str(folder), "--port", "0", "--max_tokens", "29000"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "LITFT_API_KEY": "s3cret-key"}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=heed_interrupts
    ) as process:
        try:
            assert process.stdout is not None
            said = process.stdout.readline() + process.stdout.readline()
            url = re.search(r"serving long at (http://\S+),", said)
            assert url and "from openai import OpenAI" in said and "s3cret" not in said, said
            client = OpenAI(base_url=f"{url[1]}/v1", api_key="s3cret-key", max_retries=0)
            with ThreadPoolExecutor() as pool:
                whole = pool.submit(client.chat.completions.create, model="long", messages=ASK)
                stream = client.chat.completions.create(model="long", messages=ASK, stream=True)
                next(iter(stream))
                began = time.monotonic()
                for _ in range(times):
                    process.send_signal(number)
                    time.sleep(0.3)
                with pytest.raises((openai.APIError, httpx.HTTPError)):
                    for _ in stream:
                        pass
                assert isinstance(whole.exception(), openai.InternalServerError | openai.APIConnectionError)
            assert process.wait(10) == code and time.monotonic() - began < 10
            assert "Traceback" not in process.stderr.read()  # type: ignore[union-attr]
        finally:
            process.kill()


def test_mistakes_on_the_command_line(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tiny_llama), "--port", port]) == 2
        assert "in use" in capsys.readouterr().err
    assert main(["serve", str(tiny_llama), "--port", "0", "--api_key", "two\nlines"]) == 2
    assert "two" not in capsys.readouterr().err
    assert main(["serve", str(tiny_llama / "nowhere"), "--port", "0"]) == 2
    assert is_local("127.0.0.1") and is_local("localhost") and is_local("::1")
    assert not is_local("0.0.0.0") and not is_local("192.168.1.2") and not is_local("example.com")


def test_an_open_server_without_a_key_is_warned_of(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Server, "run", lambda self: None)
        assert main(["serve", str(tiny_llama), "--host", "0.0.0.0", "--port", "0"]) == 0
        assert "open to others" in capsys.readouterr().err
        assert main(["serve", str(tiny_llama), "--host", "0.0.0.0", "--port", "0", "--api_key", "k"]) == 0
        assert capsys.readouterr().err == ""
