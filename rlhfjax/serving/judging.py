"""`/v1/models`, `/v1/embeddings` and `/v1/score`: what is served, and what models say of texts that are there."""

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from rlhfjax.api.prompts import ids_of, pair_ids
from rlhfjax.models import EncoderDecoder
from rlhfjax.serving.answers import usage
from rlhfjax.serving.asking import Hall, in_thread
from rlhfjax.serving.models import Served
from rlhfjax.serving.problems import Json, Problem
from rlhfjax.serving.schemas import EmbeddingRequest, ScoreRequest

routes = APIRouter()


def _described(served: Served) -> dict[str, Any]:
    described = {"id": served.name, "object": "model", "created": served.created, "owned_by": "rlhfjax"}
    return described | {"role": served.model.role, "context": served.context}


@routes.get("/v1/models")
async def models(request: Request) -> Response:
    """The names that requests may give as `model`."""
    hall: Hall = request.app.state.hall
    return Json({"object": "list", "data": [_described(one) for one in hall.models.values()]})


@routes.get("/v1/models/{name}")
async def one_model(request: Request, name: str) -> Response:
    hall: Hall = request.app.state.hall
    return Json(_described(hall.served(name)))


@routes.post("/v1/embeddings")
async def embeddings(request: Request, body: EmbeddingRequest) -> Response:
    """The final hidden state of each text's last token, as it is: its length is not made 1."""
    hall: Hall = request.app.state.hall
    served = hall.served(body.model)
    width = served.model.config.width
    if served.reader.scalar or isinstance(served.model.network, EncoderDecoder):
        raise Problem(400, f"the model {served.name!r} has no embeddings; ask a policy that is a decoder")
    if body.dimensions not in (None, width):
        raise Problem(400, f"dimensions: expected {width}, which is what this model has", param="dimensions")
    several = isinstance(body.input, list) and not isinstance(body.input[0], int)
    given: Any = body.input if several else [body.input]
    vocabulary = served.model.config.vocab_size
    rows = await in_thread(lambda: [ids_of(served.tokenizer, vocabulary, "input", one) for one in given])
    _fits(served, max(map(len, rows)), "input")
    found = [await hall.on_device(lambda row=row: served.reader.embedding(row)) for row in rows]
    encoded = [_base64(x) if body.encoding_format == "base64" else x.tolist() for x in found]
    data = [{"object": "embedding", "index": place, "embedding": one} for place, one in enumerate(encoded)]
    read = sum(map(len, rows))
    spent = {"prompt_tokens": read, "total_tokens": read}
    return Json({"object": "list", "data": data, "model": served.name, "usage": spent})


@routes.post("/v1/score")
async def score(request: Request, body: ScoreRequest) -> Response:
    """A reward model's score of each response to a prompt or to messages, read at its end."""
    hall: Hall = request.app.state.hall
    served = hall.served(body.model)
    if not served.reader.scalar:
        raise Problem(400, f"the model {served.name!r} is a {served.model.role}; scores are a reward model's")
    if (body.prompt is None) == (body.messages is None):
        raise Problem(400, "expected either prompt or messages", param="prompt")
    prompt: Any = body.prompt if body.messages is None else [message.record for message in body.messages]
    known = served.tokenizer, served.model.config.vocab_size

    def pairs() -> list[tuple[list[int], list[int]]]:
        return [pair_ids(*known, str(place), prompt, response) for place, response in enumerate(body.responses)]

    found = await in_thread(pairs)
    read = [len(asked) + len(answer) for asked, answer in found]
    _fits(served, max(read), "responses")
    scores = [await hall.on_device(lambda pair=pair: served.reader.score(*pair)) for pair in found]
    return Json({"object": "list", "scores": scores, "model": served.name, "usage": usage(sum(read), 0)})


def _fits(served: Served, length: int, param: str) -> None:
    if length > served.context:
        message = f"this model's context is {served.context} tokens, got {length}"
        raise Problem(400, message, param=param, code="context_length_exceeded")


def _base64(x: np.ndarray) -> str:
    return base64.b64encode(x.astype("<f4").tobytes()).decode()
