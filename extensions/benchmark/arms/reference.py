"""What the losses should be: fp32, one row at a time, plain transformers and PEFT, AdamW as everybody has it."""

from __future__ import annotations

from extensions.benchmark.arms import hf
from extensions.benchmark.job import Job, Recorder, Result


def run(job: Job, recorder: Recorder) -> Result:
    """Train on `job.groups`."""
    import torch

    job.setting = {"dtype": "fp32"}
    model = hf.load(job).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=0.0)
    for step, group in enumerate(job.groups):
        recorder.begin()
        count = sum(label != -100 for row in group for label in recorder.rows[row][1][1:])
        total = 0.0
        for row in group:
            ids, labels = (torch.tensor(x, device=job.device)[None] for x in recorder.rows[row])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum") / count
            loss.backward()
            total += float(loss)
        torch.nn.utils.clip_grad_norm_(trained, job.clip or float("inf"))
        optimizer.param_groups[0]["lr"] = job.lrs[step] if job.lrs else job.lr
        optimizer.step()
        optimizer.zero_grad()
        recorder.end(total, group)
    return recorder.finish()
