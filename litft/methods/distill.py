"""Distillation: a student learns the distribution of a teacher over the next token."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from litft.data.batch import Batch
from litft.data.loader import Step
from litft.errors import UserError
from litft.losses.distillation import Divergence, divergence, linear_loss, with_rest
from litft.methods.base import Method
from litft.methods.on_policy import with_own_answers
from litft.methods.reference import frozen
from litft.methods.sft import SFT
from litft.models.head import Head


class Distill(SFT):
    """Distillation on the trained tokens of chats (Hinton et al. 2015; Agarwal et al. 2023), mixed with cross-entropy.

    Args:
        teacher: the model to learn from: a folder, a run, an adapter or an id on the hub, with the student's tokens.
        loss_type: forward_kl KL(teacher || student), reverse_kl KL(student || teacher), symmetric_kl a mix of both, or
            js_divergence.
        share: of the forward part in symmetric_kl, of the teacher in js_divergence's mixture.
        temperature: divides both models' logits; the divergence is multiplied by its square.
        ce_share: share of plain cross-entropy in the loss; the divergence has the rest.
        top_k: keep the teacher's log-probabilities of so many likeliest tokens on disk, computed once before training,
            and all others as one; the teacher's memory is then free.
        teacher_quant: store the teacher's linear layers in nf4 or int8.
        offload_teacher: keep the teacher's layers in the host's memory, beside a GPU.
        on_policy: share of the rows whose last answer the student samples itself in each step, and the teacher judges,
            without cross-entropy (Agarwal et al. 2023, lambda of their algorithm 1).
        answer_temperature: of the student's own answers.
        max_new_tokens: longest answer of its own.
        options: of `SFT`.
    """

    dropout: ClassVar[bool] = False
    loss_settings: ClassVar[tuple[str, ...]] = (
        *("neftune", "teacher_path", "kind", "share", "temperature", "ce_share", "top_k", "teacher_quant"),
        *("on_policy", "answer_temperature", "max_new_tokens"),
    )
    measured: ClassVar[tuple[str, ...]] = ("ce", "divergence")

    def __init__(
        self,
        *args: Any,
        teacher: str = "",
        loss_type: Divergence = "forward_kl",
        share: float = 0.5,
        temperature: float = 1.0,
        ce_share: float = 0.5,
        top_k: int | None = None,
        teacher_quant: Literal["nf4", "int8"] | None = None,
        offload_teacher: bool = False,
        on_policy: float = 0.0,
        answer_temperature: float = 1.0,
        max_new_tokens: int = 256,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if not teacher:
            raise UserError("--model.teacher: distill needs a model to learn from\nmend: --model.teacher ID_OR_FOLDER")
        if temperature <= 0 or not 0 <= ce_share <= 1 or not 0 < share < 1:
            raise UserError("--model.temperature above 0, ce_share from 0 to 1, share between 0 and 1")
        if top_k is not None and top_k < 1:
            raise UserError(f"--model.top_k {top_k}: at least 1")
        if self.label_smoothing:
            raise UserError("--model.label_smoothing: the teacher's distribution is what takes the place of labels")
        if not 0 <= on_policy <= 1 or answer_temperature < 0 or max_new_tokens < 1:
            raise UserError("--model.on_policy from 0 to 1, answer_temperature at least 0, max_new_tokens at least 1")
        if on_policy and top_k is not None:
            raise UserError("--model.top_k: what the student will answer can't be asked ahead\nmend: leave it out")
        if on_policy and self.step_in_backward:
            raise UserError("--model.step_in_backward: not with on_policy, whose steps may need several micro-batches")
        self.on_policy, self.answer_temperature, self.max_new_tokens = on_policy, answer_temperature, max_new_tokens
        self.teacher_path, self.kind, self.share, self.temperature = str(teacher), loss_type, share, temperature
        self.ce_share, self.top_k = ce_share, top_k
        self.teacher_quant, self.offload_teacher = teacher_quant, offload_teacher
        self._teacher: list[Method] = []  # no submodule: it is neither trained nor saved

    def build(self, precision: str = "32-true", device: Any = "cpu", parallel: Any = None) -> Method:
        """Load the student, apply the tuner, and load the teacher."""
        if self.offload_teacher and torch.device(device).type == "cpu":
            raise UserError(
                "--model.offload_teacher: the run is on the CPU, there is nowhere else to go\nmend: leave it out"
            )
        super().build(precision, device, parallel)
        if self.net.head is None:
            raise UserError("distill: the student's head is none that the fast loss knows (or fast_loss is off)")
        self._precision, self._half = str(precision), self.compute_dtype or torch.float32
        if self.top_k is None:
            self._teacher = [self._load_teacher()]
        return self

    @property
    def distributions(self) -> int:
        """The student's and the teacher's."""
        return 2

    @property
    def frozen_beside(self) -> list[str]:
        """The teacher, unless it was asked ahead."""
        return [] if self.top_k is not None or self.offload_teacher else [self.teacher_path]

    def _load_teacher(self) -> Method:
        made = frozen(self, self._precision, self.teacher_path, self.offload_teacher, quant=self.teacher_quant)
        self._shared = self._shared_rows(made.config)
        check_vocabularies(self.tokenizer, made.tokenizer, self.teacher_path, self._shared)
        if self.cannot_pack is None and made.cannot_pack is not None:
            raise UserError(
                f"--model.teacher {self.teacher_path}: takes no packed rows: {made.cannot_pack}\n"
                "mend: --data.packing false"
            )
        return made

    def _shared_rows(self, teacher: Any) -> int:
        """Tokens that both have a logit for; what is beyond only fills a matrix up."""
        rows = self.net.model.get_input_embeddings().weight.shape[0]
        return min(rows, int(teacher.get_text_config().vocab_size))

    def on_fit_start(self) -> None:
        """Compile the layers, and ask the teacher ahead where that is wanted; Trainer's hook."""
        super().on_fit_start()
        if self.top_k is not None:
            with self.trainer.precision_plugin.forward_context():
                self.cache_teacher(self.trainer.datamodule)  # type: ignore[attr-defined]

    def cache_teacher(self, data: Any) -> None:
        """Compute the teacher's likeliest tokens for all of the data's rows, or read them where they are on disk."""
        from litft.methods.cached import attach, settings_of
        from litft.models.load import fingerprint, load_config
        from litft.models.resolve import resolve

        def compute() -> Any:
            self._teacher = [self._load_teacher()]
            return self._likeliest

        source = resolve(self.teacher_path, trust_remote_code=self.trust_remote_code)
        self._shared = self._shared_rows(load_config(source, trust_remote_code=self.trust_remote_code))
        key = [fingerprint(source), *settings_of(self, data), self.teacher_quant, self.top_k, self.temperature]
        key.append(self._shared)
        attach(data, self.run_device, key, lambda rows: rows.trained, compute, "teacher")
        self._teacher = []

    def _likeliest(self, batch: Batch) -> dict[str, Tensor]:
        """The teacher's `top_k` likeliest tokens at each target, and their log-probabilities, [targets, k]."""

        def find(head: Head | None, last: Tensor) -> dict[str, Tensor]:
            ids, log_ps = [], []
            for rows in torch.arange(len(last), device=last.device).split(1024):
                log_p = self._log_p(_logits(head, last[rows], self._half)[:, : self._shared])
                top = log_p.topk(min(self.top_k or 1, log_p.shape[-1]))
                ids.append(top.indices.int())
                log_ps.append(top.values)
            return {"teacher_ids": torch.cat(ids), "teacher_log_p": torch.cat(log_ps)}

        found: dict[str, Tensor] = self._teacher[0].net(batch | {"with_head": find})["with_head"]
        return found

    def _log_p(self, logits: Tensor) -> Tensor:
        return torch.log_softmax(logits / self.temperature, -1)

    def take_plan(self, data: Any) -> None:
        """As of `Method`, where rows have answers to give."""
        if self.on_policy and data.train_on == "all":
            raise UserError(
                "--model.on_policy: answers are sampled, and --data.train_on all knows of none\n"
                "mend: --data.train_on assistant"
            )
        super().take_plan(data)

    def begin_step(self, step: Step) -> None:
        """Let the student answer where it is to be judged by its own answers."""
        if self.on_policy:
            options = self.on_policy, self.answer_temperature, self.max_new_tokens
            step["micro_batches"] = with_own_answers(self, step, *options)
        super().begin_step(step)

    # ---- the loss

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The student's pass with, at its end, the comparison with the teacher: `with_head` [targets]."""
        found: dict[str, Tensor] = self.net(batch | {"with_head": partial(self._against_teacher, batch)})
        return found

    def loss(self, batch: Batch) -> Tensor:
        """Share of the step's loss."""
        with self.noise(batch):
            found = self.losses(batch)
        return found["with_head"].sum() / batch["denominator"] + self.balance_loss(found, batch)

    def validation_sums(self, batch: Batch) -> Tensor:
        """Summed loss and the number of trained tokens."""
        losses = self.losses(batch)["with_head"]
        return torch.stack([losses.sum(), losses.new_tensor(batch["trained"])])

    def _against_teacher(self, batch: Batch, head: Head | None, last: Tensor) -> Tensor:
        if self.top_k is not None:
            return self._compare(batch, head, last, None, last)
        device = last.device.type
        half = torch.is_autocast_enabled(device)
        # inside of the student's forward pass, where its head is whole; so is the teacher's inside of its own
        with (
            torch.no_grad(),
            torch.autocast(device, torch.get_autocast_dtype(device), enabled=half, cache_enabled=False),
        ):
            compare = partial(self._compare, batch, head, last)
            found: Tensor = self._teacher[0].net(batch | {"with_head": compare})["with_head"]
        return found

    def _compare(
        self, batch: Batch, head: Head | None, last: Tensor, teacher_head: Head | None, teacher_last: Tensor
    ) -> Tensor:
        assert head is not None
        ce_share = last.new_full((len(batch["target_ids"]),), self.ce_share, dtype=torch.float32)
        if "own" in batch:
            ce_share = ce_share.masked_fill(batch["own"], 0.0)  # its own answers are no labels
        ce_sum, kd_sum = (torch.zeros((), device=last.device) for _ in range(2))

        def of_rows(rows: slice, logits: Tensor) -> Tensor:
            nonlocal ce_sum, kd_sum
            ce = F.cross_entropy(logits, batch["target_ids"][rows], reduction="none")
            if self.top_k is not None:
                ids = batch["teacher_ids"][rows].long()
                student = with_rest(self._log_p(logits[:, : self._shared]).gather(1, ids))
                teacher = with_rest(batch["teacher_log_p"][rows])
            else:
                with torch.no_grad():
                    theirs = _logits(teacher_head, teacher_last[rows], self._half)
                student, teacher = (self._log_p(x[:, : self._shared]) for x in (logits, theirs))
            kd = divergence(student, teacher, self.kind, self.share) * self.temperature**2
            ce_sum, kd_sum = ce_sum + ce.detach().sum(), kd_sum + kd.detach().sum()
            return ce_share[rows] * ce + (1 - ce_share[rows]) * kd

        module: Any = head.module
        with torch.enable_grad() if last.requires_grad else torch.no_grad():
            losses = linear_loss(
                last, module.weight, getattr(module, "bias", None), of_rows, scale=head.scale, softcap=head.softcap
            )
        self.measures.add("ce", ce_sum, len(losses))
        self.measures.add("divergence", kd_sum, len(losses))
        return losses


def _logits(head: Head | None, last: Tensor, dtype: torch.dtype) -> Tensor:
    return last.float() if head is None else head.logits(last, dtype)


def check_vocabularies(student: Any, teacher: Any, name: str, shared: int | None = None) -> None:
    """Refuse a teacher whose token ids mean something else, or that lacks some.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's.
        name: of the teacher.
        shared: tokens that both models have a logit for; one per cent of the tokens may have other names below that.

    Raises:
        UserError: how many differ, and one of them.
    """
    own, theirs = student.get_vocab(), teacher.get_vocab()
    differing = sorted(token for token, id in own.items() if theirs.get(token, id) != id)
    missing = [token for token in own if token not in theirs]
    beyond = [token for token in missing if shared is not None and own[token] >= shared]
    differing += beyond
    if differing or len(missing) > len(own) // 100:
        one = (differing or missing)[0]
        raise UserError(
            f"--model.teacher {name}: its vocabulary is another than the student's: "
            f"{len({*differing, *missing}):,} of {len(own):,} tokens differ, {one!r} for one\n"
            "mend: a teacher of the student's family"
        )
