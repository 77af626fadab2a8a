"""A meeting of processes before jax is started: the one that is missing, wrong or twice is named, and nobody hangs.

jax itself aborts a process whose wait runs out, with a stack of its own, and takes no notice of processes
that were told different numbers. The meeting is at the coordinator's address, which process 0 then gives to jax.
"""

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from rlhfjax.errors import ConfigError, Stopped

_GREETING = "rlhfjax processes"
_LONGEST = 4096  # bytes of a message


@dataclass(frozen=True)
class Place:
    """Process `index` of `count`; process 0 is reached at `coordinator` and listens at `bind`, both HOST:PORT."""

    coordinator: str
    count: int
    index: int
    bind: str


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def meet(place: Place, timeout: float) -> None:
    """Return when all processes are there.

    Raises ConfigError where numbers do not fit together or the port is taken, and Stopped when somebody is missing
    after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    if place.index:
        _join(place, deadline, timeout)
    else:
        _gather(place, deadline, timeout)


def _gather(place: Place, deadline: float, timeout: float) -> None:
    joined: dict[int, socket.socket] = {}
    with _listen(place) as door:
        try:
            while len(joined) < place.count - 1:
                door.settimeout(_left(deadline))
                try:
                    guest, _ = door.accept()
                except TimeoutError:
                    raise Stopped(_missing(place, set(joined), timeout)) from None
                told = _hello(guest)
                if told is None:
                    guest.close()  # a stranger: a port scanner, a health check
                    continue
                problem = problem_of(place, told, set(joined))
                if problem:
                    for each in (guest, *joined.values()):
                        send(each, {"problem": problem})
                    guest.close()
                    raise ConfigError(problem)
                joined[told["index"]] = guest
        finally:
            for each in joined.values():
                send(each, {"all": len(joined) == place.count - 1})
                each.close()


def _join(place: Place, deadline: float, timeout: float) -> None:
    while True:
        try:
            with socket.create_connection(_address(place.coordinator), timeout=_left(deadline)) as door:
                send(door, {"greeting": _GREETING, "count": place.count, "index": place.index})
                door.settimeout(_left(deadline))
                answer = receive(door)
        except OSError:
            answer = None
        if answer and answer.get("all"):
            return
        if answer and "problem" in answer:
            raise ConfigError(str(answer["problem"]))
        if answer is not None or time.monotonic() >= deadline:
            raise Stopped(
                f"process {place.index}: expected process 0 and {place.count} processes in all at {place.coordinator} "
                f"within {timeout:.0f} s, got {'not all of them' if answer else 'no answer'}; start all of them with "
                "the same --coordinator and --num-processes"
            )
        time.sleep(min(0.1, _left(deadline)))


def _listen(place: Place) -> socket.socket:
    try:
        address = _address(place.bind)
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server(address, family=family, backlog=place.count)
    except OSError as error:
        raise ConfigError(
            f"--coordinator {place.coordinator}: expected a free port of an address of this machine at {place.bind}, "
            f"got {error.strerror or error}; process 0 must run there, on a port that nothing else uses"
        ) from None


def _hello(guest: socket.socket, greeting: str = _GREETING, longest: int = _LONGEST) -> dict | None:
    guest.settimeout(5.0)
    told = receive(guest, longest)
    whole = isinstance(told, dict) and told.get("greeting") == greeting
    return told if told and whole and all(isinstance(told.get(key), int) for key in ("count", "index")) else None


def problem_of(place: Place, told: dict, joined: set[int]) -> str | None:
    """Why a process does not fit those that came, if so."""
    if told["count"] != place.count:
        return (
            f"--num-processes: expected {place.count}, as process 0 has it, got {told['count']} in process "
            f"{told['index']}; start all of them with the same number"
        )
    if not 0 < told["index"] < place.count or told["index"] in joined:
        taken = "twice" if told["index"] in {0, *joined} else "which is none of them"
        return (
            f"--process-id: expected 0 to {place.count - 1}, each once, got {told['index']} {taken}; "
            "give every process its own"
        )
    return None


def _missing(place: Place, joined: set[int], timeout: float) -> str:
    missing = [index for index in range(1, place.count) if index not in joined]
    shown = ", ".join(map(str, missing[:8])) + (" …" if len(missing) > 8 else "")
    return (
        f"{place.coordinator}: expected {place.count} processes within {timeout:.0f} s, got {len(joined) + 1}, without "
        f"process {shown}; see their logs, and start all of them again"
    )


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.01)


def guests(place: Place, deadline: float, greeting: str, longest: int) -> Iterator[tuple[socket.socket, dict]]:
    """Those that come to process 0 with a greeting until the deadline, and what they say; strangers are sent away."""
    with _listen(place) as door:
        while True:
            door.settimeout(_left(deadline))
            try:
                guest, _ = door.accept()
            except TimeoutError:
                return
            told = _hello(guest, greeting, longest)
            if told is None:
                guest.close()
            else:
                yield guest, told


def knock(place: Place, deadline: float, told: dict) -> socket.socket | None:
    """A connection to process 0 that has heard what is told; None where nobody answers."""
    try:
        door = socket.create_connection(_address(place.coordinator), timeout=_left(deadline))
    except OSError:
        return None
    send(door, told)
    return door


def send(to: socket.socket, message: dict) -> None:
    """One line of JSON."""
    with suppress(OSError):  # it is gone, and hears nothing
        to.sendall(json.dumps(message).encode() + b"\n")


def receive(of: socket.socket, longest: int = _LONGEST) -> dict | None:
    """One line of JSON; None where what comes is something else, too long, or nothing."""
    data = b""
    try:
        while b"\n" not in data and len(data) < longest:
            part = of.recv(longest)
            if not part:
                return None
            data += part
        message = json.loads(data.partition(b"\n")[0])
    except (OSError, ValueError):
        return None
    return message if isinstance(message, dict) else None
