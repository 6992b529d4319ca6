"""A counter on stderr for work that takes over two seconds."""

from __future__ import annotations

import sys
from typing import Any


class Progress:
    """A context whose value takes the count so far.

    Args:
        what: is counted, rows of it.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> Any:
        from tqdm import tqdm

        self.bar = tqdm(desc=self.what, unit=" rows", delay=2, disable=not sys.stderr.isatty(), leave=False)
        return lambda done: self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        self.bar.close()
