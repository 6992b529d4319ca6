"""Bounds on what a chat template may ask for: it is a program that came with somebody's model."""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from litft.data.masks import MaskError

if sys.platform != "win32":
    import resource

PATIENCE = 60
"""Seconds of processor time for one conversation."""
PATIENCE_LEARNING = 10
"""The same for one of the small chats that tell what a template writes."""
ROOM = 4 << 30
"""Bytes for one conversation, on top of what the process has."""
_LONG, _GROWTH = 1 << 20, 16  # characters from which a text may be no more than so many times its conversation
_FRESH = 0.1  # seconds for which a measured size is taken for the present one
_MEND = "split the row; where others fail too, the template is broken or hostile: name another with data.chat_template"
_measured = (0.0, 0)  # when, and bytes of the process's address space


class TooMuch(MaskError):
    """A chat template asks for more time, memory or text than one conversation is worth."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the chat template takes {what}", _MEND)


class _Over(BaseException):
    """The time is over; no `Exception`, as Jinja drops those of what it computes ahead, and would compute it again."""


def _stop(*_: object) -> None:
    raise _Over


class Bounded:
    """End the block when it asks for too much; only in the main thread of Linux and macOS, its memory only on Linux.

    Args:
        seconds: of processor time.

    Raises:
        TooMuch: the block takes longer, or more memory than `ROOM`.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        self._works = sys.platform != "win32" and threading.current_thread() is threading.main_thread()
        if not self._works:
            return
        self._limits = _take_room()
        if signal.getsignal(signal.SIGVTALRM) is not _stop:
            signal.signal(signal.SIGVTALRM, _stop)
        signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._works:
            return
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if self._limits:
            resource.setrlimit(resource.RLIMIT_AS, self._limits)
        if kind is _Over:
            raise TooMuch(f"more than {self.seconds:g} s for one conversation") from None
        if kind is MemoryError:
            raise TooMuch(f"more than {ROOM >> 30} GB for one conversation") from None


def _take_room() -> tuple[int, int] | None:
    """Let the process grow by no more than `ROOM`; returns the limits that there were."""
    global _measured
    if sys.platform != "linux":
        return None
    now = time.monotonic()
    if now - _measured[0] > _FRESH:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _measured = now, pages * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    room = _measured[1] + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (room if soft == resource.RLIM_INFINITY else min(room, soft), hard))
    return soft, hard


def check_length(text: str, *conversation: Any) -> None:
    """Refuse a text that is out of all proportion to the messages and tools it was made of.

    Raises:
        TooMuch: it is.
    """
    if len(text) > _LONG and len(text) > _GROWTH * len(json.dumps(conversation)):
        raise TooMuch(f"{len(text):,} characters for a conversation of {len(json.dumps(conversation)):,}")
