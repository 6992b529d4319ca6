"""The same training as TRL's trainers: losses, figures and weights of ten optimizer steps on the same rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from preferences import NO_NEWLINE, Row, even_rows, save_model
from test_parity import peft_twin
from tiny import tiny_tokenizer, write_jsonl
from training import difference, train

from litft import LoRA

STEPS, ROWS_PER_STEP, LR = 10, 4, 1e-3
BUDGET = 400  # tokens a step: rows of 81 to 100 tokens fill it with exactly four
CASES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "DPO", "method": {"beta": 0.3}, "theirs": {"beta": 0.3}},
    "ipo": {"kind": "DPO", "method": {"loss_type": "ipo"}, "theirs": {"loss_type": ["ipo"]}},
    "dpo, mixed": {
        "kind": "DPO",
        "method": {"loss_type": ["sigmoid", "aot", "sft"], "loss_weights": [0.7, 0.4, 0.2]},
        "theirs": {"loss_type": ["sigmoid", "aot", "sft"], "loss_weights": [0.7, 0.4, 0.2]},
    },
    "kto": {"kind": "KTO", "method": {"undesirable_weight": 1.5}, "theirs": {"undesirable_weight": 1.5}},
    "orpo": {"kind": "ORPO", "method": {"beta": 0.5, "nll_on": "all"}, "theirs": {"beta": 0.5}},
    "cpo": {"kind": "CPO", "method": {}, "theirs": {"loss_type": "sigmoid", "cpo_alpha": 1.0}},
    "simpo": {
        "kind": "SimPO",
        "method": {"gamma": 0.6},
        "theirs": {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.6, "cpo_alpha": 0.0},
    },
}
LABELLED = ("kto",)
LORA = ("dpo", "ipo", "kto", "orpo")
PARTS = (4096, 120)
"""Tokens a micro-batch: a whole step, or one row."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[list[Row], Path]]:
    """Pairs, and labelled answers, of nearly the same length, and their file."""
    folder = tmp_path_factory.mktemp("rows")
    found = {kind: even_rows(STEPS * ROWS_PER_STEP, kind, 81, 100) for kind in (False, True)}
    return {kind: (some, write_jsonl(folder / f"{kind}.jsonl", some)) for kind, some in found.items()}


def trainer_of(kind: str) -> tuple[Any, Any]:
    """TRL's trainer and its configuration."""
    if kind == "DPO":
        from trl import DPOConfig, DPOTrainer

        return DPOTrainer, DPOConfig
    if kind == "KTO":
        from trl import KTOConfig, KTOTrainer

        return KTOTrainer, KTOConfig
    if kind == "ORPO":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        return ORPOTrainer, ORPOConfig
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    return CPOTrainer, CPOConfig


def by_trl(kind: str, model: Any, rows: list[Row], folder: Path, **options: Any) -> tuple[list[float], list[Any]]:
    """Losses and log records of TRL's trainer over the rows in their order."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler

    trainer_class, config = trainer_of(kind)
    losses: list[float] = []

    class InOrder(trainer_class):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *args: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    arguments = config(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS_PER_STEP,
        num_train_epochs=1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=512,
        disable_tqdm=True,
        **options,
    )
    trainer = InOrder(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(NO_NEWLINE)
    )
    trainer.train()
    return losses, [record for record in trainer.state.log_history if "loss" in record]


@pytest.fixture
def quiet() -> Iterator[None]:
    """TRL's data sets show bars."""
    import datasets

    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def pairwise() -> Iterator[Any]:
    """Every method with full tuning, some with adapters (in plain pytest one), each with one of the two cuts."""
    for index, name in enumerate(CASES):
        for tuner, part in zip(("full", "lora"), (PARTS[index % 2], PARTS[1 - index % 2]), strict=True):
            if tuner == "full" or name in LORA:
                marks = pytest.mark.slow if tuner == "lora" and name != "dpo" else ()
                yield pytest.param(name, tuner, part, id=f"{name}-{tuner}-{part}", marks=marks)


@pytest.mark.parametrize(("name", "tuner", "tokens_per_batch"), list(pairwise()))
def test_losses_figures_and_weights_are_trls(
    name: str, tuner: str, tokens_per_batch: int, model: Path, rows: Any, tmp_path: Path, quiet: None
) -> None:
    from transformers import AutoModelForCausalLM

    case = CASES[name]
    kind, (some, file) = case["kind"], rows[name in LABELLED]
    start: dict[str, torch.Tensor] = {}

    def keep(method: Any) -> None:
        start.update({n: p.detach().clone() for n, p in method.net.model.named_parameters()})

    mine = train(
        model,
        file,
        kind=kind,
        tuner=LoRA(r=4, alpha=8, dropout=0.0) if tuner == "lora" else None,
        method={"optimizer": "adamw", "lr": LR, "clip": 1.0, **case["method"]},
        tokens_per_step=BUDGET,
        tokens_per_batch=tokens_per_batch,
        change=keep,
    )
    assert [len(step) for step in mine.rows] == [ROWS_PER_STEP] * STEPS
    assert set(mine.micro_batches) == {1 if tokens_per_batch == PARTS[0] else ROWS_PER_STEP}
    order = [row for step in mine.rows for row in sorted(step)]  # in which a step's answers go round for KTO's KL
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if tuner == "lora":
        theirs = peft_twin(theirs, start)
    losses, records = by_trl(kind, theirs, [some[row] for row in order], tmp_path, **case["theirs"])
    assert len(losses) == STEPS
    assert mine.losses == pytest.approx(losses, rel=1e-5, abs=1e-6)
    assert max(abs(a - b) for a, b in itertools.pairwise(losses)) > 1e-3
    same_figures(mine.figures, records, set(mine.method.measured), case["theirs"])
    after = {n: p.detach() for n, p in theirs.named_parameters() if p.requires_grad}
    if tuner == "lora":
        after = {n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in after.items()}
        after = {next(k for k in mine.weights if k in (n, n.removesuffix(".weight"))): p for n, p in after.items()}
        after = {n: p.reshape(mine.weights[n].shape) for n, p in after.items()}
    # AdamW divides gradients by their own size, so that what rounding makes of small ones shows
    assert difference(mine.weights, after) < 5e-5
    assert max(float((after[n] - start[n]).abs().max()) for n in after) > 2e-3


def same_figures(steps: list[dict[str, float]], records: list[Any], names: set[str], theirs: dict[str, Any]) -> None:
    """What is measured has TRL's names and values; not those of steps in which it is nothing."""
    if theirs.get("cpo_alpha") == 0.0:
        names = names - {"nll_loss"}  # which TRL doesn't compute then
    for step, record in zip(steps, records, strict=True):
        some = {name for name in names if not math.isnan(step[name])}
        assert len(some) >= 3 and some <= record.keys()
        for name in some:
            assert step[name] == pytest.approx(record[name], rel=1e-4, abs=2e-5), name
