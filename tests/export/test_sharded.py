"""A sharded model is exported as if one process had held it."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IM_END, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from litft.export.final import save_final
from litft.tuners import Full

IDS = torch.tensor([[1, 50, 77, 200, 9, 31, 120, 2, 64, 5]])


FAMILIES = ("llama", "qwen2")  # untied, tied


def _export_sharded(rank: int, folder: Path) -> None:
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    rendezvous, patience = f"file://{folder}/rendezvous", timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=patience)
    mesh = init_device_mesh("cpu", (2,))
    for family in FAMILIES:
        model: Any = tiny_model(family)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        options: dict[str, Any] = {"base": "nowhere/at-all", "stop_ids": {IM_END}, "dtype": torch.float32}
        save_final(model, Full(), tiny_tokenizer(), folder / family, **options)
        distributed.barrier()
    distributed.destroy_process_group()


@pytest.mark.slow
def test_f5_f7_a_sharded_model_is_gathered_on_one_rank(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_export_sharded, (tmp_path,), nprocs=2)
    for family in FAMILIES:
        reloaded, expected = AutoModelForCausalLM.from_pretrained(tmp_path / family), tiny_model(family).eval()
        tied = family == "qwen2"
        assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) is tied
        assert reloaded.config.tie_word_embeddings is tied
        with torch.no_grad():
            torch.testing.assert_close(reloaded(IDS).logits, expected(IDS).logits, atol=0, rtol=0)
