"""OpenAI's requests, checked, and what they ask of the engine. Fields that would change nothing here are refused."""

from __future__ import annotations

import copy
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from litft.data.conversation import Conversation
from litft.data.messages import to_messages, to_tools
from litft.errors import UserError
from litft.infer.engine import Request
from litft.infer.generate import decoding
from litft.infer.load import ChatModel

Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class ApiError(Exception):
    """An error as OpenAI shapes it.

    Args:
        status: of HTTP.
        message: for people.
        code: for programs ("model_not_found"), or None.
        param: the field at fault, or None.
    """

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """What is sent."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(BaseModel):
    """What a stream tells beside the text."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class _Asked(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=False)

    model: str | None = None
    n: int | None = Field(1, ge=1, le=128)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: str | list[Annotated[str, Field(min_length=1)]] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # Only the values that ask for nothing.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    # Notes of the client's own.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @property
    def stops(self) -> list[str]:
        """The stop texts."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def longest(self) -> tuple[int | None, str]:
        """The longest answer asked for, in tokens, and the field that says so."""
        return self.max_tokens, "max_tokens"

    def top(self) -> int | None:
        """How many log-probabilities to report at each token; None for none."""
        raise NotImplementedError

    def prompts(self, bundle: ChatModel) -> list[list[int]]:
        """The tokens to continue, one or several times."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _several(self) -> _Asked:
        if self.stop is not None and (self.stop == "" or len(self.stops) > 16):
            raise ValueError("stop: up to 16 texts, none empty")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream: true")
        return self


class ResponseFormat(BaseModel):
    """Only plain text."""

    type: Literal["text"]


class ChatAsked(_Asked):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None

    def longest(self) -> tuple[int | None, str]:
        """The longest answer asked for, in tokens, and the field that says so."""
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens, "max_completion_tokens"
        return super().longest()

    def top(self) -> int | None:
        """How many log-probabilities to report at each token; None for none."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self, bundle: ChatModel) -> list[list[int]]:
        """The chat in the model's template."""
        if bundle.encoder is None:
            raise ApiError(400, f"{bundle.name} has no chat template; it takes /v1/completions", param="messages")
        roles = {"developer": "system"}  # OpenAI's newer name
        turns = [turn | {"role": roles.get(str(turn.get("role")), turn.get("role"))} for turn in self.messages]
        try:
            messages, train = to_messages([{k: v for k, v in turn.items() if v is not None} for turn in turns])
            tools = None if self.tool_choice == "none" else to_tools(self.tools)
            ids = bundle.encode(Conversation(messages, train, tools=tools))
            if tools and ids == bundle.encode(Conversation(messages, train)):
                raise ApiError(400, f"{bundle.name}'s chat template has no place for tools", param="tools")
            return [ids]
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from error


class TextAsked(_Asked):
    """The body of /v1/completions."""

    prompt: str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    max_tokens: int | None = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def top(self) -> int | None:
        """How many log-probabilities to report at each token; None for none."""
        return self.logprobs

    def prompts(self, bundle: ChatModel) -> list[list[int]]:
        """The texts as they stand, or token ids."""
        given: Any = self.prompt
        several = isinstance(given, list) and not isinstance(given[0], int)
        rows = [
            bundle.encode(Conversation(text=part)) if isinstance(part, str) else part
            for part in (given if several else [given])
        ]
        size = bundle.model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
        if any(id >= size for row in rows for id in row):
            raise ApiError(400, f"a token id of the prompt is beyond the vocabulary of {size:,}", param="prompt")
        return rows


def to_requests(asked: ChatAsked | TextAsked, bundle: ChatModel, *, max_tokens: int) -> list[Request]:
    """The engine's requests: every prompt `n` times.

    Args:
        asked: the body.
        bundle: the model.
        max_tokens: most tokens that an answer may have here.

    Raises:
        ApiError: what cannot be done, naming the field.
    """
    wanted, field = asked.longest()
    if wanted is not None and wanted > max_tokens:
        raise ApiError(400, f"{field} {wanted:,}: this server gives at most {max_tokens:,}", param=field)
    try:
        settings = decoding(
            bundle, wanted or max_tokens, asked.temperature, asked.top_p, asked.top_k, asked.stops, asked.min_p
        )
    except UserError as error:
        raise ApiError(400, str(error)) from error
    settings.num_beams = 1  # several beams have no one text that grows
    limit, requests = bundle.context_length, []
    for number, ids in enumerate(asked.prompts(bundle)):
        if not ids:
            raise ApiError(400, "the prompt is empty", param="prompt")
        room = max_tokens if limit is None else limit - len(ids)
        if room < (wanted or 1):
            what = f"the prompt has {len(ids):,} tokens" + (f" and {field} is {wanted:,}" if wanted else "")
            raise ApiError(
                400,
                f"This model's maximum context length is {limit:,} tokens; {what}.",
                code="context_length_exceeded",
                param="messages" if isinstance(asked, ChatAsked) else "prompt",
            )
        for choice in range(asked.n or 1):
            seed = None if asked.seed is None else f"{asked.seed}/{number}/{choice}"
            longest = min(wanted or max_tokens, room)
            requests.append(
                Request(
                    ids, copy.copy(settings), longest, seed=seed, stop=asked.stops, logprobs=asked.top(), strip=False
                )
            )
    return requests
