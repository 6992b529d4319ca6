"""What the arms on transformers share: loading, LoRA through PEFT, and a callback that keeps time."""

from __future__ import annotations

from typing import Any

from extensions.benchmark.job import Job, Recorder


def load(job: Job) -> Any:
    """The model in the type that the setting names, with PEFT's adapters for lora and qlora."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(job.seed)
    dtype = torch.bfloat16 if job.setting["dtype"] == "bf16-weights" or job.tuner != "full" else torch.float32
    if job.setting["dtype"] == "fp32":
        dtype = torch.float32
    options: dict[str, Any] = {}
    if job.tuner == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, **options).to(job.device)
    model.config.use_cache = False
    if job.tuner == "full":
        return model
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def arguments(job: Job) -> dict[str, Any]:
    """Training arguments that Trainer and TRL have in common."""
    batch = job.setting["batch"]
    return {
        "output_dir": "unused",
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": max(1, job.rows_per_step // batch),
        "max_steps": job.steps,
        "learning_rate": job.lr,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "bf16": job.setting["dtype"] == "bf16-mixed",
        "use_cpu": job.device == "cpu",
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length" if job.setting.get("grouped") else "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job.seed,
        "torch_compile": bool(job.setting.get("compile")),
    }


def dataset(recorder: Recorder) -> Any:
    """The rows as a data set."""
    from datasets import Dataset

    rows = [{"input_ids": ids, "labels": labels, "length": len(ids)} for ids, labels in recorder.rows]
    return Dataset.from_list(rows)


def clock(recorder: Recorder) -> Any:
    """A Trainer callback that times steps and keeps the losses logged."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            recorder.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            recorder.end()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                recorder.result.losses.append(float(logs["loss"]))

    return Clock()
