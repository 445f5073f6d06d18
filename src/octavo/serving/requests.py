"""What a request to transformers' server may ask: OpenAI's parameters, checked, and nothing that would silently be left undone.

Fields that this engine does not have are accepted only with the value that changes nothing (`n=1`, `presence_penalty=0`).

Example:
    >>> ChatRequest.model_validate({"messages": [{"role": "user", "content": "Hi"}], "n": 2})
    Traceback (most recent call last):
    pydantic_core._pydantic_core.ValidationError: ...
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Nothing = Annotated[float, Field(ge=0, le=0)] | None
Limit = Annotated[int, Field(ge=1)] | None
NotEmpty = Annotated[str, Field(min_length=1)]


class TextFormat(BaseModel):
    type: Literal["text"]


class Request(BaseModel):
    """Both kinds of requests. Other fields are left to transformers' own check."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str | None = None
    max_tokens: Limit = None
    max_completion_tokens: Limit = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: NotEmpty | Annotated[list[NotEmpty], Field(max_length=16)] | None = None
    stream: bool | None = None
    n: Literal[1] | None = None
    # transformers' own, as JSON: `transformers chat` sends it.
    generation_config: str | None = None
    presence_penalty: Nothing = None
    # transformers would take it for another penalty, of another size.
    frequency_penalty: Nothing = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: NotEmpty
    content: str | list[dict[str, Any]] | None = None


class ChatRequest(Request):
    messages: Annotated[list[Message], Field(min_length=1)]
    logprobs: Literal[False] | None = None
    top_logprobs: Nothing = None
    response_format: TextFormat | None = None
    tool_choice: Literal["auto", "none"] | None = None


class CompletionRequest(Request):
    prompt: NotEmpty | Annotated[list[NotEmpty], Field(min_length=1, max_length=1)]
    logprobs: None = None
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None


def explained(error: ValidationError) -> str:
    """What is wrong with a request, in a sentence."""
    found = []
    for problem in error.errors():
        # What follows the field's name are pydantic's branches of a union.
        where = ".".join(str(part) for part in problem["loc"][:1])
        found.append(f"{where}: {problem['msg'][:1].lower()}{problem['msg'][1:]}")
    return "; ".join(dict.fromkeys(found))
