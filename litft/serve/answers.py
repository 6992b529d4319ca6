"""From the engine's thread to OpenAI's responses: whole, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from litft.infer.engine import Request, TokenLogprobs
from litft.infer.load import ChatModel
from litft.serve.protocol import ApiError, ChatAsked, TextAsked
from litft.serve.worker import Closed, Full, Worker

Event = tuple[int, str, int]
"""Of which answer, a piece of its text, and how many tokens it has by then."""


class Answers:
    """The answers to one HTTP request.

    Args:
        asked: the body.
        requests: what it asks of the engine.
        bundle: the model.
        name: the model's name, as clients read it.
    """

    def __init__(self, asked: ChatAsked | TextAsked, requests: list[Request], bundle: ChatModel, name: str) -> None:
        self.asked, self.requests, self.bundle, self.name = asked, requests, bundle, name
        self.chat = isinstance(asked, ChatAsked)
        self.id = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def start(self, worker: Worker) -> None:
        """Hand the requests to the engine.

        Raises:
            ApiError: the queue is full, or the server is going down.
        """
        loop = asyncio.get_running_loop()

        def tell(number: int, piece: str, tokens: int) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, (number, piece, tokens))

        for number, request in enumerate(self.requests):
            if self.asked.stream:
                request.on_text = lambda piece, n=number, r=request: tell(n, piece, len(r.new))
            request.on_end = lambda r, n=number: tell(n, "", -1)
        try:
            worker.submit(self.requests)
        except Full:
            raise ApiError(429, "too many requests wait already; try again later", code="queue_full") from None
        except Closed:
            raise ApiError(503, "the server is going down", code="shutting_down") from None

    def cancel(self) -> None:
        """Stop what still grows."""
        for request in self.requests:
            request.cancel()

    async def whole(self) -> dict[str, Any]:
        """All answers, once they are complete.

        Raises:
            ApiError: one of them failed or was cut by the server.
        """
        left = len(self.requests)
        while left:
            left -= (await self._events.get())[2] == -1
        self._check()
        choices = []
        for index, request in enumerate(self.requests):
            choice: dict[str, Any] = {"index": index, "finish_reason": request.finish}
            choice |= {"message": {"role": "assistant", "content": request.text}} if self.chat else {}
            choice |= {} if self.chat else {"text": request.text}
            choices.append(choice | {"logprobs": self._logprobs(request, 0, len(request.told))})
        kind = "chat.completion" if self.chat else "text_completion"
        return self._head(kind) | {"choices": choices, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events; whoever stops listening stops the answers."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        told = [0] * len(self.requests)
        left = len(self.requests)
        usage = {"usage": None} if self.asked.wants_usage else {}

        def event(choices: list[dict[str, Any]], more: dict[str, Any] = usage) -> str:
            return _event(self._head(kind) | {"choices": choices} | more)

        def choice(index: int, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
            said = {"delta": {"content": text} if text else {}} if self.chat else {"text": text}
            return {"index": index, **said, "logprobs": logprobs, "finish_reason": finish}

        try:
            if self.chat:
                for index in range(left):
                    delta = {"role": "assistant", "content": ""}
                    yield event([{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}])
            while left:
                index, piece, tokens = await self._events.get()
                request = self.requests[index]
                over = tokens == -1
                if over:
                    left -= 1
                    if request.finish not in ("stop", "length"):
                        self._check()
                if request.logprobs is not None:
                    until = len(request.told) if over else tokens
                    logprobs = self._logprobs(request, told[index], until) if until > told[index] else None
                    told[index] = until
                else:
                    logprobs = None
                if piece or (logprobs and (logprobs.get("content") or logprobs.get("tokens"))):
                    yield event([choice(index, piece, None, logprobs)])
                if over:
                    yield event([choice(index, "", request.finish, None)])
            if self.asked.wants_usage:
                yield event([], {"usage": self._usage()})
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())
        finally:
            self.cancel()

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.name}

    def _check(self) -> None:
        for request in self.requests:
            if request.finish == "error":
                raise ApiError(500, f"the model failed: {type(request.error).__name__}", code="internal_error")
            if request.finish == "cancelled":
                raise ApiError(503, "the server is going down", code="shutting_down")

    def _usage(self) -> dict[str, int]:
        """Tokens of the prompts, each counted once, and of the answers."""
        read = sum(len(request.ids) for request in self.requests[:: self.asked.n or 1])
        new = sum(len(request.new) for request in self.requests)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}

    def _logprobs(self, request: Request, start: int, end: int) -> dict[str, Any] | None:
        """In the form of chats or of completions; without the stop token, which is no part of the text."""
        if request.logprobs is None:
            return None
        told = [tell for tell in request.told[start:end] if tell.id not in self.bundle.stop_ids]
        if self.chat:
            return {"content": [self._one(tell) for tell in told], "refusal": None}
        before = len(self._text(request.new[:start]))
        offsets = [before]
        for tell in told:
            offsets.append(offsets[-1] + len(self._text([tell.id])))
        return {
            "tokens": [self._text([tell.id]) for tell in told],
            "token_logprobs": [tell.logprob for tell in told],
            # By text, which two tokens may share: then the likelier one's stands.
            "top_logprobs": [{self._text([id]): logprob for id, logprob in reversed(tell.top)} for tell in told],
            "text_offset": offsets[:-1],
        }

    def _one(self, tell: TokenLogprobs) -> dict[str, Any]:
        top = [self._named(id, logprob) for id, logprob in tell.top]
        return self._named(tell.id, tell.logprob) | {"top_logprobs": top}

    def _named(self, id: int, logprob: float) -> dict[str, Any]:
        text = self._text([id])
        whole = "\ufffd" not in text  # else it is part of a character
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    def _text(self, ids: list[int]) -> str:
        return str(self.bundle.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
