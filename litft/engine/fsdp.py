"""FSDP2 under Trainer and under Fabric: where the processes' groups are made, and what is theirs of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy as FabricModelParallel
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from litft.engine import part_files
from litft.engine.background import load
from litft.engine.guard import global_norm, sum_partial
from litft.errors import UserError
from litft.models.mesh import Parallel, Sizes
from litft.models.parts import like, part_of


class _Shared:
    """What both have in common: the options, and the groups made of them.

    Args:
        tensor_parallel_size: processes that share each layer's products, on one machine.
        context_parallel_size: processes that share the tokens of each micro-batch, for very long rows.
        replicate: groups of processes that each hold all weights between them, such as one a machine (HSDP).
        cpu_offload: keep weights, gradients and the optimizer's states in the host's memory.
        reshard_after_forward: gather each layer again in the backward pass; false takes more memory and less exchange.
        hold_gradients: exchange gradients once an optimizer step and not once a micro-batch; takes their whole size.
        timeout_minutes: that processes wait for each other before the run ends.
    """

    world_size: int
    root_device: torch.device

    def __init__(
        self,
        tensor_parallel_size: int = 1,
        context_parallel_size: int = 1,
        replicate: int = 1,
        cpu_offload: bool = False,
        reshard_after_forward: bool = True,
        hold_gradients: bool = False,
        timeout_minutes: float = 30.0,
    ) -> None:
        self.tensor, self.context, self.replicate = tensor_parallel_size, context_parallel_size, replicate
        self.cpu_offload, self.reshard_after_forward = cpu_offload, reshard_after_forward
        self.hold_gradients, self.timeout = hold_gradients, timedelta(minutes=timeout_minutes)
        self._parallel: Parallel | None = None
        self._begin()

    def _begin(self) -> None:
        """Make Lightning's own strategy of it."""
        raise NotImplementedError

    @property
    def sizes(self) -> Sizes:
        """The groups' sizes.

        Raises:
            UserError: they don't divide the number of processes.
        """
        if self.timeout <= timedelta(0):
            raise UserError("--trainer.strategy.timeout_minutes: must be above 0")
        sizes = Sizes(self.world_size, self.tensor, self.context, self.replicate)
        sizes.check()
        return sizes

    @property
    def _backend(self) -> str:
        """Both kinds of exchange, where gradients lie in the host's memory beside a GPU."""
        return "cpu:gloo,cuda:nccl" if self.cpu_offload and self.root_device.type == "cuda" else ""

    @property
    def parallel(self) -> Parallel:
        """The groups; made at the first call, which every process makes."""
        if self._parallel is None:
            self._parallel = Parallel.make(
                self.sizes,
                self.root_device,
                cpu_offload=self.cpu_offload,
                hold_gradients=self.hold_gradients,
                reshard_after_forward=self.reshard_after_forward,
            )
        return self._parallel


class FSDP(_Shared, ModelParallelStrategy):
    """Weights, gradients and the optimizer's states cut over all processes (FSDP2), for Trainer."""

    def _begin(self) -> None:
        ModelParallelStrategy.__init__(self, timeout=self.timeout)

    def _get_process_group_backend(self) -> str:
        return self._backend or ModelParallelStrategy._get_process_group_backend(self)

    def setup_environment(self) -> None:
        """Meet the other processes; make the groups."""
        self._setup_distributed()
        self._device_mesh = self.parallel.weights
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """How rows are shared out; the plan has done that."""
        sizes = self.sizes
        return {"num_replicas": sizes.data, "rank": sizes.data_rank(self.global_rank)}

    def model_to_device(self) -> None:
        """Each weight is where it belongs since it was cut."""

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Wait with what need not be exchanged after each micro-batch.

        Gradients are cut up at once, since whole ones take memory, unless `hold_gradients` says otherwise; between
        groups that each hold all weights they are exchanged after the last one only.
        """
        net: Any = self.lightning_module.net  # type: ignore[union-attr]
        net.set_requires_all_reduce(False)
        net.set_requires_gradient_sync(not self.hold_gradients)
        try:
            yield
        finally:
            net.set_requires_all_reduce(True)
            net.set_requires_gradient_sync(True)

    # ---- checkpoints: every process has its part of what is trained, and hands that to the CheckpointIO

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """What is trained is read when the model is there, as by other strategies."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Trainer hands the optimizer its state, as by other strategies."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is trained, this process's part of each tensor."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's state, this process's part."""
        state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write this process's part."""
        options = storage_options or {}
        if "then" not in options:
            raise UserError(
                "a callback saves a checkpoint of its own, which --trainer.strategy fsdp can't\nmend: leave it out"
            )
        module: Any = self.lightning_module
        parts = part_files.take_apart(checkpoint, module.trained, self.optimizers)
        file = part_files.name_of(self.global_rank, self.world_size)
        options = options | {"parts": parts, "file": file, "alone": self.is_global_zero}
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint but for its tensors, of which each process reads what it needs."""
        torch.cuda.empty_cache()
        return load(Path(self.broadcast(checkpoint_path)))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the optimizers their state, where they keep it."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for index, state in saved["state"].items():
                shape = part_of(parameters[index]).shape
                for key, value in state.items():
                    if shape and tuple(getattr(value, "shape", ())) == shape:
                        state[key] = like(parameters[index], value)
            optimizer.load_state_dict(saved)


class FabricFSDP(_Shared, FabricModelParallel):
    """As `FSDP`, for Fabric: `method.build(precision, fabric.device, fabric.strategy.parallel)` cuts the model up."""

    def _begin(self) -> None:
        FabricModelParallel.__init__(self, parallelize_fn=_as_it_is, timeout=self.timeout)
        self._summed = False

    def _get_process_group_backend(self) -> str:
        return self._backend or FabricModelParallel._get_process_group_backend(self)

    def setup_environment(self) -> None:
        """Meet the other processes."""
        self._setup_distributed()
        self._device_mesh = self.parallel.weights

    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Any,
        max_norm: float | int,
        norm_type: float | int = 2.0,
        error_if_nonfinite: bool = True,
    ) -> Tensor:
        """Clip by the norm over all processes, the only kind there is; what `fabric.clip_gradients` calls."""
        parameters = [p for p in module.parameters() if p.grad is not None]
        sum_partial(parameters)
        self._summed = True
        norm = global_norm(parameters)
        if error_if_nonfinite and not torch.isfinite(norm):
            raise RuntimeError("the norm of the gradients is not finite")
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def optimizer_step(self, optimizer: Any, **kwargs: Any) -> Any:
        """The step, with whole gradients where nobody has clipped them."""
        if not self._summed:
            sum_partial([p for group in optimizer.param_groups for p in group["params"]])
        self._summed = False
        return super().optimizer_step(optimizer, **kwargs)


def _as_it_is(module: nn.Module, mesh: Any) -> nn.Module:
    return module
