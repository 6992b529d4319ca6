"""Ctrl-C, SIGTERM, SIGUSR1: at once where nothing would be lost, while training after the step and its checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OBEYED = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""SIGUSR1 is what clusters send some time before a job's limit."""


class Stopped(BaseException):
    """A signal ended the run; like KeyboardInterrupt no `Exception`, so that no library takes it for its own failure.

    Args:
        number: of the signal.
        step: optimizer steps done, all of them in a checkpoint; None where no training had begun.
        folder: the run folder, where there is a checkpoint to go on from.
    """

    def __init__(self, number: int, step: int | None = None, folder: Path | None = None) -> None:
        self.number, self.step, self.folder = number, step, folder
        after = "" if step is None else f" after step {step}"
        super().__init__(f"stopped by {signal.Signals(number).name}{after}")


@contextmanager
def tidied() -> Iterator[None]:
    """Inside, SIGTERM unwinds the stack as Ctrl-C does, so that what is half done goes away; the exit code stays 143.

    Only in the main thread, and where nobody else handles it.
    """
    alone = threading.current_thread() is threading.main_thread()
    if not alone or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _unwind(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


class Signals:
    """Handlers of the signals that ask a process to end; a context manager.

    A signal raises `Stopped` in the main thread. While `deferred` it is only noted, to be obeyed between two steps; a
    second Ctrl-C then raises all the same. While `importing` the process ends on the spot: nothing is there to be
    tidied up, and a library may swallow what is raised in mid-import and fail in odd ways later.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self.deferred = False
        self.importing = False
        self.training = False
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        self._before = {number: signal.getsignal(number) for number in OBEYED}
        self.install()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def install(self) -> None:
        """Take the signals, also back from a Trainer, whose own handler would end the run before its checkpoint."""
        if threading.current_thread() is threading.main_thread():
            for number in OBEYED:
                signal.signal(number, self._handle)

    def release(self) -> None:
        """Let signals end the process as they do by themselves, in the middle of C++ code too; until `install`."""
        if threading.current_thread() is threading.main_thread():
            for number in OBEYED:
                signal.signal(number, signal.SIG_DFL)

    def check(self) -> None:
        """Raise again what was raised where Python drops exceptions, as in a destructor."""
        if self.noted is not None and not self.deferred:
            raise Stopped(self.noted)

    def _handle(self, number: int, frame: Any) -> None:
        if os.getpid() != self._process:  # a forked worker: its parent has been told too, and still needs it to train
            if not self.training:
                os._exit(128 + number)
            return
        if self.importing:
            if int(os.environ.get("LOCAL_RANK") or 0) == 0:
                print(Stopped(number), file=sys.stderr, flush=True)
            os._exit(128 + number)
        first, self.noted = self.noted is None, self.noted or number
        if not self.deferred or (not first and number == signal.SIGINT):
            raise Stopped(number)
        if first and sys.stderr.isatty():  # a step may take a while, and a person is waiting
            print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr, flush=True)
