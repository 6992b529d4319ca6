"""transformers' Trainer, with PEFT for LoRA."""

from __future__ import annotations

from extensions.benchmark.arms import hf
from extensions.benchmark.job import Job, Recorder, Result

GRID = {
    "dtype": ["bf16-mixed", "bf16-weights", "fp32"],
    "batch": [8, 4, 2, 1],
    "grouped": [False, True],
}


def run(job: Job, recorder: Recorder) -> Result:
    """Train."""
    from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = hf.load(job)
    recorder.watch(model)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**hf.arguments(job)),
        train_dataset=hf.dataset(recorder),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(job.model), padding=True),
        callbacks=[hf.clock(recorder)],
    )
    trainer.train()
    return recorder.finish()
