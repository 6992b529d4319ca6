"""The engine against transformers' own `generate`, logits and logits processors."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, VOCAB, save_tiny
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from litft.infer.engine import Engine, Request
from litft.infer.generate import decoding, generate
from litft.infer.load import ChatModel, load_for_inference
from litft.infer.sampling import Draw, Sampling, candidates, choose, not_read

LENGTHS = (3, 40, 4, 17, 1, 90, 18, 33, 5)


def prompts(seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB) for _ in range(length)] for length in LENGTHS]


def bundle_of(folder: Path) -> ChatModel:
    bundle = load_for_inference(folder, device="cpu", dtype=torch.float32)
    bundle.stop_ids = set()  # random models would end at once, at times
    return bundle


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return bundle_of(save_tiny(tmp_path_factory.mktemp("engine") / "llama", "llama"))


def ask(bundle: ChatModel, ids: list[int], longest: int = 20, **more: Any) -> Request:
    options = {"temperature": 0} | {k: more.pop(k) for k in ("temperature", "top_p", "top_k") if k in more}
    return Request(ids, decoding(bundle, longest, **options), longest, **more)


def oracle(model: Any, ids: list[int], longest: int) -> list[int]:
    row = torch.tensor([ids])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": longest, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(row, attention_mask=torch.ones_like(row), **options)[0, len(ids) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_transformers_own_whatever_shares_the_batch(
    tiny_folder: Callable[..., Path], family: str
) -> None:
    """Windows of 8 are left behind, slots are fewer than rows, prompts come in pieces, answers differ in length."""
    bundle = bundle_of(tiny_folder(family))
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(family), dtype=torch.float32).eval()
    lengths = [9 + 4 * (i % 4) for i in range(len(LENGTHS))]
    requests = [ask(bundle, ids, longest) for ids, longest in zip(prompts(), lengths, strict=True)]
    engine = Engine(bundle, slots=4, prompt_tokens=32)
    assert {engine.why_alone(request) for request in requests} == {None}
    engine.run(requests)
    for request, longest in zip(requests, lengths, strict=True):
        assert request.new == oracle(model, request.ids, longest)
        assert request.finish == "length"
    assert len({tuple(request.new) for request in requests}) > 1


@settings(max_examples=12, deadline=None)
@given(
    order=st.permutations(range(len(LENGTHS))),
    slots=st.integers(1, 9),
    piece=st.sampled_from((1, 7, 64, 2048)),
    steps=st.lists(st.integers(0, 3), min_size=len(LENGTHS), max_size=len(LENGTHS)),
    cancelled=st.sets(st.integers(0, len(LENGTHS) - 1), max_size=3),
)
def test_an_answer_does_not_depend_on_who_comes_and_goes(
    llama: ChatModel, order: list[int], slots: int, piece: int, steps: list[int], cancelled: set[int]
) -> None:
    alone = [ask(llama, ids, 5 + i, temperature=1.0, seed=i) for i, ids in enumerate(prompts())]
    for request in alone:
        Engine(llama, slots=1).run([request])
    rows = [ask(llama, ids, 5 + i, temperature=1.0, seed=i) for i, ids in enumerate(prompts())]
    engine = Engine(llama, slots=slots, prompt_tokens=piece)
    for i, pause in zip(order, steps, strict=True):
        engine.submit(rows[i])
        for _ in range(pause):
            engine.step()
        if i in cancelled:
            rows[i].cancel()
    while engine.step():
        pass
    for i, (one, row) in enumerate(zip(alone, rows, strict=True)):
        if i in cancelled and row.finish == "cancelled":
            assert row.new == one.new[: len(row.new)]
        else:
            assert row.new == one.new and row.finish == "length"
    assert not engine.rows and not engine.waiting


def test_log_probabilities_are_those_of_the_whole_text(llama: ChatModel) -> None:
    requests = [ask(llama, ids, 6, logprobs=3, temperature=0.7, top_k=5, seed=1) for ids in prompts()]
    Engine(llama, slots=4).run(requests)
    for request in requests:
        whole = torch.tensor([request.ids + request.new])
        with torch.no_grad():
            logs = llama.model(whole).logits[0].log_softmax(1)
        for at, (id, told) in enumerate(zip(request.new, request.told, strict=True), len(request.ids) - 1):
            assert told.id == id and told.logprob == pytest.approx(float(logs[at, id]), abs=1e-4)
            values, ids = logs[at].topk(3)
            assert [i for i, _ in told.top] == ids.tolist()
            assert [v for _, v in told.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_stop_text_ends_its_own_row_and_the_text_is_before_it(llama: ChatModel) -> None:
    free = ask(llama, prompts()[1], 16)
    Engine(llama).run([free])
    word = free.text[5:8]
    rows = [ask(llama, ids, 16, stop=[word] if i == 1 else ()) for i, ids in enumerate(prompts())]
    pieces: list[str] = []
    rows[1].on_text, rows[1].strip = pieces.append, False
    Engine(llama, slots=9).run(rows)
    assert rows[1].finish == "stop" and len(rows[1].new) < 16
    assert rows[1].text == "".join(pieces) == free.text[: free.text.index(word)]
    assert {row.finish for i, row in enumerate(rows) if i != 1} == {"length"}


def test_memory_bounds_who_may_enter(llama: ChatModel) -> None:
    each = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, their size, fp32
    free = [ask(llama, ids, 10) for ids in prompts()]
    Engine(llama, slots=9).run(free)
    engine = Engine(llama, slots=9, cache_bytes=each * 100 * 2)
    rows = [engine.submit(ask(llama, ids, 10)) for ids in prompts()]
    most = 0
    engine.step()
    while engine.step():
        longest = max((len(row.ids) for row in engine.rows), default=0)
        most = max(most, longest * len(engine.rows))
    assert [row.new for row in rows] == [row.new for row in free]
    assert most <= 200


def test_an_exception_leaves_the_engine_empty_and_usable(llama: ChatModel) -> None:
    def bad(piece: str) -> None:
        raise KeyboardInterrupt

    engine = Engine(llama, slots=2)
    rows = [ask(llama, ids, 8) for ids in prompts()]
    rows[0].on_text = bad
    with pytest.raises(KeyboardInterrupt):
        engine.run(rows)
    assert {row.finish for row in rows} == {"error"} and not engine.rows
    again = [ask(llama, ids, 8) for ids in prompts()]
    engine.run(again)
    assert {row.finish for row in again} == {"length"}


# -- how tokens are drawn ---------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1000),
    vocabulary=st.sampled_from((5, 300, 3000)),
    temperature=st.sampled_from((0.3, 1.0, 1.7)),
    top_k=st.sampled_from((0, 1, 4, 2000)),
    top_p=st.sampled_from((1.0, 0.9, 0.2, 0.999)),
    min_p=st.sampled_from((0.0, 0.1, 0.7)),
    penalty=st.sampled_from((1.0, 1.3)),
)
def test_what_may_be_drawn_is_what_transformers_processors_leave(
    seed: int, vocabulary: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(1, vocabulary, generator=generator)
    seen = torch.randint(vocabulary, (1, 7), generator=generator)
    processors = [RepetitionPenaltyLogitsProcessor(penalty)] if penalty != 1 else []
    processors += [TemperatureLogitsWarper(temperature)]
    processors += [TopKLogitsWarper(top_k)] if top_k else []
    if top_p < 1:
        before = LogitsProcessorList(processors)(seen, logits.clone()).double().softmax(1)
        sums = before.sort(descending=True).values.cumsum(1)
        assume(float((sums - top_p).abs().min()) > 1e-5)  # nearer than that rounding says which token is the last
        processors += [TopPLogitsWarper(top_p)]
    processors += [MinPLogitsWarper(min_p)] if min_p else []
    wanted = LogitsProcessorList(processors)(seen, logits.clone()).softmax(1)[0]
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
    given_ = logits.clone()
    choose(given_, [Draw(sampling, 0)], [seen[0].tolist()])  # the penalty is applied in place
    ids, probabilities = candidates(given_[0], sampling)
    found = torch.zeros(vocabulary).index_put((ids,), probabilities)
    assert torch.allclose(found, wanted, atol=2e-6)


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    draw = Draw(Sampling(1.0), 3)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[choose(logits.clone(), [draw], [[]])[0]] += 1
    wanted = 4000 * logits[0].softmax(0)
    chi_squared = float(((counts - wanted) ** 2 / wanted).sum())
    assert chi_squared < 16.3  # 3 degrees of freedom, 1 in 1000


def test_the_same_prompt_several_times_is_drawn_several_ways(llama: ChatModel) -> None:
    texts = generate(llama, ["why?"] * 6, temperature=1.0, max_new_tokens=8, seed=5)
    assert len(set(texts)) > 3
    assert generate(llama, ["why?"] * 3, temperature=1.0, max_new_tokens=8, seed=5, batch_size=2) == texts[:3]


# -- what can't be batched --------------------------------------------------------------------------------------------


def test_settings_the_engine_does_not_know_are_answered_by_transformers(
    llama: ChatModel, caplog: pytest.LogCaptureFixture
) -> None:
    plain = GenerationConfig(num_beams=1, do_sample=False, output_attentions=False)
    assert not_read(plain) == []
    own = GenerationConfig(no_repeat_ngram_size=1, num_beams=2)
    bundle = ChatModel(llama.model, llama.tokenizer, own, set(), llama.encoder, "odd")
    texts = generate(bundle, ["why?", "who?"], temperature=0, max_new_tokens=8)
    assert generate(bundle, ["who?"], temperature=0, max_new_tokens=8) == texts[1:]
    assert len(caplog.records) == 1 and "no_repeat_ngram_size" in caplog.text and "odd" in caplog.text
    row = torch.tensor([bundle.encode("why?")])
    options: dict[str, Any] = {"no_repeat_ngram_size": 1, "num_beams": 2, "do_sample": False, "max_new_tokens": 8}
    out = llama.model.generate(row, attention_mask=torch.ones_like(row), eos_token_id=None, **options)
    assert texts[0] == bundle.decode(out[0, row.shape[1] :].tolist()).lstrip("\r\n").rstrip()


def test_a_model_with_a_state_is_answered_by_transformers(llama: ChatModel, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import MambaConfig

    config = MambaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4, eos_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).eval()
    bundle = ChatModel(model, llama.tokenizer, llama.settings, set(), llama.encoder, "mamba")
    rows = [ask(bundle, ids, 6) for ids in prompts()[:3]]
    Engine(bundle).run(rows)
    assert [row.new for row in rows] == [oracle(model, row.ids, 6) for row in rows]
    assert "keep a state" in caplog.text


def test_angles_that_depend_on_the_longest_row_keep_rows_apart(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder = save_tiny(tmp_path / "dynamic", "llama", rope_parameters=rope, max_position_embeddings=32)
    bundle = bundle_of(folder)
    rows = [ask(bundle, ids, 12) for ids in prompts()[:4]]
    Engine(bundle).run(rows)
    assert "longest row" in str(rows[0].alone)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert [row.new for row in rows] == [oracle(model, row.ids, 12) for row in rows]


def test_transformers_stops_at_stop_texts_and_cancels(llama: ChatModel) -> None:
    own = GenerationConfig(no_repeat_ngram_size=3)
    bundle = ChatModel(llama.model, llama.tokenizer, own, set(), llama.encoder, "odd")
    free = ask(bundle, prompts()[1], 16)
    Engine(bundle).run([free])
    stopped = ask(bundle, prompts()[1], 16, stop=[free.text[4:6]])
    cut = ask(bundle, prompts()[1], 100)
    cut.on_text = lambda piece: cut.cancel()
    Engine(bundle).run([stopped, cut])
    assert stopped.finish == "stop" and stopped.text == free.text[:4]
    assert cut.finish == "cancelled" and len(cut.new) < 10
