"""Streams of server-sent events."""

import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from rlhfjax.serving.problems import Problem

_SLOW = 60.0  # seconds in which a client must take what it is sent


class _Stream(EventSourceResponse):
    """A stream whose end is told, even where it never began."""

    def __init__(self, events: AsyncIterator[ServerSentEvent], ended: Callable[[], None]):
        super().__init__(events, sep="\n", send_timeout=_SLOW)
        self._ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()


def event_stream(objects: AsyncIterator[Mapping[str, Any]], ended: Callable[[], None]) -> EventSourceResponse:
    """Each object as an event, then [DONE]. What goes wrong on the way is the last one before it.

    `ended` is called when all was sent, and as soon as the client leaves, or takes nothing for a minute.
    """

    async def events() -> AsyncIterator[ServerSentEvent]:
        try:
            async for one in objects:
                yield ServerSentEvent(json.dumps(one, allow_nan=False, separators=(",", ":")))
        except Problem as problem:
            yield ServerSentEvent(json.dumps(problem.body))
        yield ServerSentEvent("[DONE]")

    return _Stream(events(), ended)
