"""The application: routes behind the shield, errors in one shape, and the worker behind them all."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rlhfjax.serving import chat, completions, judging, moderating, page
from rlhfjax.serving.asking import Hall
from rlhfjax.serving.metrics import CONTENT_TYPE, Counted, Metrics
from rlhfjax.serving.problems import Json, Problem, of_fields, of_status
from rlhfjax.serving.shield import Access, Shield

_STUCK = 120.0  # seconds after which a device that says nothing is taken for dead


def create_app(hall: Hall, access: Access) -> FastAPI:
    """An ASGI application over models that are warm and a worker that was started."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()

        def deliver(told: list[Any]) -> None:
            for each, delta in told:
                each(delta)

        def post(told: list[Any]) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(deliver, told)

        hall.worker.post = post
        yield

    app = FastAPI(title="rlhfjax", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.hall, app.state.metrics = hall, Metrics(hall)
    hall.ended = app.state.metrics.ended
    for room in (chat, completions, judging, moderating, page):
        app.include_router(room.routes)
    _add_health(app)
    _add_errors(app)
    app.add_middleware(Shield, access=access, limits=hall.limits)  # pyright: ignore[reportArgumentType]
    app.add_middleware(Counted, metrics=app.state.metrics)  # pyright: ignore[reportArgumentType]
    return app


def _add_health(app: FastAPI) -> None:
    @app.get("/healthz")
    async def healthz(request: Request) -> Response:
        """Whether the process is worth keeping: its device answers."""
        worker = request.app.state.hall.worker
        if not worker.alive or worker.silent > _STUCK:
            raise Problem(503, "the device does not answer")
        return Json({"status": "ok"})

    @app.get("/readyz")
    async def readyz(request: Request) -> Response:
        """Whether a request would be taken now."""
        hall: Hall = request.app.state.hall
        if not hall.worker.alive or hall.full:
            raise Problem(503, "not ready: the queue is full, or the device is gone", headers={"Retry-After": "1"})
        return Json({"status": "ok", "models": list(hall.models)})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        """The state of the server for Prometheus."""
        return Response(request.app.state.metrics.text(), media_type=CONTENT_TYPE)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(Problem)
    async def problem(request: Request, error: Problem) -> Response:
        return error.response

    @app.exception_handler(RequestValidationError)
    async def fields(request: Request, error: RequestValidationError) -> Response:
        return of_fields(error.errors()).response

    @app.exception_handler(HTTPException)
    async def found_by_the_framework(request: Request, error: HTTPException) -> Response:
        return of_status(error.status_code).response

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return Problem(500, "a bug of this server; its log has the traceback").response
