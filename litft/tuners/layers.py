"""The modules a tuner puts around the model's own. Each keeps what it wraps, frozen, as `base_layer`."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from litft.errors import UserError
from litft.tuners.low_rank import SharedInput
from litft.tuners.masters import spread_
from litft.tuners.quant import add_product, compute_dtype, is_quantised, weight_matrix

Init = Literal["default", "gaussian", "pissa"]


class Adapter(nn.Module):
    """A module that stands in for `base_layer` and answers like it when not `enabled`.

    Whatever it does not define itself (`in_features`, `num_experts`, ...) is looked up in the base layer.
    """

    base_layer: nn.Module
    enabled: bool

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.enabled = True
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not set yet: do not look for it in itself
                raise
            return getattr(self.base_layer, name)

    def merged(self) -> nn.Module:
        """The base layer with the adapter folded into its weights; in place."""
        raise NotImplementedError


class LoRALinear(Adapter):
    r"""A linear layer with a low-rank update: `y = W x + b + scale * B A x` (Hu et al. 2021, arXiv:2106.09685).

    With `dora`, the rows of the updated weight are set to a learnt length `m`
    (Liu et al. 2024, arXiv:2402.09353): `y = m / ||W + scale * B A|| * (W + scale * B A) x + b`, the norm taken over
    each output row and not differentiated (their section 4.3).

    `A` and `B` are fp32 whatever the base's dtype; the products run in the dtype the base layer answers in, or in
    autocast's.

    Args:
        base_layer: `nn.Linear`, GPT-2's `Conv1D`, or a quantised linear layer.
        r: rank.
        scale: factor on `B A`.
        dropout: probability of dropping an element of the adapter's input (not of the base layer's).
        dora: learn the row lengths too.
        init: `default`: A uniform (Kaiming, a=sqrt(5)), B zero; `gaussian`: A normal with deviation 1/r, B zero;
            `pissa`: the r largest singular directions of the weight, which are taken out of the base layer
            (Meng et al. 2024, arXiv:2404.02948).
    """

    initial_A: Tensor | None
    initial_B: Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        r: int,
        scale: float,
        dropout: float = 0.0,
        dora: bool = False,
        init: Init = "default",
    ) -> None:
        super().__init__(base_layer)
        weight = weight_matrix(base_layer)
        out_features, in_features = weight.shape
        self.r, self.scale, self.dropout = r, scale, dropout
        self.transposes = isinstance(base_layer, Conv1D)  # remembered: a quantised Conv1D is stored as a Linear
        device = torch.device("cpu") if weight.is_meta else weight.device  # a base without weights yet
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, dtype=torch.float32, device=device))
        # What PiSSA starts from. Needed for the model as it was, and for an adapter that fits the original base.
        self.register_buffer("initial_A", None, persistent=False)
        self.register_buffer("initial_B", None, persistent=False)
        if init == "pissa":
            self._split_off_principal_part()
        else:
            init_A(self.lora_A, r, init)
        self.lora_magnitude_vector: nn.Parameter | None = None
        if dora:
            lengths = torch.empty(out_features, device=device) if weight.is_meta else self.weight_norm()
            self.lora_magnitude_vector = nn.Parameter(lengths)
        self.shared: SharedInput | None = None  # computes this layer, where `share_inputs` has been called

    @property
    def fusable(self) -> bool:
        """Whether the fused operator can be this layer: it has nothing between its products."""
        return not self.transposes and not self.dropout and self.lora_magnitude_vector is None

    @torch.no_grad()
    def _split_off_principal_part(self) -> None:
        if is_quantised(self.base_layer):
            raise UserError("init: pissa needs the weights before quantisation: load the model in 16 bits")
        weight = weight_matrix(self.base_layer)
        if self.r > min(weight.shape):
            raise UserError(
                f"init: pissa: a weight of shape {tuple(weight.shape)} has fewer than r = {self.r} directions\n"
                f"use r: {min(weight.shape)} or less, or give such layers a smaller one with rank_pattern"
            )
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        root = torch.sqrt(s[: self.r] / self.scale)
        self.lora_A.copy_(root[:, None] * vh[: self.r])
        self.lora_B.copy_(u[:, : self.r] * root)
        self.initial_A, self.initial_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        weight.copy_(weight.float() - self.delta())  # in place: for Conv1D a view of the base layer's own

    def delta(self) -> Tensor:
        """`scale * B A` in fp32 (under autocast too), `(out_features, in_features)`."""
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.scale * self.lora_B.float() @ self.lora_A.float()

    @torch.no_grad()
    def weight_norm(self) -> Tensor:
        """Length of each row of `W + scale * B A` in fp32, `(out_features,)`."""
        return torch.linalg.vector_norm(weight_matrix(self.base_layer).float() + self.delta(), dim=1)

    @torch.no_grad()
    def reset_magnitude(self) -> None:
        """Take the row lengths from the weight as it is now, after it was quantised."""
        if self.lora_magnitude_vector is not None:
            self.lora_magnitude_vector.copy_(self.weight_norm())

    def full_weight(self) -> Tensor:
        """The weight this layer acts with, fp32, `(out_features, in_features)`; differentiable."""
        weight = weight_matrix(self.base_layer).float() + self.delta()
        if self.lora_magnitude_vector is not None:
            weight = (self.lora_magnitude_vector / self.weight_norm())[:, None] * weight
        return weight

    @property
    def weight(self) -> Tensor:
        """The weight this layer acts with, in the base layer's dtype and orientation (for a fused loss on a head)."""
        base: Tensor = self.base_layer.weight  # type: ignore[assignment]
        if self.enabled:
            weight = self.full_weight()
        elif self.initial_A is not None and self.initial_B is not None:
            weight = weight_matrix(self.base_layer).float() + self.scale * self.initial_B @ self.initial_A
        else:
            return base
        if base.is_floating_point():
            weight = weight.to(base.dtype)
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in_features)` to `(..., out_features)`."""
        if self.shared is not None and self.enabled:
            return self.shared(self, x)
        A: Tensor | None = self.lora_A if self.enabled else self.initial_A
        B: Tensor | None = self.lora_B if self.enabled else self.initial_B
        if A is None or B is None:
            return self.base_layer(x)  # switched off, and the base layer is whole; PiSSA's lacks what it took out
        x = x.to(compute_dtype(self.base_layer, x))
        seen = F.dropout(x, self.dropout, self.training and self.enabled)
        y = add_product(F.linear(F.linear(seen, A.to(x.dtype)) * self.scale, B.to(x.dtype)), x, self.base_layer)
        if self.lora_magnitude_vector is not None and self.enabled:
            # Lengths change by less than bf16 resolves, so they multiply in fp32.
            y = self.lora_magnitude_vector / self.weight_norm() * y
        bias: Tensor | None = self.base_layer.bias  # type: ignore[assignment]
        return (y if bias is None else y + bias).to(x.dtype)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base layer holding `full_weight`, added in fp32 and rounded once."""
        weight_matrix(self.base_layer).copy_(self.full_weight())
        return self.base_layer

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"r={self.r}, scale={self.scale:g}, dora={self.lora_magnitude_vector is not None}"


class LoRAExperts(Adapter):
    """Low-rank updates of stacked weights `(experts, ..., ...)` that a fused mixture-of-experts module owns.

    Every expert has its own rank-r pair. Shapes are those of PEFT's files: with `E` experts, `lora_A` is
    `(E * r, in)`, expert-major, and `lora_B` is `(out, r * E)`, rank-major. The module runs with the updated weights in
    the place of its own.

    Args:
        base_layer: the module, which stores `(E, out, in)`, or `(E, in, out)` if it says `is_transposed`.
        ranks: rank by parameter name.
        scales: factor on the update by parameter name.
        init: `default` or `gaussian`, as in `LoRALinear`.
    """

    def __init__(
        self, base_layer: nn.Module, ranks: dict[str, int], scales: dict[str, float], init: Init = "default"
    ) -> None:
        super().__init__(base_layer)
        self.scales = scales
        self.transposed = bool(getattr(base_layer, "is_transposed", False))
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        for name, r in ranks.items():
            weight = base_layer.get_parameter(name)
            experts, out_features, in_features = weight.shape
            if self.transposed:
                out_features, in_features = in_features, out_features
            self.lora_A[name] = torch.empty(experts * r, in_features, dtype=torch.float32, device=weight.device)
            self.lora_B[name] = torch.zeros(out_features, r * experts, dtype=torch.float32, device=weight.device)
            init_A(self.lora_A[name], r, init)

    def updated(self, name: str, dtype: torch.dtype) -> Tensor:
        """The stacked weights `name` with their update, computed in `dtype` (or in autocast's)."""
        weight = self.base_layer.get_parameter(name)
        A = self.lora_A[name].reshape(weight.shape[0], -1, self.lora_A[name].shape[1])  # (E, r, in)
        B = self.lora_B[name].reshape(self.lora_B[name].shape[0], -1, weight.shape[0]).permute(2, 0, 1)  # (E, out, r)
        left, right = (A.mT, B.mT) if self.transposed else (B, A)
        return torch.baddbmm(weight.to(dtype), left.to(dtype), right.to(dtype), alpha=self.scales[name])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer does, with the updated weights."""
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        weights = {name: self.updated(name, self.base_layer.get_parameter(name).dtype) for name in self.lora_A}
        return torch.func.functional_call(self.base_layer, weights, args, kwargs)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base layer holding the updated weights, added in fp32 and rounded once."""
        for name in self.lora_A:
            weight = self.base_layer.get_parameter(name)
            with torch.autocast(weight.device.type, enabled=False):
                weight.copy_(self.updated(name, torch.float32))
        return self.base_layer

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"scales={self.scales}"


class TrainedCopy(Adapter):
    """An fp32 copy of a whole module (a head, an embedding) that learns in its place.

    Args:
        base_layer: the module; stays as it was, so that the model before training can still be had.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        self.copy = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(param.detach().to(torch.float32, copy=True))
                for name, param in base_layer.named_parameters()
            }
        )
        for name, param in base_layer.named_parameters():
            if param.dtype == torch.bfloat16:
                spread_(self.copy[name.replace(".", "/")], name)

    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """The learning copies by the names they have in the base layer."""
        return {name.replace("/", "."): param for name, param in self.copy.items()}

    def _cast(self, name: str, param: Tensor) -> Tensor:
        return param.to(self.base_layer.get_parameter(name).dtype)

    @property
    def weight(self) -> Tensor:
        """The weight this layer acts with, in the base layer's dtype; differentiable."""
        return self._cast("weight", self.copy["weight"]) if self.enabled else self.base_layer.weight  # type: ignore[return-value]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer does, with the learning copies."""
        if not self.enabled:
            return self.base_layer(*args, **kwargs)
        weights = {name: self._cast(name, param) for name, param in self.parameters_by_name().items()}
        return torch.func.functional_call(self.base_layer, weights, args, kwargs)

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base layer with its own new parameters: a tie to another module is cut, not dragged along."""
        for name, param in self.parameters_by_name().items():
            owner, _, leaf = name.rpartition(".")
            new = nn.Parameter(self._cast(name, param.detach()).clone(), requires_grad=False)
            setattr(self.base_layer.get_submodule(owner), leaf, new)
        return self.base_layer


class TrainableRows(Adapter):
    """A few rows of an embedding, or of the output head, that learn: those of newly added tokens.

    Args:
        base_layer: `nn.Embedding`, or the head's `nn.Linear`.
        rows: token ids.
        shared: the learning rows of the embedding that this head is tied to.
    """

    rows: Tensor

    def __init__(self, base_layer: nn.Module, rows: list[int], shared: nn.Parameter | None = None) -> None:
        super().__init__(base_layer)
        weight: Tensor = base_layer.weight  # type: ignore[assignment]
        self.register_buffer("rows", torch.tensor(rows, device=weight.device), persistent=False)
        if shared is None:
            shared = nn.Parameter(weight.detach()[self.rows].to(torch.float32, copy=True))
            if weight.dtype == torch.bfloat16:
                spread_(shared, "rows")
        self.trainable_tokens_delta = shared  # PEFT's name; these are the rows themselves, not a difference

    @property
    def weight(self) -> Tensor:
        """The whole matrix with the learning rows in place, in the base layer's dtype; differentiable."""
        base: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return base.index_copy(0, self.rows, self.trainable_tokens_delta.to(base.dtype)) if self.enabled else base

    def forward(self, x: Tensor) -> Tensor:
        """Embed ids, or map hidden states to logits."""
        y = self.base_layer(x)
        if not self.enabled:
            return y
        rows = self.trainable_tokens_delta.to(y.dtype)
        if isinstance(self.base_layer, nn.Embedding):
            scale = getattr(self.base_layer, "embed_scale", None)  # Gemma multiplies inside its embedding
            rows = rows if scale is None else rows * torch.as_tensor(scale).to(rows)
            is_row = x.unsqueeze(-1) == self.rows  # (..., number of rows)
            found = F.embedding(is_row.to(torch.uint8).argmax(-1), rows)
            return torch.where(is_row.any(-1, keepdim=True), found, y)
        return y.index_copy(-1, self.rows, F.linear(x.to(y.dtype), rows).to(y.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Module:
        """The base layer with the learnt rows written into it; a tied head sees them too."""
        self.base_layer.weight[self.rows] = self.trainable_tokens_delta.to(self.base_layer.weight.dtype)  # type: ignore
        return self.base_layer


def init_A(A: Tensor, r: int, init: Init) -> None:
    """Fill `A`, `(..., in_features)`, as PEFT does; see `LoRALinear`."""
    if init == "gaussian":
        nn.init.normal_(A, std=1 / r)
    else:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
