"""Errors as OpenAI's clients expect them: an HTTP status, and a JSON body that says what is wrong with which field."""

from __future__ import annotations

from typing import Any

# `type` in the body, by the status. Every other status of 400 to 499 is an invalid_request_error.
_TYPES = {429: "rate_limit_error", 401: "authentication_error"}


class ApiError(Exception):
    """Answered as {"error": {"message", "type", "param", "code"}} with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, _utf8(message), param and _utf8(param), code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        kind = "server_error" if self.status >= 500 else _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _utf8(text: str) -> str:
    """What a client sent may have half a surrogate pair, which has no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def wrong_value(error: ValueError) -> ApiError:
    """Of an error whose text begins with the name of a field: "temperature: expected ..."."""
    name, colon, _ = str(error).partition(": ")
    return ApiError(400, str(error), param=name if colon and name.isidentifier() else None)


def busy(message: str) -> ApiError:
    return ApiError(429, message, code="rate_limit_exceeded", headers={"Retry-After": "1"})
