"""`/v1/completions`: what follows texts or ids, and with `echo` what the model says of those themselves."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import time
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response

from rlhfjax.api.prompts import ids_of
from rlhfjax.serving.answers import Written, log_probs, usage
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
from rlhfjax.serving.moderating import FILTERED, judged_texts
from rlhfjax.serving.problems import Json, Problem
from rlhfjax.serving.schemas import CompletionRequest
from rlhfjax.serving.tokens import Token, token_of

routes = APIRouter()

_DEFAULT = 16  # tokens of a response where nothing else is asked for, as OpenAI has it


@dataclass(frozen=True)
class Prompt:
    """What is gone on with: its ids, and with `echo` its text and what the model says of each token."""

    ids: Sequence[int]
    text: str = ""
    tokens: Sequence[Token] = ()


@routes.post("/v1/completions")
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continuations of one prompt or several, whole or as a stream of events."""
    hall: Hall = request.app.state.hall
    served = hall.served(body.model)
    served.writer  # noqa: B018  a model that writes nothing is named before anything else is looked at
    count, best = body.n or 1, body.best_of or body.n or 1
    if best < count or (body.stream and best > count):
        raise Problem(400, "best_of: expected at least n, and n where the answer is a stream", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise Problem(400, "max_tokens: expected at least 1 without echo", param="max_tokens")
    rows = await in_thread(_prompt_ids, served, body.prompt)
    most = room_for(hall, served, rows, _DEFAULT if body.max_tokens is None else body.max_tokens)
    fillers = await _fillers(hall, served, rows)
    if any(filler is None for filler in fillers) and any(filler is not None for filler in fillers):
        raise Problem(400, "the policy of this server stops some of these prompts; ask for them apart", code=FILTERED)
    prompts = [Prompt(row) if fillers[0] is not None else await _prompt(hall, served, body, row) for row in rows]
    head = {"id": f"cmpl-{uuid4().hex}", "object": "text_completion", "created": int(time()), "model": served.name}
    head["system_fingerprint"] = served.fingerprint
    if not most:
        nothing = Written(finish_reason="length")
        choices = [_choice(body, place, prompt, nothing) for place, prompt in enumerate(prompts)]
        return Json({**head, "choices": choices, "usage": usage(sum(map(len, rows)), 0)})
    sampling = drawing(served, body, most, body.logprobs or 0)
    reports = body.logprobs is not None
    choices = Choices(served, rows, sampling, stops_of(body), seed_of(body.seed), best, reports)
    stopped = [filler for filler in fillers if filler is not None]
    asked = Answered(choices, stopped) if stopped else Asked(hall, choices)
    if body.stream:
        return event_stream(_chunks(asked, body, prompts, head), asked.cancel)
    return Json(await unless_gone(request, asked, _whole(hall, asked, body, prompts, head)))


def _prompt_ids(served: Served, given: Any) -> list[list[int]]:
    several = isinstance(given, list) and not isinstance(given[0], int)
    vocabulary = served.model.config.vocab_size
    return [ids_of(served.tokenizer, vocabulary, "prompt", one) for one in (given if several else [given])]


async def _prompt(hall: Hall, served: Served, body: CompletionRequest, ids: Sequence[int]) -> Prompt:
    if not body.echo:
        return Prompt(ids)
    text = served.tokenizer.decode(ids) if served.tokenizer else ""
    if body.logprobs is None:
        return Prompt(ids, text)
    with_top = body.logprobs
    said, top = await hall.on_device(lambda: served.reader.log_probs(ids, with_top))
    before = [None, *ids[:-1]]
    tokens = [token_of(served.tokenizer, *each) for each in zip(ids, before, said, top, strict=True)]
    return Prompt(ids, text, tokens)


def _choice(body: CompletionRequest, index: int, prompt: Prompt, one: Written) -> dict[str, Any]:
    said = None
    if body.logprobs is not None:
        said = log_probs([*prompt.tokens, *one.tokens], body.logprobs)
    return {"index": index, "text": prompt.text + one.text, "logprobs": said, "finish_reason": one.finish_reason}


async def _fillers(hall: Hall, served: Served, rows: Sequence[Sequence[int]]) -> list[str | None]:
    """What stands in the place of an answer to each prompt; None where the policy lets the model answer."""
    if hall.moderator is None or served.tokenizer is None:
        return [None] * len(rows)
    texts = await in_thread(lambda: [served.tokenizer.decode(row) for row in rows])  # pyright: ignore[reportOptionalMemberAccess]
    verdicts = await judged_texts(hall.moderator, texts)
    return [(verdict.filler or "") if verdict.stops else None for verdict in verdicts]


async def _whole(
    hall: Hall, asked: Asked | Answered, body: CompletionRequest, prompts: Sequence[Prompt], head: Mapping[str, Any]
) -> dict[str, Any]:
    written = await all_written(hall, asked)
    count, best, choices = body.n or 1, asked.choices.count, []
    for row, prompt in enumerate(prompts):
        places = range(row * best, (row + 1) * best)
        if best > count:
            places = sorted(places, key=lambda place: -_mean_log_prob(asked, place))[:count]
        for place in places:
            choices.append(_choice(body, len(choices), prompt, written[place]))
    spent = usage(asked.choices.read, sum(one.drawn for one in written))
    return {**head, "choices": choices, "usage": spent}


def _mean_log_prob(asked: Asked | Answered, place: int) -> float:
    """What the best are chosen by: the mean log-probability of a token."""
    job = asked.jobs[place]
    found = job.response.log_probs if job else []
    return sum(found) / max(len(found), 1)


async def _chunks(
    asked: Asked | Answered, body: CompletionRequest, prompts: Sequence[Prompt], head: Mapping[str, Any]
) -> AsyncIterator[dict[str, Any]]:
    tells = bool(body.stream_options and body.stream_options.include_usage)
    counts, ends = [0] * len(asked.jobs), [0] * len(asked.jobs)

    def chunk(place: int, text: str, tokens: Sequence[Token], reason: str | None = None) -> dict[str, Any]:
        said = None if body.logprobs is None else log_probs(tokens, body.logprobs, ends[place])
        ends[place] += sum(token.length for token in tokens)
        choice = {"index": place, "text": text, "logprobs": said, "finish_reason": reason}
        return {**head, "choices": [choice]} | ({"usage": None} if tells else {})

    async with aclosing(asked.sendable()) as deltas:
        for place in range(len(asked.jobs)) if body.echo else ():
            prompt = prompts[place // asked.choices.count]
            yield chunk(place, prompt.text, prompt.tokens)
        async for place, delta in deltas:
            counts[place] = delta.drawn
            yield chunk(place, delta.text, delta.tokens, delta.finish_reason)
    if tells:
        yield {**head, "choices": [], "usage": usage(asked.choices.read, sum(counts))}
