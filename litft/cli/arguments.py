"""From what a person types to plain `--group.key=value` arguments: short forms, configuration files, key checks."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from litft.cli import keys
from litft.cli.keys import FSDP, OPEN, SWITCHES, TUNERS
from litft.engine.secrets import HIDDEN
from litft.errors import UserError

SHORT = {"data": "data.train", "model": "model.path"}
BARE = (*SWITCHES, "print_config", "help")
"""Flags without a value."""
NUMBERS = ("data.weights", "model.betas", "model.loss_weights")
LISTS = (
    "data.train",
    *NUMBERS,
    "samples.prompts",
    "model.tuner.modules_to_save",
    "model.tuner.target_parameters",
)
MANY = (*LISTS, "data.val", "model.loss_type", "model.tuner.targets")
"""Keys that take several values after one flag; those of `LISTS` are lists even with one."""


@dataclass(frozen=True)
class Said:
    """A key, its value, and where it was said: a flag, or file and line."""

    key: str
    value: Any
    where: str


def expand(argv: list[str], method: str | None) -> list[str]:
    """Rewrite a command line.

    Args:
        argv: words after `litft finetune METHOD`.
        method: the word after `litft finetune`, full, lora and qlora among them.

    Returns:
        `--key=value` words in order, those of configuration files first, so that flags go before them; the
        tuner's class before its options.

    Raises:
        UserError: for a stray word, an unknown key, a broken file, or a tuner that contradicts the verb.
    """
    flags = list(_flags(argv))
    configs = [name for flag, values in flags if flag == "config" for name in values]
    said = [entry for name in _with_saved(configs, flags) for entry in _said_in(name)]
    if not configs:
        _refuse_inherited(said, {key for key, _ in flags})
    said += [_said(key, values) for key, values in flags if key != "config"]
    _refuse_twice([key for key, _ in flags if key != "config"])
    tuner = _tuner(said, method if method in TUNERS else None) or ("lora" if method else None)
    said = [_plain(entry) for entry in said if entry.key not in ("model.tuner", "model.tuner.class_path")]
    said, sharded = _strategy(said)
    keys.check([(entry.key, entry.where) for entry in said], tuner, sharded, method)
    if any(entry.key.startswith("plan.") for entry in said) and not any(e.key == "data.train" for e in said):
        said = [*said, Said("data.train", "[]", "--plan")]  # no rows are needed to plan for devices
    words = [f"--model.tuner={TUNERS.get(tuner, tuner)}"] if tuner else []
    said = _last(said)
    _refuse_hidden(said)
    for entry in said:
        if entry.key in BARE:
            words += [f"--{entry.key}"] * bool(entry.value)
        else:
            words.append(f"--{entry.key}={entry.value}")
    return words


def _refuse_twice(flags: list[str]) -> None:
    for index, key in enumerate(flags):
        if key in flags[:index]:
            more = f"; several values follow one flag: --{key} A B" if key in MANY else ""
            raise UserError(f"--{key} is said twice{more}")


def _refuse_inherited(saved: list[Said], flags: set[str]) -> None:
    """A model's own code runs because somebody says so now, never because a folder says that somebody did."""
    for entry in saved:
        if entry.key == "model.trust_remote_code" and entry.value != "false" and entry.key not in flags:
            raise UserError(
                f"{entry.where}: trust_remote_code is not taken over from the folder of a run\n"
                "mend: --model.trust_remote_code true once more, if you still trust that model's code"
            )


def _refuse_hidden(said: list[Said]) -> None:
    """A secret that was kept out of a file has to be said again, unless a later flag does."""
    for at, entry in enumerate(said):
        if HIDDEN in str(entry.value) and not any(later.key.startswith(f"{entry.key}.") for later in said[at:]):
            raise UserError(
                f"{entry.where}: holds {HIDDEN} where a secret was left out of the file\n"
                "mend: write it there again; better, remove that key and set the environment variable that is read\n"
                "in its place (WANDB_API_KEY, HF_TOKEN)"
            )


def _last(said: list[Said]) -> list[Said]:
    """What holds where a key is said more than once: the last, over all that an earlier one had below that key."""
    kept: list[Said] = []
    for entry in reversed(said):
        if not any(entry.key == later.key or entry.key.startswith(f"{later.key}.") for later in kept):
            kept.append(entry)
    return kept[::-1]


def _with_saved(configs: list[str], flags: list[tuple[str, list[str]]]) -> list[str]:
    """The configuration files asked for; where none is, a resumed run's own."""
    if configs or not any(key == "resume" for key, _ in flags):
        return configs
    saved = [Path(values[-1]) / "config.yaml" for key, values in flags if key == "out" and values]
    return [str(path) for path in saved[-1:] if path.is_file()]


def _said(key: str, values: list[str]) -> Said:
    where = f"--{key}"
    if key in BARE:
        if values:
            raise UserError(f"--{key} takes no value, but {values[0]!r} follows it")
        return Said(key, True, where)
    if not values:
        raise UserError(f"--{key} needs a value")
    if len(values) > 1 and key not in MANY:
        raise UserError(f"--{key} takes one value, but {values[1]!r} follows {values[0]!r}")
    if len(values) == 1 and (key not in LISTS or values[0] == "null" or values[0].startswith("[")):
        return Said(key, values[0], where)
    if key in NUMBERS:
        try:
            return Said(key, json.dumps([float(value) for value in values]), where)
        except ValueError:
            raise UserError(f"--{key} {' '.join(values)}: not numbers") from None
    return Said(key, json.dumps(values), where)


def _tuner(said: list[Said], command_tuner: str | None) -> str | None:
    """The tuner that verb, files and flags agree on: full, lora, qlora or a class path."""
    tuner = command_tuner
    for entry in said:
        if entry.key in ("model.tuner", "model.tuner.class_path") and entry.value not in (None, "null"):
            text = str(entry.value)
            name = next((n for n, path in TUNERS.items() if text.lower() in (n, path.lower())), None)
            if name is None and "." not in text:
                near = difflib.get_close_matches(text, TUNERS, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UserError(f"{entry.where}: no tuner {text!r}: one of {', '.join(TUNERS)}, or a class path{hint}")
            if command_tuner and (name or text) != command_tuner:
                raise UserError(
                    f"{entry.where}: tuner {name or text}, but the command says {command_tuner}\n"
                    f"mend: litft finetune {name or command_tuner} ..."
                )
            tuner = name or text
    return tuner


def _strategy(said: list[Said]) -> tuple[list[Said], bool]:
    """`fsdp` as the class that it is, before its options, which imply it; and whether that is the strategy."""
    named = [entry for entry in said if entry.key == "trainer.strategy"]
    options = [entry for entry in said if entry.key.startswith("trainer.strategy.")]
    if options and not named:
        named = [Said("trainer.strategy", "fsdp", options[0].where)]
    if not named:
        return said, False
    last, rest = named[-1], [entry for entry in said if not f"{entry.key}.".startswith("trainer.strategy.")]
    text = str(last.value)
    arguments: dict[str, Any] = {}
    if text.startswith("{") and FSDP in text.replace(".engine.fsdp.", "."):  # as a saved configuration has it
        arguments = json.loads(text).get("init_args") or {}
    elif text.lower() not in ("fsdp", "fsdp2"):
        return [*rest, last, *options], False
    own = [Said(f"trainer.strategy.{key}", json.dumps(value), last.where) for key, value in arguments.items()]
    options = [Said(e.key.replace(".init_args.", "."), e.value, e.where) for e in options]
    return [*rest, Said(last.key, json.dumps({"class_path": FSDP}), last.where), *own, *options], True


def _plain(entry: Said) -> Said:
    """The tuner's options without `init_args`, as a saved configuration has them."""
    return Said(entry.key.replace("model.tuner.init_args.", "model.tuner."), entry.value, entry.where)


def _flags(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the values up to the next one."""
    position = 0
    while position < len(argv):
        word = {"-h": "--help", "-c": "--config"}.get(argv[position], argv[position])
        if not word.startswith("--"):
            raise UserError(f"{word!r} follows no flag; mend: litft finetune lora --data {word}")
        key, equals, value = word[2:].partition("=")
        position += 1
        values = [value] if equals else []
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        yield SHORT.get(key, key), values


def read_config(name: str) -> list[tuple[str, Any]]:
    """The keys and values of a configuration file, or of one that config_hub has under that name.

    Raises:
        UserError: no such file or name (the nearest is named), or broken YAML.
    """
    return [(entry.key, entry.value) for entry in _said_in(name)]


def _said_in(name: str) -> list[Said]:
    import yaml

    path = find_config(name)
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            kind = root.tag.rpartition(":")[2]
            raise UserError(f"{path}: holds a {kind}, not keys and values")
        return list(_flatten(root, "", str(path), loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _flatten(mapping: Any, prefix: str, file: str, loader: Any) -> Iterator[Said]:
    """The leaves below a YAML mapping, each under its dotted key."""
    for key_node, node in mapping.value:
        where = f"{file}:{key_node.start_mark.line + 1}"
        key = f"{prefix}{loader.construct_object(key_node, deep=True)}"
        if node.id == "mapping" and key not in OPEN and node.value:
            yield from _flatten(node, f"{key}.", file, loader)
            continue
        value = loader.construct_object(node, deep=True)
        if not prefix and key in SHORT:
            key = SHORT[key]
        if key in LISTS and isinstance(value, str):
            value = [value]
        plain = isinstance(value, str) or key in BARE
        yield Said(key, value if plain else json.dumps(value), where)


def config_hub() -> Path:
    """The folder of ready-made configurations: beside the package in a checkout, in site-packages when installed."""
    import config_hub as hub

    return Path(next(iter(hub.__path__)))


def hub_names() -> list[str]:
    """Names of all ready-made configurations."""
    root = config_hub()
    return sorted(str(p.relative_to(root).with_suffix("")).replace("\\", "/") for p in root.rglob("*.yaml"))


def find_config(name: str) -> Path:
    """A file, or a name in config_hub."""
    if Path(name).is_file():
        return Path(name)
    names = hub_names()
    if name.removesuffix(".yaml") in names:
        return config_hub() / f"{name.removesuffix('.yaml')}.yaml"
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--config {name}: no such file, and config_hub has no such name{hint}\nmend: litft config list")
