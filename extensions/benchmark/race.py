"""litft against every installed peer, on the same rows, each arm in a process of its own.

    python -m extensions.benchmark.race --device cpu --tuner full,lora --data gsm8k_train.jsonl --json race.json

Each peer runs at its best: the fastest of its grid of settings, tried one key after another and printed. The arms
then take turns A B B A; the first steps of each are left out. An arm whose loss at any step is more than 2% off that of
a plain fp32 loop over the same rows is disqualified.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from extensions.benchmark import ablation
from extensions.benchmark.job import Job, Result, run_arm

PEERS = ("trainer", "trl")
TOLERANCE = 0.02
PROBE_STEPS, PROBE_WARM_UP = 3, 1
PROBE_PART = 2  # a probe's step reads this part of the rows


def encode(source: str, model: str, folder: Path, limit: int) -> Path:
    """The rows of a file as every arm reads them: ids and labels by litft's own encoder, which equals the template's.

    Args:
        source: chats.
        model: whose tokenizer and template.
        folder: to write to.
        limit: rows.
    """
    from litft import SFT, ChatData

    data = ChatData(source, val_fraction=0.0)
    data.prepare(SFT(model), max_epochs=1)
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for index in range(min(limit, len(data.selection))):
            ids, trained = data.selection.read(index)
            labels = [int(i) if t else -100 for i, t in zip(ids, trained, strict=True)]
            file.write(json.dumps({"input_ids": [int(i) for i in ids], "labels": labels}) + "\n")
    return path


def say(text: str) -> None:
    """Print, at once."""
    print(text, flush=True)


def at_its_best(job: Job, pythons: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The fastest setting of an arm's grid, one key after another, and what was tried."""
    grid = importlib.import_module(f"extensions.benchmark.arms.{job.arm}").GRID
    best = {key: values[0] for key, values in grid.items()}
    tried: list[dict[str, Any]] = []
    speeds: dict[str, float] = {}

    def speed(setting: dict[str, Any]) -> float:
        key = json.dumps(setting)
        if key not in speeds:
            rows, tokens = job.rows_per_step // PROBE_PART, job.tokens_per_step // PROBE_PART
            probe = replace(job, setting=setting, steps=PROBE_STEPS, rows_per_step=rows, tokens_per_step=tokens)
            found = run_arm(probe, pythons.get(job.arm, sys.executable))
            speeds[key] = 0.0 if found.error else found.rate(PROBE_WARM_UP)
            tried.append({**setting, "tokens_per_s": round(speeds[key], 1), "error": found.error})
            say(f"    {job.arm} {setting}: {found.error or f'{speeds[key]:.0f} tok/s'}")
        return speeds[key]

    for key, values in grid.items():
        best = max(({**best, key: value} for value in values), key=speed)
    return best, tried


def grid_of(earlier: str, tuner: str, peer: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """An arm's best setting and what was tried, from the JSON of an earlier race on the same machine."""
    if not earlier:
        return None
    found = json.loads(Path(earlier).read_text())
    tried = found["races"].get(tuner, {}).get("tried", {}).get(peer)
    if not tried:
        return None
    say(f"    {peer}: grid of {found['date']} taken from {Path(earlier).name}")
    best = max(tried, key=lambda t: t["tokens_per_s"])
    return {k: v for k, v in best.items() if k not in ("tokens_per_s", "error")}, tried


def check(job: Job, results: list[Result], references: dict[str, list[float]]) -> tuple[float, list[float]]:
    """The greatest deviation from the reference's losses, and those losses."""
    longest = max(results, key=lambda r: len(r.groups))
    same = replace(job, arm="reference", groups=longest.groups, steps=len(longest.groups))
    same = replace(same, lrs=longest.lrs, clip=longest.clip)
    key = json.dumps([same.tuner, same.groups, same.lrs, same.clip])
    if key not in references:
        found = run_arm(same)
        if found.error:
            raise RuntimeError(f"the reference failed: {found.error}")
        references[key] = found.losses
    expected = references[key]
    off = [abs(a - b) / b for r in results for a, b in zip(r.losses, expected, strict=False)]
    whole = all(len(r.losses) == len(r.groups) > 0 for r in results)
    return (max(off) if whole and all(map(math.isfinite, off)) else math.inf), expected


def race(
    job: Job, peers: list[str], warm_up: int, pythons: dict[str, str], earlier: str = "", checked: str = ""
) -> dict[str, Any]:
    """One tuner's race; returns what the report shows. The way back is half as long as the way there.

    Args:
        job: what every arm does.
        peers: arms to run against.
        warm_up: steps of each run that don't count.
        pythons: interpreters of arms that have one of their own.
        earlier: JSON of a race on this machine whose grids are taken over.
        checked: the only arm whose losses are compared with the reference; empty for all.
    """
    settings: dict[str, dict[str, Any]] = {"litft": {"compile": "true"}}  # as in runs longer than a race is
    tried: dict[str, Any] = {}
    for peer in peers:
        found_before = grid_of(earlier, job.tuner, peer)
        settings[peer], tried[peer] = found_before or at_its_best(replace(job, arm=peer), pythons)
    order = list(settings)
    found: dict[str, list[Result]] = {arm: [] for arm in order}
    floors = [run_arm(replace(job, arm="floor"))]
    back = warm_up + max(1, (job.steps - warm_up) // 2)
    for arm, steps in [*((arm, job.steps) for arm in order), *((arm, back) for arm in order[::-1])]:
        turn = replace(job, arm=arm, setting=settings[arm], steps=steps)
        result = run_arm(turn, pythons.get(arm, sys.executable))
        text = result.error or f"{result.rate(warm_up):.0f} tok/s, peak {result.peak_gb:.2f} GB"
        say(f"  {job.tuner:<5} {arm:<8} {settings[arm]}: {text}")
        found[arm].append(result)
    floors.append(run_arm(replace(job, arm="floor")))
    if floor_error := next((f.error for f in floors if f.error), ""):
        raise RuntimeError(f"the floor failed: {floor_error}")
    floor = statistics.mean(f.tokens[0] / f.seconds[0] for f in floors)
    references: dict[str, list[float]] = {}
    arms: dict[str, Any] = {}
    for arm, results in found.items():
        if error := next((r.error for r in results if r.error), ""):
            arms[arm] = {"error": error, "setting": settings[arm]}
            continue
        worst, expected = check(job, results, references) if checked in ("", arm) else (None, [])
        rate = statistics.median(r.rate(warm_up) for r in results)
        arms[arm] = {
            "setting": settings[arm],
            "tokens_per_s": rate,
            "each": [r.rate(warm_up) for r in results],
            "trained_tokens_per_s": statistics.median(r.rate(warm_up, "trained") for r in results),
            "peak_gb": max(r.peak_gb for r in results),
            "floor_share": rate / floor,
            "deviation": worst,
            "disqualified": None if worst is None else worst > TOLERANCE,
            "losses": results[0].losses,
            "reference": expected,
            "seconds": [[round(s, 4) for s in r.seconds] for r in results],
            "packing": sum(results[0].tokens) / sum(results[0].notes.get("slots", results[0].tokens)),
            "notes": [r.notes for r in results],
            "versions": results[0].versions,
        }
    for entry in arms.values():
        if "error" not in entry:
            entry["litft_is"] = arms["litft"]["tokens_per_s"] / entry["tokens_per_s"]
    parts = {name: [f.notes["parts"][name] for f in floors] for name in floors[0].notes["parts"]}
    return {"arms": arms, "tried": tried, "floor_tokens_per_s": floor, "floor_parts_s": parts}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    from litft.models import cpu

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    flags = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in cpu.flags()]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": name, "features": flags, "threads": torch.get_num_threads(), "gpu": gpu, "torch": torch.__version__}


def table(tuner: str, outcome: dict[str, Any]) -> str:
    """The race as Markdown."""
    from litft.engine import floor

    lines = [
        f"### {tuner}",
        "",
        "| arm | real tok/s | trained tok/s | peak GB | share of the floor | litft is | loss off by | setting |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for arm, e in outcome["arms"].items():
        if "error" in e:
            lines.append(f"| {arm} | failed: {e['error']} | | | | | | {e['setting']} |")
            continue
        out = " (disqualified)" if e["disqualified"] else ""
        off = "not checked" if e["deviation"] is None else f"{e['deviation']:.2%}"
        each = " / ".join(f"{rate:.0f}" for rate in e["each"])
        lines.append(
            f"| {arm}{out} | {e['tokens_per_s']:.0f} ({each}) | {e['trained_tokens_per_s']:.0f} | {e['peak_gb']:.2f} "
            f"| {e['floor_share']:.1%} | {e['litft_is']:.2f}x | {off} | {e['setting']} |"
        )
    parts = ", ".join(f"{name} {min(v):.3f}-{max(v):.3f} s" for name, v in outcome["floor_parts_s"].items())
    formula = (floor.__doc__ or "").split("\n\n")[1]
    lines += [
        "",
        f"Floor: {outcome['floor_tokens_per_s']:.0f} tok/s ({parts} a micro-batch).",
        "",
        "```",
        formula,
        "```",
    ]
    for peer, tried in outcome["tried"].items():
        lines += ["", f"Grid of {peer}:", ""]
        lines += [f"- { ({k: v for k, v in t.items() if k != 'error'}) } {t['error']}".rstrip() for t in tried]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the races that the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tuner", default="full,lora", help="full, lora, qlora; several with commas")
    parser.add_argument("--data", default="tutorials/data/quickstart.jsonl", help="chats")
    parser.add_argument("--model", help="a folder; the default model where not said")
    parser.add_argument("--rows", type=int, default=2000, help="of the data, at most")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm_up", type=int, default=6, help="steps of each run that don't count")
    parser.add_argument("--rows_per_step", type=int, default=16)
    parser.add_argument("--tokens_per_step", type=int, default=4096)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--litgpt", metavar="PYTHON", help="the interpreter of an environment that holds LitGPT")
    parser.add_argument("--earlier", default="", help="JSON of a race on this machine whose grids are taken over")
    parser.add_argument("--check", default="", help="the only arm to compare with the reference; all by default")
    parser.add_argument("--ablate", action="store_true", help="litft alone, one technique after another")
    parser.add_argument("--sweep", action="store_true", help="litft alone, over tokens, rows and vocabularies")
    parser.add_argument("--json", help="where the figures go")
    parser.add_argument("--markdown", help="where the report goes")
    args = parser.parse_args(argv)
    from litft.models.alias import default_model

    model = args.model or str(default_model())
    started = time.time()
    report: dict[str, Any] = {}
    texts: list[str] = []
    peers = [peer for peer in args.peers.split(",") if peer]
    pythons = {"litgpt": args.litgpt} if args.litgpt else {}
    peers += [peer for peer in pythons if peer not in peers]
    with tempfile.TemporaryDirectory() as folder:
        rows = encode(args.data, model, Path(folder), args.rows)
        for tuner in args.tuner.split(","):
            job = Job(
                arm="litft",
                model=model,
                rows=str(rows),
                source=str(Path(args.data).absolute()),
                tuner=tuner,
                steps=args.steps,
                rows_per_step=args.rows_per_step,
                tokens_per_step=args.tokens_per_step,
                lr=2e-5 if tuner == "full" else 2e-4,
                device=args.device,
            )
            if args.ablate:
                report[tuner] = ablation.ablate(job, args.warm_up, say)
                texts.append(ablation.report(tuner, report[tuner]))
            elif args.sweep:
                report[tuner] = ablation.sweep(job, Path(folder), say)
                texts.append(ablation.curves(report[tuner]))
            else:
                report[tuner] = race(job, peers, args.warm_up, pythons, args.earlier, args.check)
                texts.append(table(tuner, report[tuner]))
            say(f"\n{texts[-1]}\n")
    options = {k: v for k, v in vars(args).items() if k not in ("json", "markdown", "litgpt", "earlier")}
    whole = {"machine": machine(), "options": options, "date": time.strftime("%Y-%m-%d"), "races": report}
    whole["seconds"] = round(time.time() - started)
    if args.json:
        Path(args.json).write_text(json.dumps(whole, indent=1, default=asdict) + "\n")
    if args.markdown:
        head = [f"# Race of {whole['date']}", "", f"Machine: {whole['machine']}. Options: {options}.", ""]
        Path(args.markdown).write_text("\n".join(head + [f"{text}\n" for text in texts]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
