"""How the processes of a run share the model, the rows and the tokens of a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from litft.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Sizes:
    """How many processes share what; neighbours in the innermost group first.

    Attributes:
        world: all processes.
        tensor: those that share each layer's products (tensor parallel); the innermost, on one machine.
        context: those that share the tokens of each micro-batch (context parallel).
        replicate: groups that each hold all weights.
    """

    world: int
    tensor: int = 1
    context: int = 1
    replicate: int = 1

    def check(self) -> None:
        """Refuse sizes that don't come out even.

        Raises:
            UserError: naming the flag.
        """
        names = {
            "tensor_parallel_size": self.tensor,
            "context_parallel_size": self.context,
            "replicate": self.replicate,
        }
        for name, size in names.items():
            if size < 1:
                raise UserError(f"--trainer.strategy.{name} {size}: must be at least 1")
        product = self.tensor * self.context * self.replicate
        if self.world % product:
            said = " x ".join(f"{name} {size}" for name, size in names.items() if size > 1)
            raise UserError(
                f"--trainer.strategy: {said} does not divide the run's {self.world} processes\n"
                "mend: other sizes, or another number of --trainer.devices"
            )

    @property
    def data(self) -> int:
        """Groups that have rows of their own."""
        return self.world // (self.tensor * self.context)

    def data_rank(self, rank: int) -> int:
        """The group that a process belongs to."""
        return rank // (self.tensor * self.context)

    @property
    def shard(self) -> int:
        """Processes over which each weight is cut; those that share the tokens of a row are among them."""
        return self.world // (self.tensor * self.replicate)


def data_ranks(trainer: Any) -> dict[str, int]:
    """`ranks`, how many groups of a Trainer's or Fabric's processes have rows of their own, and this one's `rank`."""
    sizes: Sizes | None = getattr(trainer.strategy, "sizes", None)
    if sizes is None:
        return {"ranks": trainer.world_size, "rank": trainer.global_rank}
    return {"ranks": sizes.data, "rank": sizes.data_rank(trainer.global_rank)}


@dataclass(frozen=True)
class Parallel:
    """The groups that this process belongs to, and how it shards.

    Attributes:
        sizes: of the groups.
        weights: mesh over all processes with the dimensions replicate, shard, tensor.
        tokens: mesh over all processes with the dimensions data, context, tensor.
        cpu_offload: weights, gradients and the optimizer's states lie in the host's memory.
        hold_gradients: gradients are exchanged once an optimizer step.
        reshard_after_forward: a layer's weights are let go after the forward pass and gathered again in the backward.
    """

    sizes: Sizes
    weights: DeviceMesh
    tokens: DeviceMesh
    cpu_offload: bool = False
    hold_gradients: bool = False
    reshard_after_forward: bool = True

    @classmethod
    def make(cls, sizes: Sizes, device: torch.device, **options: Any) -> Parallel:
        """Make the groups; every process calls this."""
        from torch.distributed.device_mesh import init_device_mesh

        weights = (sizes.replicate, sizes.shard, sizes.tensor)
        tokens = (sizes.data, sizes.context, sizes.tensor)
        return cls(
            sizes,
            init_device_mesh(device.type, weights, mesh_dim_names=("replicate", "shard", "tensor")),
            init_device_mesh(device.type, tokens, mesh_dim_names=("data", "context", "tensor")),
            **options,
        )

    @property
    def fsdp(self) -> DeviceMesh:
        """The mesh that weights are cut over."""
        return self.weights["replicate", "shard"] if self.sizes.replicate > 1 else self.weights["shard"]

    @property
    def tensor_group(self) -> Any:
        """The process group that shares products."""
        return self.weights.get_group("tensor")

    @property
    def context_group(self) -> Any:
        """The process group that shares tokens."""
        return self.tokens.get_group("context")

    def rank_in(self, name: str) -> int:
        """This process's number in its `replicate`, `shard`, `tensor`, `data` or `context` group."""
        mesh = self.weights if name in ("replicate", "shard", "tensor") else self.tokens
        return mesh.get_local_rank(name)
