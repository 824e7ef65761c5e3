"""Errors of requests, in the form that OpenAI's clients read."""

from __future__ import annotations

from typing import Any


class ApiError(Exception):
    """A request that is not answered.

    Attributes:
        status: Of HTTP.
        message: One line.
        param: The field of the request that is wrong; None where it is none.
        code: For programs; None where `type` says enough.
        retry_after: Seconds after which the same request may work; None where it will not.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after
        super().__init__(message)

    @property
    def type(self) -> str:
        """OpenAI's class of the error."""
        names = {401: "authentication_error", 429: "rate_limit_error"}
        fallback = "server_error" if self.status >= 500 else "invalid_request_error"
        return names.get(self.status, fallback)

    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        fields = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": {**fields, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def bad_field(name: str, problem: str, code: str | None = None) -> ApiError:
    """The error of a field that cannot work."""
    return ApiError(400, f"{name}: {problem}", param=name, code=code)
