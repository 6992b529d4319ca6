"""The processes of a run on one machine watch each other: one dies, all end within seconds, with one clear line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from litft.engine.heartbeat import Heartbeat
from litft.engine.rank_logs import to_console

POLL_S = 0.3
GRACE_S = {"first": 20.0, "other": 3.0}
"""Seconds to end by itself: the first process saves what it holds, unless a collective keeps it from that."""
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket|peer|store", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)?[ \d,]+\)[^.]*?(?:by signal: (\w+)|exited)")


class Watch:
    """Looks out, in a thread, for the death of another process of the run.

    Args:
        look: what to say of it; None while all are alive.
        started: the processes to end with this one, in the first.
        aloud: whether nobody else is there to say it.
    """

    def __init__(
        self, look: Callable[[], str | None], started: Sequence[subprocess.Popen] = (), aloud: bool = True
    ) -> None:
        self._look, self._started, self._aloud = look, started, aloud
        self._found, self._over, self._said = threading.Event(), False, threading.Lock()
        self._line = ""
        threading.Thread(target=self._run, daemon=True, name="peers").start()

    def of(self, error: BaseException) -> str | None:
        """What to say where `error` comes of another process's death, else None."""
        if not (isinstance(error, RuntimeError) and _LOST.search(str(error))):
            return None
        found = self._found.wait(10 * POLL_S)
        if found and not self._started:  # of an error it is the first process that speaks, and that one is gone
            self._say()
        if found:
            return self._line
        return None if self._started else "another process of this run ended"  # which the first one says

    def close(self, end: bool = False) -> None:
        """The run is over; who ends now may.

        Args:
            end: see to it that they do.
        """
        self._over = True
        for process in self._started if end else ():
            process.kill()

    def _say(self) -> None:
        if self._aloud and self._said.acquire(blocking=False):
            to_console(f"error: {self._line}")

    def _run(self) -> None:
        while not self._over:
            if line := self._look():
                self._line = line
                self._found.set()
                time.sleep(GRACE_S["first" if self._started else "other"])
                if not self._over:
                    self._say()
                    self.close(end=True)
                    os._exit(1)
            time.sleep(POLL_S)


def watch(trainer: Any) -> Watch | None:
    """Watch the processes that a Trainer has started, or in one of those the first, and other machines.

    Processes that were started from outside (torchrun, Slurm) on one machine are watched by what started them.

    Returns:
        None where there is nothing to watch.
    """
    launcher: Any = getattr(trainer.strategy, "launcher", None)
    started: list[subprocess.Popen] = list(getattr(launcher, "procs", []))
    if started:
        # Lightning's own watch kills this process without a word, and before it can save, when a started one fails
        launcher.procs.clear()
        return Watch(lambda: _dead(started), started)
    if trainer.num_nodes > 1:
        leads = trainer.local_rank == 0
        return Watch(Heartbeat(trainer.node_rank, trainer.num_nodes, leads), aloud=leads)
    if trainer.world_size > 1 and trainer.local_rank and not os.environ.get("TORCHELASTIC_RUN_ID"):
        first = os.getppid()
        line = "the first process of this run has died; go on with the same command and --resume"
        return Watch(lambda: None if os.getppid() == first else line, aloud=trainer.local_rank == 1)
    return None


def _dead(processes: Sequence[subprocess.Popen]) -> str | None:
    for rank, process in enumerate(processes, 1):
        if code := process.poll():
            how = f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
            return f"the process of rank {rank} {how}"
    return None


def dead_worker(error: BaseException) -> str | None:
    """What to say where `error` comes of the death of a process that makes batches, else None."""
    found = _WORKER.search(str(error)) if isinstance(error, RuntimeError) else None
    if not found:
        return None
    how = f"was killed (signal {found[1]})" if found[1] else "ended"
    return f"a process that makes batches {how}: out of memory, maybe; --data.num_workers 0 does without"
