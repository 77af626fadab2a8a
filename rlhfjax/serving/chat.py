"""`/v1/chat/completions`: the answer to a conversation, written as the model was trained on conversations."""

from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from time import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response

from rlhfjax.api.dialogue import ANSWER, HISTORY
from rlhfjax.api.prompts import ids_of
from rlhfjax.serving.answers import chat_log_probs, usage
from rlhfjax.serving.asking import (
    Answered,
    Asked,
    Choices,
    Hall,
    all_written,
    drawing,
    in_thread,
    room_for,
    seed_of,
    stops_of,
    unless_gone,
)
from rlhfjax.serving.events import event_stream
from rlhfjax.serving.models import Served
from rlhfjax.serving.moderating import judged_messages
from rlhfjax.serving.problems import Json, Problem
from rlhfjax.serving.schemas import ChatRequest
from rlhfjax.text.chat import Message, truncate_history

routes = APIRouter()


@routes.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """An answer to messages, whole or as a stream of events."""
    hall: Hall = request.app.state.hall
    served = hall.served(body.model)
    messages, dropped = await _kept(served, body)
    choices = await _choices(hall, served, body, messages)
    asked = await _asked(hall, choices, body)
    head: dict[str, Any] = {"dropped": dropped} if dropped else {}
    head |= {"id": f"chatcmpl-{uuid4().hex}", "created": int(time()), "model": served.name}
    head["system_fingerprint"] = served.fingerprint
    if body.stream:
        return event_stream(_chunks(asked, body, head), asked.cancel)
    return Json(await unless_gone(request, asked, _whole(hall, asked, body, head)))


async def _kept(served: Served, body: ChatRequest) -> tuple[list[Message], int]:
    """The messages that the model reads, and how many older ones it does not where that was asked for."""
    served.writer  # noqa: B018  a model that writes nothing is named before anything else is looked at
    messages: list[Message] = [message.record for message in body.messages]
    if not body.drop_oldest or served.tokenizer is None:
        return messages, 0
    room = min(served.context, HISTORY)
    answer = body.max_completion_tokens or body.max_tokens or min(ANSWER, room // 2)
    return await in_thread(truncate_history, messages, served.tokenizer, room, answer)


async def _choices(hall: Hall, served: Served, body: ChatRequest, messages: list[Message]) -> Choices:
    if body.top_logprobs and not body.logprobs:
        raise Problem(400, "top_logprobs: expected logprobs true with it", param="top_logprobs")
    record: dict[str, Any] = {"messages": messages}
    if body.chat_template_kwargs:
        record["chat_template_kwargs"] = body.chat_template_kwargs
    ids = await in_thread(ids_of, served.tokenizer, served.model.config.vocab_size, "messages", record)
    most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    if most == 0:
        raise Problem(400, "max_tokens: expected at least 1", param="max_tokens")
    sampling = drawing(served, body, room_for(hall, served, [ids], most), body.top_logprobs or 0)
    return Choices(served, [ids], sampling, stops_of(body), seed_of(body.seed), body.n or 1, bool(body.logprobs))


async def _asked(hall: Hall, choices: Choices, body: ChatRequest) -> Asked | Answered:
    """Responses under way, or the answer to a conversation that the policy keeps from the model."""
    if hall.moderator:
        verdict = await judged_messages(hall.moderator, [message.record for message in body.messages])
        if verdict.stops:
            return Answered(choices, [verdict.filler or ""])
    return Asked(hall, choices)


async def _whole(hall: Hall, asked: Asked | Answered, body: ChatRequest, head: Mapping[str, Any]) -> dict[str, Any]:
    written = await all_written(hall, asked)
    choices = [
        {
            "index": place,
            "message": {"role": "assistant", "content": one.text, "refusal": None},
            "logprobs": chat_log_probs(one.tokens, body.top_logprobs or 0) if body.logprobs else None,
            "finish_reason": one.finish_reason,
        }
        for place, one in enumerate(written)
    ]
    spent = usage(asked.choices.read, sum(one.drawn for one in written))
    return {**head, "object": "chat.completion", "choices": choices, "usage": spent}


async def _chunks(asked: Asked | Answered, body: ChatRequest, head: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
    head = {**head, "object": "chat.completion.chunk"}
    tells = bool(body.stream_options and body.stream_options.include_usage)
    counts = [0] * len(asked.jobs)

    def chunk(place: int, delta: Mapping[str, Any], said: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": place, "delta": delta, "logprobs": said, "finish_reason": reason}
        return {**head, "choices": [choice]} | ({"usage": None} if tells else {})

    async with aclosing(asked.sendable()) as deltas:
        for place in range(len(asked.jobs)):
            yield chunk(place, {"role": "assistant", "content": ""})
        async for place, delta in deltas:
            counts[place] = delta.drawn
            said = chat_log_probs(delta.tokens, body.top_logprobs or 0) if body.logprobs else None
            if delta.text or delta.tokens:
                yield chunk(place, {"content": delta.text}, said)
            if delta.finish_reason:
                yield chunk(place, {}, reason=delta.finish_reason)
    if tells:
        yield {**head, "choices": [], "usage": usage(asked.choices.read, sum(counts))}
