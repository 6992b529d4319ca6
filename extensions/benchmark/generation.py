"""Tokens a second of greedy answers: transformers one prompt at a time, transformers in batches, and litft's engine.

python -m extensions.benchmark.generation [--model M] [--data F] [--prompts N] [--max_new_tokens N] [--dtype D]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from litft.data.conversation import Message
from litft.infer.engine import Engine, Request
from litft.infer.generate import decoding
from litft.infer.load import ChatModel, load_for_inference

Answers = list[list[int]]


def by_transformers(bundle: ChatModel, rows: list[list[int]], longest: int, batch: int) -> Answers:
    """Transformers' `generate`, padded on the left, prompts sorted by length; the answers up to their stop tokens."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    answers: Answers = [[] for _ in rows]
    model: Any = bundle.model
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
    """Print a line an arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--data", default="tutorials/data/quickstart.jsonl")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--alone", type=int, default=16, help="prompts for the slow arm, spread over all of them")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype) if args.dtype else None
    bundle = load_for_inference(args.model, device="cpu", dtype=dtype)
    rows = [bundle.encode(messages) for messages in prompts(args.data, args.prompts)]
    few = rows[:: max(1, len(rows) // args.alone)]
    lengths = sorted(map(len, rows))
    print(
        f"{len(rows)} prompts of {lengths[0]} to {lengths[-1]} tokens, {bundle.model.dtype}, torch {torch.__version__}"
    )
    arms: dict[str, tuple[Callable[..., Answers], list[list[int]], int]] = {
        "transformers, one by one": (by_transformers, few, 1),
        "litft, one by one": (by_litft, few, 1),
        "transformers, batches of 16": (by_transformers, rows, 16),
        "litft, 16 slots": (by_litft, rows, 16),
        "transformers, one batch": (by_transformers, rows, len(rows)),
        "litft, a slot a prompt": (by_litft, rows, len(rows)),
    }
    by_litft(bundle, few[:2], 4, 2)
    by_transformers(bundle, few[:2], 4, 2)
    first, answers = 0.0, {}
    for name, (arm, some, size) in arms.items():
        began, cpu = time.perf_counter(), time.process_time()
        answers[name] = arm(bundle, some, args.max_new_tokens, size)
        took, cpu = time.perf_counter() - began, time.process_time() - cpu
        tokens = sum(map(len, answers[name]))
        first = first or tokens / took
        rate = f"{tokens / took:7.1f} tokens/s {tokens / took / first:5.2f}x"
        print(f"{name:<28} {tokens:5} tokens {took:6.1f} s {rate} {cpu:6.1f} s of processors", flush=True)
    one = answers["transformers, batches of 16"]
    same = sum(a == b for a, b in zip(one, answers["litft, 16 slots"], strict=True))
    print(f"the same tokens as transformers' batches: {same} of {len(rows)} answers")


if __name__ == "__main__":
    main()
