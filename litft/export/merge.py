"""An adapter folded into its base: one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from litft.errors import UserError
from litft.export.hf import Written, write_model
from litft.models.resolve import ModelSource


def merge(source: ModelSource, out: Path, **options: Any) -> Written:
    """Merge an adapter into the model that it was trained from.

    A QLoRA adapter goes into the model as it was before it was quantised.

    Args:
        source: of `resolve`; an adapter.
        out: of `new_output`.
        options: of `write_model`.

    Returns:
        What was written.

    Raises:
        UserError: there is no adapter, or it doesn't fit its base.
        Failed: what was written doesn't answer as base and adapter do.
    """
    check_mergeable(source)
    return write_model(source, out, **options)


def check_mergeable(source: ModelSource) -> None:
    """Refuse a whole model.

    Raises:
        UserError: saying what to do with it.
    """
    if source.adapter is None:
        raise UserError(
            f"{source.name} is a whole model: there is nothing to merge\n"
            f"mend: to have it elsewhere or in another dtype: litft export {source.name} --to hf --out DIR"
        )
