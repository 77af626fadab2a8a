"""The chat page, and the votes that people give on it."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from starlette.responses import FileResponse, Response

from rlhfjax.serving.asking import in_thread
from rlhfjax.serving.feedback import COMPARISONS, THUMBS
from rlhfjax.serving.problems import Json, Problem
from rlhfjax.serving.schemas import ChatMessage

routes = APIRouter()
FILES = {
    "chat.css": "text/css",
    "chat.js": "text/javascript",
    "server.js": "text/javascript",
    "tree.js": "text/javascript",
}
CONSENT = (
    "I agree that what I rate is kept on this server, with the conversation it is about, and used to train models. "
    "Neither my name nor my address is kept."
)
_PAGE = Path(__file__).with_name("page")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src "
    "'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@routes.get("/", include_in_schema=False)
async def index() -> Response:
    """The page, of files of this server alone."""
    return FileResponse(_PAGE / "index.html", media_type="text/html", headers=_HEADERS)


@routes.get("/page/{name}", include_in_schema=False)
async def part(name: str) -> Response:
    """A file of the page."""
    if name not in FILES:
        raise Problem(404, "the page has no such file")
    return FileResponse(_PAGE / name, media_type=FILES[name], headers=_HEADERS)


class Settings(BaseModel):
    """What the page shows beside models."""

    feedback: bool
    consent: str


@routes.get("/v1/chat/settings")
async def settings(request: Request) -> Settings:
    """Whether votes are kept, and what somebody agrees to who gives one."""
    return Settings(feedback=request.app.state.hall.feedback is not None, consent=CONSENT)


Key = Annotated[str, StringConstraints(pattern="^[0-9a-zA-Z-]{8,64}$")]
Rank = Annotated[int, Field(ge=1, le=2)]


class Vote(BaseModel):
    """Two answers with ranks (1 is better, equal ranks are a tie), or one answer and whether it is good."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: Key = Field(description="Chosen by the sender; a vote that is sent again is kept once.")
    consent: Literal[True]
    messages: list[ChatMessage] = Field(min_length=1)
    models: list[str] = Field(max_length=2, description="Who wrote the answers.")
    responses: list[str] | None = Field(None, min_length=2, max_length=2)
    ranks: list[Rank] | None = Field(None, min_length=2, max_length=2)
    completion: str | None = None
    label: bool | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> "Vote":
        compared = self.responses is not None and self.ranks is not None and 1 in self.ranks
        rated = self.completion is not None and self.label is not None
        given = [x is not None for x in (self.responses, self.ranks, self.completion, self.label)]
        if compared == rated or sum(given) != 2:
            raise ValueError("expected responses with ranks (1 is best), or completion with label")
        return self

    @property
    def record(self) -> tuple[str, dict[str, Any]]:
        """The file that it belongs to, and the record."""
        messages = [message.record for message in self.messages]
        own = {"messages": messages, "models": self.models, "consent": CONSENT}
        if self.responses is not None:
            return COMPARISONS, own | {"responses": self.responses, "ranks": self.ranks}
        return THUMBS, own | {"completion": self.completion, "label": self.label}


@routes.post("/v1/feedback")
async def feedback(request: Request, body: Vote) -> Response:
    """Keep a vote. It is on the disk when this is answered."""
    kept = request.app.state.hall.feedback
    if kept is None:
        raise Problem(404, "this server keeps no votes; start it with --feedback DIR")
    name, record = body.record
    try:
        new = await in_thread(kept.keep, name, body.id, record)
    except OSError as error:
        raise Problem(507, f"not kept: {os.strerror(error.errno or 0)}") from None
    return Json({"kept": True, "new": new})
