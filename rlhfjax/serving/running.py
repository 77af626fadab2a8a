"""A server from checkpoints to the last request: loaded, compiled, listening, stopped."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import uvicorn
from sse_starlette.sse import AppStatus

from rlhfjax.api import Model
from rlhfjax.errors import ConfigError
from rlhfjax.host import stopping
from rlhfjax.moderation import Moderator
from rlhfjax.serving.app import create_app
from rlhfjax.serving.asking import Hall
from rlhfjax.serving.limits import Limits
from rlhfjax.serving.models import serve_model
from rlhfjax.serving.shield import LOOPBACK, Access
from rlhfjax.serving.worker import Worker

_IDLE = 30  # seconds for which a connection without a request is kept
_GRACE = 10  # seconds for what is under way when the server is told to stop


def named(checkpoints: list[str]) -> dict[str, str]:
    """Checkpoints by the names under which they are served: NAME=CKPT, or the last part of the path.

    Raises ConfigError where two have one name.
    """
    found: dict[str, str] = {}
    for given in checkpoints:
        name, parts, path = given.partition("=")
        if not parts:
            name, path = Path(given).resolve().name, given
        if name in found or not name:
            raise ConfigError(f"expected a name for each checkpoint, got {name!r} for two of them; give NAME=CKPT")
        found[name] = path
    return found


def access_of(host: str, token: str | None) -> Access:
    """Who may ask. Raises ConfigError where anybody could, from elsewhere and without a token."""
    if token is not None and len(token) < 16:
        raise ConfigError("--token: expected at least 16 characters; `openssl rand -hex 24` makes one")
    if host in LOOPBACK:
        return Access(token=token)
    if not token:
        raise ConfigError(
            f"--host {host}: other machines can reach this address, and anybody there could use the server; give "
            "--token (or RLHFJAX_TOKEN), or leave --host at 127.0.0.1"
        )
    return Access(None, token)


def listen(host: str, port: int) -> socket.socket:
    """A socket at this address, taken before anything is loaded. Raises ConfigError where that cannot be."""
    taken = None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        if taken:
            taken.close()
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}; choose another port or address") from error
    return taken


@contextlib.contextmanager
def opened(
    models: Mapping[str, Model], limits: Limits, say: Callable[[str], None], moderator: Moderator | None = None
) -> Iterator[Hall]:
    """A worker with models that are warm, and the end of it."""
    worker = Worker(limits.queue)
    served = {name: serve_model(name, model, limits) for name, model in models.items()}
    worker.start()
    try:
        for one in served.values():
            say(f"{one.name}: compiling ({one.model.role}, context {one.context})")
            worker.call(one.warm_up).result()
        yield Hall(worker, served, limits, moderator)
    finally:
        worker.close()


class _Server(uvicorn.Server):
    """A server for which to be told to stop is how it ends well; told twice it stops at once."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with stopping.held():  # the signals are not those of a run, which would stop with 42
                yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def server_of(hall: Hall, access: Access) -> uvicorn.Server:
    """What answers requests: `run(sockets=[…])` it."""
    AppStatus.disable_automatic_graceful_drain()  # which would cut every stream at once
    config = uvicorn.Config(
        create_app(hall, access),
        log_level="warning",
        access_log=False,  # what was asked for is in the metrics; a log of requests would be one of people
        server_header=False,
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_GRACE,
        proxy_headers=False,
        ws="none",
    )
    return _Server(config)
