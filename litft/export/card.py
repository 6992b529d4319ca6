"""The model card: README.md of what leaves, in words for people and front matter for the model hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litft.errors import UserError
from litft.models.alias import DEFAULT_MODEL as ALIAS
from litft.models.alias import HUB_ID, LICENSE, cache_dir
from litft.models.resolve import read_json

if TYPE_CHECKING:
    from litft.models.resolve import ModelSource

CARD = "README.md"
HERE = '"."  # this folder, or its id on the hub'
"""What the card's code names, so that it runs where the card lies; `litft push` puts the repository's id there."""
LOADING = "## How to load"
SCORE = "litft score . --data pairs.jsonl --out scores.jsonl"
_LICENSE_KEYS = ("license", "license_name", "license_link")
_OURS = "made with litft."


@dataclass(frozen=True)
class Base:
    """The model that was trained from, as a card may name it: without a path of this machine.

    Attributes:
        name: the hub's id, or the name of a folder.
        hub_id: what the hub knows it, or what it was itself made from, by.
        license: what the base's own card says: `license`, and perhaps `license_name` and `license_link`.
        note: what else has to be known.
    """

    name: str
    hub_id: str | None = None
    license: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass
class Training:
    """What a card says of the training.

    Attributes:
        method: "SFT".
        tuner: "lora".
        settings: hyperparameters by name.
        data: of `ChatData.summary`.
        fingerprint: of the data.
        datasets: those of it that lie on the hub, by id.
        losses_before: held-out losses by name, before training.
        losses_after: and of the weights beside the card.
    """

    method: str
    tuner: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""
    datasets: Sequence[str] = ()
    losses_before: Mapping[str, float] = field(default_factory=dict)
    losses_after: Mapping[str, float] = field(default_factory=dict)


def base_of(source: ModelSource, going_on: bool = True) -> Base:
    """What a card says of a base model; its licence is read from the card beside its weights.

    Args:
        source: of `resolve`.
        going_on: whether training began with its adapter, where it has one; else that adapter is what the card is of.
    """
    note = "training went on from another adapter of this base" if source.adapter and going_on else ""
    if source.folder == cache_dir() / "models" / ALIAS:
        copied = f"trained on the copy that litft calls {ALIAS}, whose weights have been quantised to 4 bits and back"
        return Base(HUB_ID, HUB_ID, {"license": LICENSE}, "; ".join(filter(None, [copied, note])))
    front = front_matter(source.folder / CARD)
    license = {key: text for key in _LICENSE_KEYS if (text := _plain(front.get(key)))}
    if source.hub_id:
        return Base(source.hub_id, source.hub_id, license, note)
    folder = source.folder.parent if source.folder.name == "final" else source.folder
    made_from = front.get("base_model")
    return Base(_plain(folder.name), made_from if is_repo_id(made_from) else None, license, note)


def front_matter(file: Path) -> dict[str, Any]:
    """The metadata at the head of a card; empty where there is none that can be read."""
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        found = re.match(r"\s*---\r?\n(.*?)\r?\n---", text, re.S)
        content = yaml.safe_load(found[1]) if found else {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def is_repo_id(name: Any) -> bool:
    """Whether a name has the form of a repository on the hub with an owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str) or "/" not in name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def model_card(folder: str | Path, base: Base | None = None, training: Training | None = None, title: str = "") -> str:
    """The card of a model or adapter folder.

    Args:
        folder: with its config.json, or adapter_config.json, and tokenizer.
        base: what it was trained from; None where nobody knows.
        training: how; None where nobody knows.
        title: over the card; the base's name, fine-tuned, where empty.

    Returns:
        Markdown whose front matter the hub understands and whose code runs in that folder.

    Raises:
        UserError: there is neither of these files.
    """
    folder = Path(folder)
    adapter = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else None
    if adapter is None and not (folder / "config.json").is_file():
        raise UserError(f"{folder}: has neither config.json nor adapter_config.json, so it is no model")
    tuner = training.tuner if training else "lora" if adapter else ""
    how = {"lora": "LoRA", "qlora": "QLoRA", "full": "all weights"}.get(tuner, tuner)
    name = base.name if base else "A language model"
    head = title or f"{name}, fine-tuned{f' ({how})' if how else ''}"
    parts = [_front(folder, base, training), f"# {head}", ""]
    kind = "A PEFT adapter" if adapter else "A language model"
    if base:
        link = f"[{name}](https://huggingface.co/{name})" if name == base.hub_id else f"`{name}`"
        kind += f" for {link}" if adapter else f", fine-tuned from {link}"
    parts += [f"{kind}; {_OURS}", ""]
    parts += _table(_facts(base, training, adapter, how))
    if training and training.settings:
        parts += ["", "## Hyperparameters", "", *_table([(key, _said(v)) for key, v in training.settings.items()])]
    parts += ["", LOADING, "", *_loading(folder, base, adapter)]
    losses = "the held-out loss above" if training and training.losses_after else "anything"
    parts += ["", "## Limits", "", f"This card reports no test beyond {losses}. What the base may not be used for,"]
    parts += ["and what it gets wrong, holds for this model too: see the base's own card.", ""]
    return "\n".join(parts)


def derived_card(source: ModelSource, folder: Path) -> str | None:
    """The card of what was made from a fine-tuned model: merged, in another dtype, quantised.

    Args:
        source: with a card of `model_card`, or another's.
        folder: of what was made, with its config.json or adapter_config.json.

    Returns:
        What the source's card says of its training, with the code that loads what was made; another's card as it is;
        None where a whole model has none.
    """
    from huggingface_hub import ModelCard

    file, base = (source.adapter or source.folder) / CARD, base_of(source, going_on=False)
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if _OURS not in text or LOADING not in text:
        return model_card(folder, base) if source.adapter else text or None
    own = read_json(folder / "adapter_config.json") if (folder / "adapter_config.json").is_file() else None
    code = "\n".join([LOADING, "", *_loading(folder, base, own), "", ""])
    text = re.sub(rf"^{LOADING}$.*?(?=^## |\Z)", lambda _: code, text, flags=re.S | re.M)
    if own is None:
        text = text.replace("\nA PEFT adapter for ", "\nA language model, fine-tuned from ")
    card = ModelCard(text, ignore_metadata_errors=True)
    card.data["library_name"] = "peft" if own else "transformers"
    return str(card)


def with_note(card: str, title: str, text: str) -> str:
    """A card with one more section: before the code that loads the model, at the end of another's card."""
    section = f"## {title}\n\n{text}\n\n"
    ahead, found, code = card.partition(f"{LOADING}\n")
    return f"{ahead}{section}{found}{code}" if found else f"{card.rstrip()}\n\n{section.rstrip()}\n"


def on_hub(card: str, repo: str, base: str | None = None) -> str:
    """A card as it lies on the hub: its code loads the repository, and its metadata names the base.

    Args:
        card: of `model_card`, or written by hand.
        repo: "owner/name".
        base: the hub's id of the base, where it is known only now.
    """
    from huggingface_hub import ModelCard

    def commands(found: re.Match[str]) -> str:
        block = re.sub(r"(?<=[ =])\.(?= |$)", repo, found[0], flags=re.M)
        return re.sub(r"(vllm serve )\S+(?= --enable-lora)", rf"\g<1>{base}", block) if base else block

    text = re.sub(r"```bash\n.*?```", commands, card.replace(HERE, f'"{repo}"'), flags=re.S)
    if base is None:
        return text
    parsed = ModelCard(text, ignore_metadata_errors=True)
    parsed.data["base_model"] = base
    return str(parsed)


def gives_scores(folder: Path) -> bool:
    """Whether a model or adapter folder holds a reward model, whose output is a number."""
    if (folder / "adapter_config.json").is_file():
        return read_json(folder / "adapter_config.json").get("task_type") == "SEQ_CLS"
    names = read_json(folder / "config.json").get("architectures") or [""]
    return str(names[0]).endswith("ForSequenceClassification")


def _front(folder: Path, base: Base | None, training: Training | None) -> str:
    from huggingface_hub import ModelCardData

    is_adapter = (folder / "adapter_config.json").is_file()
    tuner = training.tuner if training else ""
    tags = ["litft", *(["lora"] if is_adapter else []), *([training.method.lower()] if training else [])]
    tags += [tuner] if tuner and tuner not in tags else []
    data = ModelCardData(
        base_model=base.hub_id if base else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-classification" if gives_scores(folder) else "text-generation",
        datasets=list(training.datasets) or None if training else None,
        tags=tags,
        **{key: base.license.get(key) if base else None for key in _LICENSE_KEYS},  # type: ignore[arg-type]
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _facts(
    base: Base | None, training: Training | None, adapter: Mapping[str, Any] | None, how: str
) -> list[tuple[str, str]]:
    rows = [("base", "unknown")]
    if base:
        license = base.license.get("license_name") or base.license.get("license") or "unknown: see the base"
        if link := base.license.get("license_link"):
            license += f" ({link})"
        rows = [("base", base.name + (f"; {base.note}" if base.note else "")), ("licence of the base", license)]
    if adapter:
        rows.append(
            ("adapter", f"{adapter.get('peft_type', 'LORA')}, r {adapter.get('r')}, alpha {adapter.get('lora_alpha')}")
        )
    if training is None:
        return rows
    rows.append(("method", f"{training.method}, {how}"))
    if data := training.data:
        rows.append(
            ("data", f"{data['rows']:,} rows, {data['row_tokens']:,} tokens, {data['row_trained_tokens']:,} trained")
        )
        held_out = ", ".join(f"{count:,} rows" for count in data["val_rows"].values()) or "none"
        rows += [
            ("held out", held_out),
            ("steps", f"{data['steps']:,} ({data['epochs']:g} epoch{'s' * (data['epochs'] != 1)})"),
        ]
    rows += [("fingerprint of the data", f"`{training.fingerprint}`")] if training.fingerprint else []
    for name, after in training.losses_after.items():
        before = training.losses_before.get(name)
        was = f"{before:.4f} before, " if before is not None else ""
        rows.append((_plain(name.replace("val_", "held-out ")), f"{was}{after:.4f} after"))
    return rows


def _loading(folder: Path, base: Base | None, adapter: Mapping[str, Any] | None) -> list[str]:
    """Code for transformers or PEFT, and commands of litft and vLLM."""
    chats, scores = (folder / "chat_template.jinja").is_file(), gives_scores(folder)
    kind = "ForSequenceClassification" if scores else "ForCausalLM"
    loader = f"AutoPeftModel{kind}" if adapter else f"AutoModel{kind}"
    package = "peft" if adapter else "transformers"
    imports = [f"from {package} import {loader}", "from transformers import AutoTokenizer"]
    chat = '[{"role": "user", "content": "Hello"}' + (', {"role": "assistant", "content": "Ahoy!"}]' if scores else "]")
    asked = ['inputs = tokenizer("Hello", return_tensors="pt")']
    head = "num_labels=1, pad_token_id=tokenizer.pad_token_id, "  # which an adapter can't bring
    if chats:
        header = "" if scores else "add_generation_prompt=True, "
        asked = [
            f"messages = {chat}",
            f'inputs = tokenizer.apply_chat_template(messages, {header}return_dict=True, return_tensors="pt")',
        ]
    code = [
        *(imports if adapter else [f"from transformers import {loader}, AutoTokenizer"]),
        "",
        f"name = {HERE}",
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f'model = {loader}.from_pretrained(name, {head if adapter and scores else ""}dtype="auto")',
        *asked,
    ]
    if scores:
        code.append("print(model(**inputs).logits[0, 0].item())")
        return [f"With {package}:", "", "```python", *code, "```", "", "With litft:", "", "```bash", SCORE, "```"]
    code += [
        "answer = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    serve = "vllm serve ." if adapter is None else _serving(folder, base, adapter)
    lines = [f"With {package}:", "", "```python", *code, "```", "", "With litft, or served by vLLM:", ""]
    return [*lines, "```bash", 'litft generate . --prompt "Hello"', serve, "```"]


def _serving(folder: Path, base: Base | None, adapter: Mapping[str, Any]) -> str:
    """How vLLM serves an adapter beside its base, or merged where it doesn't take it."""
    from litft.export.vllm import beyond_vllm, served_rank

    if adapter.get("peft_type") != "LORA" or beyond_vllm(folder):
        return "litft merge . --out merged && vllm serve merged  # vLLM takes no adapter of this kind"
    named, rank = base.name if base else "BASE", served_rank(adapter["r"])
    return f"vllm serve {named} --enable-lora --max-lora-rank {rank} --lora-modules tuned=."


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value.replace('|', '/')} |" for key, value in rows)]


def _said(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return _plain(", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value) or "none"


def _plain(text: Any) -> str:
    """A short name or address without anything that Markdown, YAML or HTML would take for its own."""
    return re.sub(r"[^\w .,;:+/@#%()=-]", "", str(text).replace("\n", " "))[:120].strip() if text else ""


__all__ = [
    "CARD",
    "HERE",
    "Base",
    "Training",
    "base_of",
    "derived_card",
    "front_matter",
    "is_repo_id",
    "model_card",
    "on_hub",
]
