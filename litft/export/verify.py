"""Whether a folder that was written answers as the model that it was made from."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from litft.engine.room import host_memory_left
from litft.errors import Failed
from litft.models.quiet import quiet
from litft.models.stored import stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from litft.export.merged import MergedWeights
    from litft.models.resolve import ModelSource

TOLERANCE = 1e-4
"""How far fp32 logits may be apart, as a part of their standard deviation where that is above 1."""

PASSES = 4
"""Times that `verify` calls `progress` with one more step."""

_CHATS = (
    "Why is the sky blue? Answer in two sentences.",
    "Write a short poem about the sea, then count from 1 to 10.",
    "Übersetze 'good morning' ins Französische. 日本語でも。 x = [i**2 for i in range(10)]",
)


@dataclass(frozen=True)
class Check:
    """What was compared.

    Attributes:
        tokens: number of positions whose logits were compared; 0 where the model was too large for that.
        difference: largest difference of fp32 logits between the folder, and base and adapter apart from each other
            (their sum rounded as the folder's weights are).
        rounding: largest difference of fp32 logits that rounding the weights made; 0 where nothing was rounded.
        divergence: what rounding did to the predictions, as KL divergence in nats a token; None for scores.
        weights: number of weights compared one by one, where the model was too large for logits.
        modules: number of adapted layers compared one by one then.
    """

    tokens: int = 0
    difference: float = 0.0
    rounding: float = 0.0
    divergence: float | None = 0.0
    weights: int = 0
    modules: int = 0

    def lines(self) -> list[str]:
        """For the user."""
        if not self.tokens:
            what = "checked: every weight read again, bit for bit" if self.weights else "not checked"
            if self.modules:
                what += f"; {self.modules} adapted layers answer random inputs as with the adapter beside them"
                what += f" within {self.difference:.1g}"
            return [f"{what} (the model in fp32 has no room in memory here, so logits were not compared)"]
        apart = f"within {self.difference:.1g}" if self.difference else "bit for bit"
        said = [f"checked: read again by transformers, its fp32 logits at {self.tokens} tokens are the model's {apart}"]
        if self.rounding:
            predictions = "" if self.divergence is None else f", predictions by {self.divergence:.1g} nats a token (KL)"
            moved = f"rounding the weights to 16 bits moved logits by at most {self.rounding:.2g}{predictions}"
            said.append(f"{moved}; --dtype fp32 rounds nothing")
        return said


@torch.no_grad()
def verify(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    *,
    weights: MergedWeights | None = None,
    trust_remote_code: bool = False,
    progress: Callable[..., None] = lambda more: None,
) -> Check:
    """Compare a folder's answers with those of the base with its adapter beside it; both in fp32, one after the other.

    The live model answers unmerged, then merged in memory, then with its weights rounded as the folder's are. Merging
    may move nothing, and the folder, read by plain transformers, has to be the last of them. Where one fp32 model has
    no room in memory, weights and adapted layers are compared one by one.

    Args:
        source: that the folder was made from.
        tokenizer: of `load_tokenizer`.
        folder: that was written.
        dtype: of its weights.
        weights: that were written.
        trust_remote_code: run the Python code that the model brings.
        progress: called with 1 after each pass.

    Returns:
        What was compared.

    Raises:
        Failed: the answers differ.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from litft.export.card import gives_scores
    from litft.models.load import grow, load_model
    from litft.tuners import LoRA

    code: Any = {"trust_remote_code": trust_remote_code}
    if not fits(folder):
        return Check() if weights is None else _one_by_one(weights, folder, dtype)
    scores = gives_scores(source.adapter or source.folder)
    model = load_model(source, dtype=torch.float32, scores=scores, **code).eval()
    lora = None
    if source.adapter is not None:
        grow(model, tokenizer)
        lora = LoRA.from_folder(source.adapter, dropout=0.0)
        lora.apply(model)
        lora.load(model, source.adapter)
    batches = probes(tokenizer, model.get_input_embeddings().weight.shape[0])
    live = _answers(model, batches)
    progress(1)
    expected = live
    if lora is not None:
        lora.merge(model)
        expected = _answers(model, batches)
        _compare(live, expected, "merging in memory")
    progress(1)
    if dtype != torch.float32:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype).float()
        expected = _answers(model, batches)
    progress(1)
    del model
    with quiet():
        kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        again = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **code)
    found = _answers(again.eval(), batches)
    progress(1)
    difference = _compare(expected if dtype != torch.float32 else live, found, "what was written")
    if dtype == torch.float32:
        return Check(len(live), difference)
    rounding = (live - expected).abs().max().item()
    if scores:
        return Check(len(live), difference, rounding, divergence=None)
    divergence = F.kl_div(expected.log_softmax(-1), live.log_softmax(-1), reduction="sum", log_target=True)
    return Check(len(live), difference, rounding, divergence.item() / len(live))


def fits(folder: Path) -> bool:
    """Whether the model in a folder has room in memory in fp32, with its logits on what `probes` gives."""
    elements = sum(math.prod(tensor.shape) for tensor in stored_tensors(folder).values())
    return host_memory_left() > 4 * elements * 1.25 + 2e9


def _one_by_one(weights: MergedWeights, folder: Path, dtype: torch.dtype) -> Check:
    """As `verify`, in the memory that the largest weight takes a few times."""
    written = stored_tensors(folder)
    generator = torch.Generator().manual_seed(0)
    difference, modules = 0.0, 0
    for name in weights.shapes:
        merged = weights.read(name)
        if not torch.equal(written[name].whole(), merged.to(dtype)):
            raise Failed(f"{name} was not written as it was computed\nnothing was written; is the disk in order?")
        with weights.adapted(name) as layer:
            if layer is not None:
                x = torch.randn(8, layer.lora_A.shape[1], generator=generator)
                plain = merged.T if layer.transposes else merged
                bias: Any = layer.base_layer.bias
                difference = max(difference, _compare(layer(x), F.linear(x, plain, bias), f"merging {name}"))
                modules += 1
    return Check(difference=difference, weights=len(weights.shapes), modules=modules)


def probes(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> list[Tensor]:
    """Token ids to compare models on: some chats as the template writes them, and random ids; [1, tokens] each."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randint(min(vocabulary, len(tokenizer)), (1, 48), generator=generator)]
    for text in _CHATS:
        ids = list(tokenizer(text)["input_ids"])
        if tokenizer.chat_template:
            from litft.data.conversation import Conversation
            from litft.data.template import ChatEncoder
            from litft.errors import UserError

            chat = Conversation(messages=[{"role": "user", "content": text}], train=[None])
            with contextlib.suppress(UserError):  # a template that wants something else; plain text will do
                ids = ChatEncoder(tokenizer).prompt(chat)
        found.append(torch.tensor([ids[:256]]))
    return [ids for ids in found if ids.numel()]


def _answers(model: Any, batches: list[Tensor]) -> Tensor:
    """Logits (or scores) at every position of every batch, fp32 [tokens, vocabulary (or 1)]."""
    if hasattr(model, "score"):
        backbone = getattr(model, model.base_model_prefix)
        return torch.cat([model.score(backbone(ids, use_cache=False).last_hidden_state)[0].float() for ids in batches])
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0].float() for ids in batches])


def _compare(expected: Tensor, found: Tensor, what: str) -> float:
    """The largest difference.

    Raises:
        Failed: it is too large, or there is nothing to compare with.
    """
    if not expected.isfinite().all():
        raise Failed("the model answers with infinities or NaN: training went wrong before this\nnothing was written")
    difference = (expected - found).abs().max().item()
    allowed = TOLERANCE * max(1.0, expected.std().item())
    if not difference <= allowed:
        raise Failed(
            f"{what} changes the model's answers: logits differ by up to {difference:.2g} ({allowed:.1g} is allowed)\n"
            "nothing was written; this is a fault of litft or of the files of the model"
        )
    return difference
