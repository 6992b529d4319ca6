"""The rows that a run held out, as its model reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from litft.errors import UserError
from litft.evaluate.losses import Documents


@dataclass(frozen=True)
class _Reader:
    """What `ChatData` asks of a method."""

    tokenizer: Any
    context_length: int | None
    cannot_pack: None = None
    add_tokens: bool = False
    rows: str = "chats"


def held_out(run: Path, tokenizer: Any, context_length: int | None, limit: int | None = None) -> Documents:
    """Read a run's data as the run did and take the rows that it validated on.

    Args:
        run: a run folder, or its final/.
        tokenizer: of the model.
        context_length: longest row that the model's positions reach.
        limit: only so many rows, the first.

    Returns:
        The rows of all its validation sets.

    Raises:
        UserError: it is no run folder, its data isn't there any more, or it held nothing out.
    """
    import yaml

    from litft.data.chat import ChatData

    file = (run.parent if run.name == "final" else run) / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: is no run folder, so there are no held-out rows to measure on\nmend: --data FILE")
    settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or not isinstance(settings.get("data"), dict):
        raise UserError(f"{file}: names no data\nmend: --data FILE")
    options = settings["data"]
    if options.get("seed") is None:
        options["seed"] = settings.get("seed_everything") or 0
    try:
        data = ChatData(**options | {"chat_template": None})
        data.prepare(_Reader(tokenizer, context_length), max_epochs=1)
    except (UserError, TypeError) as error:
        raise UserError(f"the rows that {run} held out can't be read: {error}\nmend: --data FILE") from error
    rows = [part.read(i) for part in data.val_selections.values() for i in range(len(part))]
    if not rows:
        raise UserError(f"{run} held no rows out\nmend: --data FILE")
    rows = rows[:limit]
    return Documents(rows, np.array([bool(mask.any()) for _, mask in rows]), {})
