"""What came of a run, and the closing lines about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from litft.engine.speed import Speed


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        folder: the run folder; `final/` is in it.
        losses_before: validation losses before training.
        losses_after: those of the weights in `final/`.
        final_step: the optimizer step whose weights are in `final/`.
        why: that step in words.
        stopped: why the run ended before its last step; empty where it didn't.
        answers: prompt, answer before and answer after.
        speed: of the run, on the first rank.
        scores: whether the model gives numbers, not text.
    """

    folder: Path
    losses_before: dict[str, float] = field(default_factory=dict)
    losses_after: dict[str, float] = field(default_factory=dict)
    final_step: int = 0
    why: str = ""
    stopped: str = ""
    answers: list[tuple[str, str, str]] = field(default_factory=list)
    speed: Speed | None = None
    scores: bool = False


def report(outcome: Outcome, page: Path | None = None) -> str:
    """The closing lines: losses, answers, where the result and its page lie, what to type next."""
    lines = ["", outcome.stopped] if outcome.stopped else [""]
    for name, after in outcome.losses_after.items():
        before = outcome.losses_before.get(name)
        change = f"{before:.4f} before, " if before is not None else ""
        loss, shown = name.startswith("val_loss"), name.endswith(("accuracies", "margins", "accuracy"))
        if not loss and not shown:
            continue
        share = f" ({(after - before) / before:+.1%})" if before and loss else ""
        what, _, of = name.removeprefix("val_").partition("/") if loss else (name.removeprefix("val_"), "", "")
        label = f"held-out {what}" + (f", {of}" if of else "")
        lines.append(f"{label}: {change}{after:.4f} after{share}")
    if outcome.speed:
        lines.append(str(outcome.speed))
    for question, then, now in outcome.answers:
        lines += ["", f"> {_short(question)}", f"  before: {_short(then)}", f"  after:  {_short(now)}"]
    final = outcome.folder / "final"
    lines += [
        "",
        f"the result: {final} ({outcome.why})",
        *([f"the report: {page}"] if page else []),
    ]
    if outcome.scores:
        lines.append(f"next:       litft score {final.parent} --data FILE --out scores.jsonl")
    else:
        lines += [f"next:       litft chat {final.parent}", f'            litft generate {final.parent} --prompt "..."']
    return "\n".join(lines)


def _short(text: str, width: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 3] + "..."
