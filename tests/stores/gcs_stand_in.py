"""Google Cloud Storage in small: the part of its JSON interface that objects are written, read and listed with.

Objects are whole or not there, and `ifGenerationMatch=0` puts one only where there is none, as
https://cloud.google.com/storage/docs/json_api says. Emulators that are at hand ignore that condition.
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 50  # objects of one answer to a listing, so that there are several


class GcsStandIn(ThreadingHTTPServer):
    """Buckets with objects in `buckets`; `denied` answers everything with 401."""

    daemon_threads = True

    def __init__(self, *buckets):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets = {name: {} for name in buckets}
        self.generations, self.uploads, self.turn, self.denied = itertools.count(1), {}, threading.Lock(), False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """A client that went away is nothing to print."""

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        asked = self._asked()
        if asked is None:
            return
        bucket, name, query = asked
        if name is None and self.path.split("?")[0].endswith("/o"):
            self._list(bucket, query)
        elif name is None:
            self._json(200, {"kind": "storage#bucket", "name": bucket})
        elif name not in self.server.buckets[bucket]:
            self._json(404, {"error": {"code": 404, "message": f"No such object: {bucket}/{name}"}})
        elif query.get("alt") == "media" or "/download/" in self.path:
            self._media(self.server.buckets[bucket][name][0])
        else:
            self._json(200, self._described(bucket, name))

    def do_POST(self):
        asked = self._asked()
        if asked is None:
            return
        bucket, _, query = asked
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if query.get("uploadType") == "resumable":
            upload = str(next(self.server.generations))
            self.server.uploads[upload] = bucket, json.loads(body)["name"], query, bytearray()
            self.send_response(200)
            self.send_header("Location", f"{self.server.url}/upload/storage/v1/b/{bucket}/o?upload_id={upload}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        _, facts, data, _ = body.split(b"--" + boundary)
        name = json.loads(facts.partition(b"\n\n")[2] or facts.partition(b"\r\n\r\n")[2])["name"]
        head = b"\r\n\r\n" if b"\r\n\r\n" in data[:300] else b"\n\n"
        data = data.partition(head)[2]
        self._put(bucket, name, query, data.removesuffix(b"\n").removesuffix(b"\r"))

    def do_PUT(self):
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        bucket, name, asked, held = self.server.uploads[query["upload_id"]]
        held += self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers["Content-Range"].endswith(f"/{len(held)}"):
            self._put(bucket, name, asked, bytes(held))
        else:
            self.send_response(308)
            self.send_header("Range", f"bytes=0-{len(held) - 1}")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_DELETE(self):
        asked = self._asked()
        if asked is None:
            return
        bucket, name, _ = asked
        found = self.server.buckets[bucket].pop(name, None)
        self._json(204 if found else 404, {})

    def _asked(self):
        """Bucket, object and query; None, and answered, where they cannot be had."""
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        found = re.match(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?$", parts.path)
        bucket, name = unquote(found[1]), found[2] and unquote(found[2])
        if self.server.denied:
            self._json(401, {"error": {"code": 401, "message": "Anonymous caller does not have storage.objects.list"}})
        elif bucket not in self.server.buckets:
            self._json(404, {"error": {"code": 404, "message": "The specified bucket does not exist."}})
        else:
            return bucket, name, query
        return None

    def _put(self, bucket, name, query, data):
        with self.server.turn:
            objects = self.server.buckets[bucket]
            refused = query.get("ifGenerationMatch") == "0" and name in objects
            if not refused:
                objects[name] = data, next(self.server.generations)
        if refused:
            self._json(412, {"error": {"code": 412, "message": "conditionNotMet: At least one pre-condition failed."}})
        else:
            self._json(200, self._described(bucket, name))

    def _list(self, bucket, query):
        prefix, delimiter, begin = query.get("prefix", ""), query.get("delimiter"), query.get("pageToken", "")
        names = sorted(name for name in dict(self.server.buckets[bucket]) if name.startswith(prefix) and name > begin)
        items, folders = [], set()
        for name in names[:PAGE]:
            inside, cut, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
            if cut:
                folders.add(prefix + inside + cut)
            else:
                items.append(self._described(bucket, name))
        answer = {"kind": "storage#objects", "items": items, "prefixes": sorted(folders)}
        self._json(200, answer | ({"nextPageToken": names[PAGE - 1]} if len(names) > PAGE else {}))

    def _described(self, bucket, name):
        data, generation = self.server.buckets[bucket][name]
        digest = base64.b64encode(hashlib.md5(data).digest()).decode()
        times = dict.fromkeys(("timeCreated", "updated"), "2026-01-01T00:00:00.000Z")
        facts = {"name": name, "bucket": bucket, "generation": str(generation), "size": str(len(data))}
        return facts | times | {"md5Hash": digest, "contentType": "application/octet-stream", "kind": "storage#object"}

    def _media(self, data):
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        part = data[int(asked[1]) : int(asked[2]) + 1 if asked[2] else None] if asked else data
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def _json(self, code, value):
        text = json.dumps(value).encode() if code != 204 else b""
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
