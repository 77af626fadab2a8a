"""Errors in the shape that OpenAI's clients read, each with its status."""

import json
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from starlette.responses import Response

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class Problem(Exception):
    """What is wrong with a request, or why it is not answered now: a status and a sentence or two."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> "Json":
        return Json(self.body, self.status, self.headers)


class Json(Response):
    """JSON in ASCII: a lone surrogate of a request may come back in a message, and is no UTF-8."""

    media_type = "application/json"

    def __init__(self, content: Any, status_code: int = 200, headers: Mapping[str, str] | None = None):
        super().__init__(json.dumps(content, allow_nan=False, separators=(",", ":")), status_code, headers)


def of_status(status: int) -> Problem:
    """A problem that the framework found: no such path, another method."""
    return Problem(status, f"{HTTPStatus(status).phrase.lower()}; the paths of this server are in /openapi.json")


def of_fields(errors: Sequence[Any]) -> Problem:
    """The first of what a schema has against a request; the value itself is not repeated."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    message = "the body is not JSON" if first["type"] == "json_invalid" else first["msg"]
    if first["type"] == "extra_forbidden":
        message = "this server has no such parameter; leave it out"
    return Problem(400, f"{place}: {message}" if place else message, param=place or None)
