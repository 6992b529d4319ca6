"""LitGPT's own recipes, `litgpt finetune lora` and `full`, on the same rows; its log is the clock.

It wants an environment of its own (`race --litgpt PYTHON`). Its schedule starts at nothing and decays, and its
gradients are not clipped: there are no settings for that, so the reference does the same. Its loss is a mean of
micro-batches' means.
"""

from __future__ import annotations

import csv
import json
import tempfile
from pathlib import Path
from typing import Any

from extensions.benchmark.job import Job, Recorder, Result

GRID = {
    "dtype": ["bf16-true", "bf16-mixed", "32-true"],
    "batch": [8, 4, 2, 1],
}


def run(job: Job, recorder: Recorder) -> Result:
    """Train."""
    from litgpt.args import EvalArgs, TrainArgs
    from litgpt.finetune import full, lora

    if job.tuner == "qlora" and job.device == "cpu":
        raise RuntimeError("LitGPT quantises on CUDA alone")
    micro = job.setting["batch"]
    accumulation = max(1, job.rows_per_step // micro)
    with tempfile.TemporaryDirectory() as folder:
        model, out = _converted(job, Path(folder) / "model"), Path(folder) / "out"
        options: dict[str, Any] = {
            "checkpoint_dir": model,
            "out_dir": out,
            "precision": job.setting["dtype"],
            "data": _rows(recorder, micro),
            "train": TrainArgs(
                save_interval=None,
                log_interval=1,
                global_batch_size=micro * accumulation,
                micro_batch_size=micro,
                lr_warmup_steps=1,
                max_steps=job.steps,
                epochs=1000,
            ),
            "eval": EvalArgs(
                interval=10**6, max_iters=1, max_new_tokens=1, initial_validation=False, final_validation=False
            ),
            "optimizer": {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": job.lr, "weight_decay": 0.0, "fused": True},
            },
            "logger_name": "csv",
            "seed": job.seed,
        }
        recipe = full.setup
        if job.tuner != "full":
            recipe = lora.setup
            parts = ("query", "key", "value", "projection", "mlp")
            options |= {f"lora_{part}": True for part in parts}
            options |= {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
            options |= {"quantize": "bnb.nf4-dq" if job.tuner == "qlora" else None}
        try:
            recipe(**options)
        except Exception:
            if len(_log(out)) < job.steps * accumulation:
                raise  # else it trained: merging adapters afterwards fails outside its command line
        lines = _log(out)
    rows = len(recorder.rows)
    recorder.result.clip = 0.0
    recorder.result.lrs = [0.0, *(float(line["learning_rate"]) for line in lines[accumulation - 1 :: accumulation])]
    for step in range(job.steps):
        window = lines[step * accumulation : (step + 1) * accumulation]
        first = step * micro * accumulation
        recorder.add(
            sum(float(line["iter_time"]) for line in window),
            float(window[-1]["loss"]),
            [i % rows for i in range(first, first + micro * accumulation)],
        )
    return recorder.finish()


def _log(out: Path) -> list[dict[str, str]]:
    """What it wrote of every micro-batch."""
    log = next(out.rglob("metrics.csv"), None)
    if log is None:
        return []
    with log.open() as file:
        return [line for line in csv.DictReader(file) if line.get("iter_time")]


def _converted(job: Job, folder: Path) -> Path:
    """The model as LitGPT keeps it; which of its configurations that is, the sizes say."""
    import shutil

    import torch
    from litgpt.config import configs
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint
    from safetensors.torch import load_file

    shutil.copytree(job.model, folder)
    config = json.loads((folder / "config.json").read_text())
    sizes = {
        "n_layer": config["num_hidden_layers"],
        "n_embd": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "padded_vocab_size": config["vocab_size"],
    }
    name = next((c["name"] for c in configs if all(c.get(k) == v for k, v in sizes.items())), None)
    if name is None:
        raise RuntimeError(f"LitGPT has no configuration of these sizes: {sizes}")
    weights: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        weights |= load_file(file)
        file.unlink()
    if config.get("tie_word_embeddings"):  # LitGPT ties nothing: the head gets a copy
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    torch.save(weights, folder / "pytorch_model.bin")
    convert_hf_checkpoint(folder, model_name=name)
    return folder


def _rows(recorder: Recorder, micro: int) -> Any:
    """The rows as one of LitGPT's data modules."""
    import torch
    from litgpt.data import DataModule, get_sft_collate_fn
    from litgpt.prompts import Default

    class Rows(DataModule):
        prompt_style = Default()

        def train_dataloader(self) -> Any:
            samples = [
                {
                    "input_ids": torch.tensor(ids),
                    "labels": torch.tensor(labels),
                    "token_counts": {"raw": len(ids), "raw_plus_prompt_template": len(ids)},
                }
                for ids, labels in recorder.rows
            ]
            return torch.utils.data.DataLoader(samples, batch_size=micro, collate_fn=get_sft_collate_fn())

        def val_dataloader(self) -> Any:
            return self.train_dataloader()

    return Rows()
