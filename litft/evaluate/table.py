"""An evaluation as a table for the terminal."""

from __future__ import annotations

from typing import Any

WIDTH = 80
_COLUMN, _NAME = 14, 18
_FIRST = ("loss", "perplexity", "bits_per_byte")
_NOT_SHOWN = {"tokens", "total_tokens"}


def table(facts: dict[str, Any]) -> str:
    """The figures of every set, at most `WIDTH` columns wide.

    Args:
        facts: of an `Evaluation`.
    """
    lines = [f"model     {facts['model']['name']}"] if facts.get("sets") or facts.get("tasks") else []
    if "baseline" in facts:
        lines.append(f"baseline  {facts['baseline']['name']}")
    for name, found in facts.get("sets", {}).items():
        lines += ["", *_set(name, found)]
    for name, found in facts.get("tasks", {}).items():
        lines += ["", *_task(name, found)]
    return "\n".join(lines)


def _set(name: str, found: dict[str, Any]) -> list[str]:
    answered = f", {found['rows_answered']:,} answered" if found["rows_answered"] else ""
    lines = [f"{name}: {found['rows']:,} rows, {found['tokens']:,} trained tokens{answered}"]
    lines += [f"  left out: {count:,} {why}" for why, count in found["left_out"].items()]
    other = found.get("baseline")
    compared = found.get("same_tokens", True)
    if not compared:
        lines.append("  the two read other tokens: compare bits_per_byte, not the loss of a token")
    lines.append(_heading(other is not None))
    for key, value in _figures(found, other).items():
        if key == "bits_per_byte" and compared:
            continue
        lines.append(_line(key, value, other and other.get(key), found))
    return lines


def _figures(found: dict[str, Any], other: dict[str, Any] | None) -> dict[str, Any]:
    scores = [key for key in found if key.startswith(("exact", "extracted", "rouge", "chrf"))]
    return {key: found.get(key) for key in (*_FIRST, *scores)}


def _task(name: str, found: dict[str, Any]) -> list[str]:
    other = found.get("baseline")
    lines = [f"task {name}: {found['samples']:,} samples, {found['num_fewshot']} shots", _heading(other is not None)]
    return lines + [_line(key, value, other and other.get(key), found) for key, value in found["metrics"].items()]


def _heading(compared: bool) -> str:
    columns = ["model", "baseline", "diff", "95 % of diff"] if compared else ["model"]
    return (" " * _NAME + "".join(f"{column:>{_COLUMN}}" for column in columns)).rstrip()


def _line(key: str, value: float | None, other: float | None, found: dict[str, Any]) -> str:
    cells = [_number(value)]
    if "diff" in found:
        cells.append(_number(other))
        if key in found["diff"]:
            cells.append(f"{found['diff'][key]:+.4f}")
            if interval := found["ci95"].get(key):
                cells.append(" .. ".join(f"{end:+.3f}" for end in interval))
    return (
        f"  {key:<{_NAME - 2}}"
        + "".join(f"{cell:>{_COLUMN}}" for cell in cells[:3])
        + "".join(f"{cell:>20}" for cell in cells[3:])
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}" if abs(value) < 1e7 else f"{value:.3g}"
