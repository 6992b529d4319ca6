"""The thread in which the engine answers, and what it counts."""

from __future__ import annotations

import threading
import time
import traceback
from collections import Counter
from collections.abc import Sequence

from litft.infer.engine import Engine, Request

LATENCIES = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Upper ends of the histograms' buckets, in seconds."""


class Full(Exception):
    """The queue has no room."""


class Closed(Exception):
    """The server is going down."""


class Histogram:
    """How many values lay below each of `LATENCIES`, their sum and number."""

    def __init__(self) -> None:
        self.counts, self.sum, self.number = [0] * len(LATENCIES), 0.0, 0

    def add(self, seconds: float) -> None:
        """Count a value."""
        self.counts = [n + (seconds <= end) for n, end in zip(self.counts, LATENCIES, strict=True)]
        self.sum, self.number = self.sum + seconds, self.number + 1

    def lines(self, name: str, text: str) -> list[str]:
        """In Prometheus' text format."""
        buckets = [f'{name}_bucket{{le="{end}"}} {n}' for end, n in zip(LATENCIES, self.counts, strict=True)]
        head = [f"# HELP {name} {text}", f"# TYPE {name} histogram"]
        tail = [
            f'{name}_bucket{{le="+Inf"}} {self.number}',
            f"{name}_sum {self.sum:.6f}",
            f"{name}_count {self.number}",
        ]
        return head + buckets + tail


class Worker(threading.Thread):
    """Steps the engine while there is something to answer, and sleeps otherwise.

    Args:
        engine: used by this thread alone from now on.
        max_queue: requests that may wait for a slot.

    Attributes:
        responses: answers of HTTP by path and status.
    """

    def __init__(self, engine: Engine, *, max_queue: int) -> None:
        super().__init__(name="litft-engine", daemon=True)
        self.engine, self.max_queue = engine, max_queue
        self.responses: Counter[tuple[str, int]] = Counter()
        self.finished: Counter[str] = Counter()
        self.prompt_tokens = self.new_tokens = 0
        self.latency = Histogram()
        self._open: set[Request] = set()
        self._work = threading.Condition()
        self._closing = self._over = False

    def submit(self, requests: Sequence[Request]) -> None:
        """Queue requests, all or none.

        Raises:
            Full: the queue has no room for them.
            Closed: the server is going down.
        """
        with self._work:
            if self._closing:
                raise Closed
            if len(self.engine.waiting) + len(requests) > self.max_queue:
                raise Full
            for request in requests:
                self._count(request)
                self._open.add(request)
                self.engine.submit(request)
            self._work.notify()

    def close(self, patience: float) -> None:
        """Take nothing more, cut what still waits, and after a while what is being answered."""
        with self._work:
            self._closing = True
            for request in list(self.engine.waiting):
                request.cancel()
            self._work.notify()
        until = time.monotonic() + patience
        while self._open and time.monotonic() < until:
            time.sleep(0.02)
        with self._work:
            for request in list(self._open):
                request.cancel()
            self._over = True
            self._work.notify()

    def run(self) -> None:
        """Answer until `close`; whatever goes wrong ends the requests of that moment and no more."""
        while True:
            with self._work:
                while not self._open and not self._over:
                    self._work.wait()
                if self._over and not self._open:
                    return
            try:
                self.engine.step()
            except Exception as error:
                traceback.print_exc()
                self.engine.fail(error)

    def metrics(self) -> str:
        """The counts, in Prometheus' text format."""
        engine = self.engine

        def metric(name: str, kind: str, text: str, *values: tuple[str, float]) -> list[str]:
            return [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *(f"{name}{label} {n}" for label, n in values)]

        responses = [(f'{{path="{path}",status="{code}"}}', n) for (path, code), n in sorted(self.responses.items())]
        finished = [(f'{{reason="{reason}"}}', n) for reason, n in sorted(self.finished.items())]
        lines = [
            *metric("litft_http_responses_total", "counter", "Responses of HTTP.", *responses),
            *metric("litft_answers_total", "counter", "Answers, by how they ended.", *finished),
            *metric("litft_prompt_tokens_total", "counter", "Tokens of prompts.", ("", self.prompt_tokens)),
            *metric("litft_generated_tokens_total", "counter", "Tokens of answers.", ("", self.new_tokens)),
            *metric("litft_requests_waiting", "gauge", "Answers that wait for a slot.", ("", len(engine.waiting))),
            *metric("litft_requests_running", "gauge", "Answers that grow.", ("", len(engine.rows))),
            *self.latency.lines("litft_answer_seconds", "From a request's arrival to its answer's end."),
        ]
        return "\n".join(lines) + "\n"

    def _count(self, request: Request) -> None:
        """Count the request when it ends, before its own `on_end` is called."""
        began, then = time.monotonic(), request.on_end

        def ended(request: Request) -> None:
            self._open.discard(request)
            self.finished[str(request.finish)] += 1
            self.prompt_tokens += len(request.ids)
            self.new_tokens += len(request.new)
            self.latency.add(time.monotonic() - began)
            if then is not None:
                then(request)

        request.on_end = ended
