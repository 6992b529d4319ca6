"""litft, as `litft finetune` runs it: Trainer, its own plan, and its defaults where the setting says nothing."""

from __future__ import annotations

from typing import Any

from extensions.benchmark.job import Job, Recorder, Result


def run(job: Job, recorder: Recorder) -> Result:
    """Train; the setting holds arguments of `SFT` and `ChatData` and a `precision`."""
    import os

    from lightning import Callback, Trainer, seed_everything

    from litft import SFT, ChatData, Full, LoRA, QLoRA
    from litft.cli.finetune import _quiet
    from litft.engine.precision import default_precision
    from litft.models import native
    from litft.models.compiled import recompilations

    _quiet()
    seed_everything(job.seed, verbose=False)
    os.environ["PL_GLOBAL_SEED"] = str(job.seed)
    setting = dict(job.setting)
    precision = setting.pop("precision", None) or default_precision(job.device)
    data_options = {k: setting.pop(k) for k in list(setting) if k in ("packing", "tokens_per_batch", "num_workers")}
    if not setting.pop("arena", True):  # memory as the C library handles it
        native.use_arena = lambda: True
    tuner = {"full": Full, "lora": LoRA, "qlora": QLoRA}[job.tuner]
    options: dict[str, Any] = {"schedule": "constant", "warmup": 0.0} | setting
    method = SFT(job.model, tuner=tuner(), lr=job.lr, **options)
    data = ChatData(job.source, val_fraction=0.0, tokens_per_step=job.tokens_per_step, **data_options)
    slots: list[int] = []

    class Clock(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            slots.append(sum(m["input_ids"].numel() for m in batch["micro_batches"]))
            recorder.begin()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            rows = [recorder.index[tuple(data.selection.read(i)[0].tolist())] for i in batch["rows"]]
            recorder.end(float(outputs["loss"]), rows)

    trainer = Trainer(
        accelerator="gpu" if job.device == "cuda" else "cpu",
        devices=1,
        max_steps=job.steps,
        precision=precision,
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(method, datamodule=data)
    return recorder.finish(
        slots=slots,
        predicted_gb=round(method.memory.total / 1e9, 2) if method.memory else None,
        precision=precision,
        compiled=method.compiled.layers,
        compile_s=method.compiled.seconds,
        recompilations=recompilations(),
        attention=method.net.model.config._attn_implementation,
        uncompiled=method.compiled.failed,
    )
