"""What every request passes before anything reads it: who it is for, where it comes from, its token and its size."""

import asyncio
import hmac
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rlhfjax.serving.limits import Limits
from rlhfjax.serving.problems import Problem

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_OPEN = ("/", "/healthz", "/readyz")  # what a supervisor asks, who has no token, and the page, which asks for it
_PAGE = "/page/"
_METHODS = ("GET", "HEAD", "POST")


@dataclass(frozen=True)
class Access:
    """Who may ask: names of this server in `Host` (None: any), and the token, if one is needed."""

    hosts: Collection[str] | None = LOOPBACK
    token: str | None = None


class Shield:
    """ASGI middleware. A page of elsewhere cannot ask, not even under a name that leads to this machine.

    Browsers say in `Origin` whose page asks, and in `Host` what name was asked; a name that an attacker's DNS leads
    here is in neither list. A body must be JSON, which no page may send to other origins unasked.
    """

    def __init__(self, app: ASGIApp, access: Access, limits: Limits):
        self.app, self.access, self.limits = app, access, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            if scope["type"] != "http":
                raise Problem(403, "this server has no sockets")
            headers = Headers(scope=scope)
            self._check(scope, headers)
            if scope["method"] == "POST":
                receive = _whole(await self._body(headers, receive), receive)
        except Problem as problem:
            await problem.response(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if scope["method"] not in _METHODS:
            raise Problem(405, "expected GET or POST", headers={"Allow": ", ".join(_METHODS)})
        hosts = headers.getlist("host")
        name = _name(hosts[0]) if len(hosts) == 1 else None
        if name is None or (self.access.hosts is not None and name not in self.access.hosts):
            raise Problem(403, "Host: expected a name of this server; ask for it by the address that it listens on")
        origins = headers.getlist("origin")
        if any(origin.partition("://")[2].lower() != hosts[0].lower() for origin in origins):
            raise Problem(403, "Origin: a page of another site asks; this server answers its own pages alone")
        if self.access.token and scope["path"] not in _OPEN and not scope["path"].startswith(_PAGE):
            self._check_token(headers.get("authorization", ""))
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Problem(415, "Content-Type: expected application/json")

    def _check_token(self, given: str) -> None:
        scheme, _, token = given.partition(" ")
        right = hmac.compare_digest(token.strip().encode(), (self.access.token or "").encode())
        if scheme.lower() != "bearer" or not right:
            header = {"WWW-Authenticate": "Bearer"}
            message = "Authorization: expected `Bearer TOKEN` with the token of this server"
            raise Problem(401, message, code="invalid_api_key", headers=header)

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body, within its bounds of bytes and time."""
        most, parts, size = self.limits.body_bytes, [], 0
        said = headers.get("content-length", "0")
        if said.isdigit() and int(said) > most:
            raise _too_large(most)
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem(400, "the client left")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > most:
                        raise _too_large(most)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            message = f"expected a whole body within {self.limits.body_seconds:g} seconds"
            raise Problem(408, message, headers={"Connection": "close"}) from None


def _name(host: str) -> str | None:
    """The name in a Host header, without its port."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def _too_large(most: int) -> Problem:
    return Problem(413, f"expected a body of at most {most} bytes", headers={"Connection": "close"})


def _whole(body: bytes, receive: Receive) -> Receive:
    """A channel that gives the body at once, then what the connection says."""
    given = False

    async def next_message() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message
