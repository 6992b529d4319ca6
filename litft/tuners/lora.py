"""LoRA: low-rank updates of a frozen model, in PEFT's file format."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from litft.errors import UserError
from litft.tuners.base import Applied, Tuner, logger, trainable_parameters

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class LoRA(Tuner):
    """Low-rank updates of a frozen model's linear layers (Hu et al. 2021, arXiv:2106.09685).

    Args:
        r: rank of the updates.
        alpha: strength; updates are scaled by alpha / r.
        dropout: probability of dropping an element of an adapter's input.
        targets: all-linear (every linear layer except heads and routers), module names or their endings, or a regex
            that matches whole names.
        rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).
        dora: learn the lengths of the weight's rows apart from their directions (arXiv:2402.09353).
        init: default (A uniform, B zero), gaussian (A normal, B zero), or pissa (the weight's largest singular
            directions, arXiv:2404.02948; saved as an adapter of rank 2r that fits the original model).
        lora_plus_ratio: learning rate of B over that of A (LoRA+, arXiv:2402.12354; try 16).
        target_parameters: endings of stacked expert weights to adapt too, such as mlp.experts.gate_up_proj.
        modules_to_save: modules that learn as a whole beside the updates, such as embed_tokens, lm_head. A new score
            or classification head always does.
        trainable_rows: ids of tokens whose embedding rows learn (newly added tokens), in the output head too.
        rank_pattern: other ranks for some modules: name ending (or regex of it) to rank.
        alpha_pattern: other alphas for some modules: name ending (or regex of it) to alpha.
    """

    name = "lora"
    default_lr = 2e-4
    trains_base = False

    def __init__(
        self,
        r: int = 16,
        alpha: float = 32,
        dropout: float = 0.0,
        targets: str | list[str] = "all-linear",
        rslora: bool = False,
        dora: bool = False,
        init: Literal["default", "gaussian", "pissa"] = "default",
        lora_plus_ratio: float | None = None,
        target_parameters: list[str] | None = None,
        modules_to_save: list[str] | None = None,
        trainable_rows: list[int] | None = None,
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
    ) -> None:
        self.r, self.alpha, self.dropout, self.targets = r, alpha, dropout, targets
        self.rslora, self.dora, self.init, self.lora_plus_ratio = rslora, dora, init, lora_plus_ratio
        self.target_parameters = list(target_parameters or [])
        self.modules_to_save = list(modules_to_save or [])
        self.trainable_rows = list(dict.fromkeys(trainable_rows or []))
        self.rank_pattern, self.alpha_pattern = dict(rank_pattern or {}), dict(alpha_pattern or {})
        for name, value in {"r": r, **self.rank_pattern}.items():
            if value < 1:
                raise UserError(f"the rank of an adapter is at least 1, {name} is {value}")
        if not 0 <= dropout < 1:
            raise UserError(f"dropout is a probability below 1, not {dropout}")
        if lora_plus_ratio is not None and lora_plus_ratio <= 0:
            raise UserError(f"lora_plus_ratio is a positive factor on the learning rate, not {lora_plus_ratio}")
        if dora and init == "pissa":
            raise UserError("dora and init: pissa do not go together: such an adapter can't be saved; use one of them")
        if self.target_parameters and (dropout or dora or init == "pissa"):
            raise UserError(
                "target_parameters adapts fused experts, which can't be combined with dropout, dora or init: pissa\n"
                "set dropout: 0, dora: false, init: default, or leave target_parameters out"
            )

    def apply(self, model: PreTrainedModel) -> Applied:
        """Freeze the model and put fp32 adapters around the targets, in place.

        Raises:
            UserError: nothing to adapt, a target that can't be adapted, or an adapter is there already.
        """
        from transformers import PreTrainedModel

        from litft.tuners import targets
        from litft.tuners.layers import Adapter, LoRAExperts, LoRALinear, TrainableRows, TrainedCopy

        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"a tuner is applied to the transformers model itself, not to a {type(model).__name__}")
        if any(isinstance(module, Adapter) for module in model.modules()):
            raise UserError("this model has an adapter already; merge it first, or load the base model afresh")
        total = sum(param.numel() for param in model.parameters())
        linears = targets.find_targets(model, self.targets) if self.targets else []
        experts = targets.find_parameters(model, self.target_parameters) if self.target_parameters else {}
        saved = self._modules_to_save(model)
        with_rows = self._modules_with_rows(model, saved)
        linears = [name for name in linears if not any(_inside(name, whole) for whole in saved)]
        if not linears and not experts:
            raise UserError("no module to adapt was found: name some with targets")
        adapted = [f"{owner}.{leaf}" for owner, leaves in experts.items() for leaf in leaves]
        self._check_patterns(linears + adapted)
        left = {name: size for name, size in targets.stacked_weights(model).items() if name not in adapted}

        model.requires_grad_(False)
        for name in linears:
            layer = model.get_submodule(name)
            adapter = LoRALinear(layer, self.rank_of(name), self.scale_of(name), self.dropout, self.dora, self.init)
            replace(model, name, adapter)
        for name, leaves in experts.items():
            ranks = {leaf: self.rank_of(f"{name}.{leaf}") for leaf in leaves}
            scales = {leaf: self.scale_of(f"{name}.{leaf}") for leaf in leaves}
            replace(model, name, LoRAExperts(model.get_submodule(name), ranks, scales, self.init))
        for name in saved:
            replace(model, name, TrainedCopy(model.get_submodule(name)))
        tied, shared = targets.is_tied(model), None
        for name in with_rows:
            rows = TrainableRows(model.get_submodule(name), self.trainable_rows, shared)
            replace(model, name, rows)
            shared = rows.trainable_tokens_delta if tied else None

        applied = Applied(
            trainable=sum(param.numel() for _, param in trainable_parameters(model)),
            total=total,
            matched=linears + adapted,
            whole=saved + [f"{len(self.trainable_rows)} rows of {name}" for name in with_rows],
            skipped=targets.summarise(left),
        )
        logger.info("%s: %s", self.name, applied)
        return applied

    def _modules_to_save(self, model: PreTrainedModel) -> list[str]:
        """Full names of the modules that learn as a whole, in model order."""
        from litft.tuners import targets

        wanted = self.modules_to_save + targets.new_heads(model)
        names: list[str] = []
        for name, _ in model.named_modules():
            if any(targets.has_ending(name, want) for want in wanted) and not any(_inside(name, n) for n in names):
                names.append(name)
        for want in self.modules_to_save:
            if not any(targets.has_ending(name, want) for name in names):
                raise UserError(f"modules_to_save: no module is called {want!r}")
        return names

    def _modules_with_rows(self, model: PreTrainedModel, saved: list[str]) -> list[str]:
        """Names of the embedding and then the head, if some of their rows learn."""
        if not self.trainable_rows:
            return []
        embedding = model.get_input_embeddings()
        size = embedding.weight.shape[0]  # type: ignore[index]
        if min(self.trainable_rows) < 0 or max(self.trainable_rows) >= size:
            raise UserError(
                f"trainable_rows: token {max(self.trainable_rows)} has no row, the model's vocabulary has {size}\n"
                "resize it first: model.resize_token_embeddings(len(tokenizer))"
            )
        names = {id(module): name for name, module in model.named_modules()}
        found = [names[id(module)] for module in (embedding, model.get_output_embeddings()) if module is not None]
        if clash := set(found) & set(saved):
            raise UserError(f"{clash.pop()} learns as a whole (modules_to_save): leave trainable_rows out")
        return found

    def _check_patterns(self, names: list[str]) -> None:
        from litft.tuners import targets

        for option, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for pattern in patterns:
                if not any(targets.matches_pattern(pattern, name) for name in names):
                    raise UserError(f"{option}: {pattern!r} is the ending of no adapted module, such as {names[0]}")

    def rank_of(self, name: str) -> int:
        """The rank of the update of the module or parameter called `name`."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def scale_of(self, name: str) -> float:
        """The factor on the update of the module or parameter called `name`."""
        r, alpha = self.rank_of(name), _by_pattern(self.alpha_pattern, name, self.alpha)
        return alpha / math.sqrt(r) if self.rslora else alpha / r

    def param_groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """As `Tuner.param_groups`.

        Raises:
            UserError: something cast the adapters to 16 bits since `apply` (Lightning's `bf16-true` does); most of
                their updates would be rounded away.
        """
        groups = super().param_groups(model, lr, weight_decay)
        for dtype in {param.dtype for group in groups for param in group["params"]}:
            if dtype.itemsize < 4:
                raise UserError(
                    f"the adapter was cast to {dtype}, in which small updates are lost\n"
                    "use precision bf16-mixed: it keeps the adapter in fp32 and computes in bf16"
                )
        return groups

    def lr_ratio(self, name: str) -> float:
        """LoRA+: the Bs learn faster."""
        return self.lora_plus_ratio if self.lora_plus_ratio and "lora_B" in name.split(".") else 1.0

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """Inside the context the model answers as before training; restored on exit, exceptions included."""
        from litft.tuners.layers import Adapter

        before = {module: module.enabled for module in model.modules() if isinstance(module, Adapter)}
        try:
            for module in before:
                module.enabled = False
            yield
        finally:
            for module, enabled in before.items():
                module.enabled = enabled

    def merge(self, model: PreTrainedModel) -> None:
        """Fold the adapters into the model's weights and take them off, in place; added in fp32, rounded once.

        If a module of a tied pair was trained on its own, the tie is cut and the configuration says so.

        Raises:
            UserError: the model is quantised; `merge_adapter` folds a saved adapter into the 16-bit one.
        """
        from litft.tuners import targets
        from litft.tuners.layers import Adapter
        from litft.tuners.quant import is_quantised

        adapters = [(name, module) for name, module in model.named_modules() if isinstance(module, Adapter)]
        if any(is_quantised(module) for module in model.modules() if not isinstance(module, Adapter)):
            raise UserError(
                "an adapter is not merged into a quantised model: rounding would undo part of it\n"
                "save it and merge it into the 16-bit model (litft.tuners.merge_adapter)"
            )
        for name, module in adapters:
            replace(model, name, module.merged())
        if getattr(model.config, "tie_word_embeddings", False) and not targets.is_tied(model):
            model.config.tie_word_embeddings = False

    def save(self, model: PreTrainedModel, folder: str | Path | None, base: str, revision: str | None = None) -> None:
        """Write adapter_config.json and adapter_model.safetensors as PEFT reads them.

        Args:
            model: the model with the adapter.
            folder: made if need be; None in a process that only takes part in gathering what is sharded.
            base: what the user calls the base model, an id or a folder; written as it is.
            revision: the base's revision on the hub.
        """
        from litft.tuners import peft_format

        peft_format.save(self, model, None if folder is None else Path(folder), base, revision)

    def load(self, model: PreTrainedModel, folder: str | Path) -> None:
        """Copy a saved adapter into a model that this tuner was applied to.

        Raises:
            UserError: the folder holds no adapter, a pickle, or tensors that do not fit.
        """
        from litft.tuners import peft_format

        peft_format.load(self, model, Path(folder))

    @classmethod
    def from_folder(cls, folder: str | Path, **options: Any) -> Self:
        """The tuner that fits a saved adapter; `apply` it to the base model, then `load` the folder.

        Args:
            folder: with adapter_config.json and adapter_model.safetensors, ours or PEFT's.
            options: arguments to set otherwise, those that files do not hold (`lora_plus_ratio`, `quant`).

        Raises:
            UserError: no such adapter, or it uses something that is not supported, by name.
        """
        from litft.tuners import peft_format

        return cls(**{**peft_format.tuner_options(Path(folder)), **options})

    def continuing(self, folder: str | Path) -> Self:
        """A tuner of this kind that goes on with a saved adapter: its shape, this one's way of training it.

        Raises:
            UserError: this tuner asks for another shape than the adapter has.
        """
        training = {"dropout": self.dropout} if self.dropout else {}
        saved = self.from_folder(folder, lora_plus_ratio=self.lora_plus_ratio, **training, **self._storage())
        default = type(self)()
        for key in ("r", "alpha", "targets", "rslora", "dora", "target_parameters", "modules_to_save"):
            asked, there = getattr(self, key), getattr(saved, key)
            if asked not in (getattr(default, key), there):
                raise UserError(
                    f"--model.tuner.{key} {asked}: the adapter in {folder} has {there} and is gone on with as it is\n"
                    "leave the option out, or start a new adapter from the base model"
                )
        return saved

    def _storage(self) -> dict[str, Any]:
        """Options that say how the base is stored, which files of adapters do not hold."""
        return {}


def merge_adapter(model: PreTrainedModel, folder: str | Path) -> None:
    """Fold a saved adapter into a freshly loaded (16-bit or fp32) model, in place; leaves a plain model.

    The way out of QLoRA as well: an adapter trained over a quantised model goes into the model before quantisation.
    """
    tuner = LoRA.from_folder(folder)
    tuner.apply(model)
    tuner.load(model, folder)
    tuner.merge(model)


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the module called `name` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _inside(name: str, whole: str) -> bool:
    return name == whole or name.startswith(f"{whole}.")


def _by_pattern(patterns: dict[str, Any], name: str, default: Any) -> Any:
    from litft.tuners.targets import matches_pattern

    return next((value for pattern, value in patterns.items() if matches_pattern(pattern, name)), default)
