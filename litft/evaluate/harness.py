"""Tasks of EleutherAI's lm-evaluation-harness, run on a model that is in memory already."""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from litft.errors import Failed, UserError
from litft.evaluate.bootstrap import paired_difference

if TYPE_CHECKING:
    from litft.infer.load import ChatModel

Results = dict[str, dict[str, Any]]
"""By task: `metrics` and their `stderr` by name, `samples` (how many), `num_fewshot`, `version`, and under `rows` each
metric's values of the single samples, where the metric is their mean."""


@dataclass(frozen=True)
class Tasks:
    """Tasks that have been found and have their data.

    Attributes:
        loaded: the harness's own form of them.
        num_fewshot: examples before each question; None is what a task says itself.
        limit: only the first samples of each task.
        apply_chat_template: whether prompts are written as chats.
        seed: of the choice of examples.
    """

    loaded: Any
    num_fewshot: int | None
    limit: int | None
    apply_chat_template: bool
    seed: int


def find_tasks(
    names: Sequence[str],
    *,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 0,
) -> Tasks:
    """Find tasks by name and load their data, which the harness's own ones fetch from the hub.

    Args:
        names: of tasks, groups or tags.
        include_path: a folder with task files (YAML) of one's own. Such files may name Python code beside them, which
            the harness runs.
        num_fewshot: see `Tasks`.
        limit: see `Tasks`.
        apply_chat_template: see `Tasks`.
        seed: see `Tasks`.

    Raises:
        UserError: the harness isn't installed, there is no such folder, or no task of a name.
        Failed: a task's data can't be had.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"--tasks needs lm-eval ({error})\nmend: pip install 'litft[evaluate]'") from None
    if include_path is not None and not Path(include_path).is_dir():
        raise UserError(f"--include_path {include_path}: no such folder\nmend: name the folder of the task files")
    with _quietly():
        manager = TaskManager(include_path=include_path and str(include_path), include_defaults=include_path is None)
        if include_path is not None and not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=str(include_path))
        for name in names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                where = f" nor in {include_path}" if include_path else ""
                raise UserError(f"--tasks {name}: no such task in lm-eval{where}{hint}")
        try:
            loaded = manager.load(list(names))
        except Exception as error:  # of any library that reads data
            text = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise Failed(f"--tasks {','.join(names)}: the data can't be loaded: {text}") from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(f"--tasks {name}: runs code that the model writes, which litft doesn't do")
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=seed)
    return Tasks(loaded, num_fewshot, limit, apply_chat_template, seed)


def run_tasks(bundle: ChatModel, tasks: Tasks, *, batch_size: int = 8) -> Results:
    """Run tasks on a model.

    Args:
        bundle: the model; left as it was.
        tasks: of `find_tasks`.
        batch_size: sequences at once.

    Raises:
        Failed: the harness gives up.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    model: Any = bundle.model
    with _quietly():
        lm = HFLM(model, backend="causal", tokenizer=copy.deepcopy(bundle.tokenizer), batch_size=batch_size)
        try:
            found: Any = lm_eval.evaluate(
                lm,
                tasks.loaded,
                limit=tasks.limit,
                bootstrap_iters=1000,
                apply_chat_template=tasks.apply_chat_template,
                fewshot_as_multiturn=tasks.apply_chat_template,
            )
        except (ValueError, RuntimeError, KeyError) as error:
            raise Failed(f"lm-eval: {type(error).__name__}: {str(error)[:300]}") from error
    samples = found["samples"]
    return {name: _result(name, values, found, samples.get(name, [])) for name, values in found["results"].items()}


def _result(name: str, values: dict[str, Any], found: dict[str, Any], samples: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = {_plain(key): float(v) for key, v in values.items() if _is_metric(key, v) and "_stderr" not in key}
    stderr = {
        _plain(key.replace("_stderr", "")): float(v) for key, v in values.items() if _is_metric(key, v, stderr=True)
    }
    rows: dict[str, list[float]] = {}
    for sample in samples:
        for key in sample["metrics"]:
            if isinstance(value := sample[key], (int, float, np.number)):
                rows.setdefault(_plain(f"{key},{sample['filter']}"), []).append(float(value))
    means = {key: v for key, v in rows.items() if key in metrics and abs(float(np.mean(v)) - metrics[key]) < 1e-6}
    counts = [found["n-samples"][task]["effective"] for task in _leaves(name, found)]
    return {
        "metrics": metrics,
        "stderr": stderr,
        "samples": sum(counts),
        "num_fewshot": found["n-shot"].get(name),
        "version": found["versions"].get(name),
        "rows": means,
    }


def _leaves(name: str, found: dict[str, Any]) -> Iterator[str]:
    """The tasks that a task or group stands for."""
    if name in found["n-samples"]:
        yield name
    else:
        for inner in found["group_subtasks"].get(name, []):
            yield from _leaves(inner, found)


def _is_metric(key: str, value: Any, stderr: bool = False) -> bool:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return "," in key and number and bool(np.isfinite(value)) and ("_stderr" in key) == stderr


def _plain(key: str) -> str:
    """`acc` for `acc,none`: no filter was applied to the answers."""
    return key.removesuffix(",none")


def against(mine: Results, other: Results, seed: int = 0) -> Results:
    """Put a baseline's figures beside a model's: `baseline`, `diff`, and `ci95` where samples can be paired."""
    found: Results = {}
    for name, result in mine.items():
        theirs = other[name]
        shared = [key for key in result["metrics"] if key in theirs["metrics"]]
        found[name] = result | {
            "baseline": theirs["metrics"],
            "diff": {key: result["metrics"][key] - theirs["metrics"][key] for key in shared},
            "ci95": {
                key: paired_difference(np.array(result["rows"][key]), np.array(theirs["rows"][key]), seed=seed)[1]
                for key in shared
                if len(result["rows"].get(key, ())) == len(theirs["rows"].get(key, ())) > 0
            },
        }
    return found


@contextmanager
def _quietly() -> Iterator[None]:
    """Only errors of the harness are said inside; its progress lines stay."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
