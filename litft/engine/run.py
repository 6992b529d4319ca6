"""One fine-tuning run from its parts: plan, fit, the best weights, `final/`."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from litft.data.chat import ChatData
from litft.data.shown import describe
from litft.engine.background import load
from litft.engine.checkpoint_files import half_written, is_whole, newest_whole, step_of, tidy
from litft.engine.checkpoints import Checkpoints, in_parts
from litft.engine.console import Console
from litft.engine.identity import of
from litft.engine.metrics import MetricsCSV, StepMetrics, peak_memory_gb
from litft.engine.outcome import Outcome
from litft.engine.peers import Watch, dead_worker, watch
from litft.engine.rank_logs import redirect
from litft.engine.run_folder import RunFile
from litft.engine.samples import Samples
from litft.engine.signals import Signals, Stopped
from litft.engine.speed import speed_of
from litft.errors import Failed, UserError
from litft.methods.base import Method
from litft.methods.refusals import refuse
from litft.models import native
from litft.models.mesh import data_ranks
from litft.models.quiet import quiet

VALIDATIONS = 4  # during a run, where nothing is said


def plan(method: Method, data: ChatData, trainer: Trainer) -> dict[str, Any]:
    """Encode, plan, and count: what `--dry_run` shows. Does not load the model."""
    refuse(method, trainer)
    data.prepare(
        method,
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        pin_memory=trainer.strategy.root_device.type == "cuda",
        **data_ranks(trainer),
    )
    return data.summary() | {"model": method.path, "tuner": method.tuner.name, "lr": method.lr}


def check_validation(data: ChatData, val_every_n_steps: int | None, patience: int | None) -> None:
    """Refuse intervals that mean nothing, and patience with nothing to be patient for; `data` is planned.

    Raises:
        UserError: naming the flag.
    """
    if val_every_n_steps is not None and val_every_n_steps < 0:
        raise UserError(
            f"--val_every_n_steps {val_every_n_steps}: must be at least 0 (0: only before and after training)"
        )
    if patience is None:
        return
    if patience < 1:
        raise UserError(f"--patience {patience}: must be at least 1 validation; leave it out to train to the end")
    if not data.val_names:
        raise UserError(
            f"--patience {patience}: no rows are held out, so nothing says when to stop\n"
            "mend: --data.val FILE, or leave --patience out"
        )
    if val_every_n_steps == 0:
        raise UserError(
            f"--patience {patience}: --val_every_n_steps 0 validates only before and after training\n"
            "mend: leave one of them out"
        )


def model_line(method: Method) -> str:
    """What of the built model learns, and what its tuner left alone."""
    return f"model  {method.path}: {method.applied}"


class _Opening(Callback):
    """Says what learns once the model is built, and begins the run's files once its checkpoint has been accepted."""

    def __init__(self, folder: Path, begin: Callable[[], None], signals: Signals | None) -> None:
        self.folder, self.begin, self.signals, self.said = folder, begin, signals, False
        self.peers: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        if self.signals:
            self.signals.install()
        if not trainer.is_global_zero:  # by now the first process has made the folder, and all have met
            redirect(self.folder, trainer.global_rank, trainer.world_size)
        self.peers = self.peers or watch(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero:
            print(model_line(pl_module), flush=True)
            if pl_module.fast_loss and pl_module.net.head is None:
                print("       all logits are held at once: the model's head is none that the fast loss knows")
            if native.problem():
                print(f"       slower, and more memory: {native.problem()}")
            if pl_module.memory:
                print(pl_module.memory, flush=True)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._say(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._say(trainer, pl_module)
        self.begin()

    def _say(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and not self.said and str(pl_module.compiled):
            print(f"       {pl_module.compiled}", flush=True)
        self.said = True


def run(
    trainer: Trainer,
    method: Method,
    data: ChatData,
    folder: Path,
    *,
    resume: bool = False,
    val_every_n_steps: int | None = None,
    patience: int | None = None,
    log_every_n_steps: int | None = None,
    planned: dict[str, Any] | None = None,
    config: str = "",
    signals: Signals | None = None,
    allow_changed: Collection[str] = (),
) -> Outcome:
    """Train, and write `final/`.

    Args:
        trainer: with a `Checkpoints` and a `Samples` callback.
        method: what to train.
        data: on what.
        folder: the run folder.
        resume: go on from its newest checkpoint; begin where it has none yet.
        val_every_n_steps: optimizer steps between validations; four a run where None, 0 for before and after only.
        patience: validations without a better loss after which the run stops.
        log_every_n_steps: optimizer steps between records; about a hundred records a run where None.
        planned: of `plan`.
        config: the resolved configuration, kept as config.yaml.
        signals: handlers that wait for a checkpoint while training.
        allow_changed: what may have changed since the checkpoint gone on from, of `litft.engine.identity.PARTS`.

    Returns:
        Losses and answers before and after, and where the result lies.
    """
    planned = planned or plan(method, data, trainer)
    check_validation(data, val_every_n_steps, patience)
    checkpoint, damaged = _resume_point(folder, trainer, data.total_steps) if resume else (None, [])
    checkpoints, samples, metrics = _one(trainer, Checkpoints), _one(trainer, Samples), StepMetrics(log_every_n_steps)
    checkpoints.signals, checkpoints.allowed = signals, allow_changed
    checkpoints.folder = folder / "checkpoints"
    record: RunFile | None = None

    def begin() -> None:
        nonlocal record
        if record or not trainer.is_global_zero:
            return
        try:
            tidy(folder / "checkpoints", checkpoint, damaged)
            record = _begin(trainer, method, data, folder, planned, config, checkpoint)
        except OSError as error:
            raise Failed(f"{folder}: cannot be written: {error.strerror or error}") from error

    if checkpoint is None:  # there is nothing that a refusal could spoil, and a crash leaves a trace
        begin()
    opening = _Opening(folder, begin, signals)
    added: list[Any] = [
        opening,
        metrics,
    ]  # after what takes time to look (samples), before the checkpoint that closes a step
    if patience is not None:
        added.append(EarlyStopping("val_loss", patience=patience, check_on_train_epoch_end=False))
    at = trainer.callbacks.index(checkpoints)  # type: ignore[attr-defined]
    trainer.callbacks[at:at] = added  # type: ignore[attr-defined]
    every = val_every_n_steps if val_every_n_steps is not None else math.ceil(data.total_steps / VALIDATIONS)
    trainer.val_check_interval = every or sys.maxsize
    trainer.check_val_every_n_epoch = None
    since = step_of(checkpoint) if checkpoint else None
    trainer.loggers = [MetricsCSV(folder, since, method.measured), *trainer.loggers, Console(data.total_steps)]
    if signals:
        signals.training = True
        if trainer.num_nodes > 1:  # waits for the other machines, for half an hour and deaf to Python's handlers
            signals.release()
    try:
        trainer.fit(method, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        begin()  # a finished run has nothing to train
    except pickle.UnpicklingError:
        raise _more_than_data(checkpoint) from None
    except BaseException as error:
        reason = dead_worker(error) or (opening.peers.of(error) if opening.peers else None)
        ended = Failed(f"{reason} (after step {trainer.global_step})") if reason else error
        if record:
            text = str(ended).strip().partition("\n")[0]
            record.finish(f"{type(ended).__name__}: {text}", steps=trainer.global_step)
        if opening.peers:
            opening.peers.close(end=not isinstance(error, Stopped))
        if reason:
            raise ended from error
        raise
    if opening.peers:
        opening.peers.close()
    memory_gb = peak_memory_gb()  # before anything but training adds to it
    outcome = _finish(trainer, method, data, folder, checkpoints, metrics, patience)
    if trainer.is_global_zero:
        outcome.speed = speed_of(method, data, metrics, memory_gb, trainer.world_size)
    if not samples.questions:  # a finished run, resumed, trains no step
        samples.choose(trainer)
    if samples.questions:
        from litft.engine.samples import last_user

        after = samples.answer(method)
        before = samples.before or [""] * len(after)
        outcome.answers = list(zip(map(last_user, samples.questions), before, after, strict=True))
    if record:
        record.finish(
            "done",
            steps=trainer.global_step,
            losses_before=outcome.losses_before,
            losses_after=outcome.losses_after,
            final_step=outcome.final_step,
            final=outcome.why,
            stopped=outcome.stopped,
            bad_steps=metrics.bad_steps,
            **(outcome.speed.as_dict() if outcome.speed else {}),
            memory=method.memory.summary() if method.memory else None,
            answers=outcome.answers,
        )
    return outcome


def _resume_point(folder: Path, trainer: Trainer, total_steps: int) -> tuple[Path | None, list[Path]]:
    """The checkpoint to go on from and the damaged ones passed over, and lines about them.

    Raises:
        UserError: all are damaged.
    """
    told = in_parts(trainer) and not trainer.is_global_zero  # the first process's choice is broadcast
    file, damaged = newest_whole(folder / "checkpoints", check=not told)
    names = ", ".join(place.name for place in damaged)
    if file is None and damaged:
        raise UserError(
            f"{folder / 'checkpoints'}: nothing to go on from, every checkpoint is damaged ({names})\n"
            "mend: begin in another --out"
        )
    if file and step_of(file) > total_steps:
        raise UserError(
            f"--resume: the run has made {step_of(file)} steps already, this command asks for {total_steps}\n"
            "mend: raise --trainer.max_steps or --trainer.max_epochs, or leave them out"
        )
    if trainer.is_global_zero:
        if damaged:
            print(f"passed over, damaged: {names} (kept as damaged-...)", file=sys.stderr)
        for half in half_written(folder / "checkpoints"):
            print(f"passed over, only half written: {half.name}", file=sys.stderr)
        if file is None:
            print(f"{folder} has no checkpoint yet: beginning at its first step")
        else:
            print(f"going on from step {step_of(file)} of {total_steps} ({file.parent})")
    return file, damaged


def _more_than_data(file: Path | None) -> UserError:
    return UserError(
        f"{file}: holds more than plain data, as none that litft wrote does; it was not loaded\n"
        "mend: remove that checkpoint's folder, and --resume goes on from the one before it"
    )


def keep_config(folder: Path, config: str, step: int) -> None:
    """Write config.yaml; one that a resumed run has changed is kept beside it under the step it held to.

    Of several that followed each other at the same step, the first is what the steps until then were made with.
    """
    path, kept = folder / "config.yaml", folder / f"config-until-step-{step}.yaml"
    if not config or (path.exists() and path.read_text(encoding="utf-8") == config):
        return
    if path.exists() and not kept.exists():
        path.replace(kept)
    beside = path.with_name(".config.yaml.partial")
    beside.write_text(config, encoding="utf-8")
    beside.replace(path)


def _begin(
    trainer: Trainer,
    method: Method,
    data: ChatData,
    folder: Path,
    planned: dict[str, Any],
    config: str,
    resumed: Path | None,
) -> RunFile:
    folder.mkdir(parents=True, exist_ok=True)
    keep_config(folder, config, step_of(resumed) if resumed else 0)
    facts = {
        "plan": planned,
        "fingerprints": of(method, data),
        "rows": describe(data.selection, method.tokenizer),
        "precision": trainer.precision,
        "device": str(trainer.strategy.root_device),
        "devices": trainer.world_size,
        "resumed_from": str(resumed) if resumed else None,
    }
    return RunFile(folder, facts)


def _finish(
    trainer: Trainer,
    method: Method,
    data: ChatData,
    folder: Path,
    checkpoints: Checkpoints,
    metrics: StepMetrics,
    patience: int | None,
) -> Outcome:
    """Put the chosen weights into the model and write `final/`."""
    last, best, best_file = trainer.global_step, checkpoints.best, checkpoints.best_file()
    outcome = Outcome(folder, metrics.losses_before, metrics.losses_at.get(last, {}), last, f"the last, step {last}")
    outcome.scores = method.scores
    if best and best_file and checkpoints.final == "best":
        outcome.final_step, outcome.why = best[1], f"the best by val_loss, step {best[1]} of {last}"
        outcome.losses_after = metrics.losses_at.get(best[1], {"val_loss": best[0]})
        if best[1] != last:
            if not is_whole(best_file):
                raise Failed(
                    f"{best_file}: the checkpoint with the best weights is damaged\n"
                    "mend: the same command with --resume --checkpoint.final last takes those of the last step"
                )
            try:
                state = load(best_file)
            except pickle.UnpicklingError:
                raise _more_than_data(best_file) from None
            method.tuner.load_trainable_state(method.net.model, state["state_dict"])
    if last < data.total_steps:
        early = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
        if any(c.wait_count >= c.patience for c in early):
            reason = "val_loss got no better" + (f" (--patience {patience})" if patience else "")
        else:
            reason = "the Trainer was told to (--trainer.max_time, say)"
        outcome.stopped = f"stopped early, after step {last} of {data.total_steps}: {reason}"
    if trainer.is_global_zero or in_parts(trainer):
        with quiet():
            method.save(folder / "final", losses_before=outcome.losses_before, losses_after=outcome.losses_after)
    return outcome


def _one(trainer: Trainer, cls: Any) -> Any:
    found = [c for c in trainer.callbacks if isinstance(c, cls)]  # type: ignore[attr-defined]
    if not found:
        raise MisconfigurationException(f"the Trainer has no {cls.__name__} callback")
    return found[0]
