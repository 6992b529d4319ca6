"""Fine-tuning with a loop of your own: the parts of `litft finetune`, driven by Lightning Fabric.

    python extensions/fabric/finetune.py --data tutorials/data/quickstart.jsonl --devices 2 --strategy fsdp

Backward, clip, step and schedule stand in plain sight; change them. The losses are those of the command line.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from lightning import Fabric

import litft
from litft.cli.keys import METHODS, TUNERS
from litft.engine.fsdp import FabricFSDP
from litft.engine.precision import default_precision
from litft.engine.randomness import seed_step
from litft.models.mesh import data_ranks


def find(path: str) -> Any:
    """The class of that name in `litft`."""
    return getattr(litft, path.removeprefix("litft."))


def main(args: argparse.Namespace) -> list[float]:
    """Train and write OUT; returns the loss of each optimizer step."""
    precision = args.precision or default_precision()
    strategy = FabricFSDP() if args.strategy == "fsdp" else args.strategy
    fabric = Fabric(devices=args.devices, accelerator=args.accelerator, precision=precision, strategy=strategy)
    fabric.launch()
    fabric.seed_everything(args.seed)

    kind = METHODS[args.method]
    taught = {"teacher": args.teacher} if args.method == "distill" else {}
    method = find(kind.method)(args.model, find(TUNERS[args.tuner])(), lr=args.lr, **taught)
    data = find(kind.data)(args.data, tokens_per_step=args.tokens_per_step)
    with fabric.rank_zero_first():  # the first encodes, the others read its cache
        data.prepare(method, max_steps=args.max_steps, **data_ranks(fabric))
    method.take_plan(data)
    method.build(precision, fabric.device, getattr(fabric.strategy, "parallel", None))
    [optimizer], [schedule] = method.configure_optimizers()
    method, optimizer = fabric.setup_module(method), fabric.setup_optimizers(optimizer)
    method.mark_forward_method("loss")
    with fabric.autocast():
        method.module.compile_if_worth()  # where the run is long enough

    losses: list[float] = []
    for epoch in range(data.plan.locate(data.total_steps - 1)[0] + 1):
        for step in fabric.setup_dataloaders(data.train_dataloader(epoch, 0), use_distributed_sampler=False):
            seed_step(step["seed"])
            with fabric.autocast():
                method.module.begin_step(step)
            total = torch.zeros((), device=fabric.device)
            for index, batch in enumerate(step["micro_batches"]):
                with fabric.no_backward_sync(method, enabled=index < len(step["micro_batches"]) - 1):
                    loss = method.loss(batch)  # already divided by the counts of the whole step
                    fabric.backward(loss)
                total += loss.detach()
            fabric.clip_gradients(method, optimizer, max_norm=method.clip)
            optimizer.step()
            schedule["scheduler"].step()
            optimizer.zero_grad()
            losses.append(float(fabric.all_reduce(total, reduce_op="mean")))
            fabric.print(f"step {len(losses)}/{data.total_steps}  loss {losses[-1]:.6f}")
            if len(losses) == data.total_steps:
                break

    method.module.save(args.out)
    return losses


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--method", default="lora", choices=METHODS)  # lora is plain fine-tuning
    parser.add_argument("--teacher", default="", help="of distill")
    parser.add_argument("--tuner", default="lora", choices=TUNERS)
    parser.add_argument("--out", default="fabric-out")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--max_steps", type=int)
    parser.add_argument("--tokens_per_step", type=int)
    parser.add_argument("--precision")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args(words)


if __name__ == "__main__":
    main(parse())
