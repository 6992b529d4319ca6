"""Tokens a second of greedy answers: transformers one prompt at a time, transformers in batches, and litft's engine.

All arms in turn, there and back, so that what else the machine does meets each alike; then the median of each.

python -m extensions.benchmark.generation [--model M] [--data F] [--prompts N] [--max_new_tokens N] [--dtype D]
    [--rounds N] [--whole]
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from litft.data.conversation import Message
from litft.infer.engine import Engine, Request
from litft.infer.generate import decoding
from litft.infer.load import ChatModel, load_for_inference
from litft.models.resolve import resolve

Answers = list[list[int]]


def by_transformers(bundle: ChatModel, model: Any, rows: list[list[int]], longest: int, batch: int) -> Answers:
    """Transformers' `generate`, padded on the left, prompts sorted by length; the answers up to their stop tokens.

    Its model is as transformers loads it; only the settings are those of `bundle`.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    answers: Answers = [[] for _ in rows]
    settings = decoding(bundle, longest, temperature=0)
    for start in range(0, len(rows), batch):
        some = order[start : start + batch]
        width = max(len(rows[i]) for i in some)
        ids = torch.tensor([[0] * (width - len(rows[i])) + rows[i] for i in some])
        mask = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in some])
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
        for i, new in zip(some, out, strict=True):
            end = next((n for n, id in enumerate(new, 1) if id in bundle.stop_ids), len(new))
            answers[i] = new[:end]
    return answers


def by_litft(bundle: ChatModel, rows: list[list[int]], longest: int, slots: int) -> Answers:
    """The engine under `litft generate`."""
    settings = decoding(bundle, longest, temperature=0)
    requests = [Request(ids, settings, longest) for ids in rows]
    Engine(bundle, slots=slots).run(sorted(requests, key=lambda request: -len(request.ids)))
    return [request.new for request in requests]


def prompts(path: str, count: int) -> list[list[Message]]:
    """The messages of the first rows up to the last user turn."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    return [row[:-1] if row[-1]["role"] == "assistant" else row for row in rows[:count]]


def main() -> None:
    """Print a line a measurement, then one an arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="tutorials/data/quickstart.jsonl")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--alone", type=int, default=16, help="prompts for the slow arm, spread over all of them")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--whole", action="store_true", help="also all prompts at once")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype) if args.dtype else None
    bundle = load_for_inference(args.model, device="cpu", dtype=dtype)
    source = resolve(args.model).folder
    plain: Any = AutoModelForCausalLM.from_pretrained(source, dtype=bundle.model.dtype).eval()
    hf = functools.partial(by_transformers, bundle, plain)
    ours = functools.partial(by_litft, bundle)
    rows = [bundle.encode(messages) for messages in prompts(args.data, args.prompts)]
    few = rows[:: max(1, len(rows) // args.alone)]
    lengths = sorted(map(len, rows))
    threads = torch.get_num_threads()
    print(f"{len(rows)} prompts of {lengths[0]} to {lengths[-1]} tokens, {bundle.model.dtype}, {threads} threads")
    arms: dict[str, tuple[Callable[..., Answers], list[list[int]], int]] = {
        "transformers, one by one": (hf, few, 1),
        "litft, one by one": (ours, few, 1),
        "transformers, batches of 16": (hf, rows, 16),
        "litft, 16 slots": (ours, rows, 16),
    }
    if args.whole:
        arms |= {"transformers, one batch": (hf, rows, len(rows)), "litft, a slot a prompt": (ours, rows, len(rows))}
    for arm in (ours, hf):
        arm(few[:2], 4, 2)
    answers: dict[str, Answers] = {}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    worked: dict[str, list[float]] = {name: [] for name in arms}  # by the time of the processors
    for turn in range(args.rounds):
        for name in list(arms)[:: -1 if turn % 2 else 1]:
            arm, some, size = arms[name]
            began, cpu = time.perf_counter(), time.process_time()
            answers[name] = arm(some, args.max_new_tokens, size)
            took, cpu = time.perf_counter() - began, time.process_time() - cpu
            tokens = sum(map(len, answers[name]))
            rates[name].append(tokens / took)
            worked[name].append(tokens / cpu)
            print(f"{name:<28} {tokens:5} tokens {took:6.1f} s {cpu:6.1f} s of processors", flush=True)
    first = statistics.median(rates["transformers, one by one"])
    for name, found in rates.items():
        median = statistics.median(found)
        spread = f"{min(found):.1f} to {max(found):.1f}"
        busy = f"{statistics.median(worked[name]):.1f} a processor second"
        print(f"{name:<28} {median:7.1f} tokens/s ({spread}) {median / first:5.2f}x, {busy}")
    one = answers["transformers, batches of 16"]
    same = sum(a == b for a, b in zip(one, answers["litft, 16 slots"], strict=True))
    print(f"the same tokens as transformers' batches: {same} of {len(rows)} answers")


if __name__ == "__main__":
    main()
