"""What a run is made of, so that a checkpoint is gone on with by the same run only."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Mapping
from typing import Any

from litft.engine.schedules import schedule
from litft.errors import UserError

PARTS = ("data", "tokenizer", "template", "model", "method", "tuner")
"""What `--allow_changed` can name."""
SCHEDULE = ("total_steps", "lr", "min_lr", "schedule_name", "warmup")
DIGITS = 12  # of a fingerprint, in what people read


def of(method: Any, data: Any) -> dict[str, str]:
    """Fingerprints of each of `PARTS`, and of the plan that comes of them.

    Args:
        method: built.
        data: planned.
    """
    from litft.models.load import fingerprint, tokenizer_fingerprint

    tuner = method.tuner
    loss = {name: getattr(method, name) for name in method.loss_settings}
    options = {name: getattr(tuner, name, None) for name in inspect.signature(type(tuner).__init__).parameters}
    return {
        "data": data.fingerprint[:DIGITS],
        "plan": data.plan_fingerprint[:DIGITS],
        "tokenizer": tokenizer_fingerprint(method.tokenizer, template=False)[:DIGITS],
        "template": _hash(method.tokenizer.chat_template),
        "model": fingerprint(method.source)[:DIGITS],
        "method": _hash([type(method).__name__, loss]),
        "tuner": _hash([type(tuner).__name__, options]),
    }


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def check(then: Mapping[str, str], now: Mapping[str, str], step: int, allowed: Collection[str]) -> None:
    """Refuse to go on with something else.

    Args:
        then: the fingerprints in the checkpoint.
        now: those of this command.
        step: that the checkpoint was made after.
        allowed: parts that may differ.

    Raises:
        UserError: naming what differs, with both fingerprints.
    """
    differing = [part for part in PARTS if then.get(part) != now[part]]
    if not differing and then.get("plan") != now["plan"] and "data" not in allowed:
        raise UserError(
            f"--resume: the same rows have come out as other tokens since step {step} "
            f"({then.get('plan')} then, {now['plan']} now):\nanother version of litft or transformers encodes them\n"
            "mend: go on with the versions in run.json, or all the same: --allow_changed data"
        )
    changed = [part for part in differing if part not in allowed]
    if not changed:
        return
    what = ", ".join(f"{part} ({then.get(part)} then, {now[part]} now)" for part in changed)
    hints = {
        "data": "\n(data: the rows, their limits and shares, the seed, tokens_per_step)",
        "tuner": "\n(tuner: what is not in the weights' shapes, such as dropout or alpha, can be allowed)",
    }
    hint = "".join(text for part, text in hints.items() if part in changed)
    raise UserError(
        f"--resume: changed since step {step}: {what}{hint}\n"
        f"mend: name what the run was made with, or go on all the same: --allow_changed {','.join(changed)}\n"
        "or begin in another --out; --model OLD_OUT takes over what was learnt"
    )


def parse_allowed(text: str | None) -> list[str]:
    """The parts that `--allow_changed` names.

    Raises:
        UserError: for one that isn't any.
    """
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    for name in names:
        if name not in PARTS:
            raise UserError(f"--allow_changed {name}: is none of {', '.join(PARTS)}")
    return names


def schedule_of(method: Any) -> dict[str, Any]:
    """What decides the learning rate of each step."""
    return {name: getattr(method, name) for name in SCHEDULE}


def schedule_changes(then: Mapping[str, Any], now: Mapping[str, Any], step: int) -> str:
    """A line about what differs, and the learning rate that comes of it; empty where nothing does."""
    changed = [name for name in SCHEDULE if then[name] != now[name]]
    if not changed:
        return ""
    names = {"total_steps": "steps", "schedule_name": "schedule"}
    what = ", ".join(f"{names.get(name, name)} {then[name]} -> {now[name]}" for name in changed)
    return f"schedule: {what}; step {step + 1} has lr {_rate(now, step):.3g} (was to be {_rate(then, step):.3g})"


def _rate(settings: Mapping[str, Any], step: int) -> float:
    lr, total = settings["lr"], settings["total_steps"]
    floor = settings["min_lr"] / lr if lr else 0.0
    return lr * schedule(settings["schedule_name"], total, settings["warmup"], floor)(min(step, total))
