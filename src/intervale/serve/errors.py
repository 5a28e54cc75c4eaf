"""What a client is told when something is wrong: OpenAI's envelope, a stable code, our own words.

Promises: no text of a library reaches a client; what we did not foresee is 'internal_error' with the request's id, and its
traceback stands in the log under that id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse

from intervale.core.errors import UserError
from intervale.data.images import PictureError
from intervale.engine.api import EngineError, RefusedError, UpstreamRefusedError

# Codes of an engine's own failures -> HTTP status; everything else it refuses is the client's (400).
_ENGINE_STATUS = {"busy": 429, "engine_unavailable": 503, "out_of_memory": 503, "engine_interrupted": 502, "upstream_failed": 502}
_REFUSED_STATUS = {"model_not_found": 404}


@dataclass(eq=False)
class ApiError(Exception):
    """An answer that is an error. `param` names the field at fault."""

    status: int
    code: str
    message: str
    param: str | None = None
    retry_after: int | None = None

    def body(self) -> dict[str, Any]:
        """OpenAI's error envelope."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole HTTP answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def bad(code: str, message: str, param: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, code, message, param)


def as_api_error(error: BaseException) -> ApiError | None:
    """The answer for an error of ours; None for one that nobody foresaw."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return ApiError(_ENGINE_STATUS.get(error.code, 500), error.code, error.what, None, error.retry_after)
    if isinstance(error, UpstreamRefusedError):
        return bad(error.code, error.what, "messages")
    if isinstance(error, RefusedError):
        param = "model" if error.code == "model_not_found" else "messages"
        return ApiError(_REFUSED_STATUS.get(error.code, 400), error.code, f"{error.what}; {error.fix}", param)
    if isinstance(error, PictureError):
        return bad("invalid_image", f"{error.what}; {error.fix}", "messages")
    if isinstance(error, UserError):
        return bad("invalid_request", f"{error.what}; {error.fix}", "messages")
    return None
