"""DPO with LoRA by litft and by TRL, on the same pairs: speed and memory, or how good the held-out preferences get.

    python -m extensions.benchmark.preference race --data pairs.json
    python -m extensions.benchmark.preference quality --data pairs.json --method dpo --arms litft,trl --seeds 0 1 2
    python -m extensions.benchmark.preference quality --data labelled.json --method kto --seeds 0 1 2

Each arm runs in a process of its own. In a race TRL takes the fastest of its settings, tried first; then the arms take
turns A B B A over the same rows, and the first step of each is left out. Once the reference is asked in each step, and
once ahead of the training by both, which nobody's time counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from extensions.benchmark.job import _peak_gb

GRID = [("bf16", 4), ("bf16", 2), ("bf16", 1), ("fp32", 2)]
"""TRL's types and pairs a micro-batch."""
LORA = {"r": 16, "alpha": 32}


def pairs(source: str, model: str, longest: int) -> tuple[list[dict[str, Any]], list[int]]:
    """The pairs of a file whose documents have at most so many tokens, as messages, and the tokens of each pair."""
    from transformers import AutoTokenizer

    from litft.data.files import read_rows
    from litft.data.preferences import to_pair
    from litft.models.resolve import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(model).folder)
    rows, tokens = [], []
    for row in read_rows(source):
        pair = to_pair(row.value, row.file, row.line)
        both = pair.chosen.messages, pair.rejected.messages
        lengths = [len(tokenizer.apply_chat_template(messages, return_dict=False)) for messages in both]
        shared = next(i for i, (a, b) in enumerate(zip(*both, strict=False)) if a != b)
        if max(lengths) <= longest:
            chosen, rejected = (messages[shared:] for messages in both)
            rows.append({"prompt": both[0][:shared], "chosen": chosen, "rejected": rejected})
            tokens.append(sum(lengths))
    return rows, tokens


def labelled(source: str, model: str, longest: int) -> tuple[list[dict[str, Any]], list[int]]:
    """The labelled answers of a file that have at most so many tokens, and how many each has."""
    from transformers import AutoTokenizer

    from litft.models.resolve import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(model).folder)
    rows = json.loads(Path(source).read_text())
    lengths = [len(tokenizer.apply_chat_template(row["messages"], return_dict=False)) for row in rows]
    kept = [i for i, length in enumerate(lengths) if length <= longest]
    return [rows[i] for i in kept], [lengths[i] for i in kept]


# ---- the arms, each in a process of its own


def by_litft(job: dict[str, Any]) -> dict[str, Any]:
    """`litft finetune METHOD` as it runs by default, but for what the job says."""
    from lightning import Callback, Trainer, seed_everything

    import litft
    from litft.cli.finetune import _quiet
    from litft.cli.keys import METHODS

    _quiet()
    seed_everything(job["seed"], verbose=False)
    os.environ["PL_GLOBAL_SEED"] = str(job["seed"])
    kind = METHODS[job["method"]]
    cached = {"reference": "cached"} if job["setting"]["cached"] else {}
    options = {"schedule": "constant", "warmup": 0.0, "lr": job["lr"], **cached}
    method = getattr(litft, kind.method.removeprefix("litft."))(job["model"], litft.LoRA(**LORA), **options)
    limits = {"tokens_per_step": job["tokens_per_step"]} if job["tokens_per_step"] else {}
    data = getattr(litft, kind.data.removeprefix("litft."))(job["train"], val=job["val"], val_fraction=0.0, **limits)
    found: dict[str, Any] = {"seconds": [], "tokens": [], "losses": []}

    class Clock(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            found["start"] = time.perf_counter()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            found["losses"].append(float(outputs["loss"]))
            found["seconds"].append(time.perf_counter() - found["start"])
            found["tokens"].append(batch["tokens"])

    trainer = Trainer(
        accelerator="cpu",
        max_steps=job["steps"] or -1,
        max_epochs=job["epochs"],
        precision=job.get("precision", "bf16-mixed"),
        callbacks=[Clock()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    before = None
    if job["val"]:
        trainer.validate(method, datamodule=data, verbose=False)
        before = method.val_losses
    trainer.fit(method, datamodule=data)
    if job["val"]:
        trainer.validate(method, datamodule=data, verbose=False)
    return found | {"held_out": getattr(method, "val_losses", None), "before": before}


def by_trl(job: dict[str, Any]) -> dict[str, Any]:
    """TRL's DPOTrainer with PEFT."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.manual_seed(job["seed"])
    setting = job["setting"]
    half = setting["dtype"] == "bf16"
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16 if half else torch.float32)
    found: dict[str, Any] = {"seconds": [], "tokens": [], "losses": []}

    class Counted(DPOTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            found["tokens"][-1] += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args, **kwargs)

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            found["start"] = time.perf_counter()
            found["tokens"].append(0)

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            found["seconds"].append(time.perf_counter() - found["start"])

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                found["losses"].append(float(logs["loss"]))

    arguments = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=setting["batch"],
        per_device_eval_batch_size=setting["batch"],
        gradient_accumulation_steps=max(1, job["rows_per_step"] // setting["batch"]),
        max_steps=job["steps"] or -1,
        num_train_epochs=job["epochs"],
        learning_rate=job["lr"],
        lr_scheduler_type="constant",
        precompute_ref_log_probs=setting["cached"],
        max_length=None,
        bf16=half,
        use_cpu=True,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job["seed"],
    )
    read = {key: Dataset.from_list(json.loads(Path(job[key]).read_text())) for key in ("train", "val") if job[key]}
    trainer = Counted(
        model=model,
        args=arguments,
        train_dataset=read["train"],
        eval_dataset=read.get("val"),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(r=LORA["r"], lora_alpha=LORA["alpha"], target_modules="all-linear"),
        callbacks=[Clock()],
    )
    trainer.train()
    told = {}
    if job["val"]:
        kept = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
        told = {k.replace("eval_", "val_"): v for k, v in trainer.evaluate().items() if k in kept}
    return found | {"held_out": told}


ARMS = {"litft": by_litft, "trl": by_trl}


def run(arm: str, job: dict[str, Any]) -> dict[str, Any]:
    """An arm in a process of its own."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "extensions.benchmark.preference", "arm", "--job", json.dumps({**job, "arm": arm})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"{arm}: {done.stderr[-1500:]}")
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return found


def rate(found: dict[str, Any]) -> float:
    """Tokens a second, without padding: the median over the steps after the first."""
    return statistics.median(n / s for n, s in zip(found["tokens"][1:], found["seconds"][1:], strict=True))


def race(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The race against TRL at its best."""
    rows, tokens = pairs(args.data, args.model, args.longest)
    some = args.rows * (args.steps + 2)
    train = folder / "train.json"
    train.write_text(json.dumps(rows[:some]))
    mean = sum(tokens[:some]) / len(tokens[:some])
    job = {"method": "dpo", "model": args.folder, "train": str(train), "val": None, "lr": 5e-6, "seed": 0}
    job |= {"steps": args.steps, "rows_per_step": args.rows, "tokens_per_step": int(args.rows * mean)}
    job["epochs"] = 1
    report: dict[str, Any] = {"tokens of a pair": mean}
    for cached in (False, True):
        tried = []
        for dtype, batch in GRID:
            setting = {"dtype": dtype, "batch": batch, "cached": cached}
            found = run("trl", job | {"setting": setting, "steps": 3})
            tried.append(setting | {"tokens_per_s": rate(found), "peak_gb": found["peak_gb"]})
            print(f"    trl {setting}: {rate(found):.1f} tokens/s, peak {found['peak_gb']:.2f} GB", flush=True)
        best = max(tried, key=lambda one: one["tokens_per_s"])
        job["setting"] = {key: best[key] for key in ("dtype", "batch", "cached")}
        results: dict[str, list[dict[str, Any]]] = {"litft": [], "trl": []}
        for arm in ("litft", "trl", "trl", "litft"):
            results[arm].append(run(arm, job))
            last = results[arm][-1]
            print(f"{arm}: {rate(last):.1f} tokens/s, peak {last['peak_gb']:.2f} GB", flush=True)
        speed = {arm: statistics.median(map(rate, found)) for arm, found in results.items()}
        ratio = speed["litft"] / speed["trl"]
        print(f"reference {'cached' if cached else 'live'}: litft / trl {ratio:.2f}", flush=True)
        report["cached" if cached else "live"] = {"tried": tried, "results": results, "ratio": ratio}
    return report


def quality(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Held-out figures of several seeds; the last `--held_out` rows are held out."""
    rows, tokens = (labelled if args.method == "kto" else pairs)(args.data, args.model, args.longest)
    mean = sum(tokens) / len(tokens)
    cut = {"train": rows[: -args.held_out], "val": rows[-args.held_out :]}
    parts = {name: str(folder / f"{name}.json") for name in cut}
    for name, some in cut.items():
        Path(parts[name]).write_text(json.dumps(some))
    print(f"{len(cut['train'])} rows to train on, {len(cut['val'])} held out, {mean:.0f} tokens each", flush=True)
    job = {
        "method": args.method,
        "model": args.folder,
        "steps": args.steps,
        "lr": args.lr,
        "epochs": args.epochs,
        **parts,
    }
    job |= {"rows_per_step": args.rows, "tokens_per_step": int(args.rows * mean)}
    job["setting"] = {"dtype": "bf16", "batch": min(2, args.rows), "cached": False}
    table: dict[str, Any] = {}
    for arm in args.arms.split(","):
        table[arm] = []
        for seed in args.seeds:
            found = run(arm, job | {"seed": seed})
            table[arm].append({"seed": seed} | {k: found.get(k) for k in ("before", "held_out", "losses")})
            for when in ("before", "held_out"):
                shown = {k: round(v, 4) for k, v in (found.get(when) or {}).items() if "logps" not in k}
                print(f"{arm} seed {seed} {when}: {shown}", flush=True)
    return table


def main() -> None:
    """Race, compare, or be an arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["race", "quality", "arm"])
    parser.add_argument("--data")
    parser.add_argument("--method", default="dpo")
    parser.add_argument("--arms", default="litft")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--longest", type=int, default=512, help="tokens of a document")
    parser.add_argument("--rows", type=int, default=4, help="pairs of a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1, help="where --steps is 0")
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--held_out", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.what == "arm":
        job = json.loads(args.job)
        print("RESULT " + json.dumps(ARMS[job["arm"]](job) | {"peak_gb": _peak_gb()}))
        return
    from litft.models.resolve import resolve

    args.folder = str(resolve(args.model).folder)
    with tempfile.TemporaryDirectory() as folder:
        found = (race if args.what == "race" else quality)(args, Path(folder))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
