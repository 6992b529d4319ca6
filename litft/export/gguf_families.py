"""How each family of models is written as GGUF: its metadata, its tensors' names and layouts, and what can't be said.

GGUF has a fixed vocabulary of names and numbers for each architecture that llama.cpp computes; whatever a configuration
asks for beyond it would be lost without a word, so it is refused here, by name. The names of the tensors are the `gguf`
package's; layouts follow llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litft.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PretrainedConfig

ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
}
"""From transformers' `model_type` to GGUF's `general.architecture`."""
_ACTIVATION = {"gemma": "gelu_pytorch_tanh", "gemma2": "gelu_pytorch_tanh", "gemma3": "gelu_pytorch_tanh"}
_SWA_PERIOD = {"gemma2": 2, "gemma3": 6}  # each n-th layer sees all, unless the file says otherwise
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}  # layers of those models whose queries llama.cpp scales by hidden/heads


@dataclass(frozen=True)
class Family:
    """One model's way into GGUF.

    Attributes:
        config: of the model (text only).
        arch: GGUF's name of the architecture.
        notes: what llama.cpp will compute otherwise than transformers, each a sentence for the user.
    """

    config: PretrainedConfig
    arch: str
    notes: tuple[str, ...] = ()

    @property
    def head_dim(self) -> int:
        """Columns of a query head."""
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """How many of a head's columns are rotated by position."""
        return int(self.head_dim * (self.rope.get("partial_rotary_factor") or 1.0))

    @property
    def rope(self) -> dict[str, Any]:
        """The settings of the rotary positions, of global layers where they differ by layer."""
        return _rope(self.config)

    def name(self, name: str) -> str:
        """GGUF's name of a weight.

        Raises:
            UserError: llama.cpp's architecture has no such weight.
        """
        from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

        arch = next(
            key for key, value in MODEL_ARCH_NAMES.items() if value == self.arch and isinstance(key, MODEL_ARCH)
        )
        found = get_tensor_name_map(arch, self.config.num_hidden_layers).get_name(name, (".weight", ".bias"))
        if found is None or (found.endswith(".bias") and not self._has_bias(found)):
            raise UserError(f"GGUF: llama.cpp's {self.arch} architecture has no place for the weight {name}")
        return found

    def _has_bias(self, name: str) -> bool:
        return self.arch == "llama" or (
            self.arch == "qwen2" and name.endswith(("attn_q.bias", "attn_k.bias", "attn_v.bias"))
        )

    def layout(self, name: str, weight: Tensor) -> Tensor:
        """A weight (or the B of its low-rank update) as llama.cpp wants it.

        llama rotates neighbouring pairs of a head's rows where transformers rotates halves; gemma's norms are stored
        as they multiply.

        Args:
            name: transformers' name.
            weight: of shape (out, ...).

        Returns:
            The same shape.
        """
        leaf = name.rsplit(".", 2)[-2]
        if self.arch == "llama" and leaf in ("q_proj", "k_proj"):
            config = self.config
            heads = config.num_attention_heads if leaf == "q_proj" else config.num_key_value_heads
            return weight.view(heads, 2, self.head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)
        if self.arch.startswith("gemma") and leaf.endswith("norm"):
            return weight.float() + 1
        return weight

    def extra(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors that no weight of the model is: factors on the rotary frequencies."""
        rope, kind = self.rope, self.rope.get("rope_type", "default")
        if kind == "llama3":
            yield "rope_freqs.weight", _llama3_factors(rope, self.head_dim)
        if kind == "longrope":
            yield "rope_factors_long.weight", torch.tensor(rope["long_factor"], dtype=torch.float32)
            yield "rope_factors_short.weight", torch.tensor(rope["short_factor"], dtype=torch.float32)

    def describe(self, writer: GGUFWriter, rows: int) -> None:
        """Write the architecture's numbers.

        Args:
            writer: to write them to.
            rows: of the embedding.
        """
        config, arch = self.config, self.arch
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_vocab_size(rows)
        if arch != "phi3":  # whose heads are always as wide as the model divided by their number
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)
        if arch in ("llama", "phi3"):
            writer.add_rope_dimension_count(self.rotary_dim)
        self._describe_rope(writer)
        if arch in _SWA_PERIOD:
            writer.add_sliding_window(config.sliding_window)
            sliding = [kind == "sliding_attention" for kind in config.layer_types]
            if sliding != [(i + 1) % _SWA_PERIOD[arch] != 0 for i in range(len(sliding))]:
                writer.add_sliding_window_pattern(sliding)
        elif arch == "phi3":
            writer.add_sliding_window(config.sliding_window or 0)
        if arch == "gemma2":
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        if arch in ("gemma2", "gemma3") and config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)

    def _describe_rope(self, writer: GGUFWriter) -> None:
        from gguf import RopeScalingType

        rope, kind = self.rope, self.rope.get("rope_type", "default")
        writer.add_rope_freq_base(rope["rope_theta"])
        local = (self.config.rope_parameters or {}).get("sliding_attention")
        if self.arch == "gemma3" and local:
            writer.add_rope_freq_base_swa(local["rope_theta"])
        if kind == "linear":
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(rope["factor"])
        elif kind == "yarn":
            writer.add_rope_scaling_type(RopeScalingType.YARN)
            writer.add_rope_scaling_factor(rope["factor"])
            writer.add_rope_scaling_orig_ctx_len(self._original_context())
            if factor := rope.get("attention_factor"):  # llama.cpp's number multiplies the default one
                writer.add_rope_scaling_attn_factors(factor / (0.1 * math.log(rope["factor"]) + 1))
        elif kind == "longrope":
            original = self._original_context()
            scale = self.config.max_position_embeddings / original
            default = math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0
            writer.add_rope_scaling_type(RopeScalingType.LONGROPE)
            writer.add_rope_scaling_attn_factors(rope.get("attention_factor") or default)
        if self.arch == "phi3":
            writer.add_rope_scaling_orig_ctx_len(self._original_context())

    def _original_context(self) -> int:
        config = self.config
        return (
            self.rope.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", None)
            or config.max_position_embeddings
        )


def family_of(config: PretrainedConfig, *, tied: bool) -> Family:
    """How a model of this configuration is written.

    Args:
        config: of the model.
        tied: whether input and output embeddings are one weight.

    Raises:
        UserError: an architecture that is not written here, or a setting that llama.cpp does not compute.
    """
    kind = config.model_type
    if kind not in ARCHITECTURES:
        raise UserError(
            f"GGUF: the architecture {kind!r} is not supported\nsupported: {', '.join(ARCHITECTURES)}\n"
            "llama.cpp's convert_hf_to_gguf.py may know it: litft export --to hf writes the folder that it takes"
        )
    arch = ARCHITECTURES[kind]
    if reason := _beyond(config, arch, tied):
        raise UserError(
            f"GGUF: this {kind} model can't be written: {reason}, which llama.cpp does not compute for {arch}"
        )
    return Family(config, arch, tuple(_notes(config, arch)))


def _beyond(config: PretrainedConfig, arch: str, tied: bool) -> str | None:
    """What the configuration asks for that llama.cpp's architecture lacks."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != _ACTIVATION.get(arch, "silu"):
        return f"its activation is {activation}"
    rope = _rope(config)
    kind = rope.get("rope_type", "default")
    known = {"default", "linear", "yarn"} | ({"llama3"} if arch == "llama" else set())
    if kind not in (known | {"longrope"} if arch == "phi3" else known):
        return f"its rotary positions are scaled by {kind!r}"
    if kind == "yarn":
        usual = {"mscale": 0, "mscale_all_dim": 0, "truncate": True, "beta_fast": 32, "beta_slow": 1}
        for key, value in usual.items():
            if rope.get(key) not in (None, value):
                return f"its YaRN scaling sets {key} to {rope[key]}"
    if arch in ("gemma", "gemma2") and not tied:
        return "its output matrix is not the embedding (it was trained on its own)"
    if arch in ("gemma2", "gemma3"):
        heads = config.num_attention_heads
        large = config.num_hidden_layers == _GEMMA_27B[arch]
        scale = config.hidden_size / heads if large else config.head_dim
        if config.query_pre_attn_scalar != scale:
            return f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, not {scale:g}"
        if arch == "gemma2" and not (config.attn_logit_softcapping and config.final_logit_softcapping):
            return "its logits are not soft-capped"
        if arch == "gemma3" and config.attn_logit_softcapping:
            return "its attention logits are soft-capped"
        local = (config.rope_parameters or {}).get("sliding_attention") or {}
        if local.get("rope_type", "default") != "default":
            return f"rotary positions of its sliding layers are scaled by {local['rope_type']!r}"
    return None


def _notes(config: PretrainedConfig, arch: str) -> Iterator[str]:
    """What llama.cpp leaves out without an error, so that somebody should know."""
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if arch not in _SWA_PERIOD and window and sliding and window < config.max_position_embeddings:
        yield f"llama.cpp has no sliding window for {arch}: beyond {window} tokens of context it attends to more"
    if _rope(config).get("rope_type") == "longrope":
        yield "llama.cpp takes long rotary factors by the context it starts with (-c), not by the text's length"


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    settings = config.rope_parameters or {}
    return settings.get("full_attention", settings)


def _llama3_factors(rope: dict[str, Any], head_dim: int) -> Tensor:
    """Divisors of the rotary frequencies that Llama 3.1 was trained with, of shape (head_dim / 2,).

    Wave lengths up to original context / high_freq_factor stay, those from original context / low_freq_factor on are
    stretched by `factor`, in between it is interpolated (transformers' `_compute_llama3_parameters`).
    """
    frequencies = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)  # within the original context
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()
