"""Moderation of both sides: an input that a policy stops reaches no model, an output that it stops no reader."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from starlette.responses import Response

from rlhfjax.moderation import Moderator, Verdict
from rlhfjax.serving.jobs import Delta
from rlhfjax.serving.problems import Json, Problem
from rlhfjax.serving.schemas import ModerationRequest
from rlhfjax.serving.tokens import Token

FILTERED = "content_filter"  # why an answer ended that moderation stopped

routes = APIRouter()
Placed = tuple[int, Delta]


@routes.post("/v1/moderations")
async def moderations(request: Request, body: ModerationRequest) -> Response:
    """What the server's policy says of texts, as inputs."""
    moderator: Moderator | None = request.app.state.hall.moderator
    if moderator is None:
        raise Problem(404, "this server moderates nothing; start it with --moderation POLICY", code="no_moderation")
    given = body.input if isinstance(body.input, list) else [body.input]
    texts = [one if isinstance(one, str) else one.text for one in given]
    results = [(await run_in_threadpool(moderator.input, text)).as_openai() for text in texts]
    return Json({"id": f"modr-{uuid4().hex}", "model": "rlhfjax-moderation", "results": results})


async def judged_messages(moderator: Moderator, messages: Sequence[Mapping[str, Any]]) -> Verdict:
    """The verdict of a conversation. Raises Problem where the policy blocks it."""
    return _unless_blocked(await run_in_threadpool(moderator.messages, messages))


async def judged_texts(moderator: Moderator, texts: Sequence[str]) -> list[Verdict]:
    """The verdict of each prompt. Raises Problem where the policy blocks one."""
    return [_unless_blocked(await run_in_threadpool(moderator.input, text)) for text in texts]


async def judged_answer(moderator: Moderator, text: str) -> Verdict:
    """The verdict of a whole answer. Raises Problem where the policy blocks it."""
    return _unless_blocked(await run_in_threadpool(moderator.output, text))


def _unless_blocked(verdict: Verdict) -> Verdict:
    if verdict.action == "block":
        whose = "message" if verdict.side == "input" else "answer"
        raise Problem(400, f"the policy of this server blocks this {whose} ({verdict.category})", code=FILTERED)
    return verdict


async def guarded(
    moderator: Moderator, deltas: AsyncIterator[Placed], cancel: Callable[[int], None]
) -> AsyncGenerator[Placed, None]:
    """What may be sent of responses under way. One that is stopped ends there, with the filler, and is cancelled."""
    watches: dict[int, _Watch] = {}
    async for place, delta in deltas:
        watch = watches.setdefault(place, _Watch(moderator))
        if watch.guard.stopped:
            continue
        sent = await run_in_threadpool(watch.fed, delta)
        if watch.guard.stopped:
            cancel(place)
        if sent.text or sent.tokens or sent.finish_reason:
            yield place, sent


class _Watch:
    """One response behind its guard: tokens wait with their text, or their names would tell what is held back."""

    def __init__(self, moderator: Moderator):
        self.guard = moderator.guard()
        self._sent = self._length = 0  # characters that were sent, and those of all tokens so far
        self._held: list[tuple[int, Token]] = []  # each with the character where it ends

    def fed(self, delta: Delta) -> Delta:
        """What may be sent after another piece."""
        for token in delta.tokens:
            self._length += token.length
            self._held.append((self._length, token))
        text, reason = self.guard.feed(delta.text), delta.finish_reason
        if reason and not self.guard.stopped:
            text += self.guard.end()
        if self.guard.stopped:
            return Delta(text, (), delta.drawn, FILTERED)
        self._sent += len(text)
        ready = [token for end, token in self._held if reason or end <= self._sent]
        self._held = self._held[len(ready) :]
        return Delta(text, ready, delta.drawn, reason)
