"""A model behind a port, until somebody ends it."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from litft.errors import UserError
from litft.infer.engine import Engine
from litft.infer.load import ChatModel
from litft.serve.app import build
from litft.serve.worker import Worker

PATIENCE = 4.0
"""Seconds that answers have to come to their end when the server goes down."""


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound, so that a port in use is known before a model is loaded; port 0 is any free one.

    Raises:
        UserError: it cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except (OSError, OverflowError) as error:
        sock.close()
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {why}\nmend: another port, or 0 for any free one") from error
    return sock


def is_local(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def model_name(folder: str) -> str:
    """The name clients call the model by: a folder's own name, a hub id or an alias as it stands."""
    path = Path(folder)
    return path.resolve().name if path.exists() else folder


class Server(uvicorn.Server):
    """A model behind a port, run by `run` until SIGTERM, SIGINT or `should_exit`.

    Args:
        bundle: of `load_for_inference`.
        sock: of `listen`.
        name: the model's name for clients.
        api_key: what clients have to send as a bearer token; None asks for nothing.
        slots: answers that grow at once.
        max_queue: answers that may wait; more are refused with 429.
        max_tokens: most tokens of an answer.
        max_body: most bytes of a request; more are refused with 413.
        cache_bytes: most memory for keys and values; None is half of what is free.
        ready: called once requests are taken.
    """

    def __init__(
        self,
        bundle: ChatModel,
        sock: socket.socket,
        *,
        name: str,
        api_key: str | None = None,
        slots: int = 16,
        max_queue: int = 256,
        max_tokens: int = 4096,
        max_body: int = 1 << 20,
        cache_bytes: float | None = None,
        ready: Callable[[], None] | None = None,
    ) -> None:
        if cache_bytes is None:
            cache_bytes = free_memory(bundle.model.device) / 2
        self.worker = Worker(Engine(bundle, slots=slots, cache_bytes=cache_bytes), max_queue=max_queue)
        self._sock, self._ready = sock, ready
        local = is_local(sock.getsockname()[0])
        app = build(
            bundle, self.worker, name=name, api_key=api_key, local=local, max_tokens=max_tokens, max_body=max_body
        )
        hard_end = int(PATIENCE) + 2
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=hard_end
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve to the end; then what is being answered has `PATIENCE` seconds."""
        self.worker.start()
        try:
            super().run(sockets=[self._sock])
        finally:
            self.worker.close(0)
            self.worker.join(2)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn."""
        await super().startup(sockets)
        if self._ready is not None and self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn at a signal; whoever asks twice cuts what is being answered, which is no error then."""
        if self.should_exit:
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn, which waits for open connections."""
        closing = asyncio.get_running_loop().run_in_executor(None, self.worker.close, PATIENCE)
        await super().shutdown(sockets)
        await closing


def free_memory(device: Any) -> float:
    """Bytes that are free on a device; infinity where nobody says."""
    import torch

    from litft.engine.room import host_memory_left

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory_left()
