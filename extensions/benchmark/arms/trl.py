"""TRL's SFTTrainer, with PEFT for LoRA."""

from __future__ import annotations

from typing import Any

from extensions.benchmark.arms import hf
from extensions.benchmark.job import Job, Recorder, Result

GRID = {
    "dtype": ["bf16-mixed", "bf16-weights", "fp32"],
    "batch": [8, 4, 2, 1],
    "loss": ["nll", "chunked_nll"],
    "packing": [False, True],
    "grouped": [False, True],
}


def run(job: Job, recorder: Recorder) -> Result:
    """Train; packs are of `tokens_per_step / accumulation` tokens, so that a step reads as much as an unpacked one."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = hf.load(job)
    options: dict[str, Any] = hf.arguments(job) | {"loss_type": job.setting.get("loss", "nll"), "max_length": None}
    if job.setting.get("packing"):
        options |= {"packing": True, "packing_strategy": "bfd", "per_device_train_batch_size": 1}
        options |= {"gradient_accumulation_steps": 2, "max_length": job.tokens_per_step // 2}
    recorder.watch(model)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**options),
        train_dataset=hf.dataset(recorder).remove_columns([] if job.setting.get("grouped") else ["length"]),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        callbacks=[hf.clock(recorder)],
    )
    trainer.train()
    return recorder.finish()
