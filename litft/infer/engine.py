"""The engine under `generate`, `stream`, `chat` and `serve`: many answers at once, each as if it were alone.

Every step continues all rows by one token. Rows that are done leave, waiting ones enter in their place, and prompts of
like length are read together, so that hardly any padding is computed (continuous batching: Yu et al. 2022, "Orca").
"""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from litft.infer.alone import alone, say_once, why_alone
from litft.infer.load import ChatModel
from litft.infer.text import TextStreamer

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

    from litft.infer.sampling import Draw

_ALIKE = 0.8
"""Prompts are read together if the shortest has this share of the longest one's tokens."""


class TokenLogprobs(NamedTuple):
    """Natural log-probabilities at one token of an answer, by the model's own distribution (no temperature, no filter).

    Attributes:
        id: the token.
        logprob: its log-probability.
        top: the likeliest tokens, likeliest first, with theirs.
    """

    id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Request:
    """A prompt to answer, and the answer as it grows.

    Attributes:
        ids: the prompt's tokens.
        settings: how tokens are chosen, of `litft.infer.generate.decoding`.
        max_new_tokens: longest answer; prompt and answer have to fit the model's context.
        seed: of the sampling; None draws anew.
        stop: texts that end the answer and are no part of its text.
        logprobs: how many of the likeliest tokens to report at each token of the answer; None reports nothing.
        strip: leave line breaks in front of the answer and blanks at its end out of the text.
        on_text: called, in the engine's thread, with each new piece of text.
        on_end: called there once, when `finish` is known. Neither may raise.
        new: the answer's tokens, the stop token included.
        told: the log-probabilities of `new`.
        finish: "stop" (a stop token or text), "length", "cancelled", or "error"; None while it grows.
        error: what went wrong.
        alone: why it can't share a batch; known once it is submitted.
        cancelled: whether `cancel` was called.
    """

    ids: list[int]
    settings: GenerationConfig
    max_new_tokens: int
    seed: int | str | None = 0
    stop: Sequence[str] = ()
    logprobs: int | None = None
    strip: bool = True
    on_text: Callable[[str], None] | None = None
    on_end: Callable[[Request], None] | None = None
    new: list[int] = field(default_factory=list, init=False)
    told: list[TokenLogprobs] = field(default_factory=list, init=False)
    finish: Literal["stop", "length", "cancelled", "error"] | None = field(default=None, init=False)
    error: BaseException | None = field(default=None, init=False)
    alone: str | None = field(default=None, init=False)
    cancelled: bool = field(default=False, init=False)
    _streamer: TextStreamer | None = field(default=None, init=False)

    def cancel(self) -> None:
        """Ask that it ends; from any thread. What was answered stays."""
        self.cancelled = True

    @property
    def text(self) -> str:
        """The answer's text, as far as it is certain; all of it once `finish` is known."""
        return self._streamer.text if self._streamer is not None else ""

    def begin(self, bundle: ChatModel) -> None:
        """Called by the engine when the request's turn comes."""
        self._streamer = TextStreamer(bundle, self.on_text or (lambda piece: None), self.stop, strip=self.strip)

    def accept(self, id: int, bundle: ChatModel) -> None:
        """Called by the engine with each new token; sees whether it is the last."""
        assert self._streamer is not None
        self.new.append(id)
        if id in bundle.stop_ids:
            return self.end("stop")
        watched = bool(self.stop) or self.on_text is not None
        if watched and self._streamer.add(id):
            return self.end("stop")
        if not watched:
            self._streamer.later(id)
        if len(self.new) >= self.max_new_tokens:
            self.end("length")

    def end(self, finish: Any, error: BaseException | None = None) -> None:
        """Called by the engine when the answer is over; only the first call counts."""
        if self.finish is not None:
            return
        if self._streamer is not None and error is None:
            self._streamer.end()
        self.finish, self.error = finish, error
        if self.on_end is not None:
            self.on_end(self)


@dataclass(eq=False)
class _Row:
    """A request in a slot.

    Attributes:
        request: it.
        draw: how its tokens are chosen.
        ids: prompt and answer.
        cached: how many of them the cache holds.
    """

    request: Request
    draw: Draw
    ids: list[int]
    cached: int = 0


class Engine:
    """Answers requests, many at once, with one model.

    `submit` and `Request.cancel` may be called from any thread; `step` from one at a time.

    Args:
        bundle: of `load_for_inference`.
        slots: answers that grow at once.
        prompt_tokens: prompt tokens read in one step, between which the other rows wait. A longer prompt is read in
            pieces.
        cache_bytes: most memory for keys and values; a request that would need more waits for others to end. None is
            no bound.
    """

    def __init__(
        self, bundle: ChatModel, *, slots: int = 16, prompt_tokens: int = 2048, cache_bytes: float | None = None
    ) -> None:
        from litft.infer.slots import SlotCache

        self.bundle, self.slots, self.prompt_tokens, self.cache_bytes = bundle, slots, prompt_tokens, cache_bytes
        self.waiting: deque[Request] = deque()
        self.rows: list[_Row] = []  # by slot; those whose prompt is read, then at most one that is being read
        self._cache = SlotCache()
        takes = inspect.signature(bundle.model.forward).parameters
        self._cache_name = "cache" if "cache" in takes else "past_key_values"  # transformers renames it in 5.24
        self._token_bytes = 0  # of keys and values of all layers
        self._lock = threading.Lock()
        self._why_alone = why_alone(bundle.model)
        """Why the model answers one prompt at a time; None where it need not."""

    def submit(self, request: Request) -> Request:
        """Queue a request; returns it."""
        request.alone = self.why_alone(request)
        with self._lock:
            self.waiting.append(request)
        return request

    def why_alone(self, request: Request) -> str | None:
        """Why a request can't share a batch, as half a sentence; None where it can."""
        from litft.infer.sampling import not_read

        odd = not_read(request.settings)
        return self._why_alone or (f"its settings ask for {', '.join(odd)}" if odd else None)

    def run(self, requests: Sequence[Request], watch: Callable[[], None] | None = None) -> None:
        """Answer these requests; `watch` is called after every step.

        An exception, KeyboardInterrupt too, leaves the engine empty.

        Raises:
            BaseException: what went wrong with one of them.
        """
        for request in requests:
            self.submit(request)
        try:
            while self.step():
                if watch is not None:
                    watch()
        except BaseException as error:
            self.fail(error)
            raise
        if watch is not None:
            watch()

    def fail(self, error: BaseException) -> None:
        """End all requests with an error, and be ready for new ones."""
        with self._lock:
            gone = [row.request for row in self.rows] + list(self.waiting)
            self.waiting.clear()
        self.rows = []
        self._cache.clear()
        for request in gone:
            request.end("error", error)

    def step(self) -> bool:
        """Read waiting prompts, as far as there is room, then continue every row by one token.

        Returns:
            Whether anything is left to do.
        """
        import torch

        with torch.inference_mode():
            self._leave()
            left = self.prompt_tokens
            while left > 0 and (read := self._read_prompts(left)):
                left -= read
                self._leave()
            self._continue()
            self._leave()
        if not self.rows and not self.waiting:
            self._cache.clear()
            return False
        return True

    # -- who is in ---------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Take out rows that are done; the last ones move into their slots."""
        for row in self.rows:
            if row.request.cancelled:
                row.request.end("cancelled")
        for slot in reversed(range(len(self.rows))):
            if self.rows[slot].request.finish is None:
                continue
            # The last whole row fills the gap, and the one that is being read, behind it, follows.
            for source in dict.fromkeys((self._whole() - 1, len(self.rows) - 1)):
                if source > slot:
                    self._cache.move(source, slot, self.rows[source].cached)
                    self.rows[slot] = self.rows[source]
                    slot = source
            self.rows.pop()

    def _whole(self) -> int:
        """Rows whose prompt is read; they have the first slots."""
        return len(self.rows) - (bool(self.rows) and self.rows[-1].cached < len(self.rows[-1].request.ids))

    def _enter(self, room: int) -> list[_Row]:
        """Waiting requests to begin: the first one, and others with prompts of like length."""
        from litft.infer.sampling import Draw, Sampling

        gone = [request for request in list(self.waiting) if request.cancelled]
        chosen: list[Request] = []
        shortest = longest = 0
        for request in list(self.waiting):
            size = len(request.ids)
            low, high = (min(shortest, size), max(longest, size)) if chosen else (size, size)
            if request.cancelled or (chosen and (low < _ALIKE * high or high * (len(chosen) + 1) > room)):
                continue
            if len(self.rows) + len(chosen) >= self.slots or not self._fits([*chosen, request]):
                break
            if high > room and room < self.prompt_tokens:  # the next step has room for a larger piece
                break
            if request.alone and (chosen or self.rows):
                break
            chosen.append(request)
            shortest, longest = low, high
            if request.alone or high > room:
                break
        with self._lock:
            for request in [*gone, *chosen]:
                self.waiting.remove(request)
        for request in gone:
            request.end("cancelled")
        for request in chosen:
            request.begin(self.bundle)
        return [_Row(r, Draw(Sampling.of(r.settings), r.seed), list(r.ids)) for r in chosen]

    def _fits(self, more: list[Request]) -> bool:
        """Whether the cache has memory for these, too, at their full length."""
        if self.cache_bytes is None or len(self.rows) + len(more) == 1:
            return True
        requests = [row.request for row in self.rows] + more
        longest = max(len(r.ids) + r.max_new_tokens for r in requests)
        # Before the first row nobody knows what a token takes: it goes alone.
        return self._token_bytes > 0 and len(requests) * longest * self._token_bytes <= self.cache_bytes

    # -- what is computed --------------------------------------------------------------------------------------------

    def _read_prompts(self, room: int) -> int:
        """Read a piece of the prompt that is being read, or those of new rows; returns the tokens read."""
        whole = self._whole()
        if whole == len(self.rows):
            fresh = self._enter(room)
            if not fresh:
                return 0
            if why := fresh[0].request.alone:
                say_once(self.bundle.name, why)
                try:
                    alone(self.bundle, fresh[0].request)
                except BaseException as error:
                    fresh[0].request.end("error", error)
                    raise
                return room
            self.rows += fresh
        rows = self.rows[whole:]
        pieces = [row.ids[row.cached : row.cached + room] for row in rows]
        width = max(map(len, pieces))
        logits = self._forward(pieces, slice(whole, len(self.rows)), rows)
        for row, piece in zip(rows, pieces, strict=True):
            row.cached += len(piece)
        if rows[-1].cached == len(rows[-1].ids):
            self._choose(rows, logits)
        return width * len(rows)

    def _continue(self) -> None:
        """One more token for every row whose prompt is read."""
        rows = self.rows[: self._whole()]
        if rows:
            logits = self._forward([row.ids[-1:] for row in rows], slice(0, len(rows)), rows)
            for row in rows:
                row.cached += 1
            self._choose(rows, logits)

    def _forward(self, pieces: list[list[int]], slots: slice, rows: list[_Row]) -> torch.Tensor:
        """The logits after each row's piece [rows, vocabulary], fp32."""
        import torch

        from litft.infer.slots import Step, routed

        model: Any = self.bundle.model
        width, lengths = max(map(len, pieces)), [len(piece) for piece in pieces]
        device = model.get_input_embeddings().weight.device
        starts = [row.cached for row in rows]
        step = self._cache.step = Step(slots, starts, fresh=not any(starts), device=device)
        ids = torch.tensor([piece + piece[-1:] * (width - len(piece)) for piece in pieces], device=device)
        ends = sorted(set(lengths))
        keep: Any = 1 if len(ends) == 1 else torch.tensor(ends, device=device) - 1
        with routed(model):
            logits = model(
                input_ids=ids,
                position_ids=step.positions(width),
                use_cache=True,
                logits_to_keep=keep,
                slots=step,
                **{self._cache_name: self._cache},
            ).logits
        self._token_bytes = self._token_bytes or self._cache.bytes_per_token()
        column = [ends.index(length) for length in lengths]
        return logits[range(len(rows)), column].float()

    def _choose(self, rows: list[_Row], logits: torch.Tensor) -> None:
        from litft.infer.sampling import choose

        told = [log_probabilities(logits[i], row.request.logprobs) for i, row in enumerate(rows)]
        chosen = choose(logits, [row.draw for row in rows], [row.ids for row in rows])
        for row, id, tell in zip(rows, chosen, told, strict=True):
            if tell is not None:
                row.request.told.append(tell(id))
            row.ids.append(id)
            row.request.accept(id, self.bundle)


def log_probabilities(logits: torch.Tensor, top: int | None) -> Callable[[int], TokenLogprobs] | None:
    """A function from the token that is chosen to its log-probabilities; None where nobody asked.

    Args:
        logits: [vocabulary].
        top: how many of the likeliest to report.
    """
    if top is None:
        return None
    logs = logits.log_softmax(0)
    values, ids = logs.topk(top)
    pairs = list(zip(ids.tolist(), values.tolist(), strict=True))
    return lambda id: TokenLogprobs(id, float(logs[id]), pairs)
