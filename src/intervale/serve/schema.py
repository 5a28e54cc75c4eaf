"""OpenAI's chat.completions request, as far as one local model can honour it.

Promises: a value that would change the answer is honoured or refused, never ignored; what only labels a request (`user`, `metadata` ...) is
accepted; an unknown name is refused with the nearest one. JSON is read strictly: UTF-8, no NaN, no key twice, no depth that
exhausts the reader. Errors name the place (`messages[0].content[1].image_url.url`).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from intervale.core.errors import nearest
from intervale.serve.errors import ApiError, bad

MOST_MESSAGES, MOST_PARTS, MOST_LETTERS = 500, 200, 400_000
MOST_LIKELY = 20  # top_logprobs, as at OpenAI
# Accepted and without effect: they label a request, or ask for what is the only way here.
LABELS = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls", "tool_choice",
)  # fmt: skip
# Accepted where they ask for nothing: name -> the values that do.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,), "tools": ([],), "functions": ([],), "function_call": ("none",), "logit_bias": ({},),
    "frequency_penalty": (0,), "presence_penalty": (0,), "repetition_penalty": (1,), "response_format": ({"type": "text"},),
    "modalities": (["text"],), "audio": (), "prediction": (), "reasoning_effort": ("none",), "web_search_options": (), "best_of": (1,),
    "echo": (False,), "ignore_eos": (False,), "min_p": (0,), "verbosity": ("medium",),
}  # fmt: skip


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    """A text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Strict):
    """Where a picture is; `detail` 'low' shows it as one tile, 'auto' and 'high' as many as the model takes."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(BaseModel):
    """One message; a plain text is one text part."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part] = Field(max_length=MOST_PARTS)

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            return value | {"content": [{"type": "text", "text": value["content"]}]}
        return value

    @model_validator(mode="after")
    def _nothing_more(self) -> ChatMessage:
        more = [name for name, value in (self.model_extra or {}).items() if name != "name" and value not in (None, [], {})]
        if more:
            raise ValueError(f"'{more[0]}' is not supported in a message")
        return self


class StreamOptions(_Strict):
    """`include_usage`: a last chunk with the token counts."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatBody(BaseModel):
    """The request. `top_k` and `seed` are beside OpenAI's own, and so are the two words of vLLM and SGLang by which the last message is an
    answer to be gone on with; `stop` is one text or up to four."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MOST_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1_000_000)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] | None = Field(None, max_length=4)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LIKELY)
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stream", mode="before")
    @classmethod
    def _no_stream(cls, value: Any) -> Any:
        return False if value is None else value

    def likely(self) -> int | None:
        """How many likely tokens are to be told beside each; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def most_tokens(self) -> int | None:
        """`max_tokens` by either of its names, or None."""
        given = {value for value in (self.max_tokens, self.max_completion_tokens) if value is not None}
        if len(given) > 1:
            raise bad("invalid_value", "max_tokens and max_completion_tokens differ; give one of them", "max_tokens")
        return next(iter(given), None)


def read_json(raw: bytes) -> dict[str, Any]:
    """The body as an object. Raises: ApiError 400 'invalid_json'."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise bad("invalid_json", "the body has the same key twice in one object")
        return found

    def constant(name: str) -> Any:
        raise bad("invalid_json", f"{name} is not JSON; give a number")

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
    except UnicodeDecodeError:
        raise bad("invalid_json", "the body is not UTF-8") from None
    except RecursionError:
        raise bad("invalid_json", "the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise bad("invalid_json", f"the body is not JSON (line {error.lineno}, column {error.colno})") from None
    except ValueError:
        raise bad("invalid_json", "a number in the body has too many digits") from None
    if not isinstance(value, dict):
        raise bad("invalid_json", "the body must be a JSON object")
    return value


_SAID = {
    "missing": "is missing",
    "extra_forbidden": "is not supported",
    "literal_error": "must be one of {expected}",
    "union_tag_invalid": "must be of type {expected_tags}",
    "union_tag_not_found": "has no 'type'",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length} item(s)",
    "too_long": "must have at most {max_length} items",
    "string_too_short": "must not be empty",
    "string_too_long": "must have at most {max_length} characters",
    "finite_number": "must be a finite number",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be a text",
    "list_type": "must be a list (or, for content and stop, a text)",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "value_error": "{error}",
}


def _told(error: ValidationError) -> ApiError:
    """The first fault in our words, with its place."""
    fault = error.errors(include_url=False, include_input=False)[0]
    place = ""
    previous: Any = None
    for step in fault["loc"]:
        if step != previous:  # a part's tag stands beside its field of the same name
            place += f"[{step}]" if isinstance(step, int) else ("." if place else "") + str(step)[:60]
        previous = step
    said = _SAID.get(fault["type"], "is not a value this field can have").format(**fault.get("ctx", {}))
    return bad("invalid_value", f"{place or 'the body'} {said}" if fault["type"] != "value_error" else f"{place}: {said}", place or None)


def read_chat(raw: bytes) -> ChatBody:
    """The request of a body. Raises: ApiError 400 naming the field."""
    value = read_json(raw)
    known = [*ChatBody.model_fields, *LABELS, *_NOTHING]
    for name, asked in value.items():
        if name not in known:
            raise bad("unknown_parameter", f"there is no parameter {name[:80]!r}{nearest(name[:80], known)}", name[:80])
        if name in _NOTHING and asked is not None and asked not in _NOTHING[name]:
            only = " or ".join(json.dumps(nothing) for nothing in _NOTHING[name])
            raise bad("unsupported_value", f"{name} is not supported here" + (f" other than {only}" if only else ""), name)
    try:
        body = ChatBody.model_validate(value)
    except ValidationError as error:
        raise _told(error) from None
    except RecursionError:
        raise bad("invalid_json", "the body is nested too deeply") from None
    _check_order(body)
    _check_pairs(body)
    return body


def _check_pairs(body: ChatBody) -> None:
    """Words that only mean something beside another."""
    if body.top_logprobs and not body.logprobs:
        raise bad("invalid_value", "top_logprobs needs logprobs: true", "top_logprobs")
    if body.add_generation_prompt is not None and body.add_generation_prompt == body.continue_final_message:
        raise bad(
            "invalid_value", "add_generation_prompt is false where continue_final_message is true, and only there", "add_generation_prompt"
        )


def _check_order(body: ChatBody) -> None:
    """The order of roles that a template can hold."""
    for number, message in enumerate(body.messages):
        where = f"messages[{number}]"
        if message.role in ("system", "developer") and number:
            raise bad("invalid_messages", f"{where}: a system message can only come first", f"{where}.role")
        if message.role != "user" and any(part.type == "image_url" for part in message.content):
            raise bad("invalid_messages", f"{where}: only the user's messages can have pictures", f"{where}.content")
        if message.role == "user" and not any(part.type == "image_url" or part.text for part in message.content):
            raise bad("invalid_messages", f"{where}: the user's message is empty", f"{where}.content")
    talk = [message.role for message in body.messages if message.role in ("user", "assistant")]
    if not talk or talk[0] != "user":
        raise bad("invalid_messages", "the conversation must begin with the user's message", "messages")
    ends = "assistant" if body.continue_final_message else "user"
    if talk[-1] != ends:
        whose = {"user": "the user's message (an answer to go on with needs continue_final_message: true)"}.get(
            ends, "the answer to go on with"
        )
        raise bad("invalid_messages", f"the conversation must end with {whose}", "messages")
    if body.continue_final_message and talk[-2] != "user":
        raise bad("invalid_messages", "the answer to go on with must follow the user's message", "messages")
    letters = sum(len(part.text) for message in body.messages for part in message.content if part.type == "text")
    if letters > MOST_LETTERS:
        raise bad("context_length_exceeded", f"the texts have {letters:,} characters; the limit is {MOST_LETTERS:,}", "messages")
