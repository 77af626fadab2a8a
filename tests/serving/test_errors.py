"""What a server refuses: each with its status, in the shape that clients read, and nothing asked of the device."""

import json
import socket
import threading

import httpx
import openai
import pytest

from rlhfjax.errors import ConfigError
from rlhfjax.serving.jobs import Job
from rlhfjax.serving.limits import Limits
from rlhfjax.serving.running import access_of, listen, named
from rlhfjax.serving.shield import Access

from .conftest import LIMITS, served, wait_for

JSON = {"content-type": "application/json"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "the"}]


def chat(**changes):
    return {"model": "tiny", "messages": HELLO, "max_tokens": 2} | changes


def text(**changes):
    return {"model": "tiny", "prompt": "the", "max_tokens": 2} | changes


REFUSED = [
    (CHAT, chat(model="gone"), 404, "model"),
    (CHAT, chat(model="judge"), 400, None),
    (CHAT, chat(model=3), 400, "model"),
    (CHAT, chat(messages=[]), 400, "messages"),
    (CHAT, chat(messages="hello"), 400, "messages"),
    (CHAT, chat(messages=[{"role": "robot", "content": "x"}]), 400, "messages.0.role"),
    (CHAT, chat(messages=[{"role": "user", "content": "  "}]), 400, None),
    (CHAT, chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, None),
    (CHAT, chat(messages=[*HELLO, {"role": "assistant", "content": "x"}]), 400, None),
    (CHAT, chat(messages=[{"role": "user", "content": "a\ud800"}]), 400, None),
    (CHAT, chat(temperature=-1), 400, "temperature"),
    (CHAT, chat(temperature="hot"), 400, "temperature"),
    (CHAT, chat(top_p=1.5), 400, "top_p"),
    (CHAT, chat(n=0), 400, "n"),
    (CHAT, chat(n=10**6), 400, "n"),
    (CHAT, chat(max_tokens=0), 400, "max_tokens"),
    (CHAT, chat(max_tokens=10**6), 400, "messages"),
    (CHAT, chat(messages=[{"role": "user", "content": "movie " * 400}]), 400, "messages"),
    (CHAT, chat(stop=""), 400, None),
    (CHAT, chat(stop=["x"] * 17), 400, None),
    (CHAT, chat(logit_bias={"x": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={"300": 1}), 400, "logit_bias"),
    (CHAT, chat(logit_bias={str(i): 101 for i in range(2)}), 400, None),
    (CHAT, chat(top_logprobs=2), 400, "top_logprobs"),
    (CHAT, chat(tools=[]), 400, "tools"),
    (CHAT, chat(presence_penalty=0.5), 400, "presence_penalty"),
    (CHAT, chat(chat_template_kwargs={"x": 1}), 400, None),
    (TEXT, text(prompt=""), 400, None),
    (TEXT, text(prompt=[]), 400, None),
    (TEXT, text(prompt=[300]), 400, None),
    (TEXT, text(prompt=[[1], "x"]), 400, None),
    (TEXT, text(max_tokens=0), 400, "max_tokens"),
    (TEXT, text(n=3, best_of=2), 400, "best_of"),
    (TEXT, text(best_of=2, stream=True), 400, "best_of"),
    (TEXT, text(logprobs=21), 400, "logprobs"),
    ("/v1/embeddings", {"model": "judge", "input": "x"}, 400, None),
    ("/v1/embeddings", {"model": "tiny", "input": "x", "dimensions": 3}, 400, "dimensions"),
    ("/v1/embeddings", {"model": "tiny", "input": [7] * 257}, 400, "input"),
    ("/v1/score", {"model": "tiny", "prompt": "x", "responses": ["y"]}, 400, None),
    ("/v1/score", {"model": "judge", "responses": ["y"]}, 400, "prompt"),
    ("/v1/score", {"model": "judge", "prompt": "x", "responses": []}, 400, "responses"),
    ("/v1/score", {"model": "judge", "prompt": "x", "responses": [[7] * 257]}, 400, "responses"),
    ("/v1/nothing", {}, 404, None),
    ("/v1/models/..%2f..%2fetc%2fpasswd", None, 404, None),
    ("/../../etc/passwd", None, 404, None),
    ("/v1/chat/completions", None, 405, None),
]


@pytest.mark.parametrize(("path", "body", "status", "param"), REFUSED, ids=range(len(REFUSED)))
def test_what_makes_no_sense_is_refused_before_anything_is_written(web, monkeypatch, path, body, status, param):
    monkeypatch.setattr(Job, "__init__", lambda *given, **how: pytest.fail("a response was begun"))
    answer = web.get(path) if body is None else web.post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    if param:
        assert error["param"] == param, error


def test_the_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="not served here") as raised:
        client.chat.completions.create(model="gone", messages=HELLO)
    assert raised.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x " * 999}])
    assert raised.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "[::1]"}, 200),
        ({"host": "evil.example"}, 403),  # a name that an attacker's DNS leads here
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": ""}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000"}, 200),
        ({"host": "localhost:8000", "origin": "http://localhost:8001"}, 403),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json; charset=utf-8"}, 200),
    ],
)
def test_pages_of_elsewhere_cannot_ask(web, headers, status):
    content = b'{"model": "tiny", "prompt": "the", "max_tokens": 1}'
    answer = web.post(TEXT, content=content, headers=JSON | headers)
    assert answer.status_code == status, answer.text
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods_are_refused(web, method):
    answer = web.request(method, TEXT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, POST")


def test_bodies_have_bounds_of_bytes_and_time(web, url):
    assert web.post(TEXT, content=b"[" * (LIMITS.body_bytes + 1), headers=JSON).status_code == 413
    many = (b"[" * 1000 for _ in range(100))  # in chunks, of which nobody says how many come
    assert web.post(TEXT, content=many, headers=JSON).status_code == 413
    for broken in (b"", b"{", b"[" * 19_000, b"\xff\xfe", b'{"model": NaN}', b"null", b"3"):
        assert web.post(TEXT, content=broken, headers=JSON).status_code == 400
    address = httpx.URL(url)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection((address.host, address.port)) as slow:
        slow.sendall(head + b"Content-Length: 9\r\n\r\n{")
        assert slow.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nContent-Length: 0\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost : localhost\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\r\n\r\n",
    ],
)
def test_heads_that_two_readers_would_read_in_two_ways_are_refused(url, head):
    address = httpx.URL(url)
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(head)
        assert connection.recv(1000).split(b" ")[1] in (b"400", b"403", b"415", b"501")


def test_a_token_is_asked_for_everywhere_but_where_supervisors_look(policy):
    right = "a token of this test"
    with served({"tiny": policy}, access=Access(token=right)) as (url, _), httpx.Client(base_url=url) as web:
        for given, status in ((None, 401), ("Bearer wrong", 401), (f"Basic {right}", 401), (f"Bearer {right}", 200)):
            headers = {"authorization": given} if given else {}
            for path in ("/v1/models", "/metrics", "/openapi.json"):
                assert web.get(path, headers=headers).status_code == status, (given, path)
        assert web.get("/healthz").status_code == web.get("/readyz").status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_a_full_queue_says_when_to_come_again(policy):
    gate = threading.Event()
    with served({"tiny": policy}, Limits(slots=1, queue=1)) as (url, hall), httpx.Client(base_url=url) as web:
        hall.worker.call(gate.wait)  # nothing gets a slot
        try:
            with web.stream("POST", TEXT, json=text(stream=True)), web.stream("POST", TEXT, json=text(stream=True)):
                refused = web.post(TEXT, json=text())
                ready = web.get("/readyz").status_code
        finally:
            gate.set()
        assert (refused.status_code, refused.headers["retry-after"], ready) == (429, "1", 503)
        assert refused.json()["error"]["type"] == "rate_limit_error"
        wait_for(lambda: not hall.worker.waiting, "the queue to be empty")
        assert web.get("/readyz").status_code == 200
        assert web.post(TEXT, json=text()).status_code == 200


def test_a_response_that_takes_too_long_ends_where_it_is(policy):
    with served({"tiny": policy}, Limits(slots=1, seconds=0.0)) as (url, _), httpx.Client(base_url=url) as web:
        answer = web.post(TEXT, json=text(max_tokens=200, logit_bias={"2": -100}))
        assert answer.status_code == 503 or answer.json()["usage"]["completion_tokens"] < 200


def test_who_may_listen_where():
    assert access_of("127.0.0.1", None) == access_of("::1", None) == Access()
    assert access_of("0.0.0.0", "x" * 16) == Access(None, "x" * 16)
    for host, token, words in (("0.0.0.0", None, "--token"), ("127.0.0.1", "short", "at least 16")):
        with pytest.raises(ConfigError, match=words):
            access_of(host, token)
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ConfigError, match="choose another port"):
            listen("127.0.0.1", taken.getsockname()[1])


def test_names_of_models():
    assert named(["runs/movies", "judge=runs/movies/reward"]) == {
        "movies": "runs/movies",
        "judge": "runs/movies/reward",
    }
    with pytest.raises(ConfigError, match="'reward' for two"):
        named(["a/reward", "b/reward"])
