"""Scores of a reward model: numbers for conversations."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litft.data.conversation import Conversation
from litft.errors import DataError, UserError
from litft.infer.generate import Progress, check_new, new_file
from litft.infer.load import find_device

if TYPE_CHECKING:
    import torch

    from litft.data.template import ChatEncoder
    from litft.models.scorer import Scorer


@dataclass
class ScoreModel:
    """A reward model ready to score.

    Attributes:
        net: the model, in eval mode on its device, adapters merged.
        encoder: writes a chat as training did.
        name: as the user named the model.
    """

    net: Scorer
    encoder: ChatEncoder
    name: str = ""

    def encode(self, conversation: Conversation) -> list[int]:
        """The token ids of a whole conversation.

        Raises:
            DataError: the chat template refuses it, or it is longer than the model's context.
        """
        ids = list(self.encoder(conversation).ids)
        limit = getattr(self.net.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(ids) > limit:
            said = f"{len(ids):,} tokens are more than the model's context of {limit:,}"
            mend = "shorten it, or leave such rows out with --bad_rows skip"
            raise DataError(said, file=conversation.file, line=conversation.line, mend=mend)
        return ids


def load_scorer(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ScoreModel:
    """Load a reward model; an adapter is merged, in memory, into its base.

    Args:
        name: a run folder (its `final/`), an adapter folder, a model folder or a hub id.
        device: "auto" (the first GPU, else the CPU), "cpu", "cuda", "cuda:1", "mps".
        dtype: of the weights; None is fp32, as scores are small differences.
        revision: branch, tag or commit of a model on the hub.
        trust_remote_code: allow Python code that comes with the model.

    Raises:
        UserError: no such model, one without a score head, or no such device.
    """
    import torch

    from litft.data.template import ChatEncoder
    from litft.models.load import grow, load_model, load_tokenizer
    from litft.models.resolve import read_json, resolve
    from litft.models.scorer import Scorer
    from litft.tuners.lora import merge_adapter

    where = find_device(device)
    source = resolve(name, revision=revision, trust_remote_code=trust_remote_code, scores=True)
    kind = read_json(source.folder / "config.json").get("architectures") or [""]
    learnt = source.adapter and read_json(source.adapter / "adapter_config.json").get("task_type") == "SEQ_CLS"
    if not learnt and not kind[0].endswith("ForSequenceClassification"):
        raise UserError(f"{name} gives text, not numbers\nmend: litft finetune reward makes a model that scores")
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    model = load_model(source, dtype=dtype or torch.float32, trust_remote_code=trust_remote_code, scores=True)
    if source.adapter is not None:
        grow(model, tokenizer)
        merge_adapter(model, source.adapter)
    net = Scorer(model.requires_grad_(False).eval()).to(where)
    return ScoreModel(net, ChatEncoder(tokenizer), str(name))


def score(
    bundle: ScoreModel,
    conversations: Sequence[Conversation],
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[float]:
    """Score whole conversations, in batches of like length.

    Args:
        bundle: of `load_scorer`.
        conversations: each ends with the answer that is scored.
        batch_size: conversations at once; scores do not depend on it (beyond rounding).
        progress: called with (scored so far, conversations in all).

    Returns:
        A score for each, in their order.

    Raises:
        DataError: a conversation that the chat template refuses, or that is longer than the model's context.
    """
    import numpy as np
    import torch

    from litft.data.batch import pad_documents

    encoded = [np.array(bundle.encode(conversation)) for conversation in conversations]
    found = [0.0] * len(encoded)
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
    device = next(bundle.net.parameters()).device
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        batch = pad_documents([(encoded[i], np.zeros(len(encoded[i]), bool)) for i in some], 1.0, 0)
        batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        with torch.inference_mode():
            scores = bundle.net(batch)["scores"].tolist()
        for i, value in zip(some, scores, strict=True):
            found[i] = value
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order))
    return found


def score_file(
    bundle: ScoreModel,
    data_file: str,
    out: str | Path,
    *,
    bad_rows: Literal["error", "skip"] = "error",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every row and write JSONL: the row as it was read, and `score`, or `chosen_score` and `rejected_score`.

    Args:
        bundle: of `load_scorer`.
        data_file: rows of chats, of pairs, or of labelled answers.
        out: the file to write; it appears when it is complete.
        bad_rows: a row that cannot be used is an error, or is left out.
        batch_size: conversations scored at once.
        progress: called with (scored so far, conversations in all).

    Returns:
        `rows`, how many were written; `skipped`, how many were left out; for pairs `accuracy`, in what share of them
        the chosen answer has the higher score.

    Raises:
        DataError: a bad row.
        UserError: `out` cannot be written or is there.
    """
    out = Path(out)
    check_new(out)
    rows, asked, skipped = _read(bundle, data_file, bad_rows)
    scores = iter(score(bundle, asked, batch_size=batch_size, progress=progress))
    pairs = right = 0
    with new_file(out) as file:
        for value, names in rows:
            found = {name: next(scores) for name in names}
            if len(names) == 2:
                pairs += 1
                right += found["chosen_score"] > found["rejected_score"]
            own = value if isinstance(value, dict) else {"messages": value}
            file.write(json.dumps(own | found, ensure_ascii=False) + "\n")
    return {"rows": len(rows), "skipped": skipped, "accuracy": right / pairs if pairs else None}


def _read(
    bundle: ScoreModel, data_file: str, bad_rows: str
) -> tuple[list[tuple[Any, tuple[str, ...]]], list[Conversation], int]:
    """The rows with the names of their scores, all conversations to score in order, and how many rows were left out."""
    from litft.data.files import read_rows
    from litft.data.preferences import to_labelled, to_pair
    from litft.data.rows import schema_of, to_conversation

    rows: list[tuple[Any, tuple[str, ...]]] = []
    asked: list[Conversation] = []
    skipped = 0
    for row in read_rows(data_file):
        try:
            if row.error is not None:
                raise row.error
            schema = schema_of(row.value)
            names = ("chosen_score", "rejected_score") if schema == "preference" else ("score",)
            if taken := [name for name in names if isinstance(row.value, dict) and name in row.value]:
                mend = "rename the key, which is to hold the model's score"
                raise DataError(f"the row has a {taken[0]} already", file=row.file, line=row.line, mend=mend)
            if schema == "preference":
                pair = to_pair(row.value, row.file, row.line)
                some = [pair.chosen, pair.rejected]
            elif schema == "kto":
                some = [to_labelled(row.value, row.file, row.line).conversation]
            else:
                some = [to_conversation(row.value, row.file, row.line)]
            for conversation in some:
                bundle.encode(conversation)  # one that can't be scored makes a bad row
            asked += some
            rows.append((row.value, names))
        except DataError:
            if bad_rows == "error":
                raise
            skipped += 1
    return rows, asked, skipped
