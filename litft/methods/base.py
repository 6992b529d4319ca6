"""What all methods share: the model and its tuner, the optimizer step, the guard, validation, checkpoints' contents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from litft.data.batch import Batch
from litft.data.loader import Step
from litft.data.plan import MicroBatch
from litft.engine.guard import clip_and_guard
from litft.engine.in_backward import StepInBackward
from litft.engine.memory import MemoryPlan, Sharing
from litft.engine.optimizers import build_optimizer
from litft.engine.precision import check_precision
from litft.engine.randomness import seed_step
from litft.engine.schedules import Name as ScheduleName
from litft.engine.schedules import StepSchedule, schedule
from litft.errors import UserError
from litft.methods.checks import check_arguments
from litft.methods.measures import Measures
from litft.methods.memory import plan_memory, ranks_of
from litft.methods.refusals import refuse
from litft.methods.validation import Validated
from litft.models.alias import DEFAULT_MODEL
from litft.models.compiled import Compiled
from litft.tuners import LoRA, Tuner
from litft.tuners.base import Applied, trainable_parameters

if TYPE_CHECKING:
    from litft.models.causal_lm import CausalLM
    from litft.models.mesh import Parallel

PARTS = (
    "--model.step_in_backward: needs whole gradients at once: one device, one micro-batch a step, no fp16\n"
    "mend: set --data.tokens_per_batch to --data.tokens_per_step, or leave it out"
)


class Method(Validated):
    """A fine-tuning method: subclass it and write `loss`.

    One Trainer batch is one optimizer step: a list of micro-batches, each run forward and backward in turn. So whatever
    counts batches (validation interval, schedules, checkpoints, `max_steps`) counts optimizer steps.

    Args:
        path: the model: a folder, an id on the hub, an adapter or a run to go on from, or `smollm2-135m-instruct`.
        tuner: which weights learn.
        lr: learning rate; the method's and tuner's own by default (SFT and distill: 2e-5 full, 2e-4 with adapters;
            ORPO 8e-6 and 5e-5, reward models 1e-5 and 1e-4, other preference methods 1e-6 and 5e-6).
        optimizer: adamw, adamw_8bit, paged_adamw_8bit, sgd, or a class path; `auto` is adamw, its moments in 8 bits
            where the run doesn't fit into memory otherwise.
        betas: decay rates of AdamW's moments.
        weight_decay: decoupled weight decay, on matrices only.
        schedule: how the learning rate falls after its warmup.
        warmup: steps of warmup, or a share of the run where below 1.
        min_lr: learning rate at the end.
        clip: greatest global norm of the gradient; 0 doesn't clip.
        compile: compile each decoder layer; `auto` where the run is long enough to earn the time it takes back.
        recompute: run layers again in the backward pass, for less memory and more time: none, all but matrix products
            and attention, all of them, or every n-th one; `auto` the cheapest that fits.
        offload: leave activations, or the layers' weights, in the host's memory; `auto` where nothing else fits.
        memory_gb: what the run may take; what is free on its device by default.
        add_tokens: give tokens of the chat template that the tokenizer lacks new, trained rows in the embedding.
        balance_experts: weight of the router's balance loss for mixtures of experts; the model's own by default, where
            it asks for that loss.
        step_in_backward: update each weight as soon as its gradient is there and drop that, for less memory; on one
            device, with one micro-batch a step and without clipping.
        max_bad_steps: optimizer steps with a non-finite loss or gradient that are skipped before the run stops; with
            step_in_backward only the weights with such gradients are.
        fast_attention: attention over packed documents by the fastest kernels; off, one plain call a document.
        fast_loss: the loss without ever holding all logits; off, the model's own logits and plain cross-entropy.
        fast_lora: adapters inside the products of the layers they adapt; off, products of their own.
        float8: products of the layers in float8, for full tuning of large models on recent GPUs (torchao).
        liger: Liger's kernels for norms and gates, on GPUs, in place of compiling.
        revision: of the model on the hub.
        trust_remote_code: run the Python code that a model folder brings. Only for models whose code you have read.
    """

    rows: ClassVar[str] = "chats"
    """What is trained on: `chats`, `pairs` of answers, or `labelled` answers."""
    dropout: ClassVar[bool] = True
    """Whether the model may drop activations out; not where its log-probabilities are compared with a reference's."""
    alike: ClassVar[bool] = True
    """Whether the loss weighs all trained tokens of a micro-batch alike, for which gradients come cheaper."""
    scores: ClassVar[bool] = False
    """Whether the model gives a number, in the place of the next token."""
    loss_settings: ClassVar[tuple[str, ...]] = ()
    """Names of the attributes that decide what the loss is; a run is gone on with by the same values only."""
    measured: ClassVar[tuple[str, ...]] = ()
    """Names of the figures that are measured beside the loss."""
    lrs: ClassVar[tuple[float, float] | None] = None
    """Default learning rates with adapters and in full tuning, where they aren't the tuner's own."""

    net: CausalLM
    applied: Applied
    compute_dtype: torch.dtype | None
    balance: float | None
    run_device: torch.device
    in_backward: StepInBackward
    parallel: Parallel | None

    def __init__(
        self,
        path: str = DEFAULT_MODEL,
        tuner: Tuner | None = None,
        lr: float | None = None,
        optimizer: str = "auto",
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        schedule: ScheduleName = "cosine",
        warmup: float = 0.03,
        min_lr: float = 0.0,
        clip: float = 1.0,
        compile: Literal["auto", "true", "false"] | bool = "auto",
        recompute: Literal["auto", "none", "selective", "full"] | int = "auto",
        offload: Literal["auto", "none", "activations", "parameters"] = "auto",
        memory_gb: float | None = None,
        add_tokens: bool = False,
        balance_experts: float | None = None,
        step_in_backward: bool = False,
        max_bad_steps: int = 10,
        fast_attention: bool = True,
        fast_loss: bool = True,
        fast_lora: bool = True,
        float8: bool = False,
        liger: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.path, self.revision, self.trust_remote_code = str(path), revision, trust_remote_code
        self.tuner = tuner if tuner is not None else LoRA()
        own = self.lrs[self.tuner.trains_base] if self.lrs else self.tuner.default_lr
        self.lr = lr if lr is not None else own
        self.optimizer_name, self.betas, self.weight_decay = optimizer, betas, weight_decay
        self.schedule_name, self.warmup, self.min_lr = schedule, warmup, min_lr
        self.clip, self.add_tokens = clip, add_tokens
        self.recompute, self.offload, self.memory_gb = recompute, offload, memory_gb
        self.balance_experts, self.max_bad_steps = balance_experts, max_bad_steps
        self.fast_attention, self.fast_loss, self.fast_lora = fast_attention, fast_loss, fast_lora
        self.compile_layers = str(compile).lower()
        self.float8, self.liger, self.step_in_backward = float8, liger, step_in_backward
        check_arguments(self)
        self.new_tokens: list[str] = []
        self.total_steps: int | None = None
        self.run_tokens: int | None = None
        self.micro_batch: MicroBatch | None = None
        self.memory: MemoryPlan | None = None
        self.sharing: Sharing | None = None  # by processes that aren't there: of a dry run
        self.offloaded, self.loading_bytes, self.resident_before = False, 0, 0.0
        self.beside = 0  # bytes of frozen models that the loss needs, on the same device
        self.compiled = Compiled()
        self.grad_norm: Tensor | None = None
        self.trained: list[tuple[str, torch.nn.Parameter]] = []
        self.mid_step = False  # whether weights have moved that belong to an optimizer step not yet done

    # ---- what a subclass writes

    def loss(self, batch: Batch) -> Tensor:
        """The loss of a micro-batch, such that those of an optimizer step's micro-batches add up to the step's.

        Args:
            batch: what `litft.data.batch` makes.
        """
        raise TypeError(f"{type(self).__name__} needs a loss(batch)")

    def probe(self, batch: Batch) -> Tensor:
        """A loss that computes and keeps what this method's does, for a batch of any documents."""
        return self.loss(batch)

    # ---- the model

    @property
    def distributions(self) -> int:
        """How many distributions over the vocabulary the loss compares at each target; 0 for a target's probability."""
        return 0

    @property
    def frozen_beside(self) -> list[str]:
        """Names of models that are kept beside the trained one, on the same devices: a reference, a teacher."""
        return []

    @cached_property
    def source(self) -> Any:
        """Where the model lies."""
        from litft.models.resolve import resolve

        trust = self.trust_remote_code
        return resolve(self.path, revision=self.revision, trust_remote_code=trust, scores=self.scores)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer; the data part may give it a chat template and new tokens."""
        from litft.models.load import load_tokenizer

        return load_tokenizer(self.source, trust_remote_code=self.trust_remote_code)

    @cached_property
    def config(self) -> Any:
        """The model's configuration."""
        from litft.models.load import load_config

        return load_config(self.source, trust_remote_code=self.trust_remote_code)

    @property
    def context_length(self) -> int | None:
        """Longest row that the model's positions reach."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def cannot_pack(self) -> str | None:
        """Why rows have to be padded for this model, or None where they can be packed."""
        from litft.models.load import can_pack

        return can_pack(self.config)

    def configure_model(self) -> None:
        """Load the model and apply the tuner, once; Trainer's hook."""
        check_precision(str(self.trainer.precision))
        if not hasattr(self, "net"):
            refuse(self, self.trainer)
            strategy: Any = self.trainer.strategy
            self.build(self.trainer.precision, strategy.root_device, getattr(strategy, "parallel", None))

    def build(
        self, precision: str = "32-true", device: torch.device | str = "cpu", parallel: Parallel | None = None
    ) -> Method:
        """Load the model and apply the tuner; what a Fabric script calls.

        Args:
            precision: Lightning's name; a frozen base is stored in its 16-bit type, what is trained in fp32.
            device: where the model will run.
            parallel: the processes that share its weights, of `litft.engine.fsdp`.

        Returns:
            Itself.
        """
        from litft.methods.building import build_model

        build_model(self, str(precision), torch.device(device), parallel)
        return self

    def on_fit_start(self) -> None:
        """Compile the layers, before anything has run; Trainer's hook."""
        with self.trainer.precision_plugin.forward_context():
            self.compile_if_worth()

    def compile_if_worth(self) -> None:
        """Compile the model's layers where that is asked for, or pays; the model is on its device.

        Raises:
            UserError: `compile: true` where it can't be.
        """
        from litft.methods.compiling import compile_if_worth

        compile_if_worth(self)

    def trainable_parameters(self) -> Iterator[torch.nn.Parameter]:
        """The parameters that learn."""
        return (p for p in self.net.parameters() if p.requires_grad)

    # ---- the optimizer step

    def configure_callbacks(self) -> list[Any]:
        """Records of logged steps, where the Trainer wasn't given a callback that makes them."""
        from litft.engine.metrics import StepMetrics

        trainer: Any = self.trainer
        given = any(isinstance(c, StepMetrics) for c in trainer.callbacks)
        return [StepMetrics()] if trainer.state.fn == "fit" and not given else []

    def setup(self, stage: str) -> None:
        """Take the length of the run from the plan."""
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            raise TypeError("hand the data to Trainer.fit as `datamodule`, not as loaders: the plan is part of it")
        self.take_plan(data)

    def take_plan(self, data: Any) -> None:
        """Take from the planned data how long the run is and how large its micro-batches are; for Fabric scripts."""
        self.total_steps, self.run_tokens = data.total_steps, data.total_tokens
        self.micro_batch = data.largest_micro_batch

    def configure_optimizers(self) -> Any:
        """The optimizer over what the tuner trains, and its schedule over the run's exact number of steps.

        The plan for the run's memory is made before, as the optimizer may be part of it.
        """
        if self.memory is None:
            self.memory = plan_memory(self)
            if self.optimizer_name == "auto":
                self.optimizer_name = "adamw_8bit" if self.memory and self.memory.choice.small_states else "adamw"
        groups = self.tuner.param_groups(self.net.model, self.lr, self.weight_decay)
        # torch has no fused SGD for cut-up weights
        fused = self.compute_dtype != torch.float16 and not (self.parallel and self.optimizer_name == "sgd")
        optimizer = build_optimizer(self.optimizer_name, groups, self.lr, self.betas, self.weight_decay, fused)
        if self.total_steps is None:
            raise RuntimeError("set total_steps (data.total_steps) before configure_optimizers")
        floor = self.min_lr / self.lr if self.lr else 0.0
        factor = schedule(self.schedule_name, self.total_steps, self.warmup, floor)
        if self.step_in_backward:
            whole = self.compute_dtype != torch.float16 and ranks_of(self) == 1
            if not whole or (self.micro_batch and self.micro_batch.several):
                raise UserError(PARTS)
            self.in_backward = StepInBackward(optimizer)
        return [optimizer], [{"scheduler": StepSchedule(optimizer, factor), "interval": "step"}]

    def on_train_start(self) -> None:
        """Note what is trained, as finding it takes time that each checkpoint would take; Trainer's hook."""
        self.trained = list(trainable_parameters(self.net.model))
        if self.offloaded:  # their optimizer's state, which Trainer has moved to the run's device, belongs beside them
            for parameter, state in self.optimizers(use_pl_optimizer=False).state.items():  # type: ignore[union-attr]
                state.update({k: v.to(parameter.device) for k, v in state.items() if isinstance(v, Tensor)})

    def begin_step(self, step: Step) -> None:
        """Tell a step's micro-batches what their losses have to know of each other; what a Fabric script calls."""
        batches = step["micro_batches"]
        self.measures = Measures()
        if (ahead := self.look_ahead(batches)) is not None:
            for batch, known in zip(batches, ahead, strict=True):
                batch["ahead"] = known

    def training_step(self, step: Step, batch_idx: int) -> dict[str, Tensor]:
        """One optimizer step: forward and backward over its micro-batches, clip, update, next learning rate.

        Returns:
            `loss`: this rank's share of the step's loss; the mean over the ranks is the step's.
        """
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        losses: list[Tensor] = []
        if self.step_in_backward and len(step["micro_batches"]) > 1:  # of a later epoch
            raise UserError(PARTS)

        def backward() -> None:
            seed_step(step["seed"])
            optimizer.zero_grad()
            self.begin_step(step)
            last = len(step["micro_batches"]) - 1
            for index, batch in enumerate(step["micro_batches"]):
                with self._gradient_sync(index == last):
                    loss = self.loss(batch)
                    self.manual_backward(loss)
                losses.append(loss.detach())

        self.mid_step = self.step_in_backward
        optimizer.step(closure=backward)
        scheduler.step()
        self.mid_step = False
        return {"loss": torch.stack(losses).sum()}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip, and keep a non-finite gradient away from the weights."""
        self.mid_step = True
        if self.step_in_backward:
            self.grad_norm = self.in_backward.norm()
        else:
            self.grad_norm = clip_and_guard(self.trainable_parameters(), optimizer, self.clip)

    @contextmanager
    def _gradient_sync(self, now: bool) -> Iterator[None]:
        """Hold the exchange of gradients back until the step's last micro-batch."""
        hold = getattr(self.trainer.strategy, "block_backward_sync", None)
        with nullcontext() if now or hold is None or self.trainer.world_size == 1 else hold():
            yield

    # ---- the result

    def save(
        self,
        folder: str | Path,
        *,
        losses_before: Mapping[str, float] | None = None,
        losses_after: Mapping[str, float] | None = None,
    ) -> Path:
        """Write what was trained as a plain model or PEFT adapter folder, with tokenizer, settings and model card.

        Args:
            folder: complete afterwards, or untouched; an older result there is replaced.
            losses_before: held-out losses for the card; those that the Trainer has recorded where None.
            losses_after: of the weights as they are now.
        """
        from litft.data.template import ChatEncoder
        from litft.export.card import base_of, model_card
        from litft.export.final import save_final
        from litft.methods.card import training_of

        stops = set(ChatEncoder(self.tokenizer).stop_ids) if self.tokenizer.chat_template else set()
        base, revision = self.source.base_name, self.source.revision
        training = training_of(self, losses_before, losses_after)
        return save_final(
            self.net.model,
            self.tuner,
            self.tokenizer,
            folder,
            base=base,
            revision=revision,
            stop_ids=stops,
            card=partial(model_card, base=base_of(self.source), training=training),
        )

    # ---- checkpoints: what is trained, never the frozen base

    strict_loading = False  # a checkpoint lacks the base; on_load_checkpoint checks what it must hold

    def state_dict(  # type: ignore[override]
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Tensor]:
        """What is trained, by its name in the model and detached: all that a checkpoint has to hold."""
        state = {name: p.detach() for name, p in self.trained} or self.tuner.trainable_state(self.net.model)
        found = {} if destination is None else destination
        found.update({prefix + name: tensor for name, tensor in state.items()})
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what made the optimizer's state."""
        checkpoint["optimizer"] = self.optimizer_name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load what is trained; a missing or unknown name is an error."""
        self.tuner.load_trainable_state(self.net.model, checkpoint["state_dict"])
        if self.optimizer_name == "auto":  # its state was made by this one
            self.optimizer_name = checkpoint.get("optimizer", "adamw")
