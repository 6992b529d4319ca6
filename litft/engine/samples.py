"""Answers of the model that is being trained, to prompts that it isn't trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from litft.data.conversation import Conversation
from litft.errors import UserError
from litft.methods.base import Method


class Samples(Callback):
    """Answers held-out prompts before training, and on request at each validation.

    Args:
        count: prompts, taken from the held-out rows.
        prompts: own prompts instead.
        max_new_tokens: longest answer in tokens.
        during: print answers at each validation too.
    """

    def __init__(
        self, count: int = 3, prompts: list[str] | None = None, max_new_tokens: int = 64, during: bool = False
    ) -> None:
        if count < 0:
            raise UserError(f"--samples.count {count}: must be at least 0")
        if max_new_tokens < 1:
            raise UserError(f"--samples.max_new_tokens {max_new_tokens}: must be at least 1")
        self.count, self.prompts, self.max_new_tokens, self.during = count, prompts, max_new_tokens, during
        self.questions: list[Conversation] = []
        self.before: list[str] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the prompts, and answer them with the model as it is."""
        self.choose(trainer)
        if self.questions and trainer.global_step == 0:
            self.before = self.answer(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The answers before training, for a run that is resumed."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up again."""
        self.before = state_dict["before"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print answers where asked for."""
        if self.during and not trainer.sanity_checking and self.questions:
            for question, answer in zip(self.questions, self.answer(pl_module), strict=True):
                if not trainer.is_global_zero:
                    continue
                print(f"    > {last_user(question)}\n    {answer}")

    @staticmethod
    def can_answer(trainer: Trainer) -> bool:
        """Whether this process answers: the first, where it has all of the model; where each has a part, all do."""
        if getattr(trainer.strategy, "parallel", None) is not None:
            return True
        whole = trainer.world_size == 1 or isinstance(trainer.strategy, DDPStrategy)
        return whole and trainer.is_global_zero

    def answer(self, method: LightningModule) -> list[str]:
        """The present answers."""
        return answer(method, self.questions, self.max_new_tokens)  # type: ignore[arg-type]

    def choose(self, trainer: Trainer) -> None:
        """Choose the prompts; none on a process that doesn't answer."""
        if not self.can_answer(trainer) or getattr(trainer.lightning_module, "scores", False):
            return
        if self.prompts:
            asked: list[Any] = [{"role": "user", "content": text} for text in self.prompts]
            self.questions = [Conversation(messages=[message], train=[None]) for message in asked]
        elif self.count:
            self.questions = trainer.datamodule.held_out_prompts(self.count)  # type: ignore[attr-defined]


def answer(method: Method, questions: Sequence[Conversation], max_new_tokens: int = 64) -> list[str]:
    """Greedy answers of a method's live model.

    Args:
        method: with its model built; left as it was.
        questions: conversations that end before an answer.
        max_new_tokens: longest answer in tokens.
    """
    from litft.infer.generate import generate
    from litft.infer.live import answering

    with answering(method) as bundle:
        return generate(bundle, questions, max_new_tokens=max_new_tokens, temperature=0)


def last_user(question: Conversation) -> str:
    """The text that a question ends on."""
    return next((m["content"] for m in reversed(question.messages) if m["role"] == "user"), "")
