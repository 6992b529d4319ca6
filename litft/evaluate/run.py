"""`evaluate`: one model, or one against another, on sets of rows and on tasks of the harness."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import date as Day
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litft.engine.run_folder import versions
from litft.engine.secrets import hide
from litft.errors import UserError
from litft.evaluate import answers as scoring
from litft.evaluate import harness
from litft.evaluate.figures import Measured, answer_rows, summary
from litft.evaluate.losses import Advance, Documents, encode, row_losses, text_sizes
from litft.evaluate.models import Candidate, baseline_of, training_settings
from litft.evaluate.sets import Asked, BadRows, EvalSet, question_of, read_set

if TYPE_CHECKING:
    import torch

    from litft.data.template import TrainOn
    from litft.infer.load import ChatModel

Progress = Callable[[str, int | None, str], AbstractContextManager[Advance]]
"""Makes a progress line of (what is going on, how much there is to do or None, what is counted)."""


@dataclass
class Evaluation:
    """What was found.

    Attributes:
        facts: as evaluation.json has them.
        answers: a row an answered row, as answers.jsonl has them.
    """

    facts: dict[str, Any]
    answers: list[dict[str, Any]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        """Write answers.jsonl, where there are any, and then evaluation.json; each appears complete.

        Args:
            folder: made if absent.
        """
        folder.mkdir(parents=True, exist_ok=True)
        texts = {"answers.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.answers)}
        texts["evaluation.json"] = json.dumps(hide(self.facts), indent=2, ensure_ascii=False) + "\n"
        for name, text in texts.items():
            if text:
                part = folder / f"{name}.part"
                part.write_text(text, encoding="utf-8")
                part.replace(folder / name)


def evaluate(
    model: str,
    data: dict[str, str],
    *,
    baseline: str | None = None,
    limit: int | None = None,
    answers: int | None = None,
    extract: Sequence[str] = (),
    max_new_tokens: int = 256,
    temperature: float | None = 0.0,
    batch_size: int = 8,
    seed: int = 0,
    train_on: TrainOn | None = None,
    max_length: int | None = None,
    date: str | None = None,
    bad_rows: BadRows = "error",
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    tasks: Sequence[str] = (),
    include_path: str | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    progress: Progress = lambda what, total, unit: nullcontext(lambda more: None),
) -> Evaluation:
    """Measure the loss of rows and the quality of answers, of a model and maybe of one to compare it with.

    Everything is read and encoded before the first model is loaded, and one model is in memory at a time.

    Args:
        model: a run folder, an adapter, a model folder, a hub id or an alias.
        data: files of rows by the name of the set.
        baseline: another model, measured on the same rows; `base` is what `model` was fine-tuned from.
        limit: use the first rows of each set only.
        answers: of them, answer so many, the first; all by default, 0 measures the loss only.
        extract: what to compare of an answer: `gsm8k`, `number` or a regular expression (see `litft.evaluate.answers`).
        max_new_tokens: longest answer.
        temperature: 0 takes the likeliest token each time; None is the model's own choice.
        batch_size: prompts answered at once.
        seed: of sampling and of the bootstrap.
        train_on: which turns count in the loss; as in training where `model` is a run, else the assistant's.
        max_length: longest row in tokens; longer ones have no loss. As in training where `model` is a run.
        date: the day (YYYY-MM-DD) that chat templates take for today's in the loss; as in training, else today.
        bad_rows: a bad row is an error, or left out and counted.
        device: where to run.
        dtype: of the weights; as they are stored by default (see `load_for_inference`).
        trust_remote_code: run Python code that a model brings.
        tasks: of EleutherAI's lm-evaluation-harness, also measured (see `litft.evaluate.harness`).
        include_path: folder with task files of one's own.
        num_fewshot: examples before each question of a task; the task's own number by default.
        apply_chat_template: write the tasks' prompts as chats.
        progress: makes progress lines.

    Raises:
        UserError: something is wrong with the arguments, the data or a model; before anything long begins.
    """
    if temperature is not None and not 0 <= temperature < math.inf:
        raise UserError(f"--temperature {temperature}: 0 (greedy) or more")
    patterns = scoring.patterns_of(extract)
    trained = training_settings(model).get("data") or {}  # the defaults of what decides the loss
    settings: dict[str, Any] = {
        "limit": limit,
        "answers": answers,
        "extract": list(extract),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "batch_size": batch_size,
        "seed": seed,
        "train_on": train_on or trained.get("train_on") or "assistant",
        "max_length": max_length or trained.get("max_length"),
        "allow_special_tokens": bool(trained.get("allow_special_tokens")),
        "date": _day(date or trained.get("date")).isoformat(),
        "bad_rows": bad_rows,
    }
    sets = [read_set(name, file, limit=limit, bad_rows=bad_rows) for name, file in data.items()]
    candidates = [Candidate(model, trust_remote_code=trust_remote_code)]
    if baseline is not None:
        candidates.append(baseline_of(baseline, candidates[0]))
    documents = [[_encode(candidate, rows, settings, progress) for candidate in candidates] for rows in sets]
    asked = [_to_ask(rows, read, candidates, answers) for rows, read in zip(sets, documents, strict=True)]
    for rows, chosen in zip(sets, asked, strict=True):
        _check_references(rows, chosen, patterns)
    chosen_tasks = None
    if tasks:
        options: dict[str, Any] = {
            "include_path": include_path,
            "num_fewshot": num_fewshot,
            "apply_chat_template": apply_chat_template,
        }
        settings |= {"tasks": list(tasks), **options}
        for candidate in candidates if apply_chat_template else ():
            if not candidate.tokenizer.chat_template:
                raise UserError(f"--apply_chat_template: {candidate.name} has no chat template\nmend: leave it out")
        with progress("finding the tasks and their data", None, ""):
            chosen_tasks = harness.find_tasks(tasks, limit=limit, seed=seed, **options)
    results: list[harness.Results] = []
    found = Evaluation({})
    measured: list[list[Measured]] = [[] for _ in sets]
    for role, candidate in enumerate(candidates):
        with progress(f"loading {candidate.name}", None, ""):
            bundle = candidate.load(device, dtype)
        found.facts[("model", "baseline")[role]] = candidate.facts(bundle)
        for i, rows in enumerate(sets):
            measured[i].append(_measure(bundle, rows.name, documents[i][role], asked[i], patterns, settings, progress))
        if chosen_tasks:
            results.append(harness.run_tasks(bundle, chosen_tasks, batch_size=batch_size))
        del bundle
        gc.collect()
    found.facts |= {"versions": versions() | _scorers(chosen_tasks is not None), "settings": settings, "sets": {}}
    for rows, chosen, models in zip(sets, asked, measured, strict=True):
        sizes = text_sizes(models[0].documents, candidates[0].tokenizer)
        found.facts["sets"][rows.name] = summary(rows, chosen, models, sizes, seed)
        found.answers += answer_rows(rows.name, chosen, models)
    if results:
        compared = harness.against(results[0], results[1], seed) if len(results) > 1 else results[0]
        found.facts["tasks"] = {
            name: {key: value for key, value in result.items() if key != "rows"} for name, result in compared.items()
        }
    return found


def _scorers(harness_too: bool) -> dict[str, str]:
    return {name: metadata.version(name) for name in ("torchmetrics", *["lm_eval"] * harness_too)}


def _day(text: Any) -> Day:
    """The day of that name (YAML may have made one of it); today where there is none."""
    try:
        return Day.fromisoformat(str(text)) if text else Day.today()
    except ValueError:
        raise UserError(f"--date {text}: is no day; write it as {Day.today().isoformat()}") from None


def _encode(candidate: Candidate, rows: EvalSet, settings: dict[str, Any], progress: Progress) -> Documents:
    if not candidate.tokenizer.chat_template and any(chat.text is None for chat in rows.conversations):
        raise UserError(
            f"{candidate.name}: its tokenizer has no chat template, and {rows.file} holds chats\n"
            "mend: name a model that was fine-tuned on chats, or give rows of plain text"
        )
    with progress(f"encoding {rows.name}", len(rows.conversations), "rows") as advance:
        found = encode(
            rows.conversations,
            candidate.tokenizer,
            max_length=candidate.longest_row(settings["max_length"]),
            train_on=settings["train_on"],
            today=Day.fromisoformat(settings["date"]),
            allow_special_tokens=settings["allow_special_tokens"],
            skip_bad=settings["bad_rows"] == "skip",
            advance=advance,
        )
    if not found.used.any():
        reasons = ", ".join(f"{count} {why}" for why, count in found.left_out.items())
        raise UserError(f"{rows.file}: no row is left: {reasons}\nmend: raise --max_length, or take other rows")
    return found


def _to_ask(rows: EvalSet, read: list[Documents], candidates: list[Candidate], most: int | None) -> Asked:
    """What is asked: rows with a question and an answer to it, that fit into the context of every model."""
    found: Asked = {}
    contexts = [candidate.context_length or math.inf for candidate in candidates]
    for i, conversation in enumerate(rows.conversations):
        if most is not None and len(found) >= most:
            break
        lengths = [len(documents.rows[i][0]) for documents in read]
        pair = question_of(conversation)
        if pair and all(0 < length <= context for length, context in zip(lengths, contexts, strict=True)):
            found[i] = pair
    return found


def _check_references(rows: EvalSet, asked: Asked, patterns: dict[str, Any]) -> None:
    references = [reference for _, reference in asked.values()]
    for pattern in patterns.values():
        if references and all(scoring.extracted(reference, pattern) is None for reference in references):
            raise UserError(
                f"--extract {pattern.pattern}: matches none of the {len(references)} answers in {rows.file}\n"
                f"the first of them ends on: {references[0][-60:]!r}"
            )


def _measure(
    bundle: ChatModel,
    name: str,
    documents: Documents,
    asked: Asked,
    patterns: dict[str, Any],
    settings: dict[str, Any],
    progress: Progress,
) -> Measured:
    from litft.infer.generate import generate

    with progress(f"loss on {name}", int(documents.used.sum()), "rows") as advance:
        nll = row_losses(bundle, documents, advance=advance)
    if not asked:
        return Measured(documents, nll)
    with progress(f"answering {name}", len(asked), "rows") as advance:
        done = 0

        def count(now: int, total: int) -> None:
            nonlocal done
            advance(now - done)
            done = now

        options = {key: settings[key] for key in ("max_new_tokens", "temperature", "seed", "batch_size")}
        given = generate(bundle, [question for question, _ in asked.values()], progress=count, **options)
    with progress(f"scoring {name}", len(asked), "answers") as advance:
        scores = scoring.scores(given, [reference for _, reference in asked.values()], patterns, advance)
    return Measured(documents, nll, given, scores)
