"""A service that speaks OpenAI's moderation, over HTTP on loopback; and all that it may answer instead."""

import http.server
import json
import threading
from contextlib import contextmanager

import pytest

from rlhfjax.moderation import CATEGORIES, BackendError, open_policy
from rlhfjax.moderation.remote import Remote

SCORES = dict.fromkeys(CATEGORIES, 0.01)


def results(*scores):
    return json.dumps({"id": "m", "model": "x", "results": [{"flagged": False, "category_scores": s} for s in scores]})


def by_word(asked):
    """What a service answers to whom a dagger is violence."""
    return 200, results(*(SCORES | {"violence": 0.9 if "dagger" in text else 0.02} for text in asked["input"]))


@contextmanager
def served(answer):
    """The URL of a server on loopback that answers each request by a function of its body, and what it was asked."""
    asked, late = [], threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, dict(self.headers), body))
            given = answer(body)
            if given is None:  # nothing, until the test is over
                late.wait(60)
                return
            status, text = given
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", asked
    finally:
        late.set()
        server.shutdown()
        thread.join()
        server.server_close()


def remote(url, timeout=30.0, **others):
    return Remote(url, others.get("model"), others.get("key"), timeout, window=20, every=5)


def test_texts_are_judged_in_one_request_with_model_and_key():
    with served(by_word) as (url, asked):
        first, second = remote(url, model="omni", key="secret").judge(["a dagger", "a spoon"])
    assert (first.scores["violence"], second.scores["violence"]) == (0.9, 0.02)
    [(path, headers, body)] = asked
    assert path == "/v1/moderations"
    assert headers["Authorization"] == "Bearer secret"
    assert body == {"input": ["a dagger", "a spoon"], "model": "omni"}
    assert remote("http://x/v1/moderations/").name == remote("http://x/v1/").name == "http://x/v1/moderations"


def test_a_service_without_scores_is_believed_its_categories():
    answer = json.dumps(
        {"results": [{"flagged": True, "categories": {"hate": True, "violence": False, "illicit": None}}]}
    )
    with served(lambda body: (200, answer)) as (url, _):
        assert remote(url).judge(["x"])[0].scores == {"hate": 1.0, "violence": 0.0}


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (500, "x is bad", "expected status 200, got 500"),
        (401, "", "expected status 200, got 401"),
        (302, "", "expected status 200, got 302"),
        (200, "<html>x is bad", "expected JSON, got something else"),
        (200, "[" * 100_000, "expected JSON, got something else"),
        (200, "[]", "expected an object with a list `results`"),
        (200, '{"results": []}', "expected 1 results, got 0"),
        (200, '{"results": [{"flagged": true}]}', "expected results with category_scores"),
        (200, results({"hate": 1.5}), "expected a score from 0 to 1 of hate"),
        (200, results({"hate": float("nan")}), "expected a score from 0 to 1 of hate"),
        (200, results({"hate": "high"}), "expected a score from 0 to 1 of hate"),
        (200, " " * (5 << 20), "bytes, got more"),
    ],
)
def test_any_other_answer_is_a_failure_that_does_not_repeat_it(status, text, said):
    with served(lambda body: (status, text)) as (url, _), pytest.raises(BackendError) as error:
        remote(url).judge(["x is bad"])
    assert said in str(error.value)
    assert "bad" not in str(error.value)


def test_a_service_that_does_not_answer_or_is_not_there_is_a_failure():
    with served(lambda body: None) as (url, _), pytest.raises(BackendError, match=r"no answer within 0\.2 s"):
        remote(url, timeout=0.2).judge(["x"])
    with pytest.raises(BackendError, match="cannot be reached"):
        remote(url).judge(["x"])  # the server has gone


@pytest.mark.parametrize(("on_error", "action", "sent"), [("closed", "replace", "[away]"), ("open", "allow", "hello")])
def test_a_policy_fails_closed_or_open(on_error, action, sent, tmp_path):
    with served(lambda body: (500, "")) as (url, _):
        path = tmp_path / "policy.yaml"
        path.write_text(f"backends: [{{url: {{url: '{url}'}}}}]\non_error: {on_error}\nunavailable: '[away]'", "utf-8")
        made, called = open_policy(path), []
        assert made.input("hello").action == action
        assert "".join(made.reply("hello", lambda: called.append(1) or iter(["hel", "lo"]))) == sent
        assert len(called) == (0 if on_error == "closed" else 1)


def test_an_answer_is_judged_by_windows_and_nothing_flagged_leaks(tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "k")
    text = "It was a calm evening in the old house by the sea, then she took a dagger from the wall."
    with served(by_word) as (url, asked):
        path = tmp_path / "policy.yaml"
        backend = f"{{url: {{url: '{url}', window: 20, every: 10, key_env: A_KEY}}}}"
        path.write_text(f"backends: [{backend}]\nfiller: '[no]'", "utf-8")
        guard = open_policy(path).guard()
        sent = "".join([*map(guard.feed, text), guard.end()])
    assert sent.endswith("\n\n[no]")
    clean = sent.removesuffix("\n\n[no]")
    assert text.startswith(clean)
    assert 20 < len(clean) <= text.index("dagger")
    assert guard.verdict.category == "violence"
    assert len(asked) <= len(text) // 10 + 1
    assert max(len(body["input"][0]) for _, _, body in asked) <= 20 + 10
    assert asked[0][1]["Authorization"] == "Bearer k"
