"""From a method's arguments to its model: loaded, with its tuner applied, and its loss head beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from litft.engine.room import resident
from litft.errors import UserError
from litft.methods.memory import keep_on_host
from litft.models import attention, native
from litft.models.causal_lm import CausalLM
from litft.models.cpu import keep_freed_memory
from litft.models.extras import use_float8, use_liger
from litft.models.head import find_head
from litft.models.load import add_rows, load_model
from litft.models.scorer import Scorer
from litft.models.shard import let_go, shard
from litft.models.skeleton import fill, skeleton
from litft.models.tensor_parallel import cut_up
from litft.tuners import LoRA, QLoRA, merge_adapter
from litft.tuners.low_rank import share_inputs
from litft.tuners.masters import spread_masters
from litft.tuners.quant import make_cuttable

if TYPE_CHECKING:
    from litft.methods.base import Method
    from litft.models.mesh import Parallel


def build_model(method: Method, precision: str, device: torch.device, parallel: Parallel | None = None) -> None:
    """Set `net`, and what is known once it is there.

    Args:
        method: whose model it is.
        precision: Lightning's name.
        device: where the model will run.
        parallel: the processes that share its weights.
    """
    method.run_device, method.resident_before = device, resident()
    if device.type == "cpu" and not native.use_arena():
        keep_freed_memory()
    method.compute_dtype = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.split("-")[0])
    masters = method.tuner.trains_base and method.optimizer_name != "adamw_bf16"
    dtype = torch.float32 if masters or method.compute_dtype is None else method.compute_dtype
    implementation = None
    if method.cannot_pack is None:
        half = method.compute_dtype is not None
        shared = parallel is not None and parallel.sizes.context > 1
        implementation = attention.best(method.config, device, half, method.fast_attention, shared)
    trusted = method.trust_remote_code
    options: Any = {"dtype": dtype, "attn_implementation": implementation, "trust_remote_code": trusted}
    if method.scores:
        options["scores"] = True
    bare = skeleton(method.source, **options) if parallel and not _needs_weights(method) else None
    model = bare[0] if bare else load_model(method.source, **options)
    if parallel and not bare and _is_first():
        print("       each process loads the whole model before it is cut up (tutorials/many-devices.md)", flush=True)
    if method.new_tokens:
        rows = add_rows(model, method.tokenizer, method.new_tokens)
        if isinstance(method.tuner, LoRA):
            method.tuner.trainable_rows = rows
    adapter = method.source.adapter
    embedding: Any = model.get_input_embeddings()
    if adapter is not None and len(method.tokenizer) > embedding.num_embeddings:
        model.resize_token_embeddings(len(method.tokenizer), mean_resizing=False)  # the adapter brings their rows
    if adapter is not None and isinstance(method.tuner, LoRA):  # go on with it
        method.tuner = method.tuner.continuing(adapter)
    elif adapter is not None:  # full tuning starts from what base and adapter are together
        merge_adapter(model, adapter)
    stored = sum(file.stat().st_size for file in method.source.folder.glob("*.safetensors"))
    method.loading_bytes = stored if dtype.itemsize > 2 else 0  # read through a map of the files, cast beside it
    if parallel:  # each process reads its own part, or all has to be there before it is cut up
        method.loading_bytes = 0 if bare else sum(p.numel() * p.element_size() for p in model.parameters())
    method.applied = method.tuner.apply(model)
    if adapter is not None and isinstance(method.tuner, LoRA):
        method.tuner.load(model, adapter)
    if method.float8:
        use_float8(model, device, method.tuner.trains_base)
    if method.liger:
        use_liger(model, device)
    model.train()
    routed = getattr(model.config, "router_aux_loss_coef", None)
    if method.balance_experts and routed is None:
        raise UserError(f"--model.balance_experts: {method.path} has no experts to balance")
    own = routed if getattr(model.config, "output_router_logits", False) else 0.0
    method.balance = own if method.balance_experts is None else method.balance_experts
    if parallel and parallel.sizes.context > 1 and method.balance:
        raise UserError(
            "--trainer.strategy.context_parallel_size: the model's configuration asks for its router's balance loss,"
            " which sees a part of each document\nmend: --model.balance_experts 0, or leave it out"
        )
    if not method.dropout and switch_off_dropout(model) and _is_first():
        print(f"       no dropout with {type(method).__name__}", flush=True)
    net: CausalLM = CausalLM(model, bool(method.balance), fast_loss=False, alike=method.alike)
    method.net = net = Scorer(model) if method.scores else net
    method.parallel = net.parallel = parallel
    if parallel and parallel.sizes.tensor > 1:
        cut_up(model, parallel)
    if parallel:
        make_cuttable(model)
        shard(net, parallel, method.compute_dtype)
    if bare and parallel:
        fill(model, bare[1], torch.device("cpu") if parallel.cpu_offload else device)
    if masters and method.compute_dtype is torch.bfloat16:
        spread_masters(model)
    half = parallel is not None and method.compute_dtype is not None  # in which layers are gathered
    try:
        with torch.autocast(device.type, method.compute_dtype, enabled=half):
            if method.fast_loss and not method.scores:
                net.head = find_head(model, net.logits)
            if method.fast_lora and isinstance(method.tuner, LoRA):
                share_inputs(model, net.logits)
    except (RuntimeError, KeyError) as error:  # a few families have the number of heads in their code
        if parallel is None or parallel.sizes.tensor == 1:
            raise
        kind, text = model.config.model_type, str(error).partition("\n")[0]
        raise UserError(
            f"--trainer.strategy.tensor_parallel_size: a {kind} can't be run with cut layers ({text})\n"
            "mend: leave it out"
        ) from error
    let_go(net)
    method.offloaded = parallel is None and keep_on_host(method, device)


def _is_first() -> bool:
    """Whether this process is the one that says things."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def switch_off_dropout(model: Any) -> bool:
    """Set every probability of dropout in a model to 0; whether one was above."""
    found = False
    for module in model.modules():
        names = ["p"] if isinstance(module, torch.nn.Dropout) else []
        names += [name for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
        for name in names:
            found |= getattr(module, name) > 0
            setattr(module, name, 0.0)
    return found


def _needs_weights(method: Method) -> bool:
    """Whether something is made of the whole weights before they are cut up."""
    tuner: Any = method.tuner
    if method.new_tokens or method.source.adapter or isinstance(tuner, QLoRA) or method.scores:
        return True
    if not isinstance(tuner, LoRA):
        return False
    own = tuner.modules_to_save or tuner.trainable_rows or tuner.target_parameters
    return bool(tuner.dora or own or tuner.init == "pissa")
