"""The same fine-tuning as transformers' own Trainer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_tokenizer, write_jsonl
from training import difference, train

from litft import LoRA

STEPS, ROWS_PER_STEP = 20, 4
BUDGET = 400  # tokens a step: rows of 81 to 100 tokens fill it with exactly four


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of nearly the same length, of which between a few and nearly all tokens are trained."""
    tokenizer, rng = tiny_tokenizer(), random.Random(0)
    words = ["sun", "moon", "river", "stone", "bird", "old", "quick", "under", "nine", "because", "what", "light"]
    fitting: list[dict[str, Any]] = []
    while len(fitting) < STEPS * ROWS_PER_STEP:
        share, total = rng.random(), rng.randint(10, 60)
        texts = [" ".join(rng.choices(words, k=1 + int(total * part))) for part in (1 - share, share)]
        messages = [{"role": role, "content": t} for role, t in zip(("user", "assistant"), texts, strict=True)]
        if 81 <= len(tokenizer.apply_chat_template(messages, return_dict=False)) <= 100:
            fitting.append({"messages": messages})
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", fitting)


def by_transformers(model: Any, examples: list[dict[str, Any]], folder: Path, **options: Any) -> Any:
    """Losses and gradient norms of each optimizer step of transformers' Trainer, over the examples in their order."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        losses: list[float]
        norms: list[float]

        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(examples)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            self.losses.append(float(loss))
            return loss

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "grad_norm" in logs:
                self.norms.append(float(logs["grad_norm"]))

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: torch.tensor([row[key] for row in batch]) for key in batch[0]}

    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=ROWS_PER_STEP,
        num_train_epochs=1,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
        **options,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=examples, data_collator=collate)
    trainer.losses, trainer.norms = [], []
    trainer.train()
    steps = [trainer.losses[i : i + ROWS_PER_STEP] for i in range(0, len(trainer.losses), ROWS_PER_STEP)]
    return [sum(step) for step in steps], trainer.norms


@pytest.mark.parametrize(
    ("cut", "tuner"),
    [({"tokens_per_batch": 120}, "full"), ({"tokens_per_batch": 4096}, "full"), ({"tokens_per_batch": 120}, "lora")],
    ids=str,
)
def test_losses_and_weights_equal_transformers(
    cut: dict[str, Any], tuner: str, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    lr = 2e-3
    start: dict[str, torch.Tensor] = {}

    def keep(method: Any) -> None:
        start.update({n: p.detach().clone() for n, p in method.net.model.named_parameters()})

    mine = train(
        tiny_llama,
        rows,
        tuner=LoRA(r=4, alpha=8, dropout=0.0) if tuner == "lora" else None,
        method={"optimizer": "adamw", "lr": lr, "clip": 1.0},
        tokens_per_step=BUDGET,
        change=keep,
        **cut,
    )
    assert [len(step) for step in mine.rows] == [ROWS_PER_STEP] * STEPS
    assert set(mine.micro_batches) == ({4} if cut["tokens_per_batch"] == 120 else {1})
    selection = mine.data.selection
    counts = selection.trained
    assert counts.max() > 8 * counts.min(), "uneven rows"
    order = [row for step in mine.rows for row in step]
    examples = []
    for row in order:
        ids, trained = selection.read(row)
        labels = [int(token) if use else -100 for token, use in zip(ids, trained, strict=True)]
        examples.append({"input_ids": ids.tolist(), "labels": labels})
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    model.config.use_cache = False
    if tuner == "lora":
        model = peft_twin(model, start)
    losses, norms = by_transformers(
        model, examples, tmp_path, learning_rate=lr, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch"
    )
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.2
    assert mine.losses == pytest.approx(losses, rel=1e-5)
    assert mine.norms == pytest.approx(norms, rel=1e-3)
    if tuner == "full":
        theirs = {name: p.detach() for name, p in model.named_parameters()}
        # AdamW divides gradients by their own size, so that what rounding makes of small ones shows; 2e-5 on some CPUs
        assert difference(mine.weights, theirs) < 5e-5


def peft_twin(model: Any, start: dict[str, torch.Tensor]) -> Any:
    """PEFT's LoRA over every linear layer, begun with the same A."""
    import peft

    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    twin = peft.get_peft_model(model, config)
    taken = 0
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            bare = name.removeprefix("base_model.model.").replace(".default", "")
            key = next(k for k in start if k == bare or k == bare.removesuffix(".weight"))
            parameter.data.copy_(start[key].reshape(parameter.shape))
            taken += 1
    assert taken == sum("lora_" in name for name in start) > 0
    return twin
