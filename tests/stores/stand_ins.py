"""Stand-ins for object stores: a dictionary that can fail at any operation, moto's server, and a network between."""

import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time

BUCKET = "bucket"


class Killed(BaseException):
    """The process ends here."""


class MemoryStore:
    """A prefix of a bucket in memory. `objects` outlives it; after `operations` changes whoever uses it is killed."""

    def __init__(self, objects, operations=None, url="s3://bucket/run"):
        self.url, self.objects, self._left = url, objects, operations
        self._turn = threading.Lock()
        self.fetched, self.patience = [], 0.0

    def _change(self):
        with self._turn:
            if self._left is not None:
                if self._left <= 0:
                    raise Killed
                self._left -= 1

    def read(self, key):
        if key not in self.objects:
            raise FileNotFoundError(key)
        return self.objects[key]

    def fetch(self, key, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self.read(key))
        self.fetched.append(key)

    def write(self, key, data):
        self._change()
        self.objects[key] = bytes(data)

    def send(self, key, path):
        self.write(key, path.read_bytes())

    def create(self, key, data):
        self._change()
        with self._turn:
            return self.objects.setdefault(key, data) == data

    def sizes(self, prefix=""):
        below = f"{prefix}/" if prefix else ""
        return {key: len(data) for key, data in dict(self.objects).items() if key.startswith(below)}

    def delete(self, keys):
        for key in sorted(keys, reverse=True):  # in no order that helps
            self._change()
            self.objects.pop(key, None)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def s3_server(log):
    """moto's server with an empty bucket; its port."""
    import boto3

    port = free_port()
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=out, stderr=out)
        try:
            until = time.monotonic() + 120
            while True:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                assert time.monotonic() < until, "moto's server did not answer"
                time.sleep(0.1)
            client = boto3.client("s3", **connection(port))
            client.create_bucket(Bucket=BUCKET)
            yield port
        finally:
            process.kill()
            process.wait()


def connection(port):
    """What boto3 needs to know; credentials are any."""
    keys = {"aws_access_key_id": "any", "aws_secret_access_key": "thing", "region_name": "us-east-1"}
    return {"endpoint_url": f"http://127.0.0.1:{port}"} | keys


def variables(port, scratch):
    """The environment of a process that uses the server."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "thing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "RLHFJAX_SCRATCH": str(scratch),
    }


class Network:
    """Connections to a server, which are counted by their changes (PUT, DELETE) and can all be lost at once.

    At the change of number `at` it calls `then`, before the change reaches the server.
    """

    def __init__(self, server):
        self.port, self.changes, self.lost = free_port(), 0, 0
        self.at, self.then = None, None
        self._server, self._pairs, self._turn = server, set(), threading.Lock()
        self._down_until = 0.0
        self._listening = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, daemon=True).start()

    def lose(self, seconds=1.0):
        """Every connection ends in the middle of whatever it carries, and none can be made for a while."""
        self._down_until = time.monotonic() + seconds
        with self._turn:
            pairs, self._pairs = self._pairs, set()
            self.lost += 1
        for pair in pairs:
            for end in pair:
                _reset(end)

    def close(self):
        self._listening.close()
        self.lose(0)

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                if time.monotonic() < self._down_until:
                    _reset(client)
                    continue
                server = socket.create_connection(("127.0.0.1", self._server))
                with self._turn:
                    self._pairs.add((client, server))
                threading.Thread(target=self._carry, args=(client, server), daemon=True).start()

    def _carry(self, client, server):
        with contextlib.suppress(OSError, ValueError):
            while True:
                for end in select.select([client, server], [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        raise OSError
                    if end is client and data.startswith((b"PUT ", b"DELETE ", b"POST ")):
                        self._count()
                    (server if end is client else client).sendall(data)
        with self._turn:
            self._pairs.discard((client, server))
        client.close()
        server.close()

    def _count(self):
        with self._turn:
            self.changes += 1
            due = self.at is not None and self.changes >= self.at
            if due:
                self.at = None
        if due:
            self.then()


def _reset(end):
    """Close without a farewell: the other side sees `connection reset`."""
    with contextlib.suppress(OSError):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        end.shutdown(socket.SHUT_RDWR)
    end.close()
