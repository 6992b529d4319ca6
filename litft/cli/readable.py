"""jsonargparse's messages in a line or two: which key, what it was given, what it takes."""

from __future__ import annotations

import difflib
import re


def readable(message: str) -> str:
    """What a person needs of a parser's message.

    Args:
        message: of jsonargparse, with its nested lists of what was tried.

    Returns:
        One to five lines.
    """
    if "data.train" in message and ("required" in message or "does not exist" in message):
        return "no data: --data FILE is missing\nmend: litft finetune lora --data chats.jsonl"
    found = re.findall(r'[Kk]ey "([^"]+)"', message)
    key = found[0] if found else ""
    for inner in found[1:]:
        key = inner if inner.startswith(f"{key}.") else f"{key}.{inner}"
    given = re.findall(r"(?:Got|Given) value: (.*?)>*$", message, re.MULTILINE)
    value = next((v for v in given if not re.match(r"(NestedArg|Namespace)\(", v)), "")
    flag = f"--{key} {value}".strip() if key else "configuration"
    if package := re.search(
        r"\b(tensorboard|wandb|mlflow)\b.*(?:not met|not available|is available|No module)", message
    ):
        return f"--trainer.logger: {package[1]} is not installed\nmend: pip install 'litft[{package[1]}]'"
    if problem := re.search(r"Problem with given class_path (\S+):\s*\n\s*(.+)", message):
        return f"{'' if flag == 'configuration' else flag + ': '}{problem[1]}: {problem[2].strip()}"[:400]
    if missing := re.search(r"required: (\w+)", message):
        return f"{flag}: needs a value for --{key}.{missing[1]}"
    if path := re.search(r"dot import path string: (\S+)", message):
        return f"{flag}: there is no class {path[1]}; give a class path such as lightning.pytorch.loggers.CSVLogger"
    if bases := re.findall(r"does not correspond to a subclass of (\w+)", message):
        wrong = re.search(r"Import path (\S+) does not", message)
        kinds = list(dict.fromkeys(bases))
        what = f"none of {', '.join(kinds)}" if kinds[1:] else f"no {kinds[0]}"
        return f"--{key}: {wrong[1] if wrong else value} is {what}; give the class path of one"[:500]
    takes = _takes(message)
    if not takes:
        own = re.search(r"Errors:\s*\n\s*- (?!Expected)(.*?)(?=\n\s*- |\Z)", message, re.DOTALL)
        if own:  # what a class says of its own options
            return "\n".join(line.strip() for line in own[1].splitlines()[:5])
        lines = [line.strip(" -") for line in message.splitlines() if line.strip(" -")]
        return "\n".join(line[:200] for line in lines[:5])
    near = difflib.get_close_matches(value, takes, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{flag}: must be {', '.join(takes[:-1])}{' or ' if takes[1:] else ''}{takes[-1]}{hint}"[:500]


def _takes(message: str) -> list[str]:
    """What a key takes: names of types, and the values of fixed choices."""
    names = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "NoneType": "null"}
    names |= {"tuple with 2 elements": "two numbers"}
    takes: list[str] = []
    for kind in re.findall(r"Expected an? (?!path but )(.+?)(?:\. Got value:.*|>*)$", message, re.MULTILINE):
        if literal := re.match(r"typing\.Literal\[(.*)\]", kind):
            takes += re.findall(r"'([^']+)'", literal[1]) or literal[1].split(", ")
        else:
            plain = re.sub(r"<class '(?:\w+\.)*(\w+)'?>?|.*", lambda m: m[1] or m[0], kind, count=1)
            takes.append(names.get(plain, plain))
    takes = list(dict.fromkeys(takes))
    return [t for t in takes if t != "null"] + ["null"] * ("null" in takes and len(takes) > 1)
