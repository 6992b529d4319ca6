"""`litft doctor`: what this machine has, and what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from litft.cli.parsing import Parser, counted, waiting

if TYPE_CHECKING:
    from litft.engine.doctor import Finding


def main(argv: list[str]) -> int:
    """Run the verb; returns 1 if litft can't train here."""
    parser = Parser(
        "litft doctor",
        "Look at versions, devices, memory, disk and network: what litft will use here, what is slower than it could\n"
        "be and why, and what is broken. The exit code is 0 where litft can train, 1 where it can't.",
        "litft doctor",
    )
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    args = parser.parse(argv)
    with waiting("looking"):
        from litft.engine.doctor import examine

        found = examine()
    problems = sum(one.state == "problem" for one in found)
    if args.json:
        print(json.dumps({"can_train": not problems, "findings": [asdict(one) for one in found]}, indent=2))
    else:
        print("\n".join(_lines(found, problems)))
    return 1 if problems else 0


def _lines(found: list[Finding], problems: int) -> list[str]:
    """What needs doing first, then everything by group."""
    lines = [f"litft can't train here: {counted(problems, 'problem')}" if problems else "litft can train here"]
    for state in ("problem", "note"):
        for one in found:
            if one.state == state:
                lines += [f"{state:<8}{one.name}: {one.text}", f"        {'mend: ' * (state == 'problem')}{one.mend}"]
    width = max(len(one.name) for one in found) + 2
    for group in dict.fromkeys(one.group for one in found):
        lines += ["", group]
        lines += [f"  {one.name:<{width}}{one.text}" for one in found if one.group == group]
    return lines
