"""`litft finetune full|lora|qlora`: every `trainer.*`, `model.*`, `data.*` and `checkpoint.*` key is a flag and a YAML key."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from litft.cli import arguments
from litft.errors import UserError

METHODS = ("full", "lora", "qlora")


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    if not argv or argv[0].startswith("-") or argv[0] not in METHODS:
        import difflib

        if argv and argv[0] in ("-h", "--help"):
            argv = ["lora", "--help"]
        else:
            near = difflib.get_close_matches(argv[0], METHODS, n=1) if argv else []
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"litft finetune needs a method: {', '.join(METHODS)}{hint}\nmend: litft finetune lora --data FILE"
            )
    tuner, argv = argv[0], argv[1:]
    if "--resume" in argv and "--out" in argv and not any(w.startswith("--config") for w in argv):
        saved = f"{argv[argv.index('--out') + 1]}/config.yaml"
        argv = ["--config", saved, *argv] if os.path.isfile(saved) else argv
    words = arguments.expand(argv, tuner)
    if "--help" in words:
        print(HELP)
    _quiet()
    return _run(_parse(words), tuner)


def _run(cli: Any, tuner: str) -> int:
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from litft.engine import run_folder
    from litft.engine.checkpoints import Stopped
    from litft.engine.console import plan_lines
    from litft.engine.metrics import BadLoss
    from litft.engine.run import plan, report, run

    config = cli.config
    folder = run_folder.claim(config.out, tuner, config.resume) if config.out and not config.dry_run else None
    try:
        trainer = cli.make_trainer(logger=config.trainer.logger or False)
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise UserError(f"trainer: {str(error).strip().splitlines()[0]}") from error
    planned = plan(cli.model, cli.datamodule, trainer)
    if config.dry_run:
        cli.model.build(trainer.precision, trainer.strategy.root_device)
        applied = cli.model.applied
        planned |= {"trainable": applied.trainable, "parameters": applied.total, "precision": trainer.precision}
        planned["skipped_modules"] = applied.skipped
        print(json.dumps(planned, indent=2) if config.json else "\n".join(plan_lines(planned)))
        return 0
    if folder is None:
        folder = run_folder.claim(None, tuner, config.resume)
    if trainer.is_global_zero:
        print(
            "\n".join(
                [f"run    {folder} ({trainer.precision} on {trainer.strategy.root_device})", *plan_lines(planned)]
            )
        )
    saved = config.clone()
    for key in (*SWITCH_HELP, "config"):
        saved.pop(key, None)
    try:
        with _signals(trainer):
            outcome = run(
                trainer,
                cli.model,
                cli.datamodule,
                folder,
                resume=config.resume,
                val_every_n_steps=config.val_every_n_steps,
                patience=config.patience,
                planned=planned,
                config=cli.parser.dump(saved, skip_none=False),
            )
    except Stopped as stop:
        print(f"{stop}; go on with: litft finetune {tuner} --out {folder} --resume", file=sys.stderr)
        return 128 + stop.number
    except BadLoss as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if trainer.is_global_zero:
        print(report(outcome))
    return 0


@contextlib.contextmanager
def _signals(trainer: Any) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run at the next step, after a checkpoint; a second Ctrl-C ends it at once."""
    from litft.engine.checkpoints import Checkpoints

    checkpoints = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))

    def note(number: int, frame: Any) -> None:
        if checkpoints.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        checkpoints.signal = number
        print(f"{signal.Signals(number).name}: stopping after this step", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


HELP = """\
usage: litft finetune full|lora|qlora --data FILE... [--model ID_OR_FOLDER] [--out FOLDER] [--config FILE_OR_NAME]
                                      [--dry_run] [--json] [--resume] [--debug] [--GROUP.KEY VALUE ...]

short forms: --data FILE... is --data.train (several files are a mix), --model is --model.path; the tuner's options are
--model.tuner.r, .alpha, .dropout, .targets and so on. Every key below is a flag and a YAML key.
"""


def _quiet() -> None:
    """Silence what the libraries say that no user of litft can act on."""
    warnings.filterwarnings("ignore", module="lightning")
    for message in (".*does not have many workers.*", ".*isinstance.treespec.*", ".*LeafSpec.*", ".*litlogger.*"):
        warnings.filterwarnings("ignore", message=message)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lightning.pytorch  # noqa: F401 - sets its loggers' levels when imported

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parse(words: list[str]) -> Any:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    from litft.data.chat import ChatData
    from litft.engine.checkpoints import Checkpoints
    from litft.engine.precision import default_precision
    from litft.engine.samples import Samples
    from litft.methods.sft import SFT

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            raise UserError(_readable(message))

    class CLI(LightningCLI):
        def init_parser(self, **kwargs: Any) -> Any:
            parser = Parser(**kwargs)
            parser.add_argument("-c", "--config", action="config", help="A YAML file, or a name in config_hub.")
            return parser

        def add_arguments_to_parser(self, parser: Any) -> None:
            parser.add_lightning_class_args(Checkpoints, "checkpoint")
            parser.add_lightning_class_args(Samples, "samples")
            parser.add_argument(
                "--out", type=str | None, default=None, help="The run folder; runs/NNNN-TUNER by default."
            )
            parser.add_argument(
                "--val_every_n_steps",
                type=int | None,
                default=None,
                help="Optimizer steps between validations; four a run by default, 0 for none but before and after.",
            )
            parser.add_argument(
                "--patience",
                type=int | None,
                default=None,
                help="Stop after so many validations without a better val_loss.",
            )
            for name, text in SWITCH_HELP.items():
                parser.add_argument(f"--{name}", action="store_true", help=text)

        def before_instantiate_classes(self) -> None:
            check_trainer(self.config)
            trainer = self.config.trainer
            if trainer.max_epochs is None and trainer.max_steps == -1:
                trainer.max_epochs = 1
            if trainer.enable_progress_bar is None:
                trainer.enable_progress_bar = sys.stderr.isatty()
            if self.config.trainer.precision is None:
                self.config.trainer.precision = default_precision(self.config.trainer.accelerator)

        def instantiate_trainer(self, **kwargs: Any) -> Any:  # the run folder has to be known first
            return None

        def make_trainer(self, **kwargs: Any) -> Any:
            return super().instantiate_trainer(**kwargs)

        def check_keys(self, words: list[str]) -> None:
            known = {key for key, _ in self.parser.get_defaults(skip_validation=True).items()}
            groups = {key.rpartition(".")[0] for key in known}
            tuner = next((w.partition("=")[2] for w in words if w.startswith("--model.tuner=")), "litft.LoRA")
            import litft

            cls = getattr(litft, tuner.rpartition(".")[2], None)
            options = set(inspect.signature(cls).parameters) if cls else set()
            arguments.check_keys(words, known | {"seed_everything"} | groups - {""}, options)

        def parse_arguments(self, parser: Any, args: Any) -> None:
            if "--help" not in words and "--print_config" not in words:
                self.check_keys(words)
            super().parse_arguments(parser, args)

    return CLI(
        SFT,
        ChatData,
        run=False,
        args=words,
        save_config_callback=None,
        seed_everything_default=42,
        trainer_defaults={"num_sanity_val_steps": -1, "enable_model_summary": False},
        parser_kwargs={"allow_abbrev": False, "prog": "litft finetune lora"},
    )


SWITCH_HELP = {
    "resume": "Go on from the newest complete checkpoint of --out.",
    "dry_run": "Do everything up to the first step and print the plan.",
    "json": "With --dry_run: the plan as JSON.",
}


def _readable(message: str) -> str:
    """The lines of jsonargparse's message that say what and where."""
    if "data.train" in message and ("required" in message or "Key" in message):
        return "no data: --data FILE is missing\nmend: litft finetune lora --data chats.jsonl"
    lines = [line.strip(" -") for line in message.splitlines() if line.strip()]
    return "\n".join(line[:200] for line in lines[:5])


def check_trainer(config: Any) -> None:
    """Refuse Trainer flags that would cut through planned steps, with what to set instead."""
    trainer = config.trainer
    instead = {
        "accumulate_grad_batches": (1, "it follows from data.tokens_per_step and data.tokens_per_batch; set those"),
        "gradient_clip_val": (None, "set model.clip"),
        "limit_train_batches": (None, "set trainer.max_steps"),
        "overfit_batches": (0.0, "make a file of the few rows and set trainer.max_epochs"),
        "fast_dev_run": (False, "set trainer.max_steps, or use --dry_run"),
        "val_check_interval": (None, "set --val_every_n_steps, in optimizer steps"),
        "check_val_every_n_epoch": (1, "set --val_every_n_steps, in optimizer steps"),
        "reload_dataloaders_every_n_epochs": (0, "the plan does that"),
    }
    for key, (default, mend) in instead.items():
        if trainer.get(key) != default:
            raise UserError(f"--trainer.{key} would cut through the planned optimizer steps; mend: {mend}")
    if "true" in str(trainer.precision) and not str(trainer.precision).startswith("32"):
        raise UserError(
            f"--trainer.precision {trainer.precision} rounds away what is learnt (updates below 2^-8 of a weight vanish)\n"
            "mend: bf16-mixed keeps what is trained in fp32 and computes in bf16"
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
