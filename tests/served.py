"""A server in a thread of the test's own process."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from litft.infer.load import ChatModel
from litft.serve.server import Server, listen


@contextmanager
def served(bundle: ChatModel, **options: Any) -> Iterator[tuple[Server, str]]:
    """The server and its URL; it is down at the end of the block."""
    up = threading.Event()
    with listen("127.0.0.1", 0) as sock:
        server = Server(bundle, sock, name="tiny", ready=up.set, **options)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        assert up.wait(30)
        try:
            yield server, f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            began = time.monotonic()
            thread.join(15)
            assert not thread.is_alive() and time.monotonic() - began < 10
            assert not server.worker.is_alive()


def slow_down(server: Server, seconds: float = 0.02) -> None:
    """Let every token take some time, so that something can happen meanwhile."""
    engine = server.worker.engine
    step = engine.step
    engine.step = lambda: (time.sleep(seconds), step())[1]  # type: ignore[method-assign]


def heed_interrupts() -> None:
    """For a child process: what a shell has started in the background, tests too, ignores Ctrl-C, and its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
