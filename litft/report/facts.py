"""The numbers and words of a report, from what a run folder says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litft.report.gather import Run

Pairs = list[tuple[str, str]]
ABSENT = "-"


def summary(run: Run) -> str:
    """What was trained, in a line."""
    plan = run.plan
    parts = [f"{plan.get('model', '?')}, {plan.get('tuner', '?')}"]
    if "rows" in plan:
        parts.append(
            f"{plan['rows']:,} rows, {plan['steps']:,} steps, {plan['epochs']:g} epoch" + "s" * (plan["epochs"] != 1)
        )
    parts.append(f"{run.facts.get('precision', '?')} on {_devices(run)}")
    return "; ".join(parts)


def method(run: Run) -> str:
    """The word after `litft finetune`."""
    words = run.facts.get("command") or []
    return str(words[2]) if words[1:2] == ["finetune"] and len(words) > 2 else str(run.plan.get("tuner", "lora"))


def outcome(run: Run) -> str:
    """How it ended, in a line."""
    said = str(run.facts.get("outcome", "?"))
    if said == "running":
        return "not ended: still at work, or killed"
    if said == "done":
        return run.facts.get("stopped") or "done"
    steps = run.facts.get("steps")
    return said + (f" (after {steps:,} steps)" if steps is not None else "")


def figures(run: Run) -> list[dict[str, str]]:
    """What a reader wants first."""
    found, facts, plan = [], run.facts, run.plan
    before, after = _losses(run)
    for name, value in after.items():
        label = _label(name)
        was = before.get(name)
        change = f" ({(value - was) / was:+.1%})" if was and name.startswith("val_loss") else ""
        note = f"{was:.4f} before{change}" if was is not None else ""
        found.append({"name": label, "value": f"{value:.4f}", "note": note})
    if facts.get("tokens_per_s"):
        share = facts.get("floor_share")
        note = f"{facts['trained_tokens_per_s']:,.0f} trained" + (f"; {share:.0%} of the floor" if share else "")
        found.append({"name": "tokens a second", "value": f"{facts['tokens_per_s']:,.0f}", "note": note})
    if memory := _memory(run):
        found.append({"name": "peak memory", "value": f"{memory:.1f} GB", "note": ""})
    if "seconds" in facts:
        steps = f"{_steps(run):,} of {plan.get('steps', 0):,} steps"
        found.append({"name": "time", "value": duration(facts["seconds"]), "note": steps})
    if "tokens" in plan:
        note = f"{plan['trained_tokens']:,} trained"
        found.append({"name": "tokens read", "value": f"{plan['tokens']:,}", "note": note})
    return found


def data(run: Run) -> Pairs:
    """What was trained on, and what was left out."""
    plan = run.plan
    if "rows" not in plan:
        return []
    rows = [("rows to train on", f"{plan['rows']:,} of {plan['rows_read']:,} read")]
    rows += [("held out", f"{count:,} rows ({name})") for name, count in plan["val_rows"].items()]
    rows += [("left out", f"{count:,} rows: {reason}") for reason, count in plan["dropped"].items()]
    rows += [("cut", f"{plan['truncated']:,} rows at {plan['max_length']:,} tokens")] if plan["truncated"] else []
    rows += [
        ("form", ", ".join(f"{count:,} {name}" for name, count in plan["schemas"].items())),
        ("tokens of all rows", f"{plan['row_tokens']:,}, {plan['row_trained_tokens']:,} trained"),
        ("a step", f"up to {plan['tokens_per_step']:,} tokens"),
        ("a micro-batch", f"up to {plan['tokens_per_batch']:,} tokens, {'packed' if plan['packing'] else 'padded'}"),
        ("longest row allowed", f"{plan['max_length']:,} tokens"),
    ]
    rows += [("not packed", plan["cannot_pack"])] if plan.get("cannot_pack") else []
    rows += [("note", f"{note} ({count:,} rows)") for note, count in plan["notes"].items()]
    if prints := run.facts.get("fingerprints"):
        rows.append(("fingerprint", prints["data"]))
    return rows


def timing(run: Run) -> Pairs:
    """When and how long it ran, and what it left."""
    facts = run.facts
    rows = [("began", str(facts.get("started", "?")).replace("T", " "))]
    if "seconds" in facts:
        rows.append(("took", duration(facts["seconds"])))
    rows += [("went on from", facts["resumed_from"])] if facts.get("resumed_from") else []
    rows += [("weights in final/", f"{facts['final']}")] if facts.get("final") else []
    if facts.get("bad_steps"):
        rows.append(("bad steps", f"{facts['bad_steps']} with a non-finite loss or gradient, skipped"))
    if facts.get("compiled_layers"):
        rows.append(("compiled layers", f"{facts['compiled_layers']}, made again {facts['recompilations']} times"))
    if facts.get("mfu"):
        rows.append(("MFU", f"{facts['mfu']:.0%} of the rate of one large product here"))
    if memory := facts.get("memory"):
        rows.append(("memory predicted", f"{memory['predicted_gb']:.1f} GB of {memory['available_gb']:.1f}"))
        rows.append(("recomputed", f"{memory['recompute']}; offloaded: {memory['offload']}"))
    return [*rows, ("command", " ".join(map(str, facts.get("command", []))))]


def environment(run: Run) -> Pairs:
    """On what it ran."""
    facts = run.facts
    rows = [("device", _devices(run)), ("precision", str(facts.get("precision", "?")))]
    rows += [(name, version) for name, version in (facts.get("versions") or {}).items()]
    if git := facts.get("git"):
        rows.append(("git", git["commit"][:12] + (", with changes" if git["dirty"] else "")))
    prints = facts.get("fingerprints") or {}
    return rows + [(f"fingerprint, {name}", text) for name, text in prints.items()]


def results(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """What each run came to, a row a number."""
    losses = [_losses(run) for run in runs]
    names = dict.fromkeys(name for _, after in losses for name in after)
    rows = [("outcome", [outcome(run) for run in runs])]
    for name in names:
        label = _label(name)
        rows.append((f"{label}, before", [_digits(before.get(name)) for before, _ in losses]))
        rows.append((f"{label}, after", [_digits(after.get(name)) for _, after in losses]))
    rows += [
        ("steps", [f"{_steps(run):,} of {run.plan.get('steps', 0):,}" for run in runs]),
        ("tokens a second", [f"{speed:,.0f}" if (speed := run.facts.get("tokens_per_s")) else "-" for run in runs]),
        ("peak memory, GB", [f"{_memory(run):.2f}" for run in runs]),
        ("time", [duration(run.facts["seconds"]) if "seconds" in run.facts else "?" for run in runs]),
        ("device", [_devices(run) for run in runs]),
    ]
    return rows


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Keys of configuration, data and versions whose values aren't the same in all runs."""
    told = [_identity(run) for run in runs]
    keys = dict.fromkeys(key for one in told for key in one)
    rows = [(key, [_value(one[key]) if key in one else ABSENT for one in told]) for key in keys]
    off = {ABSENT, "none", "false"}  # what one tuner doesn't have and the other doesn't use is no difference
    return [(key, values) for key, values in rows if len(set(values)) > 1 and not set(values) <= off]


def duration(seconds: float) -> str:
    """Seconds as a person reads them."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _identity(run: Run) -> dict[str, Any]:
    facts = run.facts
    found = {key.replace("init_args.", ""): value for key, value in run.settings().items()}
    found |= {"precision": facts.get("precision"), "devices": facts.get("devices")}
    found |= {f"versions.{name}": version for name, version in (facts.get("versions") or {}).items()}
    found |= {f"fingerprints.{name}": text for name, text in (facts.get("fingerprints") or {}).items()}
    return found | {"git": (facts.get("git") or {}).get("commit", "none")[:12]}


def _losses(run: Run) -> tuple[dict[str, float], dict[str, float]]:
    return run.facts.get("losses_before") or {}, run.facts.get("losses_after") or {}


def _label(name: str) -> str:
    """Of a number of the validation: `val_loss` is "held-out loss", `val_loss/a` "held-out loss, a"."""
    what, _, of = name.removeprefix("val_").partition("/")
    return f"held-out {what.replace('_', ' ')}" + (f", {of}" if of else "")


def _steps(run: Run) -> int:
    """Made so far, by run.json or, where the run didn't end, by its records."""
    records = run.metrics.get("loss") or [(0.0, 0.0)]
    return int(run.facts.get("steps") or records[-1][0])


def _memory(run: Run) -> float:
    measured = max((y for _, y in run.metrics.get("memory_gb", [])), default=0.0)
    return float(run.facts.get("peak_memory_gb") or measured)


def _devices(run: Run) -> str:
    count = run.facts.get("devices", 1)
    return f"{run.facts.get('device', '?')}" + (f", {count} processes" if count != 1 else "")


def _digits(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
