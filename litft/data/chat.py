"""`ChatData`: from chat files to planned optimizer steps, for Trainer and for Fabric."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from datetime import date as Day
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from filelock import FileLock
from lightning import LightningDataModule

from litft.data import hub, tokens
from litft.data.batch import Batch
from litft.data.conversation import Conversation
from litft.data.dated import writes_date
from litft.data.encoding import ENCODERS
from litft.data.files import named_files, read_rows
from litft.data.layout import lay_out
from litft.data.loader import Make, MicroBatches, StepLoader, Steps, Whole, make_batch
from litft.data.plan import MICRO_BATCH, MicroBatch, Plan, default_tokens_per_step, epoch_order, run_counts
from litft.data.progress import Progress
from litft.data.prompts import beginnings
from litft.data.rows import schema_of
from litft.data.selection import Selection, select, split_validation
from litft.data.template import ChatEncoder, find_template, missing_tokens
from litft.data.tokens import TokenStore
from litft.errors import UserError
from litft.models.alias import cache_dir
from litft.models.load import add_to_tokenizer
from litft.models.mesh import data_ranks

DEFAULT_MAX_LENGTH = 4096
TRAINERS_OWN_EPOCHS = 1000  # what Trainer takes where nothing is said


class ChatData(LightningDataModule):
    """Chat rows, encoded with the model's own chat template, masked, planned and packed.

    Args:
        train: training data: files (.jsonl, .json, .parquet, .csv, also .gz and .zst), folders or data set ids on the
            hub; several are a mix.
        val: held-out data: a file, or names and files (`{"gsm8k": "a.jsonl"}`), each with a loss of its own.
        val_fraction: share of the training rows held out where `val` is not given, at most 200 rows, none where there
            are under 20; rows with the same prompt stay on one side.
        weights: how many times an epoch uses the rows of each training file; 0.5 is a seeded half, anew each epoch.
        max_length: longest row in tokens; the smaller of 4096 and the model's context by default.
        overlong: what happens to longer rows: dropped, cut at the end, or an error.
        packing: whole documents share a row without seeing each other; off, rows are padded.
        train_on: which turns are trained: all of the assistant's, only the last one, or every token.
        bad_rows: a bad row is an error, or is skipped, counted and listed.
        chat_template: a Jinja file, or `chatml`, for a tokenizer that has no template or another one.
        date: the day (YYYY-MM-DD) that chat templates take for today's; the one that the run began on by default.
        allow_special_tokens: text of users, tools and the system that spells a control token becomes that token.
        tokens_per_batch: budget of one micro-batch on one rank; 4096 by default, or the longest row.
        tokens_per_step: budget of one optimizer step over all ranks; 16384 by default, less where the epochs would
            make fewer than 100 steps.
        seed: of the order of rows; that of the run by default.
        num_workers: processes that make batches; none on a CPU, 2 beside a GPU by default.
        revision: of data sets on the hub.
    """

    kinds: ClassVar[tuple[str, ...]] = ("chats",)
    """Of rows, which a method asks for one of: `chats`, `pairs` or `labelled`."""

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | dict[str, str] | None = None,
        val_fraction: float = 0.1,
        weights: list[float] | None = None,
        max_length: int | None = None,
        overlong: Literal["drop", "truncate", "error"] = "drop",
        packing: bool = True,
        train_on: Literal["assistant", "last", "all"] = "assistant",
        bad_rows: Literal["error", "skip"] = "error",
        chat_template: str | None = None,
        date: str | None = None,
        allow_special_tokens: bool = False,
        tokens_per_batch: int | None = None,
        tokens_per_step: int | None = None,
        seed: int | None = None,
        num_workers: int | None = None,
        revision: str | None = None,
    ) -> None:
        super().__init__()
        self.train_files = [train] if isinstance(train, str) else list(train)
        self.val_files = named_files(val)
        if odd := [name for name in self.val_files if not re.fullmatch(r"(?!\.*$)[^/\\\x00-\x1f]+", name)]:
            raise UserError(f"--data.val: {odd[0]!r} is no name for a set of rows; mend: leave out slashes")
        self.val_fraction, self.weights = val_fraction, weights
        self.max_length, self.overlong = max_length, overlong
        self.packing, self.train_on, self.bad_rows = packing, train_on, bad_rows
        self.chat_template, self.allow_special_tokens, self.date = chat_template, allow_special_tokens, date
        self.tokens_per_batch, self.tokens_per_step = tokens_per_batch, tokens_per_step
        self.seed, self.num_workers, self.revision = seed, num_workers, revision
        if weights is not None and (len(weights) != len(self.train_files) or min(weights) < 0 or max(weights) == 0):
            raise UserError(f"--data.weights: {weights} for {len(self.train_files)} files; give one number >= 0 a file")
        if date is not None and not _is_day(date):
            raise UserError(f"--data.date {date}: is no day; write it as {Day.today().isoformat()}")
        limits = {"max_length": max_length, "tokens_per_batch": tokens_per_batch, "tokens_per_step": tokens_per_step}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise UserError(f"--data.{name} {value}: must be at least 1")
        if not 0 <= val_fraction < 1:
            raise UserError(f"--data.val_fraction {val_fraction}: must be at least 0 and below 1")
        self.plan: Plan | None = None
        self._prepared_for: tuple[Any, ...] | None = None
        self._encoded_for: Any = None
        self._content: dict[str, str] = {}  # hash of each file

    # ---- preparing: under Trainer by its hooks, under Fabric by one call

    def prepare_data(self) -> None:
        """Encode all files on one process a node; the others read the cache."""
        self._stores(self.trainer.lightning_module)  # type: ignore[union-attr]

    def setup(self, stage: str) -> None:
        """Plan the run from the Trainer's limits and the model's needs."""
        trainer: Any = self.trainer
        if stage == "fit":
            _check_limits(trainer)
        elif self.plan is not None:  # validation after training: nothing is planned anew
            return
        self.prepare(
            trainer.lightning_module,
            max_epochs=trainer.max_epochs if stage == "fit" else 1,
            max_steps=trainer.max_steps if stage == "fit" else None,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            **data_ranks(trainer),
        )
        trainer.reload_dataloaders_every_n_epochs = 1  # epochs may differ in their number of steps

    def prepare(
        self,
        method: Any,
        *,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        ranks: int = 1,
        rank: int = 0,
        pin_memory: bool = False,
    ) -> ChatData:
        """Encode and plan everything; what a Fabric script calls.

        Args:
            method: the method that will train; its tokenizer, context length and whether it can pack are asked.
            max_epochs: epochs of the run; one where neither limit is given.
            max_steps: optimizer steps of the run.
            ranks: number of data-parallel processes.
            rank: which of them this is.
            pin_memory: for asynchronous copies to a GPU.

        Returns:
            Itself.
        """
        if method.rows not in self.kinds:
            raise TypeError(f"{type(method).__name__} is trained on {method.rows}: {type(self).__name__} has none")
        wanted = (method, self.run_seed, max_epochs, max_steps, ranks, rank, pin_memory)
        if self.plan is not None and wanted == self._prepared_for:
            return self
        self._prepared_for = wanted
        self._rank, self._pin = rank, pin_memory
        self._pad_id = method.tokenizer.pad_token_id or 0
        self.cannot_pack: str | None = method.cannot_pack if self.packing else None
        packing = self.packing and self.cannot_pack is None
        train, val = self._stores(method)
        limit = min(n for n in (self.max_length or DEFAULT_MAX_LENGTH, method.context_length) if n)
        self.limit = limit
        self.selection: Selection = select(train, limit, self.overlong, "train")
        self.val_selections = {name: select([store], limit, self.overlong, name) for name, store in val.items()}
        if not val and self.val_fraction:
            self.selection, held_out = split_validation(self.selection, self.val_fraction)
            if len(held_out):
                self.val_selections = {"val": held_out}
        chosen = self.selection
        longest = max(int(s.lengths.max()) for s in (chosen, *self.val_selections.values()))
        if self.tokens_per_batch is None:
            self.tokens_per_batch = max(MICRO_BATCH, longest)
        if longest > self.tokens_per_batch:
            raise UserError(
                f"--data.tokens_per_batch {self.tokens_per_batch}: the longest row has {longest} tokens\n"
                f"mend: raise it, or set --data.max_length {self.tokens_per_batch} (longer rows are then dropped)"
            )
        weights = self.weights or [1.0] * len(train)
        if self.tokens_per_step is None:
            order = epoch_order(chosen.file_of_row, weights, self.run_seed, 0)
            self.tokens_per_step = default_tokens_per_step(order, chosen.lengths, max_epochs)
        self.plan = Plan(
            chosen.lengths,
            chosen.trained,
            chosen.file_of_row,
            weights,
            self.run_seed,
            self.tokens_per_step,
            self.tokens_per_batch,
            ranks,
            packing,
        )
        self.total_steps = self.plan.total_steps(max_epochs, max_steps)
        if not self.total_steps:
            raise UserError(
                "nothing to train: the run would have no steps; check --data, --data.weights and the limits"
            )
        return self

    @property
    def total_tokens(self) -> int:
        """Tokens that the run reads, nearly: whole epochs are counted, the last one by its share of steps."""
        plan = self._planned()
        epoch, index = plan.locate(self.total_steps - 1)
        tokens = int(plan.lengths[epoch_order(plan.file_of_row, plan.weights, plan.seed, 0)].sum())
        return round(tokens * (epoch + (index + 1) / len(plan.steps(epoch))))

    @property
    def largest_micro_batch(self) -> MicroBatch:
        """What a run has to have memory for."""
        return self._planned().largest_micro_batch()

    @property
    def run_seed(self) -> int:
        """`seed`, or the one that `seed_everything` has set, or 0."""
        return self.seed if self.seed is not None else int(os.environ.get("PL_GLOBAL_SEED", 0))

    @property
    def fingerprint(self) -> str:
        """Identifies what was asked for: the files' content, what is chosen of it, and how it is grouped into steps."""
        plan = self._planned()
        keys = ("date", "val_fraction", "limit", "overlong", "train_on", "bad_rows", "allow_special_tokens")
        chosen = [getattr(self, key) for key in keys]
        files = [[self._content[source] for source in some] for some in (self.train_files, self.val_files.values())]
        return tokens.cache_key(files, chosen, list(plan.weights), plan.seed, plan.tokens_per_step)

    @property
    def plan_fingerprint(self) -> str:
        """Identifies what came of it: the rows' tokens, their order and their steps; not how steps are cut."""
        plan = self._planned()
        rows = [plan.lengths.tolist(), plan.trained.tolist(), plan.file_of_row.tolist(), list(plan.weights)]
        content = [store.digest for store in self.selection.stores]
        return tokens.cache_key(rows, content, plan.seed, plan.tokens_per_step)

    # ---- loaders

    def train_dataloader(self, epoch: int | None = None, start: int | None = None) -> StepLoader:
        """The optimizer steps of an epoch, from `start` on; under Trainer both follow from the steps done."""
        plan = self._planned()
        if epoch is None:
            epoch, start = plan.locate(self.trainer.global_step) if self.trainer else (0, 0)
        layout = functools.partial(plan.layout, epoch)
        make = self.maker(self.selection)
        count, seed = len(plan.steps(epoch)), (plan.seed, epoch)
        steps = Steps(layout, self._rank, make, plan.lengths, plan.trained, count, seed)
        return StepLoader(steps, start or 0, self._workers(), self._pin)

    def val_dataloader(self) -> list[StepLoader]:
        """One loader of micro-batches a validation set, in the order of `val_names`."""
        plan = self._planned()
        found = []
        for rows in self.val_selections.values():
            packs = lay_out(np.arange(len(rows)), rows.lengths, plan.tokens_per_batch, plan.ranks, plan.packing)
            whole = Whole(np.arange(len(rows)), int(rows.trained.sum()))
            found.append(StepLoader(MicroBatches(packs[self._rank], self.maker(rows), whole), pin_memory=self._pin))
        return found

    def maker(self, rows: Selection) -> Make:
        """What makes a micro-batch of some of these rows."""
        return functools.partial(_make, rows, self._planned().packing, self._pad_id)

    @property
    def val_names(self) -> list[str]:
        """Names of the validation sets."""
        return list(self.val_selections)

    def held_out_prompts(self, count: int) -> list[Conversation]:
        """The beginnings, up to the first answer, of some rows of the first validation set."""
        rows = next(iter(self.val_selections.values()), None)
        return beginnings(rows, count, self.revision) if rows else []

    def summary(self) -> dict[str, Any]:
        """The plan in numbers: what is read, left out, trained on and in how many steps.

        `row_tokens` are those of all rows once, `tokens` those that the run reads.
        """
        plan, chosen, val = self._planned(), self.selection, self.val_selections
        last_epoch, last_index = plan.locate(self.total_steps - 1)
        return {
            "rows": len(chosen),
            "rows_read": sum(len(store) + store.bad for store in chosen.stores),
            "row_tokens": int(chosen.lengths.sum()),
            "row_trained_tokens": int(chosen.trained.sum()),
            "schemas": dict(sum((Counter(store.schemas) for store in chosen.stores), Counter())),
            "dropped": chosen.dropped,
            "truncated": chosen.truncated,
            "skipped": [line for store in self._all_stores() for line in store.skipped],
            "notes": dict(sum((Counter(store.notes) for store in self._all_stores()), Counter())),
            "val_rows": {name: len(s) for name, s in val.items()},
            "val_dropped": {name: s.dropped for name, s in val.items() if s.dropped},
            "val_truncated": {name: s.truncated for name, s in val.items() if s.truncated},
            **run_counts(plan, self.total_steps),
            "steps": self.total_steps,
            "epochs": round(last_epoch + (last_index + 1) / len(plan.steps(last_epoch)), 4),
            "tokens_per_step": plan.tokens_per_step,
            "tokens_per_batch": plan.tokens_per_batch,
            "max_length": self.limit,
            "packing": plan.packing,
            "cannot_pack": self.cannot_pack,
            "ranks": plan.ranks,
        }

    def _all_stores(self) -> list[TokenStore]:
        """Those of the training and the validation data, each once; held-out rows lie in the training data's."""
        train, val = self._encoded
        return [*train, *val.values()]

    def _workers(self) -> int:
        return self.num_workers if self.num_workers is not None else (2 if self._pin else 0)

    def _planned(self) -> Plan:
        if self.plan is None:
            raise RuntimeError("call prepare() first, or hand the data to Trainer.fit as its datamodule")
        return self.plan

    # ---- encoding

    kind = "chats"

    def _stores(self, method: Any) -> tuple[list[TokenStore], dict[str, TokenStore]]:
        if self._encoded_for is not method:
            self._encoded_for, self.kind = method, method.rows
            if self.chat_template or any(map(self._is_chat, [*self.train_files, *self.val_files.values()])):
                self._give_template(method)
            tokenizer = method.tokenizer
            if writes_date(tokenizer.chat_template):
                self.date = self.date or Day.today().isoformat()
            encoder = ChatEncoder(
                tokenizer,
                train_on=self.train_on,
                allow_special_tokens=self.allow_special_tokens,
                today=Day.fromisoformat(self.date) if self.date else None,
            )
            train = [self._store(source, encoder) for source in self.train_files]
            self._encoded = train, {name: self._store(source, encoder) for name, source in self.val_files.items()}
        return self._encoded

    def _give_template(self, method: Any) -> None:
        """Settle the chat template, and the tokens it needs, before anything is encoded or the model is loaded."""
        tokenizer = method.tokenizer
        find_template(tokenizer, self.chat_template, add_tokens=method.add_tokens)
        if method.add_tokens:
            method.new_tokens = missing_tokens(tokenizer)
            add_to_tokenizer(tokenizer, method.new_tokens)

    def _is_chat(self, source: str) -> bool:
        first = next(iter(read_rows(source, revision=self.revision)))
        return first.error is not None or schema_of(first.value) != "text"

    def _store(self, source: str, encoder: ChatEncoder) -> TokenStore:
        path = Path(source).expanduser()
        local = path.exists()
        content = tokens.content_hash(str(path)) if local else hub.content(source, revision=self.revision)
        self._content[source] = content
        key = tokens.cache_key(
            content,
            encoder.fingerprint,
            self.bad_rows,
            self.date,
            self.kind,
            tokens.code_hash(),
        )
        size = path.stat().st_size if local and path.is_file() else 0
        workers = min(8, os.cpu_count() or 1) if size > tokens.PARALLEL_FROM else 1
        folder, lock = cache_dir() / "tokens" / key, cache_dir() / "locks" / f"{key}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        # of the processes of a run, those on other machines with the same disk included, one encodes
        with FileLock(lock), Progress(f"encoding {path.name}") as advance:
            store = tokens.encode_file(
                lambda: read_rows(source, revision=self.revision),
                functools.partial(ENCODERS[self.kind], encoder),
                folder,
                file=source,
                skip_bad=self.bad_rows == "skip",
                workers=workers,
                progress=advance,
            )
        if not len(store):
            raise UserError(f"{source}: no usable row ({store.bad} bad); mend: litft data check {source}")
        return store


def _is_day(text: str) -> bool:
    try:
        return bool(Day.fromisoformat(text))
    except ValueError:
        return False


def _check_limits(trainer: Any) -> None:
    """Refuse limits that would cut the plan short, or that nobody set."""
    if trainer.max_epochs == TRAINERS_OWN_EPOCHS and trainer.max_steps == -1:
        raise UserError(
            f"neither max_epochs nor max_steps is set, and Trainer would make {TRAINERS_OWN_EPOCHS} epochs of it\n"
            "mend: Trainer(max_epochs=1), or as many as you mean"
        )
    if (trainer.limit_train_batches not in (1.0, None) and not trainer.fast_dev_run) or trainer.overfit_batches:
        raise UserError(
            "limit_train_batches and overfit_batches would cut the plan short\nmend: Trainer(max_steps=...)"
        )


def _make(selection: Selection, packing: bool, pad_id: int, rows: np.ndarray, whole: Whole) -> Batch:
    batch = make_batch(rows, selection.documents, whole, packing, pad_id)
    return batch | {name: torch.from_numpy(attached.of(rows)) for name, attached in selection.attached.items()}
