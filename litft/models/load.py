"""From a model on disk to a model ready to train."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from litft.errors import UserError
from litft.models.quiet import quiet
from litft.models.resolve import DEQUANTISED, ModelSource, read_json

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def load_config(source: ModelSource, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The base model's configuration, as it stands in its config.json."""
    from transformers import AutoConfig

    with quiet():
        try:
            return AutoConfig.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read the configuration of {source.folder}:\n    {_first_line(error)}") from error


def load_tokenizer(source: ModelSource, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer: the adapter's own where it brings one, else the base model's.

    Truncation and padding that somebody's tokenizer.json carries are switched off: they would cut rows silently, and
    would be exported again.

    Raises:
        UserError: there is none, it cannot be read, or it names a chat template as no file can be named.
    """
    from transformers import AutoTokenizer

    folder = source.tokenizer_folder
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
            settings = folder / "tokenizer_config.json"
            if not trust_remote_code and settings.is_file() and "auto_map" in read_json(settings):
                raise UserError(
                    f"the tokenizer in {folder} brings its own Python code, which would run on this machine\n"
                    "read it; if you trust it, pass --model.trust_remote_code true"
                ) from error
            raise UserError(
                f"cannot read a tokenizer from {folder}:\n    {_first_line(error)}\n"
                "it needs tokenizer.json and tokenizer_config.json (or the files of a sentencepiece tokenizer)"
            ) from error
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if odd := [name for name in templates if not re.fullmatch(r"\w[\w .-]*", name)]:  # each becomes a file of final/
        raise UserError(f"the tokenizer in {folder} has a chat template named {odd[0]!r}\nmend: use letters and digits")
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    scores: bool = False,
) -> PreTrainedModel:
    """Load the base model's weights (an adapter is not applied), for training where they are not stored quantised.

    Args:
        source: of `resolve`.
        dtype: of every parameter. Buffers keep theirs: rotary frequencies stay fp32, in bf16 they would be off by
            0.4 rad at position 4000.
        attn_implementation: transformers' name ("sdpa", "eager", or one registered); None is the model's default.
        trust_remote_code: run the Python code that the model brings.
        scores: with a score head of one label in the place of the vocabulary's; random, where the model has none.

    Returns:
        The model on the CPU, in train mode (`from_pretrained` leaves it in eval mode: no dropout, no recompute), with
        `config.use_cache` False (a cache lets packed documents see each other; export writes it True again).

    Raises:
        UserError: the weights don't fit the configuration: some missing, some left over, or of another shape. A
            missing weight would be trained from random numbers.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.utils.quantization_config import Mxfp4Config

    stored = read_json(source.folder / "config.json").get("quantization_config") or {}
    unpack = {"quantization_config": Mxfp4Config(dequantize=True)} if stored.get("quant_method") == DEQUANTISED else {}
    with quiet():
        try:
            loaded: Any = (AutoModelForSequenceClassification if scores else AutoModelForCausalLM).from_pretrained(
                source.folder,
                dtype=dtype,
                use_safetensors=True,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **unpack,
                **({"num_labels": 1} if scores else {}),
            )
        except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(f"cannot load the model in {source.folder}:\n    {_first_line(error)}") from error
    model, report = loaded
    if scores:
        report = {kind: [key for key in keys if not _is_head(key)] for kind, keys in report.items()}
    _check_report(source, report)
    if is_quantised(source):
        model.config.use_cache = model.config.get_text_config().use_cache = False
        return model
    for parameter in model.parameters():  # a few models keep some in fp32; unpacked ones may come in bf16
        if parameter.dtype != dtype and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    ready_to_train(model)
    return model


def is_quantised(source: ModelSource) -> bool:
    """Whether a model's weights are stored in a form that can't be trained."""
    stored = read_json(source.folder / "config.json").get("quantization_config") or {}
    return bool(stored) and stored.get("quant_method") != DEQUANTISED


def ready_to_train(model: Any) -> None:
    """Undo what transformers does for inference: eval mode, a cache, a token that gets no gradient."""
    model.config.use_cache = model.config.get_text_config().use_cache = False
    # A pad token that is also a real one (often the end of a turn) would get no gradient as an input.
    model.get_input_embeddings().padding_idx = None
    for module in model.modules():
        module.training = True


def _is_head(key: Any) -> bool:
    """Whether a weight is one of those that a score head takes the place of, or its own."""
    name = key[0] if isinstance(key, tuple) else str(key)
    return name.startswith(("score.", "lm_head.", "embed_out."))


def _check_report(source: ModelSource, report: dict[str, Any]) -> None:
    """Turn what transformers only warns of into an error."""
    for kind, what in (
        ("missing_keys", "lacks {} weights that its config.json calls for"),
        ("unexpected_keys", "holds {} weights that its config.json has no place for"),
        ("mismatched_keys", "holds {} weights of another shape than its config.json says"),
    ):
        keys = sorted(key[0] if isinstance(key, tuple) else key for key in report.get(kind) or ())
        if keys:
            more = ", ..." if len(keys) > 3 else ""
            raise UserError(
                f"{source.folder} {what.format(len(keys))}: {', '.join(keys[:3])}{more}\n"
                "the two belong to different models, or the copy is incomplete: fetch or save the model again"
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:300]


def add_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Add special tokens to the tokenizer and rows for them to the input and output embeddings.

    New rows start at the mean of the old ones, so that at first the new tokens are as likely as the average token
    (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"), also where the matrix had spare
    rows already.

    Args:
        model: changed in place; its matrices grow only as far as needed, and stay tied where they were.
        tokenizer: changed in place.
        tokens: their text; those that the tokenizer has are left alone.

    Returns:
        The ids of the tokens that were new, which are their rows in the embeddings.
    """
    fresh = add_to_tokenizer(tokenizer, tokens)
    return add_rows(model, tokenizer, fresh) if fresh else []


def add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[str]:
    """Add special tokens; returns those that the tokenizer didn't have."""
    from transformers import AddedToken

    known = tokenizer.get_vocab()
    fresh = [token for token in dict.fromkeys(tokens) if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in fresh], special_tokens=True)
    return fresh


def add_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fresh: Sequence[str]) -> list[int]:
    """Give tokens just added to the tokenizer their rows in the embeddings, at the mean of the old ones.

    Args:
        model: changed in place.
        tokenizer: with the tokens.
        fresh: their text.

    Returns:
        Their ids.
    """
    import torch

    ids = [tokenizer.get_vocab()[token] for token in fresh]
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    old = min(len(tokenizer) - len(fresh), rows)
    with torch.no_grad():
        for module in dict.fromkeys((model.get_input_embeddings(), model.get_output_embeddings())):
            for name in ("weight", "bias"):
                matrix: Any = getattr(module, name, None)
                if matrix is not None:
                    matrix[ids] = matrix[:old].mean(0, dtype=torch.float32).to(matrix.dtype)
    return ids


def grow(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give tokens that were added in training their rows in a base model, at the mean of the old ones.

    Those that were trained come with the adapter.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        add_rows(model, tokenizer, tokenizer.convert_ids_to_tokens(list(range(rows, len(tokenizer)))))


def fingerprint(source: ModelSource) -> str:
    """What identifies a model's weights, for cache keys and to check a resumed run; cheap, whatever its size.

    A hash over the configuration and, of each safetensors file (an adapter's too), the size, the header (names, dtypes,
    shapes) and 1 KiB out of the middle of every tensor. Not over paths, times or the version of transformers that wrote
    it: a copy elsewhere is the same model.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for folder, config in ((source.folder, "config.json"), (source.adapter, "adapter_config.json")):
        if folder is None:
            continue
        settings = read_json(folder / config)
        for noted in ("transformers_version", "peft_version", "_name_or_path", "base_model_name_or_path"):
            settings.pop(noted, None)
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for path in sorted(folder.glob("*.safetensors")):
            digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = file.read(length)
                digest.update(header)
                tensors = (entry for name, entry in json.loads(header).items() if name != "__metadata__")
                for start, end in sorted(tuple(tensor["data_offsets"]) for tensor in tensors):
                    middle = max(start, (start + end) // 2 - 512)
                    file.seek(8 + length + middle)
                    digest.update(file.read(min(1024, end - middle)))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, template: bool = True) -> str:
    """What decides a tokenizer's ids: vocabulary, merges, added tokens, normalisation, special tokens, chat template.

    The truncation and padding that the last call left in a fast tokenizer don't count.

    Args:
        tokenizer: of a model.
        template: whether its chat template counts.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
        digest.update(text[text.index('"added_tokens"') :].encode())  # before it: version, truncation, padding
    else:
        added = sorted((id, str(token), token.special) for id, token in tokenizer.added_tokens_decoder.items())
        digest.update(json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), added]).encode())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    digest.update(json.dumps([special, tokenizer.chat_template if template else None], sort_keys=True).encode())
    return digest.hexdigest()


def can_pack(model: PreTrainedModel | PretrainedConfig) -> str | None:
    """Whether documents may lie in one flat row behind `litft.models.attention` without seeing each other.

    Decided by structure, not by name: every path from one token to another has to run through attention that
    transformers hands to a registered function, and positions have to come from `position_ids`.

    Args:
        model: a model, or its configuration (then its skeleton is built without memory for weights).

    Returns:
        None if packing is safe, else the reason why not, as half a sentence ("its layers keep a state along the row").
    """
    import inspect

    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

    if not isinstance(model, PreTrainedModel):  # a configuration
        if type(model) not in MODEL_FOR_CAUSAL_LM_MAPPING:
            return "it brings its own code"
        with torch.device("meta"), quiet():
            model = AutoModelForCausalLM.from_config(model)
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False):
        return "it has an encoder and a decoder"
    if model._is_stateful:
        return "its layers keep a state along the row"
    if not model.is_backend_compatible():
        return "its attention does not go through transformers' attention interface"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it takes no position_ids, so positions cannot restart with each document"
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        return f"it has layers of the type {min(other)}"
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, torch.nn.Conv1d):
            return f"it has a convolution along the row ({name})"
        if getattr(module, "is_causal", True) is False:
            return f"it has attention that looks ahead ({name})"
    return None
