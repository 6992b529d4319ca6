"""From what the user typed after `--model` to a folder of files: an alias, a folder, an adapter, a run, a hub id."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litft.errors import UserError
from litft.models.alias import DEFAULT_MODEL, default_model

_log = logging.getLogger(__name__)

_SNAPSHOT = re.compile(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]?$")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_SHARD = re.compile(r"[^/\\\x00]+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DEQUANTISED = "mxfp4"
"""The one quantised storage that is read: gpt-oss is published in no other, and `load_model` unpacks it."""
_TO_SAFETENSORS = (
    'convert once, where you trust it: python -c "from transformers import AutoModelForCausalLM as A; '
    "A.from_pretrained('{0}', use_safetensors=False).save_pretrained('NEW_FOLDER')\""
)


@dataclass(frozen=True)
class ModelSource:
    """A model that is here, on this disk.

    Attributes:
        name: what the user typed.
        folder: an absolute folder with config.json, safetensors weights and tokenizer: the base under an adapter.
        adapter: the folder with adapter_config.json, when the user named an adapter.
        hub_id: "org/name" when the base came from the model hub.
        revision: the revision asked for, of the base on the hub.
    """

    name: str
    folder: Path
    adapter: Path | None = None
    hub_id: str | None = None
    revision: str | None = None

    @property
    def base_name(self) -> str:
        """What an adapter's `base_model_name_or_path` should say: the hub id, else the folder."""
        return self.hub_id or str(self.folder)

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies: with the adapter if it brings one (with tokens added, say), else with the base."""
        if self.adapter is not None and (self.adapter / "tokenizer_config.json").is_file():
            return self.adapter
        return self.folder


def resolve(
    name: str | Path,
    *,
    revision: str | None = None,
    weights: bool = True,
    offline: bool = False,
    trust_remote_code: bool = False,
    quantised: bool = False,
    scores: bool | None = False,
) -> ModelSource:
    """Find the model that `name` means, and fetch it if it is not here.

    Args:
        name: the alias `smollm2-135m-instruct`; a folder holding a model, a PEFT adapter, a litft run (its `final/` is
            meant) or a hub cache (`models--org--name`, its snapshot is meant); or the id of a model on the hub.
        revision: branch, tag or commit; for hub ids only.
        weights: False fetches and asks for the tokenizer and configuration only.
        offline: take hub models from the local cache only (as `HF_HUB_OFFLINE=1` does).
        trust_remote_code: let the model bring Python code of its own.
        scores: the model is to give numbers: it may have a score head, or be given one; None takes both kinds.
        quantised: take a model that is stored quantised as well: it can answer, and not be trained or merged into.

    Returns:
        The source; its `folder` is local and has been checked to hold a causal language model in safetensors.

    Raises:
        UserError: nothing there, no model in it, pickled weights only, code of its own, an unknown architecture, or
            the hub is out of reach or refuses.
    """
    text = str(name)
    if not text.strip():
        raise UserError(f"the model's name is empty\nname a folder, a hub id (org/name) or {DEFAULT_MODEL}")
    options: dict[str, Any] = {"weights": weights, "offline": offline, "trust_remote_code": trust_remote_code}
    options |= {"quantised": quantised, "scores": scores}
    if text == DEFAULT_MODEL:
        return _from_folder(text, default_model(), **options)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _from_folder(text, folder.absolute(), **options)
    if _looks_like_path(text):
        raise UserError(_missing(text, folder))

    from litft.models.hub import download

    try:
        snapshot = download(text, revision=revision, weights=weights, offline=offline, code=trust_remote_code)
    except UserError as error:
        if (
            len(folder.parts) == 2 and folder.parent.is_dir()
        ):  # runs/0003-lora looks like a hub id, but is a misspelt run
            raise UserError(_missing(text, folder)) from error
        raise
    source = _from_folder(text, snapshot, **options)
    if source.adapter is not None:
        return source
    return ModelSource(text, snapshot, hub_id=text, revision=revision)


def _from_folder(
    name: str,
    folder: Path,
    *,
    weights: bool,
    offline: bool,
    trust_remote_code: bool,
    quantised: bool,
    scores: bool | None,
) -> ModelSource:
    folder = enter(folder)
    options: dict[str, Any] = {"weights": weights, "offline": offline, "trust_remote_code": trust_remote_code}
    options["scores"] = scores
    if (folder / "adapter_config.json").is_file():
        return _from_adapter(name, folder, **options)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no model: there is no config.json\n    it holds: {_listing(folder)}\n"
            "name the folder that has config.json and *.safetensors, or adapter_config.json"
        )
    check_architecture(folder, trust_remote_code=trust_remote_code, quantised=quantised, scores=scores)
    if weights:
        _check_weights(folder)
    if cached := cached_id(folder):
        return ModelSource(name, folder, hub_id=cached[0], revision=cached[1])
    return ModelSource(name, folder)


def enter(folder: Path) -> Path:
    """From a run folder to its `final/`, from a folder of the hub's cache to its snapshot; else as it is."""
    if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
        return folder
    if (folder / "final").is_dir():
        return folder / "final"
    if (folder / "run.json").is_file() or (folder / "checkpoints").is_dir():
        raise UserError(
            f"the run in {folder} has no final/: it did not end\n"
            "finish it (the same command with --resume), then name it again"
        )
    if (folder / "snapshots").is_dir():
        main = folder / "refs" / "main"
        if main.is_file() and (folder / "snapshots" / main.read_text().strip()).is_dir():
            return folder / "snapshots" / main.read_text().strip()
        snapshots = sorted((folder / "snapshots").iterdir(), key=lambda path: path.stat().st_mtime)
        if snapshots:
            return snapshots[-1]
    return folder


def _from_adapter(name: str, adapter: Path, **options: Any) -> ModelSource:
    if options["weights"] and not (adapter / "adapter_model.safetensors").is_file():
        pickled = (adapter / "adapter_model.bin").is_file()
        raise UserError(
            f"{adapter} has an adapter_config.json but no adapter_model.safetensors\n"
            + ("adapter_model.bin is a pickle, which can run code: " if pickled else "")
            + "save the adapter again with PEFT (save_pretrained writes safetensors)"
        )
    config = read_json(adapter / "adapter_config.json")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise UserError(
            f"{adapter / 'adapter_config.json'} does not say which model it adapts\n"
            "set base_model_name_or_path in it to a folder or a hub id"
        )
    if config.get("task_type") == "SEQ_CLS" and options["scores"] is False:
        raise UserError(f"{adapter} is a reward model, which gives numbers, not text\nmend: litft score {name}")
    try:
        source = _resolve_base(base, revision, adapter, **options | {"quantised": False})  # merged into, then
    except UserError as error:
        why = "\n".join(str(error).splitlines()[:3])
        raise UserError(
            f"the adapter {adapter} needs its base model {base}:\n{why}\n"
            "or set base_model_name_or_path in adapter_config.json to where it is"
        ) from error
    if source.adapter is not None:
        raise UserError(f"the adapter {adapter} has another adapter, {base}, as its base\nmerge that one first")
    return ModelSource(name, source.folder, adapter, source.hub_id, source.revision)


def _resolve_base(base: str, revision: str | None, adapter: Path, **options: Any) -> ModelSource:
    """Find an adapter's base although the adapter may have been made on another machine or from another folder."""
    folder = Path(base).expanduser()
    if folder.is_dir() or base == DEFAULT_MODEL:
        return resolve(base, **options)
    if not folder.is_absolute() and (adapter / folder).is_dir():
        return resolve(os.path.normpath(adapter / folder), **options)
    if folder.name == DEFAULT_MODEL:  # somebody else's cache folder of the default model
        return resolve(DEFAULT_MODEL, **options)
    if cached := cached_id(base):  # somebody else's copy of a hub model
        return resolve(cached[0], revision=cached[1], **options)
    return resolve(base, revision=revision, **options)


def cached_id(folder: str | Path) -> tuple[str, str] | None:
    """The hub's id and the commit of a folder in the hub's cache, on this or another machine; None for any other."""
    found = _SNAPSHOT.search(str(folder))
    return (f"{found[1]}/{found[2]}", found[3]) if found else None


def check_architecture(
    folder: Path, *, trust_remote_code: bool = False, quantised: bool = False, scores: bool | None = False
) -> None:
    """Refuse what litft can't train (with `quantised`: run), from config.json alone: nothing is loaded, no code is run.

    Raises:
        UserError: the model brings its own code (and `trust_remote_code` is False), transformers doesn't know its
            type, it isn't a causal language model, or its weights are stored quantised.
    """
    config = read_json(folder / "config.json")
    kind, names = config.get("model_type"), config.get("architectures") or []
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as SCORES

    own_code = config.get("auto_map") or {}
    if own_code and trust_remote_code:
        _log.warning("running the Python code that %s brings (trust_remote_code)", folder)
        return
    if kind not in CAUSAL and own_code:
        raise UserError(
            f"{folder} brings its own Python code ({next(iter(own_code.values()))}), which would run on this machine\n"
            "read it; if you trust it, pass --model.trust_remote_code true"
        )
    if not trust_remote_code and (kernel := next(_kernels(config), None)):
        raise UserError(
            f"{folder / 'config.json'} asks for code from the hub ({kernel}), which would run on this machine\n"
            "take that key out of it, or read the code; if you trust it, pass --model.trust_remote_code true"
        )
    from transformers import CONFIG_MAPPING, __version__

    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"transformers {__version__} does not know the model type {kind!r} of {folder}\n"
            "update transformers, if a newer one does; else choose another model"
        )
    known = {name for value in CAUSAL.values() for name in ([value] if isinstance(value, str) else value)}
    if scores and kind not in SCORES:
        raise UserError(f"{folder}: transformers has no {kind} with a score head\nmend: another base model")
    if scores is not False:
        known.add(SCORES.get(str(kind), ""))
    elif SCORES.get(str(kind)) in names and len(config.get("id2label") or ()) == 1:
        raise UserError(f"{folder} is a reward model, which gives numbers, not text\nmend: litft score {folder}")
    if kind not in CAUSAL or (names and not known.intersection(names)):
        raise UserError(
            f"{folder} holds a {names[0] if names else kind}, which is not a causal language model\n"
            "choose one whose config.json says ...ForCausalLM under architectures"
        )
    stored = config.get("quantization_config")
    if stored and stored.get("quant_method") != DEQUANTISED and not quantised:
        raise UserError(
            f"{folder} is stored quantised ({stored.get('quant_method', 'by an unnamed method')})\n"
            "name the model it was made from; litft finetune qlora quantises that while it loads"
        )


def _kernels(config: Any) -> Iterator[str]:
    """The repositories on the hub that a configuration wants attention or experts computed by."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key.endswith("_implementation"):
            names = value.values() if isinstance(value, dict) else [value]
            yield from (name for name in names if isinstance(name, str) and "/" in name)
        yield from _kernels(value)


def _check_weights(folder: Path) -> None:
    """Refuse a folder without safetensors, or with a shard missing that its index names."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards: list[str] = sorted(set(map(str, read_json(index).get("weight_map", {}).values())))
        if odd := [shard for shard in shards if not _SHARD.fullmatch(shard)]:
            raise UserError(f"{index} names {odd[0]!r}, which is no safetensors file beside it\nfetch the model again")
        absent = [shard for shard in shards if not (folder / shard).is_file()]
        if absent:
            raise UserError(
                f"{folder} is incomplete: {len(absent)} of {len(shards)} weight files are missing, first {absent[0]}\n"
                "fetch or copy it again"
            )
        return
    if (folder / "model.safetensors").is_file():
        return
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise UserError(
            f"{folder} has its weights in {pickles[0]}, a pickle, which can run code when read: safetensors only\n"
            + _TO_SAFETENSORS.format(folder)
        )
    raise UserError(
        f"{folder} has a config.json but no weights ({' or '.join(_WEIGHTS)})\n    it holds: {_listing(folder)}\n"
        "name a folder with safetensors weights; a hub model that was fetched in part: litft download ID"
    )


def _looks_like_path(text: str) -> bool:
    path = Path(text)
    return (
        text.startswith((".", "/", "~")) or text.endswith("/") or "\\" in text or len(path.parts) > 2 or path.is_file()
    )


def _missing(text: str, folder: Path) -> str:
    if folder.is_file():
        return f"{text} is a file\nname the folder that holds the model (config.json and *.safetensors)"
    parent = folder.parent
    while not parent.is_dir():
        parent = parent.parent
    return f"there is no folder {text}\n    {parent} holds: {_listing(parent)}\nname a folder or a hub id (org/name)"


def _listing(folder: Path, most: int = 8) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if not path.name.startswith("."))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError when it is not one."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {error}\nfetch or copy the model again") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object\nfetch or copy the model again")
    return value
