"""OpenAI's protocol: what requests may say, checked strictly, and the shapes of answers.

A field this server does not serve is refused with its name, unless it has the value that changes nothing.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from jf_cluster.jacobi.sampling import Sampling

LONGEST_STOP = 8
"""Most stop strings of a request."""
BODY_BYTES = 4 << 20
"""Largest request body."""


class RequestError(ValueError):
    """A request that cannot be served: the message says what is wrong; ``status`` and ``code`` go to the client."""

    def __init__(self, message: str, *, status: int = 400, code: str = "invalid_request", field: str | None = None):
        super().__init__(message)
        self.status, self.code, self.field = status, code, field

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients expect it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_says_nothing(cls, fields: Any) -> Any:
        """Clients send null for what was not set, and give back an answer as a message with fields it never had."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def plain(self) -> dict[str, str]:
        """Role and text as chat templates take them."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class _Request(_Strict):
    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Not OpenAI's, but what many servers take; 0 keeps all tokens."""
    stop: str | list[str] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    @field_validator("stop")
    @classmethod
    def _stop_strings(cls, value: str | list[str] | None) -> str | list[str] | None:
        strings = [value] if isinstance(value, str) else value or []
        if len(strings) > LONGEST_STOP or any(not s for s in strings):
            raise ValueError(f"at most {LONGEST_STOP} stop strings, none of them empty")
        return value

    @model_validator(mode="after")
    def _options_need_stream(self) -> _Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_tokens

    @property
    def sampling(self) -> Sampling:
        """As OpenAI: temperature 1 unless said otherwise."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature, self.top_k or 0, 1.0 if self.top_p is None else self.top_p)

    @property
    def key(self) -> int:
        """Key of the sampling's noise: in float32 the same seed gives the same answer, also under load."""
        return secrets.randbits(62) if self.seed is None else self.seed & (2**62 - 1)

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(_Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Request):
    prompt: str | list[int]
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


def parse(kind: type[ChatRequest] | type[CompletionRequest], body: bytes) -> ChatRequest | CompletionRequest:
    """Read a request.

    Raises:
        RequestError: not JSON, or a field that is missing, unknown, or has a value that is not served.
    """
    if len(body) > BODY_BYTES:
        raise RequestError(f"the request has {len(body)} bytes, more than {BODY_BYTES}", status=413, code="too_large")
    try:
        fields = json.loads(body)
        json.dumps(fields, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the request is not JSON: {error}", code="malformed_json") from error
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = "this server does not know or serve it" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(f"{place or 'the request'}: {reason}", field=place or None) from error


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Tokens taken and given, as OpenAI counts them."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


LAST_EVENT = b"data: [DONE]\n\n"
