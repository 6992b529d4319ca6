"""What a run folder says of its run: run.json, metrics.csv and config.yaml."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from litft.engine.run_folder import read_metrics
from litft.errors import UserError


@dataclass
class Run:
    """A run as its folder tells it.

    Attributes:
        folder: of the run.
        name: a word for it: the folder's own name.
        facts: run.json.
        config: config.yaml as text; empty where it isn't there.
        metrics: of each column of metrics.csv the steps and numbers.
    """

    folder: Path
    name: str
    facts: dict[str, Any]
    config: str = ""
    metrics: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    @property
    def plan(self) -> dict[str, Any]:
        """What was planned."""
        return dict(self.facts.get("plan") or {})

    def settings(self) -> dict[str, Any]:
        """The configuration's keys, dotted, and their values."""
        import yaml

        content: Any = {}
        with contextlib.suppress(yaml.YAMLError):
            content = yaml.safe_load(self.config)
        return flat(content) if isinstance(content, dict) else {}


def read_run(folder: str | Path) -> Run:
    """Read a run's folder; its `final/` stands for it too.

    Raises:
        UserError: it holds no run.json, or one that isn't whole.
    """
    place = Path(folder).expanduser()
    if place.name == "final" and not (place / "run.json").exists():
        place = place.parent
    file = place / "run.json"
    if not file.is_file():
        what = "is not there" if not place.exists() else "holds no run.json, so it is no run of litft"
        raise UserError(f"{folder}: {what}\nmend: name a folder that litft finetune has made, such as runs/0001-lora")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("no JSON object")
        config = place / "config.yaml"
        text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
        return Run(place, place.absolute().name, facts, text, _columns(place / "metrics.csv"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{prefix}{key}.") if isinstance(item, dict) and item else {f"{prefix}{key}": item}
    return found


def _columns(file: Path) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in read_metrics(file) if file.is_file() else ():
        step = float(row["step"])
        for name, text in row.items():
            if name != "step" and text:
                with contextlib.suppress(ValueError):
                    found.setdefault(name, []).append((step, float(text)))
    return found
