"""What each technique brings, and how time and memory grow: litft against itself, a process a run."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from extensions.benchmark.job import Job, Result, run_arm

PLAIN: dict[str, Any] = {
    "fast_attention": False,
    "fast_loss": False,
    "fast_lora": False,
    "compile": "false",
    "optimizer": "torch.optim.AdamW",
    "arena": False,
}
"""litft with everything off that can be switched off."""
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("padded rows, fp32, plain paths", {"precision": "32-true", "packing": False}),
    ("+ bf16 compute", {"precision": "bf16-mixed"}),
    ("+ packing, one plain attention a document", {"packing": True}),
    ("+ packed attention kernels", {"fast_attention": True}),
    ("+ loss without all logits", {"fast_loss": True}),
    ("+ adapters inside the products", {"fast_lora": True}),
    ("+ fused AdamW, clipping inside it", {"optimizer": "adamw"}),
    ("+ memory kept and used again", {"arena": True}),
    ("+ compiled layers", {"compile": "true"}),
]
"""The techniques, each on top of those before."""


def ablate(job: Job, warm_up: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """One technique after another switched on; the median step of each.

    Args:
        job: the work.
        warm_up: steps of each run that don't count.
        say: prints.
    """
    setting = dict(PLAIN)
    chosen = []
    for name, change in STEPS:
        setting = setting | change
        if "adapters" in name and job.tuner == "full":
            continue
        chosen.append((name, dict(setting)))
    found: dict[str, list[Result]] = {name: [] for name, _ in chosen}
    for name, one in chosen:
        result = run_arm(replace(job, arm="litft", setting=one))
        say(f"  {job.tuner:<5} {name}: {result.error or f'{result.rate(warm_up):.0f} tok/s, {result.peak_gb:.2f} GB'}")
        found[name].append(result)
    table, before = [], None
    for name, results in found.items():
        if any(r.error for r in results):
            table.append({"technique": name, "error": next(r.error for r in results if r.error)})
            continue
        rate = statistics.median(r.rate(warm_up) for r in results)
        peak = max(r.peak_gb for r in results)
        entry = {"technique": name, "tokens_per_s": round(rate, 1), "peak_gb": round(peak, 2)}
        entry["gain"] = round(rate / before, 3) if before else 1.0
        entry["losses"] = results[0].losses[:3]
        table.append(entry)
        before = rate
    return table


TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
ROWS = (1_000, 10_000, 50_000, 200_000)
VOCABULARIES = (32_000, 64_000, 128_000, 256_000)


def sweep(job: Job, folder: Path, say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """How time and memory grow with the tokens of a micro-batch, the rows of the data and the vocabulary.

    Args:
        job: the work; its model and data are the starting point.
        folder: to write longer data and other models to.
        say: prints.
    """
    found: dict[str, list[dict[str, Any]]] = {"tokens_per_batch": [], "rows": [], "vocabulary": []}
    for tokens in TOKENS:
        setting = {"tokens_per_batch": tokens, "compile": "true"}
        result = run_arm(replace(job, arm="litft", steps=3, tokens_per_step=tokens, setting=setting))
        entry = {"tokens": tokens, "error": result.error}
        if not result.error:
            entry = {"tokens": tokens, "tokens_per_s": round(result.rate(1), 1), "peak_gb": round(result.peak_gb, 2)}
            entry["predicted_gb"] = result.notes["predicted_gb"]
        say(f"  {entry}")
        found["tokens_per_batch"].append(entry)
    for rows in ROWS:
        entry = prepare(job, rows, folder)
        say(f"  {entry}")
        found["rows"].append(entry)
    for vocabulary in VOCABULARIES:
        entry = loss_of(vocabulary, job.device)
        say(f"  {entry}")
        found["vocabulary"].append(entry)
    return found


def prepare(job: Job, rows: int, folder: Path) -> dict[str, Any]:
    """Seconds from so many rows in a file to a plan: encoded, cached, packed; and again from the cache."""
    import subprocess

    lines = [line for line in Path(job.source).read_text().splitlines() if line.strip()]
    source = folder / f"rows-{rows}.jsonl"
    with source.open("w") as file:
        for index in range(rows):
            chat = json.loads(lines[index % len(lines)])
            chat["id"] = index
            for message in chat.get("messages", [])[:1]:
                message["content"] = f"({index}) {message['content']}"  # so that no two rows are the same
            file.write(json.dumps(chat) + "\n")
    script = (
        "import json, sys, time, resource; from litft import SFT, ChatData; model, source, cache = sys.argv[1:4]\n"
        "start = time.perf_counter(); data = ChatData(source, val_fraction=0.0, tokens_per_step=16384)\n"
        "data.prepare(SFT(model), max_epochs=1); took = time.perf_counter() - start\n"
        "start = time.perf_counter(); steps = data.total_steps; _ = [data.plan.layout(0, i) for i in range(steps)]\n"
        "print(json.dumps([took, time.perf_counter() - start, steps, resource.getrusage(0).ru_maxrss / 1e6]))"
    )
    import os

    environment = {**os.environ, "LITFT_CACHE": str(folder / f"cache-{rows}"), "HF_HUB_OFFLINE": "1"}
    entry: dict[str, Any] = {"rows": rows}
    for name in ("first", "cached"):
        command = [sys.executable, "-c", script, job.model, str(source), name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            return entry | {"error": done.stderr.splitlines()[-1][:200]}
        took, laid, steps, peak = json.loads(done.stdout.splitlines()[-1])
        entry |= {f"{name}_s": round(took, 2), "layout_s": round(laid, 2), "steps": steps, "peak_gb": round(peak, 2)}
    return entry


def loss_of(vocabulary: int, device: str, rows: int = 2048, width: int = 576) -> dict[str, Any]:
    """Time and bytes of the fused loss and of the plain one, forward and backward, bf16."""
    import torch
    from torch.nn import functional as F

    from litft.losses.linear_cross_entropy import linear_cross_entropy

    weight = (torch.randn(vocabulary, width, device=device) * 0.02).bfloat16().requires_grad_()
    hidden = torch.randn(rows, width, device=device).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)

    def plain() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="none")

    entry: dict[str, Any] = {"vocabulary": vocabulary, "rows": rows, "width": width}
    for name, nll in (("fused", lambda: linear_cross_entropy(hidden, weight, targets)), ("plain", plain)):
        took = []
        for _ in range(3):
            start = time.perf_counter()
            nll().sum().backward()
            if device == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        entry[f"{name}_s"] = round(statistics.median(took), 3)
    return entry


def report(tuner: str, table: list[dict[str, Any]]) -> str:
    """The ablation as Markdown."""
    lines = [f"### Ablation, {tuner}", "", "| technique | real tok/s | gain | peak GB |", "|---|---|---|---|"]
    for e in table:
        if "error" in e:
            lines.append(f"| {e['technique']} | failed: {e['error']} | | |")
        else:
            lines.append(f"| {e['technique']} | {e['tokens_per_s']:.0f} | {e['gain']:.2f}x | {e['peak_gb']:.2f} |")
    return "\n".join(lines)


def curves(found: dict[str, list[dict[str, Any]]]) -> str:
    """The sweep as Markdown tables."""
    parts = []
    for name, entries in found.items():
        keys = list(dict.fromkeys(key for e in entries for key in e if key != "error"))
        lines = [f"### Growing {name}", "", "| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
        for e in entries:
            lines.append("| " + " | ".join(str(e.get(k, e.get("error", ""))) for k in keys) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
