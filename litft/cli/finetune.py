"""`litft finetune full|lora|qlora`: all keys of Trainer, model, data and checkpoints are flags and YAML keys."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from litft.cli import arguments
from litft.cli.checks import check_trainer
from litft.cli.keys import METHODS, SWITCHES
from litft.cli.readable import readable
from litft.engine.secrets import hide_yaml
from litft.engine.signals import Signals, Stopped
from litft.errors import Failed, UserError

FOLDER = "LITFT_RUN_FOLDER"
"""Where the first process of a run tells those it starts which folder it took."""


def main(argv: list[str]) -> int:
    """Run the verb; returns the exit code."""
    if argv and argv[0] in ("-h", "--help"):
        argv = ["lora", "--help"]
    if not argv or argv[0] not in METHODS:
        import difflib

        near = difflib.get_close_matches(argv[0], METHODS, n=1) if argv else []
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"litft finetune needs a method: {', '.join(METHODS)}{hint}\nmend: litft finetune lora --data FILE"
        )
    tuner = argv[0]
    words = arguments.expand(argv[1:], tuner)
    with Signals() as signals:
        try:
            if "--help" in words:
                print(HELP)
            signals.importing = True
            _quiet()
            try:
                cli = _parse(words, tuner)
            except SystemExit as done:  # --help and --print_config end in the parser
                return int(done.code or 0)
            finally:
                signals.importing = False
            return _run(cli, tuner, signals)
        except Stopped as stop:
            if _follows():
                return 0  # its first process says it; any other code and Lightning would kill that one
            to_do = f"; go on with: litft finetune {tuner} --out {stop.folder} --resume" if stop.folder else ""
            print(f"{stop}{to_do}", file=sys.stderr)
            return 128 + stop.number


def _run(cli: Any, tuner: str, signals: Signals) -> int:
    from litft.engine.checkpoint_files import newest, step_of
    from litft.engine.console import plan_lines
    from litft.engine.identity import parse_allowed
    from litft.engine.memory import lacks_memory
    from litft.engine.outcome import report
    from litft.engine.run import check_validation, model_line, plan, run
    from litft.engine.run_folder import discard
    from litft.methods.memory import sharing_of, ways_out
    from litft.report.page import report_of_run

    config, allowed = cli.config, parse_allowed(cli.config.allow_changed)
    if config.plan.devices is not None or config.plan.device_memory_gb is not None:
        return _plan_devices(cli)
    folder = _folder(config, tuner) if config.out and not config.dry_run else None
    trainer = _trainer(cli)
    planned = plan(cli.model, cli.datamodule, trainer)
    check_validation(cli.datamodule, config.val_every_n_steps, config.patience)
    signals.check()
    if config.dry_run:
        cli.model.trainer = trainer  # who knows of the other processes
        if sizes := getattr(trainer.strategy, "sizes", None):
            cli.model.sharing = sharing_of(trainer.strategy, sizes, sizes.tensor)
        cli.model.build(trainer.precision, trainer.strategy.root_device)
        cli.model.to(trainer.strategy.root_device)
        cli.model.take_plan(cli.datamodule)
        cli.model.configure_optimizers()
        applied, memory = cli.model.applied, cli.model.memory
        lines = [*plan_lines(planned), model_line(cli.model), *([str(memory)] if memory else [])]
        planned["memory"] = memory.summary() if memory else None
        planned |= {"trainable": applied.trainable, "parameters": applied.total, "precision": trainer.precision}
        planned["skipped_modules"] = applied.skipped
        print(json.dumps(planned, indent=2) if config.json else "\n".join(lines))
        return 0
    folder = folder or _folder(config, tuner)
    if trainer.world_size > 1:
        os.environ[FOLDER] = str(folder.absolute())
    if trainer.is_global_zero:
        print(
            f"run    {folder} ({trainer.precision} on {trainer.strategy.root_device})", *plan_lines(planned), sep="\n"
        )
    try:
        outcome = run(
            trainer,
            cli.model,
            cli.datamodule,
            folder,
            resume=config.resume,
            val_every_n_steps=config.val_every_n_steps,
            patience=config.patience,
            log_every_n_steps=config.trainer.log_every_n_steps,
            planned=planned,
            config=_resolved(cli, trainer),
            signals=signals,
            allow_changed=allowed,
        )
    except (Stopped, Exception) as error:
        kept = newest(folder / "checkpoints")
        nothing = not (kept or trainer.global_step)  # to keep: a run that trained leaves its metrics.csv
        if isinstance(error, (Stopped, Failed, UserError)) and nothing and not (config.resume or _follows()):
            discard(folder)
        elif trainer.is_global_zero:
            report_of_run(folder)
        if isinstance(error, UserError):
            raise
        if isinstance(error, Stopped):
            raise Stopped(error.number, error.step, folder if kept else None) from None
        where = f"on {trainer.strategy.root_device}, after step {trainer.global_step}"
        failed = Failed(f"out of memory {where}\n{ways_out(cli.model)}") if lacks_memory(error) else error
        if kept and not _follows():
            failed.add_note(f"{step_of(kept)} steps are kept: litft finetune {tuner} --out {folder} --resume goes on")
        if failed is error:
            raise
        raise failed from error
    if trainer.is_global_zero:
        page = report_of_run(folder)
        print(report(outcome, page))
    return 0


def _plan_devices(cli: Any) -> int:
    """Say how the run would fit on devices that aren't here."""
    from litft.methods.planning import plan_devices

    said, strategy = cli.config.plan, cli.config_init.trainer.strategy
    if said.devices is None or said.device_memory_gb is None or not cli.config.dry_run:
        raise UserError("--plan: needs all of --dry_run --plan.devices N --plan.device_memory_gb GB")
    own = strategy if hasattr(strategy, "tensor") else None
    found = plan_devices(cli.model, said.devices, said.device_memory_gb, cli.datamodule.tokens_per_batch, own)
    print(json.dumps(found.summary(), indent=2) if cli.config.json else found)
    return 0


def _follows() -> bool:
    """Whether another process leads this run."""
    from lightning.pytorch.utilities import rank_zero_only

    return bool(getattr(rank_zero_only, "rank", 0))


def _folder(config: Any, tuner: str) -> Path:
    """The run folder, taken by the first process of a run."""
    from litft.engine import run_folder

    if not _follows():
        return run_folder.claim(config.out, tuner, config.resume)
    if FOLDER not in os.environ and config.out is None:
        raise UserError("several processes that were started from outside need --out FOLDER to meet in")
    return Path(os.environ.get(FOLDER) or config.out)


def _trainer(cli: Any) -> Any:
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.callbacks import ProgressBar

    from litft.engine.console import Bar
    from litft.engine.precision import default_precision

    said, callbacks = cli.config.trainer, cli.config_init.trainer.callbacks or []
    callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
    bar = sys.stderr.isatty() if said.enable_progress_bar is None else said.enable_progress_bar
    if bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
        callbacks.append(Bar())
    processes = _started_outside() if (said.devices, said.num_nodes) == ("auto", 1) else {}
    if said.num_nodes > 1 and not _started_outside():
        raise UserError(
            f"--trainer.num_nodes {said.num_nodes}: the machines' processes have to be started by torchrun or Slurm\n"
            "mend: torchrun --nnodes N ... -m litft finetune ... on each (tutorials/many-devices.md)"
        )
    limits = {"max_epochs": 1} if said.max_epochs is None and said.max_steps == -1 else {}
    try:
        return cli.make_trainer(
            logger=cli.config_init.trainer.logger or False,
            precision=said.precision or default_precision(said.accelerator),
            enable_progress_bar=bar,
            callbacks=callbacks,
            **processes,
            **limits,
        )
    except (MisconfigurationException, ValueError, RuntimeError, TypeError) as error:
        text = " ".join(str(error).split())
        if said.accelerator not in ("auto", "cpu"):
            raise UserError(f"--trainer.accelerator {said.accelerator}: {text[:200]}\n{_devices()}") from error
        raise UserError(f"trainer: {text[:300]}") from error


def _started_outside() -> dict[str, Any]:
    """How many processes there are on each machine and how many machines, where torchrun or Slurm has started them."""
    from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

    if TorchElasticEnvironment.detect():
        here, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        return {"devices": here, "num_nodes": world // here}
    if SLURMEnvironment.detect() and int(os.environ["SLURM_NTASKS"]) > 1:
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return {"devices": int(os.environ["SLURM_NTASKS"]) // nodes, "num_nodes": nodes}
    return {}


def _devices() -> str:
    import torch

    count = torch.cuda.device_count()
    found = f"{count} CUDA GPUs" if count else "no CUDA GPU"
    return (
        f"this machine has {found} and {os.cpu_count()} CPU cores; torch {torch.__version__}\nmend: leave the flag out"
    )


def _resolved(cli: Any, trainer: Any) -> str:
    """The configuration with every default that this run's data and model have decided, as YAML that runs it again.

    Without secrets: those have to be said again.
    """
    config = cli.config.clone()
    for key in (*SWITCHES, "config", "out", "allow_changed", "plan"):
        config.pop(key, None)
    data = cli.datamodule
    config.trainer.precision = trainer.precision
    config.model.lr = cli.model.lr
    config.data.tokens_per_step, config.data.tokens_per_batch = data.tokens_per_step, data.tokens_per_batch
    config.data.max_length, config.data.date = data.limit, data.date
    return hide_yaml(cli.parser.dump(config, skip_none=False))


HELP = """\
usage: litft finetune METHOD --data FILE... [--model ID_OR_FOLDER] [--out FOLDER] [--config FILE_OR_NAME]
                             [--dry_run] [--json] [--resume] [--debug] [--GROUP.KEY VALUE ...]

METHOD: full, lora, qlora (on conversations); distill (beside a teacher); dpo, orpo, simpo, cpo, reward (on pairs of
answers); kto (on labelled answers). All but the first three take --model.tuner full|lora|qlora; see
tutorials/preferences.md.

short forms: --data FILE... is --data.train (several files are a mix), --model is --model.path; the tuner's options are
--model.tuner.r, .alpha, .dropout, .targets and so on. Every key below is a flag and a YAML key. Beside them,
--trainer.strategy fsdp has options of its own: --trainer.strategy.tensor_parallel_size, .context_parallel_size,
.replicate, .cpu_offload, .reshard_after_forward, .hold_gradients, .timeout_minutes (tutorials/many-devices.md).
"""


def _quiet() -> None:
    """Silence what the libraries say that no user of litft can act on."""
    warnings.filterwarnings("ignore", module="lightning")
    for message in (".*does not have many workers.*", ".*isinstance.treespec.*", ".*LeafSpec.*", ".*litlogger.*"):
        warnings.filterwarnings("ignore", message=message)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import lightning.pytorch  # noqa: F401 - sets its loggers' levels when imported

    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _parse(words: list[str], command: str) -> Any:
    """The command line's objects: a `LightningCLI` with `config`, `model` and `datamodule`; the Trainer comes later."""
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

    import litft
    from litft.engine.checkpoints import Checkpoints
    from litft.engine.samples import Samples

    class Unparsed(UserError):
        """What jsonargparse says, maybe of a parser within the parser."""

    class Parser(LightningArgumentParser):
        def error(self, message: str, ex: BaseException | None = None) -> Any:
            while ex is not None:  # what our own classes say of their options comes out as they say it
                if isinstance(ex, UserError) and not isinstance(ex, Unparsed):
                    raise UserError(str(ex)) from None
                ex = ex.__cause__ or ex.__context__
            raise Unparsed(message)

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
            parser.add_argument(
                "--allow_changed",
                type=str | None,
                default=None,
                help="With --resume: what may have changed since, of data,tokenizer,template,model,method,tuner.",
            )
            parser.add_argument(
                "--plan.devices",
                type=int | None,
                default=None,
                help="With --dry_run: say how the run would fit on so many GPUs; a config.json is all it needs.",
            )
            parser.add_argument(
                "--plan.device_memory_gb", type=float | None, default=None, help="Memory of each of those GPUs."
            )
            for name, text in SWITCHES.items():
                parser.add_argument(f"--{name}", action="store_true", help=text)

        def parse_arguments(self, parser: Any, args: Any) -> None:
            try:
                super().parse_arguments(parser, args)
            except Unparsed as error:
                raise UserError(readable(str(error))) from None
            check_trainer(self.config)

        def instantiate_classes(self) -> None:
            try:
                super().instantiate_classes()
            except (ImportError, ValueError) as error:  # a logger whose package isn't there, say
                raise UserError(readable(str(error))) from error

        def instantiate_trainer(self, **kwargs: Any) -> Any:  # the run folder has to be known first
            return None

        def make_trainer(self, **kwargs: Any) -> Any:
            return super().instantiate_trainer(**kwargs)

    method, data = (
        getattr(litft, name.rpartition(".")[2]) for name in (METHODS[command].method, METHODS[command].data)
    )
    return CLI(
        method,
        data,
        run=False,
        args=words,
        save_config_callback=None,
        seed_everything_default=42,
        auto_configure_optimizers=False,
        trainer_defaults={"num_sanity_val_steps": -1, "enable_model_summary": False},
        parser_kwargs={"allow_abbrev": False, "prog": f"litft finetune {command}"},
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
