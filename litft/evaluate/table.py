"""An evaluation as a table for the terminal."""

from __future__ import annotations

from typing import Any

WIDTH = 80
_NAME, _COLUMN, _INTERVAL = 24, 11, 20
_SCORES = ("exact_match", "extracted", "rouge", "chrf")


def table(facts: dict[str, Any]) -> str:
    """The figures of every set, at most `WIDTH` columns wide.

    Args:
        facts: of an `Evaluation`.
    """
    lines = [f"{role:<10}{_short(facts[role]['name'])}" for role in ("model", "baseline") if role in facts]
    for name, found in facts.get("sets", {}).items():
        lines += ["", *_set(name, found)]
    for name, found in facts.get("tasks", {}).items():
        lines += ["", *_task(name, found)]
    return "\n".join(lines)


def _set(name: str, found: dict[str, Any]) -> list[str]:
    answered = f", {found['rows_answered']:,} answered" if found["rows_answered"] else ""
    rows, tokens = (
        f"{n:,} {what}{'s' * (n != 1)}" for n, what in ((found["rows"], "row"), (found["tokens"], "trained token"))
    )
    lines = [f"{name}: {rows}, {tokens}{answered}"]
    lines += [f"  left out: {count:,} {why}" for why, count in found["left_out"].items()]
    lines += [
        f"  {name}: on {count:,} of them, the other references have none"
        for name, count in found["rows_scored"].items()
        if count < found["rows_answered"]
    ]
    other = found.get("baseline")
    compared = found.get("same_tokens", True)
    if not compared:
        lines.append("  the two read other tokens: compare bits_per_byte, not the loss of a token")
    lines.append(_heading(other is not None))
    scores = [key for key in found if key.startswith(_SCORES)]
    for key in ("loss", "perplexity", *([] if compared else ["bits_per_byte"]), *scores):
        lines.append(_line(key, found[key], other and other[key], found))
    return lines


def _task(name: str, found: dict[str, Any]) -> list[str]:
    other = found.get("baseline")
    shots = "" if found["num_fewshot"] is None else f", {found['num_fewshot']} examples before each"
    lines = [f"task {name}: {found['samples']:,} samples{shots}", _heading(other is not None)]
    return lines + [_line(key, value, other and other.get(key), found) for key, value in found["metrics"].items()]


def _heading(compared: bool) -> str:
    columns = ["model", "baseline", "diff"] if compared else ["model"]
    line = " " * _NAME + "".join(f"{column:>{_COLUMN}}" for column in columns)
    return f"{line}{'95 % of diff':>{_INTERVAL}}" if compared else line


def _line(key: str, value: float | None, other: float | None, found: dict[str, Any]) -> str:
    line = f"  {key[: _NAME - 2]:<{_NAME - 2}}{_number(value):>{_COLUMN}}"
    if "diff" not in found:
        return line
    line += f"{_number(other):>{_COLUMN}}"
    if key in found["diff"]:
        line += f"{found['diff'][key]:>+{_COLUMN}.4f}"
    if interval := found.get("ci95", {}).get(key):
        line += f"{f'{interval[0]:+.3f} .. {interval[1]:+.3f}':>{_INTERVAL}}"
    return line


def _short(name: str) -> str:
    return name if len(name) <= WIDTH - 10 else f"...{name[-(WIDTH - 13) :]}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}" if abs(value) < 1e7 else f"{value:.3g}"
