"""What a run leaves behind: `final/`, a folder that plain transformers or PEFT loads without litft."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litft.engine.signals import tidied
from litft.errors import UserError
from litft.export.weights import (
    exported_config,
    full_state_dict,
    save_weights,
    stored_dtype,
    stream_weights,
    unwrap,
)
from litft.models.quiet import quiet
from litft.models.shard import is_sharded
from litft.modes import follow_umask

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

    from litft.models.resolve import ModelSource

logger = logging.getLogger(__name__)


def save_final(
    model: nn.Module,
    tuner: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    base: str,
    revision: str | None = None,
    stop_ids: set[int] | None = None,
    dtype: torch.dtype | None = None,
    card: Callable[[Path], str] | None = None,
) -> Path:
    """Write the fine-tuned model, complete or not at all, and leave the live model and tokenizer as they were.

    A tuner that trains the base (`tuner.trains_base`) gives a Hugging Face model folder; any other a PEFT adapter
    folder that names `base`. Both hold the tokenizer with its chat template and a generation_config.json that stops
    on the tokens that were trained as the end of a turn.

    With several processes every rank calls this, and rank 0 writes.

    Args:
        model: the trained transformers model; may be compiled or sharded.
        tuner: what trained it (`litft.tuners`).
        tokenizer: as used in training.
        folder: the folder to write; an older one there is replaced once the new one is complete.
        base: the model it was trained from, as the user named it.
        revision: of the base on the hub.
        stop_ids: ids of the end-of-turn tokens that were trained (`ChatEncoder.stop_ids`).
        dtype: of a full model's stored weights; None is the dtype in which the base is stored.
        card: makes the text of its README.md from the folder that is all but complete (`litft.export.card`).

    Returns:
        The folder.

    Raises:
        UserError: the folder is the base's own, or cannot be written.
    """
    folder = Path(folder)
    if Path(base).is_dir() and folder.resolve() == Path(base).resolve():
        raise UserError(f"{folder}: is the model that was trained from and will not be overwritten; name another --out")
    plain = unwrap(model)
    stops = control_ids(tokenizer, stop_ids or set())
    if stop_ids and not stops:
        logger.warning(
            "the chat template closes an answer with plain text (%r), not with a control token:"
            " whatever serves this model needs it as a stop text",
            tokenizer.convert_ids_to_tokens(sorted(stop_ids)),
        )
    own = getattr(plain, "generation_config", None)
    generation = None if own is None else generation_settings(own, tokenizer, stops)
    tokenizer = clean_tokenizer(tokenizer, stops)
    if generation is None:
        tokenizer.pad_token = padding_token(tokenizer, stops)

    if not tuner.trains_base:
        with new_folder(folder) if _is_first_rank() else contextlib.nullcontext() as new:
            if new is not None or is_sharded(plain):  # every rank takes part in gathering what is sharded
                tuner.save(plain, new, base, revision)
            if new is not None:
                save_text_files(tokenizer, generation, new, card)
        return folder

    dtype = dtype or base_dtype(base, revision) or plain.dtype
    config = exported_config(plain, dtype)
    # Not the pad token: as `padding_idx` it would keep that token's embedding from learning if training goes on.
    if generation is not None:
        config.eos_token_id = generation.eos_token_id
    else:  # transformers reads a score at the last token that is no pad token
        config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    by_tensor = is_sharded(plain) and published_names(plain, base, revision)
    state = {} if by_tensor else full_state_dict(model, dtype)
    with new_folder(folder) if _is_first_rank() else contextlib.nullcontext() as new:
        if by_tensor:
            stream_weights(plain, dtype, new)
        if new is None:
            return folder
        if by_tensor:
            config.save_pretrained(new)
        else:
            save_weights(plain, state, config, new)
        save_text_files(tokenizer, generation, new, card)
    return folder


def padding_token(tokenizer: PreTrainedTokenizerBase, stops: set[int]) -> str:
    """A token that no conversation ends with, for whoever looks for the last one that isn't it.

    Raises:
        UserError: there is none.
    """
    named = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token]
    spare = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    ends = {*stops, *as_ids(tokenizer.eos_token_id)}
    for token in (*named, *spare):
        if token and tokenizer.convert_tokens_to_ids(token) not in ends:
            return token
    raise UserError("the tokenizer has no special token to pad with but the end of a turn\nmend: --model.add_tokens")


def published_names(model: nn.Module, base: str, revision: str | None) -> bool:
    """Whether the model's files have the names that its weights have here; else transformers has to translate them."""
    from litft.models.resolve import resolve
    from litft.models.stored import stored_tensors

    try:
        names = stored_tensors(resolve(base, revision=revision).folder).keys()
    except UserError:
        return False
    return all(name in names for name, _ in model.named_parameters())


def generation_settings(
    base: GenerationConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]
) -> GenerationConfig:
    """The base's generation settings with the trained stop tokens in front of its own, and a pad token.

    Args:
        base: of the model trained from; its sampling settings are kept.
        tokenizer: as used in training.
        stop_ids: ids of the end-of-turn tokens that were trained.

    Returns:
        A copy whose `eos_token_id` is a list (absent where nobody names a stop token).
    """
    from transformers import GenerationConfig

    values = base.to_dict()
    for key in ("_from_model_config", "transformers_version"):  # how it was made, not what it says
        values.pop(key, None)
    settings = GenerationConfig(**values)
    settings.use_cache = True
    stops = [*sorted(stop_ids), *as_ids(base.eos_token_id), *as_ids(tokenizer.eos_token_id)]
    settings.eos_token_id = list(dict.fromkeys(stops)) or None
    pads = [*as_ids(tokenizer.pad_token_id), *as_ids(base.pad_token_id), *stops]
    settings.pad_token_id = pads[0] if pads else None
    return settings


def own_settings(source: ModelSource, config: PretrainedConfig) -> GenerationConfig:
    """The generation settings of a fine-tuned model: beside the adapter, else the base's."""
    from transformers import GenerationConfig

    for folder in filter(None, (source.adapter, source.folder)):
        if (folder / "generation_config.json").is_file():
            with quiet():
                return GenerationConfig.from_pretrained(folder)
    return GenerationConfig.from_model_config(config)


def template_stops(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The control tokens with which the chat template ends an answer."""
    from litft.data.masks import MaskError
    from litft.data.template import ChatEncoder

    if not tokenizer.chat_template:
        return set()
    try:
        return control_ids(tokenizer, ChatEncoder(tokenizer).stop_ids)
    except MaskError:  # a template that is not understood can still be written with
        return set()


def control_ids(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> set[int]:
    """Those of `ids` that cannot be part of ordinary text, so that it is safe to stop on them.

    A template may close a turn with `</s>` where the tokenizer knows no such token: its last piece is a mere `>`.
    """
    return set(ids) & {*tokenizer.added_tokens_decoder, *as_ids(tokenizer.eos_token_id)}


def as_ids(value: int | list[int] | None) -> list[int]:
    """A token id setting (none, one or several) as a list."""
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def clean_tokenizer(tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer without the padding and truncation that training may have switched on.

    Its `eos_token` becomes the trained stop token where there is exactly one, since other engines (llama.cpp, vLLM)
    stop on that; not where the chat template writes `eos_token`, because then the rendered text would change.
    """
    tokenizer = copy.deepcopy(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # tokenizers' own state, which would be written into tokenizer.json
        backend.no_padding()
        backend.no_truncation()
    templates = tokenizer.chat_template or ""
    text = templates if isinstance(templates, str) else "".join(templates.values())
    if len(stop_ids) == 1 and tokenizer.eos_token_id not in stop_ids and "eos_token" not in text:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(next(iter(stop_ids)))
    return tokenizer


def base_dtype(base: str, revision: str | None = None) -> torch.dtype | None:
    """The dtype in which the base model is stored; None where its files cannot be read any more."""
    from litft.models.resolve import resolve

    try:
        return stored_dtype(resolve(base, revision=revision).folder)
    except UserError:
        return None


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        UserError: the place cannot be written to.
    """
    new = folder.with_name(f".{folder.name}-{uuid.uuid4().hex[:8]}")
    old = new.with_name(f"{new.name}-old")
    try:
        new.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error.strerror}; name another --out") from error
    with tidied():
        try:
            yield new
            follow_umask(new)
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
    shutil.rmtree(old, ignore_errors=True)


def save_text_files(
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig | None,
    folder: Path,
    card: Callable[[Path], str | None] | None = None,
) -> None:
    """Write the tokenizer with its chat template, generation_config.json and, from all that, README.md."""
    tokenizer.save_pretrained(folder)
    # to_json_file, because save_pretrained refuses a changed copy of a published file that was inconsistent before
    # (a temperature without do_sample, say); such a file keeps its meaning here.
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")
    if card is not None and (text := card(folder)):
        (folder / "README.md").write_text(text, encoding="utf-8")


def _is_first_rank() -> bool:
    from torch import distributed

    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
