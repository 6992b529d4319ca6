"""The HTTP side: OpenAI's paths over the worker, who may call them, and errors in OpenAI's shape.

FastAPI and uvicorn rather than LitServe: that one gathers fixed batches and hands them to other processes, while
rows here enter and leave one engine between two tokens; and its OpenAI layer has no /v1/completions and no logprobs.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from litft.infer.load import ChatModel
from litft.serve.answers import Answers
from litft.serve.protocol import ApiError, ChatAsked, TextAsked, to_requests
from litft.serve.worker import Worker

OPEN = ("/", "/health")
"""Paths that need no key."""
LOCAL = ("localhost", "127.0.0.1", "::1")


def build(
    bundle: ChatModel,
    worker: Worker,
    *,
    name: str,
    api_key: str | None = None,
    local: bool = True,
    max_tokens: int = 4096,
    max_body: int = 1 << 20,
) -> FastAPI:
    """The application.

    Args:
        bundle: the model.
        worker: it answers with that model; started by the caller.
        name: the model's name for clients.
        api_key: what clients have to send; None asks for nothing.
        local: served to this machine only; then, without a key, browsers may only come from the server's own page.
        max_tokens: most tokens of an answer.
        max_body: most bytes of a request.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def api_error(_: HttpRequest, error: ApiError) -> JSONResponse:
        return _shaped(error)

    @app.exception_handler(HTTPException)
    async def http_error(_: HttpRequest, error: HTTPException) -> JSONResponse:
        return _shaped(ApiError(error.status_code, str(error.detail)), dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def not_valid(_: HttpRequest, error: RequestValidationError) -> JSONResponse:
        return _shaped(_explained(error))

    @app.exception_handler(Exception)
    async def failed(_: HttpRequest, error: Exception) -> JSONResponse:
        return _shaped(ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error"))

    async def answer(asked: ChatAsked | TextAsked, http: HttpRequest) -> Response:
        if asked.model not in (None, name, bundle.name):
            raise ApiError(
                404,
                f"The model `{asked.model}` does not exist; this is `{name}`.",
                code="model_not_found",
                param="model",
            )
        requests = to_requests(asked, bundle, max_tokens=max_tokens)
        if asked.top() is not None and (why := worker.engine.why_alone(requests[0])):
            raise ApiError(400, f"no log-probabilities from this model: {why}", param="logprobs")
        answers = Answers(asked, requests, bundle, name)
        answers.start(worker)
        if asked.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            return StreamingResponse(answers.stream(), media_type="text/event-stream", headers=headers)
        return await _unless_gone(answers, http)

    @app.post("/v1/chat/completions")
    async def chat(asked: ChatAsked, http: HttpRequest) -> Response:
        return await answer(asked, http)

    @app.post("/v1/completions")
    async def complete(asked: TextAsked, http: HttpRequest) -> Response:
        return await answer(asked, http)

    card = {"id": name, "object": "model", "created": 0, "owned_by": "litft", "max_model_len": bundle.context_length}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        if model not in (name, bundle.name):
            raise ApiError(404, f"The model `{model}` does not exist.", code="model_not_found", param="model")
        return card

    @app.get("/health")
    async def health() -> JSONResponse:
        well = worker.is_alive()
        return JSONResponse({"status": "ok" if well else "the engine has stopped"}, 200 if well else 503)

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(worker.metrics(), media_type="text/plain; version=0.0.4")

    page = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")

    @app.get("/")
    async def chat_page() -> HTMLResponse:
        return HTMLResponse(page, headers=_page_headers(page))

    app.add_middleware(_Guard, worker=worker, api_key=api_key, local=local, max_body=max_body)
    return app


def _page_headers(page: str) -> dict[str, str]:
    """Only the page's own script and style run, by their hashes, and they talk to this server alone."""

    def hashed(tag: str) -> str:
        text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        return f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = [hashed("script"), hashed("style"), "default-src 'none'", "connect-src 'self'", "img-src data:"]
    policy += ["base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"]
    return {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
    }


async def _unless_gone(answers: Answers, http: HttpRequest) -> Response:
    """The whole answer, or none if the client hangs up before."""

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    whole, hung_up = asyncio.ensure_future(answers.whole()), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({whole, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        return JSONResponse(await whole) if whole.done() else Response(status_code=499)
    except asyncio.CancelledError:  # a second Ctrl-C, or an answer that outlasts the server's patience
        raise ApiError(503, "the server is going down", code="shutting_down") from None
    finally:
        answers.cancel()
        for task in (whole, hung_up):
            task.cancel()
            with suppress(asyncio.CancelledError, ApiError):
                await task


def _shaped(error: ApiError, headers: dict[str, str] | None = None) -> JSONResponse:
    more = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status, {})
    return JSONResponse(error.body(), error.status, headers={**(headers or {}), **more})


def _explained(error: RequestValidationError) -> ApiError:
    """The first thing wrong with a body: the field and what it may be."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or None
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {where}", code="unknown_parameter", param=where)
    if first["type"] == "json_invalid" or (first["type"] in ("model_attributes_type", "missing") and where is None):
        return ApiError(400, "the body is not a JSON object, or its Content-Type is not application/json")
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{where or 'the body'}: {first['msg']}", code=code, param=where)


class _Guard:
    """Who may come in, and with how much; counts what goes out."""

    def __init__(self, app: ASGIApp, worker: Worker, api_key: str | None, local: bool, max_body: int) -> None:
        self._app, self._worker, self._local, self._max_body = app, worker, local, max_body
        self._key = api_key.encode() if api_key is not None else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        read, path = 0, scope["path"] if scope["path"] in _COUNTED else "other"

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._max_body:
                raise HTTPException(413, self._too_large())
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._worker.responses[path, message["status"]] += 1
            await send(message)

        if error := self._refused(scope):
            return await _shaped(error)(scope, receive, counted)
        await self._app(scope, limited, counted)

    def _refused(self, scope: Scope) -> ApiError | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self._key is not None and scope["path"] not in OPEN:
            kind, _, key = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1", "replace"), self._key):
                return ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
        if self._key is None and self._local:
            # A page of another site may make the browser call this server, even by a name that it lets point here.
            host, origin = headers.get("host", ""), headers.get("origin")
            if _netloc(f"//{host}")[0] not in LOCAL:
                return ApiError(403, f"this server answers to the names {', '.join(LOCAL)} only", code="unknown_host")
            if origin is not None and _netloc(origin)[1] != host:
                return ApiError(403, "pages of other sites may not use this server", code="foreign_origin")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > self._max_body:
            return ApiError(413, self._too_large(), code="request_too_large")
        return None

    def _too_large(self) -> str:
        return f"the request is larger than {self._max_body:,} bytes"


def _netloc(url: str) -> tuple[str | None, str | None]:
    """The host of a URL, and the host with its port; None where it is no URL."""
    try:
        parts = urlsplit(url)
        return parts.hostname, parts.netloc
    except ValueError:
        return None, None


_COUNTED = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics", "/"}
