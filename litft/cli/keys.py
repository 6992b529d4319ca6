"""The keys of `litft finetune`, read from the sources of the classes that take them.

Importing those classes takes seconds; a mistyped flag is answered in a fraction of one.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from litft.errors import UserError

SWITCHES = {
    "resume": "Go on from the newest complete checkpoint of --out.",
    "dry_run": "Do everything up to the first step and print the plan.",
    "json": "With --dry_run: the plan as JSON.",
}
COMMAND = (
    *("seed_everything", "out", "val_every_n_steps", "patience", "allow_changed", "config", "print_config", "help"),
    *("plan.devices", "plan.device_memory_gb"),
)
"""Keys of the command itself, beside the switches."""
Place = tuple[str, str, str]
"""A package, a file in it, and a class there."""


@dataclass(frozen=True)
class Command:
    """What `litft finetune METHOD` trains with.

    Attributes:
        method: its class.
        data: the class of what it is trained on.
        places: where the arguments of the two are written, beside those that all have.
    """

    method: str = "litft.SFT"
    data: str = "litft.ChatData"
    places: tuple[Place, ...] = ()


_REFERENCED = ("litft", "methods/preference.py", "Referenced")
_FREE = ("litft", "methods/preference.py", "ReferenceFree")
_CONTRASTIVE = ("litft", "methods/cpo.py", "Contrastive")


def _on_preferences(name: str, file: str, *more: Place) -> Command:
    return Command(f"litft.{name}", "litft.PreferenceData", (("litft", file, name), *more))


_SFT = ("litft", "methods/sft.py", "SFT")
METHODS = {
    **dict.fromkeys(("full", "lora", "qlora"), Command(places=(_SFT,))),
    "distill": Command("litft.Distill", places=(("litft", "methods/distill.py", "Distill"), _SFT)),
    "dpo": _on_preferences("DPO", "methods/dpo.py", _REFERENCED),
    "orpo": _on_preferences("ORPO", "methods/orpo.py", _FREE),
    "simpo": _on_preferences("SimPO", "methods/cpo.py", _CONTRASTIVE, _FREE),
    "cpo": _on_preferences("CPO", "methods/cpo.py", _CONTRASTIVE, _FREE),
    "reward": _on_preferences("Reward", "methods/reward.py"),
    "kto": _on_preferences("KTO", "methods/kto.py", _REFERENCED),
}
"""By the word after `litft finetune`; the first three are supervised fine-tuning with that tuner."""

GROUPS = {
    "model": [("litft", "methods/base.py", "Method")],
    "data": [("litft", "data/chat.py", "ChatData")],
    "checkpoint": [("litft", "engine/checkpoints.py", "Checkpoints")],
    "samples": [("litft", "engine/samples.py", "Samples")],
    "trainer": [("lightning", "pytorch/trainer/trainer.py", "Trainer")],
}
TUNERS = {"full": "litft.Full", "lora": "litft.LoRA", "qlora": "litft.QLoRA"}
OPTIONS = {
    "full": [("litft", "tuners/full.py", "Full")],
    "lora": [("litft", "tuners/lora.py", "LoRA")],
    "qlora": [("litft", "tuners/qlora.py", "QLoRA"), ("litft", "tuners/lora.py", "LoRA")],
}
FSDP, FSDP_OPTIONS = "litft.FSDP", ("litft", "engine/fsdp.py", "_Shared")
OPEN = ("trainer.logger", "trainer.callbacks", "trainer.strategy", "trainer.plugins", "trainer.profiler", "data.val")
"""Keys whose values have keys of their own, which only their class knows."""


@cache
def parameters(package: str, file: str, cls: str) -> tuple[str, ...] | None:
    """Names of the arguments in a class's own `__init__`; None where its source isn't found."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders or [""]))) / file
    if not path.is_file():
        return None
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == cls:
            inits = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"]
            return tuple(a.arg for init in inits for a in [*init.args.args[1:], *init.args.kwonlyargs])
    return None


@cache
def known(tuner: str | None, method: str | None = None) -> tuple[frozenset[str], tuple[str, ...]]:
    """All keys, and the groups whose own keys can't be known ahead.

    Args:
        tuner: full, lora or qlora; another class path has options that only it knows.
        method: of `METHODS`.
    """
    found, opened = {*COMMAND, *SWITCHES}, list(OPEN)
    own_places = METHODS[method or "lora"].places
    groups = {**GROUPS, "model": [*GROUPS["model"], *own_places], "model.tuner": OPTIONS.get(tuner or "lora", [])}
    for group, places in groups.items():
        names = [parameters(*place) for place in places]
        if not names or None in names:
            opened.append(group)
        found |= {group} | {f"{group}.{name}" for own in names for name in own or ()}
    return frozenset(found), tuple(opened)


def check(keys: Iterable[tuple[str, str]], tuner: str | None, sharded: bool = False, method: str | None = None) -> None:
    """Refuse keys that nothing takes, naming the nearest that something does.

    Args:
        keys: dotted keys, each with where it was said (a flag, or file and line).
        tuner: as in `known`.
        sharded: whether the strategy is fsdp.
        method: the word after `litft finetune`.

    Raises:
        UserError: for the first unknown key.
    """
    valid, opened = known(tuner, method)
    for key, where in keys:
        if key.startswith("trainer.strategy.") and sharded:
            own = parameters(*FSDP_OPTIONS) or ()
            if (name := key.removeprefix("trainer.strategy.").removeprefix("init_args.")) not in (*own, "class_path"):
                near = nearest(name, own)
                hint = f"; did you mean --trainer.strategy.{near.removeprefix('--')}?" if near else ""
                raise UserError(f"{where}: fsdp has no option {name}{hint}\nit has: {', '.join(own)}")
            continue
        if key in valid or any(key == group or key.startswith(f"{group}.") for group in opened):
            continue
        near = nearest(key, valid)
        hint = f"; did you mean {near}?" if near else ""
        place = "" if where == f"--{key}" else f"{where}: "
        raise UserError(
            f"{place}unknown key --{key}{hint}\nall keys: litft finetune {method or tuner or 'lora'} --help"
        )


def nearest(key: str, valid: Iterable[str]) -> str | None:
    """The key that was probably meant, as a flag."""
    valid = sorted(valid)
    last = key.rpartition(".")[2]
    leaves: dict[str, list[str]] = {}
    for name in valid:
        leaves.setdefault(name.rpartition(".")[2], []).append(name)
    near = difflib.get_close_matches(key, valid, n=1, cutoff=0.8)
    if not near and last in leaves:  # the right name under another group, or under none
        near = difflib.get_close_matches(key, leaves[last], n=1, cutoff=0.0)
    if not near and (leaf := difflib.get_close_matches(last, leaves, n=1, cutoff=0.75)):
        near = difflib.get_close_matches(key, leaves[leaf[0]], n=1, cutoff=0.0)
    near = near or difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
    return f"--{near[0]}" if near else None
