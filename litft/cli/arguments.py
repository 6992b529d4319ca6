"""From what a person types to plain `--group.key=value` arguments: short forms, configuration files, nearest keys."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from litft.errors import UserError

TUNERS = {"full": "litft.Full", "lora": "litft.LoRA", "qlora": "litft.QLoRA"}
SHORT = {"data": "data.train", "model": "model.path"}
SWITCHES = ("resume", "dry_run", "json", "print_config", "help")
MANY = ("data.train", "data.weights", "data.val")
"""Keys that take several values after one flag."""
CLASSES = ("trainer.logger", "trainer.callbacks", "trainer.strategy", "trainer.plugins", "trainer.profiler", "data.val")
"""Keys whose values have keys of their own, which only their class knows."""


def expand(argv: list[str], command_tuner: str | None) -> list[str]:
    """Rewrite a command line.

    Args:
        argv: words after `litft finetune METHOD`.
        command_tuner: full, lora or qlora where the verb names the tuner.

    Returns:
        `--key=value` words in order, those of configuration files first, so that flags go before them; the tuner's class
        before its options.

    Raises:
        UserError: for a stray word, a broken file, or a tuner that contradicts the verb.
    """
    pairs: list[tuple[str, Any, str]] = []  # key, value, where it was said
    flags: list[tuple[str, Any, str]] = []
    for key, values in _flags(argv):
        if key == "config":
            for name in values:
                pairs += [(k, v, name) for k, v in read_config(name)]
        elif key in SWITCHES:
            if values:
                raise UserError(f"--{key} takes no value, but {values[0]!r} follows it")
            flags.append((key, True, f"--{key}"))
        else:
            if not values:
                raise UserError(f"--{key} needs a value")
            if len(values) > 1 and key not in MANY:
                raise UserError(f"--{key} takes one value, but {values[1]!r} follows {values[0]!r}")
            many = len(values) > 1 or key in ("data.train", "data.weights")
            flags.append((key, json.dumps(_numbers(key, values)) if many else values[0], f"--{key}"))
    pairs += flags
    tuner = command_tuner
    for key, value, where in pairs:
        if key in ("model.tuner", "model.tuner.class_path"):
            name = next((n for n, path in TUNERS.items() if str(value).lower() in (n, path.lower())), None)
            chosen = name or str(value)
            if command_tuner and chosen != command_tuner:
                raise UserError(f"{where} says tuner {chosen}; mend: litft finetune {chosen}")
            tuner = chosen
    words = []
    if tuner:
        words.append(f"--model.tuner={TUNERS.get(tuner, tuner)}")
    for key, value, _ in pairs:
        if key in ("model.tuner", "model.tuner.class_path"):
            continue
        key = key.replace("model.tuner.init_args.", "model.tuner.")
        words.append(f"--{key}" if value is True and key in SWITCHES else f"--{key}={value}")
    return words


def _flags(argv: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with the values up to the next one."""
    position = 0
    while position < len(argv):
        word = argv[position]
        if word == "-h":
            word = "--help"
        if not word.startswith("--"):
            raise UserError(f"{word!r} follows no flag; mend: litft finetune lora --data {word}")
        key, equals, value = word[2:].partition("=")
        position += 1
        values = [value] if equals else []
        while not equals and position < len(argv) and not argv[position].startswith("--"):
            values.append(argv[position])
            position += 1
        yield SHORT.get(key, key), values


def _numbers(key: str, values: list[str]) -> list[Any]:
    if key == "data.weights":
        try:
            return [float(v) for value in values for v in value.strip("[]").split(",")]
        except ValueError:
            raise UserError(f"--data.weights {' '.join(values)}: not numbers") from None
    if len(values) == 1 and values[0].startswith("["):
        try:
            return json.loads(values[0])
        except json.JSONDecodeError:
            return values
    return values


def read_config(name: str) -> list[tuple[str, Any]]:
    """The keys and values of a configuration file, or of one that config_hub has under that name.

    Raises:
        UserError: no such file or name (the nearest is named), or broken YAML.
    """
    import yaml

    path = find_config(name)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not YAML: {getattr(error, 'problem', error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not keys and values")
    return list(_flatten(content, ""))


def _flatten(content: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        name = SHORT.get(key, key) if not prefix and not isinstance(value, dict) else f"{prefix}{key}"
        if isinstance(value, dict) and name not in CLASSES and value:
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, (dict, list)) or value is None or isinstance(value, bool):
            yield name, json.dumps(value) if name not in SWITCHES else value
        else:
            yield name, value


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


def check_keys(words: Iterable[str], known: set[str], tuner_keys: set[str]) -> None:
    """Refuse keys that nothing takes, naming the nearest that something does.

    Args:
        words: of `expand`.
        known: all keys of the parser, dotted.
        tuner_keys: options of the chosen tuner.

    Raises:
        UserError: for the first unknown key.
    """
    valid = known | {f"model.tuner.{key}" for key in tuner_keys} | set(SHORT) | {"config", "debug", *SWITCHES}
    for word in words:
        key = word[2:].partition("=")[0]
        if key in valid or any(key == c or key.startswith(f"{c}.") for c in CLASSES):
            continue
        last = key.rpartition(".")[2]
        near = difflib.get_close_matches(key, valid, n=1, cutoff=0.75)
        near = near or [k for k in sorted(valid) if k.rpartition(".")[2] == last]
        near = near or difflib.get_close_matches(key, valid, n=1, cutoff=0.5)
        hint = f"; did you mean --{near[0]}?" if near else ""
        raise UserError(f"unknown key --{key}{hint}\nall keys: litft finetune lora --help")
