"""Messages between the run and a worker: JSON after its length, over a socket that nothing else writes to."""

import json
import socket
import struct
from typing import Any

_HEAD = struct.Struct("!Q")
HEAD_BYTES = _HEAD.size


def framed(message: Any) -> bytes:
    """A message as bytes; null asks a worker to end."""
    body = json.dumps(message).encode()
    return _HEAD.pack(len(body)) + body


def body_bytes(head: bytes) -> int:
    """The length of the message that follows a head."""
    return _HEAD.unpack(head)[0]


def read_message(connection: socket.socket) -> Any:
    """The next message of a blocking socket. Raises EOFError where the other side is gone."""
    body = _read(connection, body_bytes(_read(connection, HEAD_BYTES)))
    return json.loads(body)


def _read(connection: socket.socket, count: int) -> bytes:
    got = bytearray()
    while len(got) < count:
        chunk = connection.recv(min(count - len(got), 1 << 20))
        if not chunk:
            raise EOFError
        got += chunk
    return bytes(got)
