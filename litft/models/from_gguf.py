"""From a GGUF file of the Llama architecture to an ordinary Hugging Face folder.

transformers reads GGUF too (`gguf_file=`), and is what the tests compare with. Not used here because it takes three
times as long, and builds another tokenizer from version to version: it takes the pre-tokenizer "smollm" for GPT-2's, so
that blanks before a number are cut otherwise than in pre-training, and 5.17 takes the start of a turn for its end.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor
    from transformers import LlamaConfig, PreTrainedTokenizerFast

_NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf: Path, folder: Path) -> None:
    """Write config.json, bf16 safetensors, tokenizer, chat template and generation config.

    Args:
        gguf: a Llama with tied embeddings and a byte-level BPE tokenizer that takes each digit alone.
        folder: made if absent.
    """
    import torch
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaForCausalLM

    from litft.models.quiet import quiet
    from litft.modes import follow_umask

    reader = GGUFReader(gguf)
    tokenizer, config = _tokenizer(reader), _config(reader)
    tokenizer.model_max_length = config.max_position_embeddings
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config.update(special)
    with quiet():
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.load_state_dict(_weights(reader), assign=True)
        model.tie_weights()
        model.generation_config = GenerationConfig(**special)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    follow_umask(folder)


def _read(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _config(reader: GGUFReader) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=_read(reader, "llama.vocab_size"),
        hidden_size=_read(reader, "llama.embedding_length"),
        intermediate_size=_read(reader, "llama.feed_forward_length"),
        num_hidden_layers=_read(reader, "llama.block_count"),
        num_attention_heads=_read(reader, "llama.attention.head_count"),
        num_key_value_heads=_read(reader, "llama.attention.head_count_kv"),
        head_dim=_read(reader, "llama.rope.dimension_count"),
        max_position_embeddings=_read(reader, "llama.context_length"),
        rms_norm_eps=_read(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _read(reader, "llama.rope.freq_base")},
        tie_word_embeddings=True,
    )


def _weights(reader: GGUFReader) -> dict[str, Tensor]:
    """The weights by their Hugging Face names, dequantised and rounded to bf16."""
    import torch
    from gguf.quants import dequantize

    weights: dict[str, Tensor] = {}
    half = _read(reader, "llama.rope.dimension_count") // 2
    for entry in reader.tensors:
        *block, kind, _ = entry.name.split(".")  # blk.7.attn_q.weight, output_norm.weight
        weight = torch.tensor(dequantize(entry.data, entry.tensor_type)).to(torch.bfloat16)
        if kind in ("attn_q", "attn_k"):  # GGUF lays out a head's rows in rotary pairs, Hugging Face in halves
            rows, columns = weight.shape
            weight = weight.view(-1, half, 2, columns).transpose(1, 2).reshape(rows, columns)
        layer = f"layers.{block[1]}." if block else ""
        weights[f"model.{layer}{_NAMES[kind]}.weight"] = weight.contiguous()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights


def _tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = _read(reader, "tokenizer.ggml.tokens"), _read(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _read(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{
            f"{ours}_token": tokens[_read(reader, f"tokenizer.ggml.{theirs}_token_id")]
            for ours, theirs in special.items()
        },
        clean_up_tokenization_spaces=False,
        chat_template=_read(reader, "tokenizer.chat_template"),
    )
