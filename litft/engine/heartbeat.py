"""The machines of a run hear of each other: one that is gone, or cut off, would be waited for in the next exchange."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta

from torch.distributed import TCPStore

EVERY_S = 2.0
SILENT_S = 25.0
"""Seconds without a word after which a machine counts as gone; all have ended within a minute."""


class Heartbeat:
    """Leaves a word for the others in the store that the processes met in, and looks for theirs.

    A thread does so, for on a cut line the store doesn't answer and doesn't fail.

    Args:
        node: the number of this machine.
        nodes: how many there are.
        leads: whether this process speaks for its machine.
    """

    def __init__(self, node: int, nodes: int, leads: bool) -> None:
        self.node, self.leads = node, leads
        now = time.monotonic()
        self.heard = {other: now for other in range(nodes) if other != node}
        self.answered, self.failed = now, ""
        threading.Thread(target=self._run, daemon=True, name="heartbeat").start()

    def __call__(self) -> str | None:
        """What to say of a machine that is gone; None while all are there."""
        now = time.monotonic()
        if self.failed or now - self.answered > SILENT_S:
            reason = f" ({self.failed})" if self.failed else ""
            address = os.environ.get("MASTER_ADDR", "?")
            return f"machine {self.node} of this run is cut off from {address}, where the run is led{reason}"
        silent = [n for n, at in self.heard.items() if now - at > SILENT_S]
        if silent:
            return f"machine {silent[0]} of this run has been silent for {SILENT_S:.0f} s: gone, or cut off"
        return None

    def _run(self) -> None:
        try:
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, timeout=timedelta(seconds=SILENT_S), wait_for_workers=False)
            words: dict[int, bytes] = {}
            beats = 0
            while True:
                beats += 1
                if self.leads:
                    store.set(f"litft/beat/{self.node}", str(beats))
                for other in self.heard:
                    key = f"litft/beat/{other}"
                    word = store.get(key) if store.check([key]) else b""
                    if word != words.get(other, b""):
                        words[other], self.heard[other] = word, time.monotonic()
                self.answered = time.monotonic()
                time.sleep(EVERY_S)
        except Exception as error:  # of the store, whose errors have no common class
            self.failed = (str(error).strip().splitlines() or [type(error).__name__])[0][:80]
