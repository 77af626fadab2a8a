"""Requests as responses under way: checked, put into the batch, followed, and cancelled when nobody listens."""

import asyncio
import hashlib
import secrets
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool

from rlhfjax.api.settings import check_stop, sampling_params
from rlhfjax.errors import RlhfjaxError
from rlhfjax.generation import SamplingParams
from rlhfjax.moderation import Moderator
from rlhfjax.serving.answers import Written
from rlhfjax.serving.feedback import Feedback
from rlhfjax.serving.jobs import Delta, Job
from rlhfjax.serving.limits import Limits
from rlhfjax.serving.models import Served
from rlhfjax.serving.moderating import FILTERED, guarded, judged_answer
from rlhfjax.serving.problems import Problem
from rlhfjax.serving.schemas import Drawing
from rlhfjax.serving.worker import Full, Worker

_SEEDS = 2**32
_SMALLEST = 1e-9  # in the place of top_p 0, which leaves the likeliest token alone
_LATER = {"Retry-After": "1"}

T = TypeVar("T")


@dataclass
class Hall:
    """What all requests share."""

    worker: Worker
    models: dict[str, Served]
    limits: Limits
    moderator: Moderator | None = None
    ended: Callable[[Job], None] = lambda job: None  # is told of each response that has ended
    feedback: Feedback | None = None  # where votes are kept

    def served(self, name: str) -> Served:
        """The model of a name. Raises Problem where there is none."""
        if name not in self.models:
            raise Problem(
                404,
                f"the model {name!r} is not served here; GET /v1/models lists what is",
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    @property
    def full(self) -> bool:
        """Whether a request would be sent away now, whichever model it asks."""
        engines = [one.batch.engine for one in self.models.values() if one.batch]
        return bool(engines) and all(self.worker.waiting >= self.worker.queue + engine.free for engine in engines)

    async def on_device(self, task: Callable[[], T]) -> T:
        """What a task of the device gives, done between two steps of the batch."""
        return await asyncio.wrap_future(self.worker.call(task))


@dataclass(frozen=True)
class Choices:
    """`count` responses to each of some prompts of ids, all drawn alike."""

    served: Served
    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    stop: Sequence[str]
    seed: int
    count: int = 1
    reports: bool = False

    @property
    def read(self) -> int:
        return sum(map(len, self.prompts))


@contextmanager
def problems_of_input(param: str | None = None):
    """Expected errors inside are of what the client sent."""
    try:
        yield
    except RlhfjaxError as error:
        raise Problem(400, str(error), param=param) from error


async def in_thread(work: Callable[..., T], *given: Any) -> T:
    """What takes time and no device, such as to tokenise a long text, beside the loop that serves all others."""
    with problems_of_input():
        return await run_in_threadpool(work, *given)


def drawing(served: Served, asked: Drawing, new_tokens: int, top: int) -> SamplingParams:
    """The sampler's settings of a request. Raises Problem on those that make no sense."""
    given = {
        "temperature": asked.temperature,
        "top_p": None if asked.top_p is None else max(asked.top_p, _SMALLEST),
        "top_k": asked.top_k,
        "min_p": asked.min_p,
        "stop_ids": asked.stop_token_ids,
    }
    vocabulary = served.model.config.vocab_size
    with problems_of_input():
        check_stop(stops_of(asked), served.tokenizer)
        made = sampling_params(
            served.tokenizer,
            vocabulary,
            max_new_tokens=max(new_tokens, 1),
            top_log_probs=min(top, vocabulary),
            **{name: value for name, value in given.items() if value is not None},
        )
    return replace(made, bias=_bias(asked.logit_bias or {}, vocabulary))


def _bias(given: Mapping[str, float], vocabulary: int) -> tuple[tuple[int, float], ...]:
    pairs = tuple((int(token) if token.isdecimal() else -1, value) for token, value in given.items())
    if any(not 0 <= token < vocabulary for token, _ in pairs):
        raise Problem(400, f"logit_bias: expected ids of 0 to {vocabulary - 1} as keys", param="logit_bias")
    return pairs


def stops_of(asked: Drawing) -> Sequence[str]:
    return [asked.stop] if isinstance(asked.stop, str) else asked.stop or ()


def seed_of(given: int | None) -> int:
    """A seed of 32 bits. Others than those are mixed, so that different ones draw differently."""
    if given is None:
        return secrets.randbelow(_SEEDS)
    if 0 <= given < _SEEDS:
        return given
    return int.from_bytes(hashlib.sha256(str(given).encode()).digest()[:4])


def room_for(hall: Hall, served: Served, prompts: Sequence[Sequence[int]], asked: int | None) -> int:
    """How many tokens a response may have. Raises Problem where a prompt is too long, or more is asked than fits."""
    longest, limits = max(map(len, prompts)), hall.limits
    room = served.context - longest
    if room < 1 or (asked is not None and asked > room):
        raise Problem(
            400,
            f"this model's context is {served.context} tokens; expected a prompt with room for its answer, got a "
            f"prompt of {longest} tokens" + (f" and {asked} for the answer" if asked else ""),
            param="messages",
            code="context_length_exceeded",
        )
    most = room if limits.new_tokens is None else min(room, limits.new_tokens)
    if asked is not None and asked > most:
        raise Problem(400, f"max_tokens: expected at most {most}, got {asked}", param="max_tokens")
    return most if asked is None else asked


class Asked:
    """The responses of one request. Iterate over (index, delta); leave, and what was not written is cancelled."""

    def __init__(self, hall: Hall, choices: Choices):
        self.choices, self._hall, self._closed = choices, hall, False
        self._deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        count = choices.count
        self.jobs = [self._job(place, choices.prompts[place // count]) for place in range(len(choices.prompts) * count)]
        batch = choices.served.writer
        with problems_of_input():
            for job in self.jobs:
                batch.engine.check(job.response)
        try:
            hall.worker.submit(batch, self.jobs)
        except Full:
            raise Problem(
                429, "as many requests wait as may; ask again in a moment", code="queue_full", headers=_LATER
            ) from None
        except RuntimeError as error:
            raise Problem(503, str(error)) from error
        self._clock = asyncio.get_running_loop().call_later(hall.limits.seconds, self._run_out)

    def _job(self, place: int, prompt: Sequence[int]) -> Job:
        c = self.choices

        def deliver(delta: Delta) -> None:
            self._deltas.put_nowait((place, delta))

        how: Mapping[str, Any] = {"stop": c.stop, "seed": c.seed, "uid": place, "reports": c.reports}
        return Job(prompt, c.sampling, c.served.tokenizer, deliver, **how)

    def sendable(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """`deltas` as they may be sent at once: what the policy stops is held back, and ends its response."""
        if self._hall.moderator is None:
            return self.deltas()
        return guarded(self._hall.moderator, self.deltas(), lambda place: self._hall.worker.cancel(self.jobs[place]))

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """What comes of all responses, until each has ended."""
        left = len(self.jobs)
        try:
            while left:
                place, delta = await self._deltas.get()
                if delta.finish_reason == "error":
                    unknown = self.jobs[place].unknown
                    raise Problem(500, "the device failed" if unknown is None else _foreign(unknown))
                if delta.finish_reason == "cancelled" and not delta.drawn:
                    raise Problem(503, "no slot became free in time; ask again later", headers=_LATER)
                if delta.finish_reason:
                    left -= 1
                yield place, delta
        finally:
            self.cancel()

    def cancel(self) -> None:
        """End what is not ended, and free its slots."""
        if self._closed:
            return
        self._closed = True
        self._clock.cancel()
        for job in self.jobs:
            self._hall.worker.cancel(job)
            self._hall.ended(job)

    def _run_out(self) -> None:
        """Time is a bound as tokens are."""
        for job in self.jobs:
            if not job.ended:
                job.response.finish_reason = "length" if job.response.tokens else "cancelled"


def _foreign(token: int) -> str:
    return f"the model drew the id {token}, which its tokenizer has no text for; a logit_bias of -100 keeps it out"


class Answered:
    """What was asked and is answered without a model: each response is the filler of its prompt."""

    def __init__(self, choices: Choices, fillers: Sequence[str]):
        self.choices, self._fillers = choices, fillers
        self.jobs: Sequence[Job | None] = [None] * (len(choices.prompts) * choices.count)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        for place in range(len(self.jobs)):
            yield place, Delta(self._fillers[place // self.choices.count], (), 0, FILTERED)

    sendable = deltas

    def cancel(self) -> None:
        """There is nothing under way."""


async def unless_gone(request: Request, asked: Asked | Answered, work: Any) -> Any:
    """The result of a coroutine about what was asked, which is cancelled when the client leaves."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem(499, "the client left")
        return task.result()
    finally:
        asked.cancel()
        for one in (task, leaving):
            one.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def all_written(hall: Hall, asked: Asked | Answered) -> list[Written]:
    """All responses when they have ended, and the filler in the place of each that the policy stops."""
    written = [Written() for _ in asked.jobs]
    async with aclosing(asked.deltas()) as deltas:
        async for place, delta in deltas:
            written[place].add(delta)
    for one in written:
        if hall.moderator and one.finish_reason != FILTERED:
            verdict = await judged_answer(hall.moderator, one.text)
            if verdict.stops:
                one.texts, one.tokens, one.finish_reason = [verdict.filler or ""], [], FILTERED
    return written
