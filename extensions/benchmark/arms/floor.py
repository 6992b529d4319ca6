"""No arm but the floor: the time of the products alone, in the shapes of litft's own micro-batches."""

from __future__ import annotations

from extensions.benchmark.job import Job, Recorder, Result


def run(job: Job, recorder: Recorder) -> Result:
    """Measure."""
    import torch

    from litft import SFT, Full, LoRA, QLoRA
    from litft.engine.floor import measure
    from litft.engine.precision import default_precision

    rows = recorder.rows
    lengths = [len(ids) for ids, _ in rows]
    trained = sum(label != -100 for _, labels in rows for label in labels[1:])
    tuner = {"full": Full, "lora": LoRA, "qlora": QLoRA}[job.tuner]
    method = SFT(job.model, tuner=tuner()).build(default_precision(job.device), job.device)
    model = method.net.to(job.device).model
    tokens = job.tokens_per_step
    attended = round(sum(n * n for n in lengths) / sum(lengths))
    floor = measure(model, tokens, round(tokens * trained / sum(lengths)), attended, torch.device(job.device))
    recorder.result.seconds, recorder.result.tokens = [floor.total], [tokens]
    found = recorder.finish(parts=floor.seconds, operations=floor.operations, peak=floor.peak, attended=attended)
    found.tokens = [tokens]
    return found
