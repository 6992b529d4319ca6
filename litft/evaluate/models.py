"""The models of an evaluation: found, their tokenizers read, and only then, one at a time, loaded."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litft.data.chat import DEFAULT_MAX_LENGTH
from litft.errors import UserError
from litft.models.alias import DEFAULT_MODEL, cache_dir
from litft.models.load import fingerprint, load_config, load_tokenizer
from litft.models.resolve import ModelSource, resolve

if TYPE_CHECKING:
    import torch

    from litft.infer.load import ChatModel

BASE = "base"
"""The name of what a model was fine-tuned from."""


@dataclass
class Candidate:
    """A model that is to be evaluated.

    Args:
        name: a run, an adapter, a model folder, a hub id or an alias.
        revision: of a model on the hub.
        template: chat template for a tokenizer that has none.
        trust_remote_code: run Python code that the model brings.
    """

    name: str
    revision: str | None = None
    template: Any = None
    trust_remote_code: bool = False

    @cached_property
    def source(self) -> ModelSource:
        """Where it lies."""
        return resolve(self.name, revision=self.revision, trust_remote_code=self.trust_remote_code, quantised=True)

    @cached_property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        tokenizer = load_tokenizer(self.source, trust_remote_code=self.trust_remote_code)
        tokenizer.chat_template = tokenizer.chat_template or self.template
        return tokenizer

    @cached_property
    def context_length(self) -> int | None:
        """Longest row that its positions reach."""
        config = load_config(self.source, trust_remote_code=self.trust_remote_code).get_text_config()
        return getattr(config, "max_position_embeddings", None)

    def longest_row(self, max_length: int | None = None) -> int:
        """The row length in tokens that a set's rows may have, by default as in training."""
        return min(n for n in (max_length or DEFAULT_MAX_LENGTH, self.context_length) if n)

    def load(self, device: str, dtype: torch.dtype | None) -> ChatModel:
        """The model, its adapter merged in memory."""
        from litft.data.template import ChatEncoder
        from litft.export.final import as_ids, generation_settings, template_stops
        from litft.infer.load import load_for_inference

        bundle = load_for_inference(
            self.name,
            device=device,
            dtype=dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
        )
        if bundle.encoder is None and self.template:
            encoder = ChatEncoder(self.tokenizer)
            settings = generation_settings(bundle.settings, self.tokenizer, template_stops(self.tokenizer))
            ends = set(as_ids(settings.eos_token_id))
            changed: dict[str, Any] = {"settings": settings, "stop_ids": ends, "encoder": encoder}
            bundle = dataclasses.replace(bundle, tokenizer=self.tokenizer, **changed)
        return bundle

    def facts(self, bundle: ChatModel) -> dict[str, Any]:
        """What identifies it, for the record."""
        adapter = {"base": self.source.base_name} if self.source.adapter else {}
        return {
            "name": self.name,
            **adapter,
            "fingerprint": fingerprint(self.source)[:12],
            "dtype": str(bundle.model.dtype).removeprefix("torch."),
            "device": str(bundle.model.device),
        }


def baseline_of(name: str, tuned: Candidate) -> Candidate:
    """The model to compare with; it takes over the tuned model's chat template where it has none of its own.

    Args:
        name: of a model, or `base` for what `tuned` was fine-tuned from.
        tuned: the model under evaluation.

    Raises:
        UserError: `base`, and nothing says what that is.
    """
    revision = None
    if name == BASE and not Path(BASE).is_dir():
        if tuned.source.adapter is not None:
            name, revision = tuned.source.base_name, tuned.source.revision
            if Path(name) == cache_dir() / "models" / DEFAULT_MODEL:
                name = DEFAULT_MODEL
        elif path := training_settings(tuned.name).get("model", {}).get("path"):
            name, revision = path, training_settings(tuned.name)["model"].get("revision")
        else:
            raise UserError(
                f"--baseline base: {tuned.name} is no adapter and no run, so nothing says what it was made from\n"
                "mend: --baseline MODEL"
            )
    template = tuned.tokenizer.chat_template
    return Candidate(name, revision, template, trust_remote_code=tuned.trust_remote_code)


def training_settings(name: str) -> dict[str, Any]:
    """The resolved configuration of a run folder, also where its final/ is named; empty for anything else."""
    folder = Path(name).expanduser()
    file = (folder.parent if folder.name == "final" else folder) / "config.yaml"
    if not file.is_file():
        return {}
    import yaml

    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return settings if isinstance(settings, dict) else {}
